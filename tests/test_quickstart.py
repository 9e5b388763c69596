"""quickstart.py: a tiny setting of the whole, its table against the logs, and starting it again."""
import json
import re
import shlex
import shutil

import pytest

from conftest import ROOT, run_stage
from quickstart import compare, compare_at_equal_learning, pystdlib, read_log, toy_math

TINY = {"max_records": 40, "source_problems": 40, "target_problems": 60, "vocab_size": 400, "hidden_size": 16,
        "intermediate_size": 32, "layers": 1, "heads": 2, "kv_heads": 1, "seq_len": 192, "base_steps": 4, "base_batch": 2,
        "steps": 3, "eval_rows": 4, "lora_ranks": "2,1"}
PARAMETERS = 400 * 16 + (16 + 2 * 8 + 16) * 16 + 3 * 16 * 32 + 3 * 16  # embedding (tied), attention, MLP, norms
LORA = {rank: rank * ((16 + 16) + 2 * (16 + 8) + (16 + 16) + 3 * (16 + 32)) for rank in (1, 2, 4)}


def quickstart(cwd, **knobs):
    return run_stage(ROOT / "quickstart.py", *(f"--{k}={v}" for k, v in {**TINY, **knobs}.items()), cwd=cwd)


def results(stdout):
    """The table and the sentences below it."""
    return stdout[stdout.index("\nHeld-out"):stdout.index("\nRead what")]


def commands(stdout):
    """[(script's name, its other arguments)] of the commands that were printed before they ran."""
    words = [shlex.split(line[2:]) for line in stdout.splitlines() if line.startswith("$ python ")]
    return [(line[1].rpartition("/")[2], line[2:]) for line in words]


