"""lessons/: their form, that they run, and that changing a knob answers what they ask."""
import ast
import re
import sys

import matplotlib
import pytest

from conftest import ROOT, run_here, run_stage, run_warm

LESSONS = ["1_rows", "2_forward", "3_lora", "4_optimizers", "5_forgetting", "6_scores", "7_spectra"]
every_lesson = pytest.mark.parametrize("name", LESSONS)


def source_of(name):
    return (ROOT / "lessons" / f"{name}.py").read_text()


def cells_of(name):
    """[(whether it is text, its lines)] of a lesson."""
    cells = []
    for cell in re.split(r"^# %%", source_of(name), flags=re.M)[1:]:
        title, *lines = cell.strip("\n").split("\n")
        cells.append((title.strip() == "[markdown]", lines))
    return cells


def knobs_of(name):
    """Names that are assigned before read_knobs() is called."""
    knobs = set()
    for node in ast.parse(source_of(name)).body:
        if isinstance(node, ast.Expr) and "read_knobs" in ast.dump(node):
            return knobs
        if isinstance(node, ast.Assign):
            knobs.add(node.targets[0].id)
    raise AssertionError(f"{name} does not read its knobs")


# ----------------------------------------------------------------------------- form
def test_the_list_is_whole():
    assert sorted(path.stem for path in (ROOT / "lessons").glob("[0-9]*.py")) == LESSONS
    page = (ROOT / "docs/lessons.md").read_text()
    assert [name for name in LESSONS if f"lessons/{name}.py" not in page] == []


@every_lesson
def test_text_and_code_alternate_in_cells(name):
    source, cells = source_of(name), cells_of(name)
    assert source.startswith(f"# %% [markdown]\n# # {name[0]} · ")
    assert len(cells) >= 10 and cells[0][0] and not cells[1][0] and cells[-1][0]
    for is_text, lines in cells:
        if is_text:
            assert [line for line in lines if line.strip() and not line.startswith("#")] == []
    assert max(map(len, source.split("\n"))) <= 100


@every_lesson
def test_a_lesson_is_short(name):
    lines = [line.strip() for line in source_of(name).split("\n")]
    code = [line for line in lines if line and not line.startswith("#")]
    assert len(code) < 120


@every_lesson
def test_three_questions_at_the_end_name_knobs(name):
    text = "\n".join(line.removeprefix("#").removeprefix(" ") for line in cells_of(name)[-1][1])
    assert text.startswith("## Questions\n")
    questions = re.findall(r"^\d\. (.*)", text, re.M)
    assert len(questions) == 3
    for question in questions:
        assert re.match(r"`(\w+)", question)[1] in knobs_of(name), question


@every_lesson
def test_a_lesson_uses_the_project_checks_its_words_and_draws_once(name):
    tree = ast.parse(source_of(name))
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            modules.add(node.module)
        elif isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
    ours = {module for module in modules
            if (ROOT / module.replace(".", "/")).with_suffix(".py").is_file()}
    assert len(ours) >= 3, ours
    assert sum(isinstance(node, ast.Assert) for node in ast.walk(tree)) >= 3
    assert source_of(name).count("\nshow(figure, out_dir") == 1


# ----------------------------------------------------------------------------- runs
@pytest.fixture
def lesson(monkeypatch, tmp_path):
    """A function that runs a lesson in this process, with knobs; returns what it printed."""
    monkeypatch.syspath_prepend(ROOT / "lessons")
    monkeypatch.chdir(ROOT)  # where start.py goes when it is imported for the first time

    def run(name, **knobs):
        words = [f"--{knob}={value}" for knob, value in knobs.items()]
        with matplotlib.rc_context():
            done = run_here(f"lessons/{name}.py", f"--out_dir={tmp_path}", *words)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
        return done.stdout

    return run


