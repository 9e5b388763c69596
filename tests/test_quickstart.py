"""quickstart.py: a tiny setting of the whole, its table against the files, and starting it again."""
import json
import random
import re
import shlex
import shutil
import test
import unittest
from pathlib import Path

import pytest

from paper.claims import Method, method_of
from configurator import configure
from conftest import ROOT, need, run_here, run_stage, run_warm
from quickstart import (compare_at_equal_learning, compare_methods, finetuning_runs, folder_of_text, last_values, lines_to_finish, pystdlib,
                        study_file, toy_math, training_words, write_records)

TINY = {"max_documents": 60, "source_problems": 40, "target_problems": 60, "held_out_problems": 8, "vocab_size": 400, "hidden_size": 16,
        "intermediate_size": 32, "layers": 1, "heads": 2, "kv_heads": 1, "seq_len": 192, "base_steps": 4, "base_batch": 2,
        "steps": "3", "eval_rows": 4, "lora_ranks": "2", "choice_items": 8, "solve_items": 2}


def quickstart(cwd, run=run_warm, **knobs):
    return run(ROOT / "quickstart.py", *(f"--{k}={v}" for k, v in {**TINY, **knobs}.items()), cwd=cwd, timeout=900)


def commands(stdout):
    """[(script's name, its other arguments)] of the commands that were printed before they ran."""
    words = [shlex.split(line[2:]) for line in stdout.splitlines() if line.startswith("$ python ")]
    words = [line[1:] if line[1] == "-m" else line for line in words]
    return [(line[1].rpartition("/")[2], line[2:]) for line in words]