def table(stdout):
    """{row: numbers} of the printed table."""
    lines = [line.replace("->", "").replace(",", "").split() for line in stdout.splitlines()
             if re.match(r"(base|full|gentle|lora-r\d+) +\d", line)]
    return {name: [float(number) for number in numbers] for name, *numbers in lines}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, stdout) of a whole run."""
    folder = tmp_path_factory.mktemp("quickstart")
    done = quickstart(folder)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    return folder, done.stdout


def test_table_says_what_the_logs_say(finished):
    folder, stdout = finished
    rows = table(stdout)
    assert list(rows) == ["base", "full", "gentle", "lora-r2", "lora-r1"]
    for name, numbers in rows.items():
        lines = [json.loads(line) for line in (folder / "out/quickstart" / name / "log.jsonl").read_text().splitlines()]
        first, last = [line["val"] for line in lines if "val" in line]
        trained = {"lora-r2": LORA[2], "lora-r1": LORA[1]}.get(name, PARAMETERS)
        change = [first["target"] - last["target"], last["source"] - first["source"]] * (name != "base")
        expected = [first["target"], last["target"], *change[:1], first["source"], last["source"], *change[1:], trained]
        assert numbers[:-1] == pytest.approx(expected, abs=5.1e-4), name
        [step] = [line for line in lines if "seconds" in line]  # fewer steps than log_interval
        assert numbers[-1] == pytest.approx(step["seconds"] * step["step"], abs=0.51)
    # all finetuning starts from the base, and LoRA's first step changes nothing
    assert rows["base"][1] == pytest.approx(rows["full"][0], abs=1.1e-3)
    assert rows["full"][0] == rows["gentle"][0] == rows["lora-r2"][0] == rows["lora-r1"][0]


def test_the_words_say_what_the_table_says(finished):
    folder, stdout = finished
    rows = table(stdout)
    for verb, column in (("Learned", 2), ("Forgot", 5)):
        [sentence] = [line for line in stdout.splitlines() if line.startswith(verb)]
        said = [float(x) for x in re.findall(r"(?:full|r=\d+) (-?\d+\.\d+)", sentence)]
        assert said == pytest.approx([rows[name][column] for name in ("full", "lora-r2", "lora-r1")], abs=1.1e-3)


def test_every_step_is_a_command_that_was_shown(finished):
    folder, stdout = finished
    shown = commands(stdout)
    assert [script for script, _ in shown] == ["prepare_data.py"] * 3 + ["train.py"] * 5 + ["sample.py"]
    for script, argv in shown[:3]:
        stored = json.loads((folder / dict(a[2:].split("=", 1) for a in argv)["out_dir"] / "meta.json").read_text())
        assert stored["tokenizer_name"].startswith("sentencepiece")
    done = run_stage(ROOT / "sample.py", *shown[-1][1], cwd=folder)  # as a reader would
    assert done.returncode == 0 and "Answer:" in done.stdout, done.stderr


def test_started_again_it_makes_only_what_is_missing(finished, tmp_path):
    folder, stdout = tmp_path / "copy", finished[1]
    shutil.copytree(finished[0], folder)
    done = quickstart(folder)
    assert done.returncode == 0 and [script for script, _ in commands(done.stdout)] == ["sample.py"]
    assert results(done.stdout) == results(stdout)

    shutil.rmtree(folder / "out/quickstart/lora-r2/step_3")  # as if killed before the first checkpoint
    done = quickstart(folder, lora_ranks=2)
    assert done.returncode == 0, done.stderr
    assert [script for script, _ in commands(done.stdout)] == ["train.py", "sample.py"]
    assert table(done.stdout)["lora-r2"][:-1] == table(stdout)["lora-r2"][:-1]


def test_other_knobs_on_the_same_folders_are_refused(finished):
    folder, _ = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    done = quickstart(folder, lora_learning_rate=0.5)
    assert done.returncode == 2 and done.stdout == ""
    assert "data/quickstart was made with lora_learning_rate=" in done.stderr and "not 0.5" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize("knob, value, error", [
    ("seq_len", 1, r"^prepare_data.py: error: seq_len: "),  # a step's own error
    ("vocab_size", 10**6, r"^quickstart.py: error: vocab_size=1000000: ")])
def test_a_failing_step_ends_it(tmp_path, knob, value, error):
    done = quickstart(tmp_path, **{knob: value})
    assert done.returncode == 2 and "Held-out" not in done.stdout
    assert re.search(error, done.stderr, re.M) and "Traceback" not in done.stderr, done.stderr


def test_ranks_are_checked_first(tmp_path):
    done = quickstart(tmp_path, lora_ranks="0,2")
    assert done.returncode == 2 and "lora_ranks: " in done.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize("full, loras, verdict", [
    (2.0, {16: 1.5, 4: 1.0}, "LoRA learned less than full finetuning, as in the paper, and the less the lower its rank."),
    (2.0, {4: 1.5, 16: 1.0}, "LoRA learned less than full finetuning, as in the paper; not in the order of rank."),
    (2.0, {16: 2.5, 4: 1.0}, "LoRA learned less than full finetuning only at r=4, and the less the lower its rank."),
    (2.0, {16: 2.5}, "LoRA did not learn less than full finetuning in this run, unlike the paper."),
    (2.0, {16: 2.0}, "LoRA did not learn less than full finetuning in this run, unlike the paper.")])
def test_verdicts(full, loras, verdict):
    assert compare("learned", full, loras).endswith(verdict)
    assert compare("forgot", full, loras).endswith(verdict.replace("learned", "forgot").replace("learn ", "forget "))


def test_read_log_adds_up_the_steps_between_lines(tmp_path):
    lines = [{"step": 0, "val": {"source": 3.0}}, {"step": 50, "seconds": 0.5, "loss": 2.0}, {"step": 50, "val": {"source": 2.5}},
             {"step": 70, "seconds": 2.0, "loss": 1.0}, {"step": 70, "val": {"source": 4.0}}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_log(tmp_path) == ({"source": (3.0, 4.0)}, 50 * 0.5 + 20 * 2.0)


def test_shares_only_of_a_positive_change():
    assert compare("forgot", 0.5, {2: 0.1}).startswith("Forgot (nats a token): full 0.500, LoRA r=2 0.100 (20%). ")
    assert compare("forgot", -0.5, {2: -0.6}).startswith("Forgot (nats a token): full -0.500, LoRA r=2 -0.600. ")


def test_at_equal_learning():
    learned = {"full": 3.0, "gentle": 2.0, "lora-r4": 1.5, "lora-r16": 1.95}
    text = compare_at_equal_learning(learned, {"full": 1.0, "gentle": 0.4, "lora-r4": 0.1, "lora-r16": 0.3})
    assert text == ("At equal learning: full at the gentle learning rate learned 2.000 and forgot 0.400; nearest is lora-r16, "
                    "which learned 1.950 and forgot 0.300. So low rank kept more of the source than a smaller learning rate did.")
    text = compare_at_equal_learning(learned, {"full": 1.0, "gentle": 0.2, "lora-r4": 0.1, "lora-r16": 0.3})
    assert text.endswith("So a smaller learning rate kept as much of the source as low rank did, or more.")
    text = compare_at_equal_learning({**learned, "lora-r16": 2.2}, dict.fromkeys(learned, 0.1))
    assert text.endswith("They learned too unequally to be compared.")


def test_toy_math_is_right():
    records = list(toy_math(400, 3))
    assert records == list(toy_math(400, 3)) != list(toy_math(400, 4)) and records[:50] == list(toy_math(50, 3))
    steps = []
    for record in records:
        *lines, last = record["answer"].split("\n")
        values = [re.fullmatch(r".* <<([\d+*/-]+)=(\d+)>>(\d+) \w+\.", line).groups() for line in lines]
        assert all(eval(expression) == int(value) == int(shown) > 0 for expression, value, shown in values)
        assert last == f"#### {values[-1][2]}" and record["question"].endswith("?")
        assert re.findall(r"\d+", record["question"]) == [re.match(r"\d+", values[0][0])[0],
                                                          *(re.split(r"\D", value[0])[-1] for value in values)]
        steps.append(len(values))
    assert set(steps) == {1, 2, 3} and len({record["question"] for record in records}) > 390


def test_pystdlib_is_the_library():
    records = list(pystdlib())
    paths = [record["path"] for record in records]
    assert paths == sorted(paths) and {"json/decoder.py", "random.py"} <= {*paths}
    assert not [path for path in paths if re.search("(^|/)(tests?|site-packages)/", path)]
    assert sum(len(record["text"]) for record in records) > 3e6
