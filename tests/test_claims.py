"""claims.py: run folders with known numbers, and what is said of them."""
import json
import math
import shutil
import statistics

import numpy as np
import pytest
from conftest import run_here

from paper.changes import Change, combine, measure_runs, spared
from paper.claims import Method, claims, method_of, verdict
from paper.results import mean_of_seeds, problems

BASE = {"learned": 5.0, "kept": 3.0}


@pytest.fixture(autouse=True)
def no_notes():
    problems.clear()  # of earlier tests in this process


def write_run(folder, learned, forgot, seed=1, steps=10, effective_rank=None, **config):
    """A folder as train.py leaves it, which learned and forgot so many nats."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"config": {"seed": seed, "base": "b", **config}}))
    lines = [(0, BASE["learned"], BASE["kept"]), (steps, BASE["learned"] - learned, BASE["kept"] + forgot)]
    (folder / "log.jsonl").write_text("".join(
        json.dumps({"step": step, "tokens": step, "val": {"target": a, "source": b}}) + "\n" for step, a, b in lines))
    if effective_rank:
        rows = [{"matrix": "D", "checkpoint": 0, "effective_rank": {"0.9": r}} for r in effective_rank]
        (folder / "spectrum.json").write_text(json.dumps({"checkpoints": [{"step": steps}], "matrices": rows}))


def table(tmp_path, learning="loss target", forgetting="loss source"):
    result = run_here("paper/claims.py", f"--runs={tmp_path}/*/*", f"--learning={learning}", f"--forgetting={forgetting}")
    assert result.returncode == 0, result.stderr
    rows, claim = {}, ""
    for line in result.stdout.splitlines()[4:]:
        named, what, numbers, said = (cell.strip() for cell in line.strip("|").split("|"))
        claim = named or claim
        rows[claim[:2], what] = numbers, said
    return rows


@pytest.fixture
def studies(tmp_path):
    """Five seeds: full learns 2 and forgets 1 (at half the steps 1 and .2), r=4 1 and .1, r=16 1.5 and .5; noise of .02."""
    for seed in range(5):
        noise = 0.01 * (seed - 2)
        out = tmp_path / str(seed)
        write_run(out / "full", 2 + noise, 1.0, seed, effective_rank=[30, 50])
        write_run(out / "half", 1.0, 0.2, seed, steps=5)
        write_run(out / "r4", 1.0, 0.1, seed, lora_rank=4)
        write_run(out / "r16", 1.5 - noise, 0.5, seed, lora_rank=16)
        write_run(out / "mlp", 1.4, 0.4, seed, lora_rank=16, lora_targets="mlp")
        write_run(out / "attention", 1.4 + noise, 0.4, seed, lora_rank=16, lora_targets="attention")
        write_run(out / "decay", 2.0, 0.4, seed, weight_decay=1e-4)
        write_run(out / "pretraining", 9.0, 9.0, seed, steps=20, scratch=True)  # longer than all, and no finetuning
    return tmp_path


def test_each_claim_is_told_with_its_numbers(studies):
    rows = table(studies)
    half = 2.776 * 0.02 * math.sqrt(2.5) / math.sqrt(5)  # of full - r16: .5 + 2 noise
    numbers, said = rows["C1", "full - LoRA r=16"]
    assert said == "holds" and numbers == f"+0.500 ± {half:.3f} (n=5)"
    assert rows["C1", "LoRA r=16 - LoRA r=4"][1] == rows["C2", "LoRA r=16 - LoRA r=4"][1] == "holds"
    # r=4 learned 1 and forgot .1, full then .2; r=16 learned 1.5 and forgot .5, full then .6, by a line
    assert rows["C2", "full - LoRA r=4"] == ("+0.100 ± 0.000 (n=5)", "holds")
    # with weight decay: .4 at 2, so .2 at 1, .3 at 1.5
    assert rows["C3", "full, weight decay - LoRA r=4"] == ("+0.100 ± 0.000 (n=5)", "holds")
    assert rows["C3", "full, weight decay - LoRA r=16"][0].startswith("-0.200")
    assert rows["C3", "full, weight decay - LoRA r=16"][1] == "does not hold"
    assert rows["C4", "effective rank / r"] == ("+2.500 ± 0.000 (n=5)", "does not hold")  # 40 / 16
    assert rows["C5", "mlp - attention, r=16"][1] == "cannot be told" and rows["C5", "all - mlp, r=16"][1] == "holds"


def test_one_seed_has_no_interval(tmp_path):
    write_run(tmp_path / "a/full", 2.0, 1.0)
    write_run(tmp_path / "a/r4", 1.0, 0.1, lora_rank=4)
    rows = table(tmp_path)
    assert rows["C1", "full - LoRA r=4"] == ("+1.000 (n=1)", "cannot be told")
    assert rows["C5", ""] == ("", "no such runs")


def test_items_of_an_evaluation_make_an_interval_for_one_seed(tmp_path):
    for name, config, value in (("full", {}, 0.30), ("r4", {"lora_rank": 4}, 0.20)):
        write_run(tmp_path / "a" / name, 1.0, 0.1, **config)
        for metric, v, stderr in (("acc", value, 0.01), ("kept", 0.5, 0.02)):
            with open(tmp_path / "a" / name / "results.jsonl", "a") as file:
                file.write(json.dumps({"metric": metric, "value": v, "stderr": stderr, "n": 100, "step": 10}) + "\n")
    (tmp_path / "a/base").mkdir()
    (tmp_path / "a/base/results.jsonl").write_text("".join(
        json.dumps({"metric": m, "value": v, "stderr": 0.01, "step": 0, "settings": {"model": "b"}}) + "\n"
        for m, v in (("acc", 0.1), ("kept", 0.6))))
    rows = table(tmp_path, "acc", "kept")
    numbers, said = rows["C1", "full - LoRA r=4"]
    assert said == "holds" and numbers == f"+0.100 ± {1.96 * 0.01 * math.sqrt(2):.3f} (n=1)"
    assert rows["C2", "full - LoRA r=4"][1] == "cannot be told"  # both forgot .1, and the base has no items


def test_a_metric_of_an_earlier_checkpoint_is_no_metric_of_the_last(tmp_path):
    write_run(tmp_path / "a/full", 2.0, 0.1)
    for step in (4, 10):
        with open(tmp_path / "a/full/results.jsonl", "a") as file:
            metric = "loss new" if step == 4 else "gsm8k"
            file.write(json.dumps({"metric": metric, "value": 1.0, "stderr": 0.1, "step": step}) + "\n")
    result = run_here("paper/claims.py", f"--runs={tmp_path}/*/*", "--learning=loss new", "--forgetting=loss source")
    assert result.returncode == 2 and "'loss new' was measured at step 4, not at the last, 10; evaluate" in result.stderr


def test_a_run_that_ended_early_is_left_out(tmp_path):
    for name, steps, learned in (("full", 10, 2.0), ("r4", 10, 1.0), ("r16", 8, 3.0)):
        rank = {} if name == "full" else {"lora_rank": int(name[1:])}
        write_run(tmp_path / "a" / name, learned, 0.1, steps=steps, max_steps=10, **rank)
    result = run_here("paper/claims.py", f"--runs={tmp_path}/*/*", "--learning=loss target", "--forgetting=loss source")
    assert "a/r16: measured at step 8 of 10, left out" in result.stdout and "r=16" not in result.stdout.split("| claim")[1]


def test_a_log_is_compared_with_its_own_start_and_a_run_that_only_began_is_left_out(tmp_path):
    write_run(tmp_path / "a/full", 2.0, 1.0, weight_decay=1e-6)  # code CPT's, which is no regulariser
    write_run(tmp_path / "a/r4", 1.0, 0.1, lora_rank=4)
    write_run(tmp_path / "a/r16", 1.0, 0.1, lora_rank=16, steps=0)
    write_run(tmp_path / "a/r64", 1.0, 0.1, lora_rank=64, effective_rank=[9])
    spectrum = tmp_path / "a/r64/spectrum.json"
    spectrum.write_text(spectrum.read_text().replace('"step": 10', '"step": 5'))
    (tmp_path / "a/base").mkdir()
    (tmp_path / "a/base/results.jsonl").write_text(json.dumps(  # of other rows than those of the logs
        {"metric": "loss target", "value": 3.0, "stderr": 0.01, "step": 0, "settings": {"model": "b"}}))
    result = run_here("paper/claims.py", f"--runs={tmp_path}/*/*", "--learning=loss target", "--forgetting=loss source")
    assert result.returncode == 0 and "a/r16: nothing was measured after step 0, left out" in result.stdout, result.stderr
    assert "| full - LoRA r=4 | +1.000 (n=1) |" in result.stdout and "LoRA r=16" not in result.stdout
    assert "a/r64: spectrum.json is not of step 10, left out" in result.stdout
    assert "learned more than LoRA" not in result.stdout and "full - LoRA r=4 | +0.400 (n=1)" in result.stdout  # half of 1 - .1
    spectrum.write_text(spectrum.read_text().replace('"step": 5', '"step": 10'))
    result = run_here("paper/claims.py", f"--runs={tmp_path}/*/*", "--learning=loss target", "--forgetting=loss source", "--fraction=0.5")
    assert result.returncode == 2 and "fraction: " in result.stderr and "has 0.9, not '0.5'" in result.stderr


@pytest.mark.parametrize("mean, half, least, said", [(1.0, 0.5, 0.0, "holds"), (0.4, 0.5, 0.0, "cannot be told"),
                                                     (-1.0, 0.5, 0.0, "does not hold"), (1.0, None, 0.0, "cannot be told"),
                                                     (9.0, 0.5, 10.0, "does not hold"), (11.0, 0.5, 10.0, "holds"),
                                                     (1.0, math.nan, 0.0, "cannot be told")])
def test_verdicts(mean, half, least, said):
    assert verdict(mean, half, least) == said


@pytest.mark.parametrize("n, t", [(3, 4.303), (5, 2.776), (9, 2.306)])  # of a published table
def test_interval_is_students(n, t):
    values = [0.1 * i * i for i in range(n)]
    mean, half = mean_of_seeds([(v, None) for v in values])
    assert mean == statistics.fmean(values) and half == pytest.approx(t * statistics.stdev(values) / math.sqrt(n), rel=2e-3)


def test_two_seeds_have_the_interval_of_their_items_or_none():
    assert mean_of_seeds([(1.0, None), (2.0, None)]) == (1.5, None)
    assert mean_of_seeds([(1.0, 0.3), (2.0, 0.4)]) == pytest.approx((1.5, 1.96 * 0.35))


def test_line_between_durations():
    at = lambda learned, forgot: (Change(learned), Change(forgot))
    assert spared([[at(1.0, 0.2), at(2.0, 0.6)]], at(1.5, 0.1)) == (pytest.approx(0.3), None)
    assert spared([[at(1.0, 0.2)]], at(0.5, 0.0)) == (pytest.approx(0.1), None)
    assert spared([[at(1.0, 0.2)]], at(1.1, 0.0)) is None and spared([], at(0.1, 0.0)) is None


def test_the_same_items_are_compared_one_by_one():
    rng = np.random.default_rng(0)
    items = rng.normal(size=50)
    a, b = (Change(float(x.mean()), 0.1, tuple(x)) for x in (items + 1, items + 0.01 * rng.normal(size=50)))
    d = np.array(a.items) - np.array(b.items)
    assert combine([1, -1], [a, b])[:2] == pytest.approx((d.mean(), d.std(ddof=1) / 50 ** 0.5))
    assert combine([1, -1], [a, b._replace(items=())]).stderr == pytest.approx(0.1 * 2 ** 0.5)
    assert combine([1, -1], [a._replace(items=()), b._replace(items=(), stderr=None)]).stderr is None


@pytest.mark.parametrize("at, noise", [(1.6, 1.5), (1.6, 0.1), (0.6, 1.5)])
def test_error_at_equal_learning_is_that_of_drawing_the_items_anew(at, noise):
    """By the bootstrap: 2,000 times other items of both evaluations, the same ones in all runs; between two runs of full
    finetuning and between the base and the first, where learning makes most of the error, and where forgetting does."""
    rng = np.random.default_rng(1)
    learned, forgot = ({name: mean + sd * rng.normal(size=n) + common for name, mean in means.items()}
                       for means, sd, n, common in (
                           ({"half": 1.0, "full": 3.0, "lora": at}, noise, 400, rng.normal(size=400)),
                           ({"half": 0.2, "full": 0.9, "lora": 0.3}, 0.5, 300, rng.normal(size=300))))
    pair = lambda name, i, j: tuple(Change(x.mean(), None, tuple(x)) for x in (learned[name][i], forgot[name][j]))
    told = lambda i, j: spared([[pair("half", i, j), pair("full", i, j)]], pair("lora", i, j))
    value, stderr = told(np.arange(400), np.arange(300))
    drawn = [told(rng.integers(400, size=400), rng.integers(300, size=300))[0] for _ in range(2000)]
    assert stderr == pytest.approx(np.std(drawn), rel=0.08) and value == pytest.approx(np.mean(drawn), abs=stderr / 5)


@pytest.fixture
def evaluated(tmp_path):
    """A base, two runs and a folder of figures, with the values of each item."""
    acc, kept = ([0.1, 0.3, 0.5], [0.5, 0.7, 1.0], [0.4, 0.6, 0.8]), ([0.9, 0.8, 0.9], [0.2, 0.5, 0.1], [0.7, 0.8, 0.7])
    (tmp_path / "a/figures").mkdir(parents=True)
    for i, (name, config) in enumerate((("base", None), ("full", {}), ("r4", {"lora_rank": 4}))):
        if config is not None:
            write_run(tmp_path / "a" / name, 1.0, 0.1, **config)
        (tmp_path / "a" / name).mkdir(exist_ok=True)
        for metric, values in (("acc", acc[i]), ("kept", kept[i])):
            line = {"metric": metric, "step": 0 if config is None else 10}
            with open(tmp_path / "a" / name / "results.jsonl", "a") as lines:
                lines.write(json.dumps({**line, "value": sum(values) / 3, "stderr": 9.0, "settings": {"model": "x/b"}}) + "\n")
            with open(tmp_path / "a" / name / "values.jsonl", "a") as lines:
                lines.write(json.dumps({**line, "values": values}) + "\n")
    return tmp_path


def test_values_of_items_are_read_from_the_runs(evaluated):
    rows = table(evaluated, "acc", "kept")
    half = 1.96 * statistics.stdev([0.1, 0.1, 0.2]) / math.sqrt(3)
    assert rows["C1", "full - LoRA r=4"] == (f"+0.133 ± {half:.3f} (n=1)", "holds")
    # r=4 learned .3 of full's .4333, so full had forgotten .6923 of (.7, .3, .8); the base's items do not cancel
    share = 0.3 / (1.3 / 3)
    forgot = statistics.stdev([share * 0.7 - 0.2, share * 0.3, share * 0.8 - 0.2]) / math.sqrt(3)
    learned = (0.6 / (1.3 / 3)) * statistics.stdev([0.3 - share * 0.4, 0.3 - share * 0.4, 0.3 - share * 0.5]) / math.sqrt(3)
    assert rows["C2", "full - LoRA r=4"] == (f"{share * 0.6 - 0.4 / 3:+.3f} ± {1.96 * math.hypot(forgot, learned):.3f} (n=1)",
                                             "holds")


def test_bases_of_one_name_are_told_apart_by_their_folders(tmp_path):
    """Each seed has a base of its own, .../step_700; they are 5 and 7 before training, 4 and 6 after it."""
    out = tmp_path / "a"
    for seed in (1, 2):
        for name, step, value, config in ((f"base{seed}", 0, 3 + 2 * seed, None), (f"full{seed}", 10, 2 + 2 * seed, {})):
            if config is not None:
                write_run(out / name, 1.0, 0.1, seed, base=f"out/./{seed}/step_700")
            (out / name).mkdir(parents=True, exist_ok=True)
            line = {"metric": "a_loss", "step": step, "value": value, "stderr": 0.1, "settings": {"model": f"out/{seed}/step_700"}}
            (out / name / "results.jsonl").write_text(json.dumps(line) + "\n")
    found = {m.seed: m.learned.value for m in measure_runs(sorted(out.iterdir()), "a_loss", "loss source")}
    assert found == {1: 1.0, 2: 1.0}
    # moved, a base is known by its name alone, which two have
    (out / "full2/config.json").write_text(json.dumps({"config": {"seed": 2, "base": "elsewhere/step_700"}}))
    with pytest.raises(ValueError, match="its base is elsewhere/step_700; evaluated beside it are out/1/step_700 and out/2/step_700"):
        measure_runs(sorted(out.iterdir()), "a_loss", "loss source")
    shutil.rmtree(out / "base1")
    assert {m.seed: m.learned.value for m in measure_runs([out / "base2", out / "full2"], "a_loss", "loss source")} == {2: 1.0}


def test_runs_with_other_items_than_the_base_are_refused(evaluated):
    path = evaluated / "a/r4/values.jsonl"
    path.write_text(path.read_text().replace("[0.4, 0.6, 0.8]", "[0.4, 0.6]"))
    result = run_here("paper/claims.py", f"--runs={evaluated}/*/*", "--learning=acc", "--forgetting=kept")
    assert result.returncode == 2 and "acc: 3 items of the base, 2 of a run" in result.stderr, result.stderr


@pytest.mark.parametrize("runs, message", [("", "runs is not set"), ("{0}/*/*,{0}/none*", "none*"), ("{0}/a", "say FOLDER/*")])
def test_runs_that_are_not_there(evaluated, runs, message):
    result = run_here("paper/claims.py", f"--runs={runs.format(evaluated)}")
    assert result.returncode == 2 and message in result.stderr and len(result.stderr.splitlines()) == 1, result.stderr


@pytest.mark.parametrize("apart, said", [(4, "cannot be told"), (5, "cannot be told"), (6, "holds")])
def test_a_handful_of_right_and_wrong_items_tells_nothing(apart, said):
    """As the exact test of discordant pairs, whose p is .125, .0625 and .031."""
    a, b = Change(0.3 + apart / 100, None, (1,) * apart + (0,) * (100 - apart)), Change(0.3, None, (0,) * 100)
    value, stderr, _ = combine([1, -1], [a, b])
    assert verdict(value, 1.96 * stderr) == said


def test_methods():
    assert method_of({"lora_rank": 4, "lora_targets": "gate_proj,up_proj,down_proj"}) == Method(4, "mlp")
    assert method_of({"attention_dropout": 0.1}) == Method(0, "attention dropout") and str(Method(0, "")) == "full"
    assert method_of({"weight_decay": 1e-4, "attention_dropout": 0.1}) is None
    assert method_of({"lora_rank": 4, "a_newer_knob": False}) == method_of({"lora_rank": 4}) == Method(4, "")


@pytest.mark.parametrize("break_it, message", [
    (lambda out: write_run(out / "again", 1.0, 1.0), "a second run of full"),
    (lambda out: (out / "full/log.jsonl").write_text('{"step": 0, "val": {"target": 1}}\n{"step": 3, "val": {"target": 1}}\n'),
     "no 'loss source'"),
    (lambda out: (out / "full/log.jsonl").write_text('{"step": 3, "tokens": 3, "val": {"target": 1.0, "source": 1}}\n'),
     "evaluate the base into a folder beside it and list it in --runs"),
    (lambda out: (out / "full/config.json").unlink(), "no finished run"),
    # which would be taken for a sweep of the learning rate, or for another seed
    (lambda out: [write_run(out / f"r4{dora}", 1.0, 1.0, learning_rate=2e-4 + dora, dora=dora, lora_rank=4) for dora in (False, True)],
     "one has dora=True, the other False"),
    (lambda out: [write_run(out / f"r4-{a}", 1.0, 1.0, learning_rate=a, lora_alpha=a, lora_rank=4) for a in (4, 8)],
     "one has lora_alpha=8, the other 4"),
    (lambda out: write_run(out / "other", 1.0, 1.0, learning_rate=2e-4, optimizer="adamw"), "one has optimizer=adamw, the other lionw"),
    (lambda out: write_run(out / "other", 1.0, 1.0, seed=2, global_batch=64), "one has global_batch=64, the other 32"),
    (lambda out: write_run(out / "other", 1.0, 1.0, steps=5, global_batch=64), "one has global_batch=64, the other 32"),
    (lambda out: write_run(out / "other", 1.0, 1.0, learning_rate=2e-4, base="c"), "one has base=c, the other b")])
def test_runs_that_cannot_be_compared(tmp_path, break_it, message):
    write_run(tmp_path / "a/full", 2.0, 1.0)
    break_it(tmp_path / "a")
    result = run_here("paper/claims.py", f"--runs={tmp_path}/*/*", "--learning=loss target", "--forgetting=loss source")
    assert result.returncode == 2 and message in result.stderr and len(result.stderr.splitlines()) == 1, result.stderr




def test_where_lora_learned_more_it_is_compared_on_its_own_way():
    """r=4 learned 3 and forgot 1.2, so .8 at the 2 that full finetuning learned, which forgot 1."""
    changes = {(1, Method(0, ""), 10): {1e-4: (Change(2.0), Change(1.0))}, (1, Method(4, ""), 10): {1e-3: (Change(3.0), Change(1.2))}}
    told = dict(claims(changes, {}, {}))
    assert told["C2 At equal learning full finetuning has forgotten more than LoRA"] == [
        ("full - LoRA r=4", "+0.200 (n=1)", "cannot be told")]