def test_started_anywhere_it_finds_its_place(tmp_path):
    done = run_stage(ROOT / "lessons/3_lora.py", f"--out_dir={tmp_path}/figures", cwd=tmp_path, PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    assert "A and B 944: 8.6%" in done.stdout and (tmp_path / "figures/3_lora.png").is_file()


def test_an_unknown_knob_is_one_line(tmp_path):
    done = run_warm(ROOT / "lessons/3_lora.py", "--rnak=3", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "3_lora.py: error: --rnak=3: no such knob, nearest is rank\n"


@pytest.mark.parametrize("name", ["1_rows", "2_forward", "3_lora", "4_optimizers", "6_scores"])
def test_it_runs_and_holds(lesson, name):
    lesson(name)


@pytest.mark.slow
def test_forgetting_runs_on_a_smaller_base(lesson, tmp_path):
    small = dict(modules=20, problems=60, base_steps=4, steps=3, full_rates="1e-3", lora_rates="1e-2,1e-3")
    printed = lesson("5_forgetting", **small)
    learned = re.findall(r"(full|LoRA r=4) +rate (\S+): learned +(\S+), forgot +(\S+)", printed)
    assert [row[:2] for row in learned] == [("full", "1e-03"), ("LoRA r=4", "1e-03"), ("LoRA r=4", "1e-02")]
    # the base stays, and what depends on nothing else comes out the same
    before = (tmp_path / "5_base/pretraining/step_4/model.safetensors").stat().st_mtime_ns
    again = lesson("5_forgetting", **small, lora_rank=2)
    assert (tmp_path / "5_base/pretraining/step_4/model.safetensors").stat().st_mtime_ns == before
    assert [line for line in again.splitlines() if line.startswith("full ")] == [
        line for line in printed.splitlines() if line.startswith("full ")]


@pytest.mark.slow
def test_spectra_run_after_fewer_steps(lesson):
    printed = lesson("7_spectra", steps=4)
    assert re.search(r"LoRA r=4  D : effective rank +[1-4], noise +4; ", printed)


# ----------------------------------------------------------------------------- questions
def numbers(pattern, printed):
    """What the groups of a pattern find, as floats."""
    found = re.search(pattern, printed)
    assert found, printed
    return [float(text.replace(",", "")) for text in found.groups()]


@pytest.mark.slow
def test_answers_about_rows(lesson):
    assert "30 rows, 77% padding" in lesson("1_rows", packing="none")
    assert "8 rows, 12% padding, 87% is learned" in lesson("1_rows", train_on_prompt=True)
    moved, = numbers(r"differ by up to (\S+)", lesson("1_rows", doc_mask=False))
    assert moved > 1


def test_answers_about_flops(lesson):
    share = r"scores and values .* (\d+)%"
    assert numbers(share, lesson("2_forward", seq_len=33024)) == [40]
    assert numbers(share, lesson("2_forward", seq_len=131072)) == [72]
    assert numbers(r"head .* (\d+)%", lesson("2_forward", shape="Llama-3.1-8B")) == [7]
    of_lora = r"a step takes ([\d.]+)% of the FLOPs"
    assert numbers(of_lora, lesson("2_forward", lora_rank=256)) == [78.1]
    assert numbers(of_lora, lesson("2_forward", lora_rank=890))[0] > 100 > numbers(
        of_lora, lesson("2_forward", lora_rank=870))[0]


def test_answers_about_lora(lesson):
    assert numbers(r"A and B [\d,]+: ([\d.]+)%", lesson("3_lora", rank=46))[0] < 100
    assert numbers(r"A and B [\d,]+: ([\d.]+)%", lesson("3_lora", rank=47))[0] > 100
    assert "plain PyTorch 176, lora.py 176, full finetuning 172" in lesson("3_lora", dropout=0.0)
    lost = r"in bfloat16 ([\d.]+)% of the change"
    assert numbers(lost, lesson("3_lora", size_of_b=0.003))[0] < 50
    assert numbers(lost, lesson("3_lora", size_of_b=0.001))[0] > 50


def test_answers_about_optimizers(lesson):
    printed = lesson("4_optimizers", schedule_lag=False)
    assert "as shares: [0.005, 0.01, 0.015, 0.02]\nand of the last: 0.01\n" in printed
    settles = r"Lion  constant settles (\S+) from.*\n.*\nAdamW constant settles (\S+) from"
    lion, adamw = numbers(settles, printed)
    twice_lion, twice_adamw = numbers(settles, lesson("4_optimizers", learning_rate=0.02))
    assert 1.2 < twice_lion / lion < 2.2 and 1.2 < twice_adamw / adamw < 2.2
    lion, adamw = numbers(settles, lesson("4_optimizers", noise=0.0))
    assert lion > 10 * adamw


def test_answers_about_scores(lesson):
    assert "truth 0.410, formula 0.410, guess 0.406" in lesson("6_scores", n_samples=200)
    assert "truth 0.410, formula 0.410, guess 0.296" in lesson("6_scores", n_samples=5)
    printed = lesson("6_scores", follows_form=1.0)
    assert "strict   0.471" in printed and "flexible 0.429" in printed
    assert "with 164 items the intervals overlap" in lesson("6_scores", items=164)