def table(stdout):
    """{row: numbers} of the printed table."""
    lines = [line.replace("%", "").split() for line in stdout[stdout.rindex("target loss"):].splitlines()
             if re.match(r"(base|full-\d+|r\d+-\d+) +\d", line)]
    return {name: [float(number) for number in numbers] for name, *numbers in lines}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, stdout) of a whole run."""
    folder = tmp_path_factory.mktemp("quickstart")
    done = quickstart(folder)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    return folder, done.stdout


def test_data_serves_bases_of_other_sizes_and_durations(finished, tmp_path):
    """It is made anew, or refused, only for what it depends on."""
    shutil.copytree(finished[0] / "data", tmp_path / "data")
    before = (tmp_path / "data/quickstart/pretrain/train.bin").read_bytes()
    done = quickstart(tmp_path, base_steps=2, hidden_size=24, steps="")
    assert done.returncode == 0 and (tmp_path / "out/quickstart/pretraining/step_2").is_dir(), done.stderr
    assert not [words for script, words in commands(done.stdout) if script == "prepare_data.py"]
    assert (tmp_path / "data/quickstart/pretrain/train.bin").read_bytes() == before
    refused = quickstart(tmp_path, vocab_size=401, out_dir="out/other")
    assert refused.returncode == 2 and "was made with vocab_size=400, not 401; delete it" in refused.stderr, refused.stderr


def test_table_and_words_say_what_the_files_say(finished):
    folder, stdout = finished
    rows, start = table(stdout), last_values(folder / "out/quickstart/pretraining")
    assert list(rows) == ["base", "full-3", "r2-3"]
    for name, numbers in rows.items():
        values = last_values(folder / "out/quickstart" / name)
        values = start | values if name == "base" else values
        change = [start["loss target"] - values["loss target"], values["loss source"] - start["loss source"]]
        expected = [values["loss target"], *change[:1], values["gsm8k_strict_match"] * 100, values["loss source"], *change[1:],
                    values["hellaswag"] * 100]
        expected = [number for i, number in enumerate(expected) if name != "base" or i not in (1, 4)]
        assert numbers == pytest.approx(expected, abs=0.051), name
    for verb, column in (("Learned", 1), ("Forgot", 4)):
        sentence, = (line for line in stdout.splitlines() if line.startswith(verb))
        said = [float(x) for x in re.findall(r"(?:full|r=\d+) (-?\d+\.\d+)", sentence)]
        assert said == pytest.approx([rows[name][column] for name in ("full-3", "r2-3")], abs=1.1e-3)
    assert (folder / "out/quickstart/figures/story.png").is_file()


def test_every_step_is_a_command_that_was_shown(finished):
    folder, stdout = finished
    shown = commands(stdout)
    assert [script for script, _ in shown] == ["prepare_data.py"] * 4 + ["train.py", "paper.study", "sample.py"]
    done = run_warm(ROOT / "sample.py", *shown[-1][1], cwd=folder)  # as a reader would
    assert done.returncode == 0 and "Answer:" in done.stdout, done.stderr


def test_started_again_it_makes_nothing_twice(finished):
    folder, stdout = finished
    before = (folder / "out/quickstart/study.jsonl").read_text()
    done = quickstart(folder, run_stage)  # in processes of their own
    assert done.returncode == 0 and [script for script, _ in commands(done.stdout)] == ["paper.study", "sample.py"]
    assert table(done.stdout) == table(stdout) and (folder / "out/quickstart/study.jsonl").read_text() == before


def test_other_knobs_on_the_same_folders_are_refused(finished):
    folder, _ = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    done = quickstart(folder, lora_learning_rate=0.5)
    assert done.returncode == 2 and done.stdout == ""
    assert "out/quickstart was made with lora_learning_rate=" in done.stderr and "not 0.5" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_runs_for_the_claims_are_the_papers_methods(tmp_path):
    """Each with the seed, a plain LoRA beside every special one, and nothing that train.py would refuse."""
    runs = finetuning_runs((150, 450), (1, 4, 16), 4e-4, 4e-3, claims=True)
    train = training_words(tmp_path, batch=2, eval_rows=100, seed=5)
    (tmp_path / "runs.py").write_text(study_file("out", need("data/stories260k"), runs, train, evals=[]))
    knobs = {"out_dir": "", "base": "", "models": (), "runs": (), "train": "", "evals": ("x",), "spectrum": "", "plot": ""}
    configure(knobs, [str(tmp_path / "runs.py")])
    assert knobs["evals"] == () and "--seed=5" in knobs["train"]
    methods = set()
    for line in knobs["runs"]:
        name, *words = shlex.split(line)
        config = dict(word[2:].split("=") for word in words)
        rank = int(config.get("lora_rank", 0))
        methods.add(method_of(config | {"lora_rank": rank}))
        assert float(config["learning_rate"]) == {0: 4e-4, 1: 4e-3, 4: 2e-3, 16: 1e-3}[rank]
    assert methods == {Method(0, ""), Method(0, "weight decay"), Method(0, "attention dropout"), Method(1, ""), Method(4, ""),
                       Method(16, ""), Method(16, "mlp"), Method(16, "attention")}
    tried = run_here("train.py", *shlex.split(knobs["runs"][-1])[1:], f"--base={knobs['base']}", "--dry_run=True", "--seq_len=256")
    assert tried.returncode == 0 and "q_proj k_proj v_proj o_proj\n" in tried.stdout, tried.stderr


@pytest.mark.parametrize("knob, value, error", [
    ("seq_len", 1, r"^prepare_data.py: error: seq_len: "),  # a step's own error
    ("vocab_size", 10**6, r"^quickstart.py: error: vocab_size=1000000: ")])
def test_a_failing_step_ends_it(tmp_path, knob, value, error):
    done = quickstart(tmp_path, **{knob: value})
    assert done.returncode == 2 and "target loss" not in done.stdout
    assert re.search(error, done.stderr, re.M) and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("knob, value, error", [
    ("lora_ranks", "0,2", "found (0, 2) and "), ("lora_ranks", "", "found () and "), ("steps", "0", " and (0,)"),
    ("source", "none", "source=none: ")])
def test_knobs_are_checked_first(tmp_path, knob, value, error):
    done = quickstart(tmp_path, **{knob: value})
    assert done.returncode == 2 and error in done.stderr and not list(tmp_path.iterdir())


def test_lines_to_finish_have_one_right_end():
    texts = ["\n".join(f"    value_{i}_{j} = compute(argument_{i}, other_{j}) or None" for j in range(9)) for i in range(3)]
    items = list(lines_to_finish(texts, 10))
    assert items == list(lines_to_finish(texts, 10)) and len(items) == 10
    for item in items:
        assert len(set(item["choices"])) == 4
        whole = [f"{item['query']} {choice}" in text for text in texts for choice in item["choices"]]
        assert whole.count(True) == 1 and f"{item['query']} {item['choices'][item['gold']]}" in "\n".join(texts)


@pytest.mark.parametrize("full, loras, verdict", [
    (2.0, {16: 1.5, 4: 1.0}, "LoRA learned less than full finetuning, as in the paper, and less at lower ranks."),
    (2.0, {4: 1.5, 16: 1.0}, "LoRA learned less than full finetuning, as in the paper, but not in order of rank."),
    (2.0, {16: 2.5, 4: 1.0}, "LoRA learned less than full finetuning only at r=4, and less at lower ranks."),
    (2.0, {16: 2.5}, "LoRA did not learn less than full finetuning in this run, unlike the paper."),
    (2.0, {16: 2.0}, "LoRA did not learn less than full finetuning in this run, unlike the paper.")])
def test_verdicts(full, loras, verdict):
    assert compare_methods("learned", full, loras).endswith(verdict)
    assert compare_methods("forgot", full, loras).endswith(verdict.replace("learned", "forgot").replace("learn ", "forget "))


def test_shares_only_of_a_positive_change():
    assert compare_methods("forgot", 0.5, {2: 0.1}).startswith("Forgot (nats a token): full 0.500, LoRA r=2 0.100 (20%). ")
    assert compare_methods("forgot", -0.5, {2: -0.6}).startswith("Forgot (nats a token): full -0.500, LoRA r=2 -0.600. ")


def test_at_equal_learning():
    text = compare_at_equal_learning([(1.0, 0.1), (2.0, 0.5)], {4: (0.5, 0.04), 16: (1.5, 0.35), 64: (2.5, 0.9)})
    assert text == ("At equal learning: r=4 learned 0.500 and forgot 0.040, where full finetuning with equal learning forgot about "
                    "0.050: less; r=16 learned 1.500 and forgot 0.350, where full finetuning with equal learning forgot about "
                    "0.300: not less; r=64 learned 2.500, more than full finetuning ever did.")


@pytest.mark.parametrize("largest, most", [(10, 2), (4, 3), (60, 1)])
def test_toy_math_is_right(largest, most):
    records = list(toy_math(400, 3, largest, most))
    assert records == list(toy_math(400, 3, largest, most)) != list(toy_math(400, 4, largest, most))
    assert records[:50] == list(toy_math(50, 3, largest, most))
    steps = []
    for record in records:
        *lines, last = record["answer"].split("\n")
        values = [re.fullmatch(r".* = <<([\d+*/-]+)=(\d+)>>(\d+) \w+", line).groups() for line in lines]
        assert all(eval(expression) == int(value) == int(shown) for expression, value, shown in values)
        assert last == f"#### {values[-1][2]}" and record["question"].endswith("?")
        numbers = re.findall(r"\d+", record["question"])
        assert numbers == [re.match(r"\d+", values[0][0])[0], *(re.split(r"\D", value[0])[-1] for value in values)]
        assert all(1 <= int(number) <= largest for number in [*numbers, *(value[1] for value in values)])
        steps.append(len(values))
    assert set(steps) == {*range(1, most + 1)} and {symbol for record in records for symbol in record["answer"]} >= {*"+-*/"}


def test_problems_held_out_are_not_among_those_to_learn(tmp_path):
    write_records(tmp_path, [{"text": "x"}], 0, target_problems=9000, held_out_problems=400, choice_items=0)
    learned, new = ([json.loads(line)["question"] for line in open(tmp_path / f"problems_{name}.jsonl")] for name in ("train", "test"))
    assert len(learned) == 9000 and len(new) == 400 and not {*learned} & {*new}
    assert {record["question"] for record in toy_math(400, seed=3)} & {*learned}  # else there was nothing to leave out


def test_pystdlib_is_the_library():
    texts = [record["text"] for record in pystdlib()]
    assert sum(len(text) for text in texts) > 3e6
    for module in (json.decoder, random):
        assert Path(module.__file__).read_text() in texts
    assert Path(unittest.__file__).read_text() in texts and Path(test.__file__).read_text() not in texts


def test_other_text_may_be_the_source(tmp_path):
    (tmp_path / "docs/deep").mkdir(parents=True)
    for name in ("b.rst", "deep/c.txt", "deep/a.rst", "page.html"):
        (tmp_path / "docs" / name).write_text(f"the text of {name}")
    assert [record["text"] for record in folder_of_text(tmp_path / "docs")] == [
        "the text of b.rst", "the text of deep/a.rst", "the text of deep/c.txt"]
    with pytest.raises(ValueError, match="no .txt or .rst file"):
        list(folder_of_text(tmp_path / "none"))
    (tmp_path / "docs/latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(ValueError, match="docs/latin.txt: .*utf-8"):
        list(folder_of_text(tmp_path / "docs"))


def test_only_a_base_of_other_text(tmp_path):
    """steps=() ends after pretraining; the study base's form."""
    (tmp_path / "docs").mkdir()
    for number, record in zip(range(60), pystdlib()):
        (tmp_path / f"docs/{number:02}.rst").write_text(record["text"])
    done = quickstart(tmp_path, source="docs", source_problems=0, steps="")
    assert done.returncode == 0, done.stderr
    assert [script for script, _ in commands(done.stdout)] == ["prepare_data.py"] * 4 + ["train.py"]
    assert (tmp_path / "out/quickstart/pretraining/step_4/model.safetensors").is_file()
    first = json.loads((tmp_path / "data/quickstart/source_test.jsonl").read_text().splitlines()[0])
    assert first["text"] == (tmp_path / "docs/00.rst").read_text()
