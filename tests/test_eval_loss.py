"""eval_loss.py: train.py's own held-out loss, row by row, of a checkpoint, a base and an adapter; bad input."""
import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import need, run_here, run_stage

from eval_loss import values_of_rows
from evaluation.evals import read_done
from evaluation.scores import score
from model import Llama
from paper.results import falls


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    """Token folders of a small real tokenizer, a base and a LoRA run whose log has their losses."""
    out = tmp_path_factory.mktemp("loss")
    base = need("data/stories260k")
    texts = [f"Once upon a time there were {n} birds. They sang {n * 7} songs." for n in range(60)]
    (out / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    (out / "ift.jsonl").write_text("".join(json.dumps({"prompt": t[:20], "answer": t[20:]}) + "\n" for t in texts))
    for kind, source, more in (("cpt", "text", []), ("ift", "ift", ["--template={prompt}", "--response_field=answer"])):
        done = run_here("prepare_data.py", f"--kind={kind}", f"--source={out / source}.jsonl", f"--tokenizer={base}",
                        f"--out_dir={out / kind}", "--seq_len=64", "--val_fraction=0", *more)
        assert done.returncode == 0, done.stderr
    done = run_here("train.py", f"--base={base}", f"--data={out / 'ift'}", f"--val_data=a={out / 'ift'},b={out / 'cpt'}",
                    f"--out_dir={out / 'run'}", "--lora_rank=4", "--max_steps=4", "--global_batch=4", "--learning_rate=1e-2",
                    "--dtype=float32", "--eval_rows=7")
    assert done.returncode == 0, done.stderr
    logged = {line["step"]: line["val"] for line in map(json.loads, (out / "run/log.jsonl").read_text().splitlines())
              if "val" in line}
    return out, base, logged


def results(folder):
    return {line["metric"]: line for line in map(json.loads, (folder / "results.jsonl").read_text().splitlines())}


def test_loss_is_the_one_that_training_logs(studied):
    out, base, logged = studied
    sets = f"--data=a={out / 'ift'},b={out / 'cpt'}"
    for model, step, folder in ((base, 0, out / "base"), (out / "run/step_4", 4, out / "run")):
        elsewhere = [f"--out_dir={folder}"] if step == 0 else []
        done = run_here("eval_loss.py", f"--model={model}", sets, "--rows=7", "--dtype=float32", *elsewhere)
        assert done.returncode == 0, done.stderr
        for name, found in results(folder).items():
            assert found["value"] == pytest.approx(logged[step][name.removeprefix("loss ")], rel=1e-5) and found["step"] == step
            assert found["n"] == 7 and found["stderr"] > 0
    assert abs(logged[4]["a"] - logged[0]["a"]) > 0.05  # the adapter was there
    values = [json.loads(line) for line in (out / "run/values.jsonl").read_text().splitlines()]
    assert [v["metric"] for v in values] == ["loss a", "loss b"] and {len(v["values"]) for v in values} == {7}
    assert np.mean(values[0]["values"]) == pytest.approx(logged[4]["a"], rel=1e-5)


def test_two_ranks_and_a_second_start_find_the_same(studied, tmp_path):
    out, base, logged = studied
    argv = [f"--model={base}", f"--data=a={out / 'ift'}", f"--out_dir={tmp_path}", "--dtype=float32"]
    done = run_stage("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "eval_loss.py", *argv, "--rows=7")
    assert done.returncode == 0, done.stderr
    assert results(tmp_path)["loss a"]["value"] == pytest.approx(logged[0]["a"], rel=1e-5)
    first = read_done(tmp_path / "eval_loss_a.jsonl")
    done = run_here("eval_loss.py", *argv, "--rows=0")
    assert done.returncode == 0 and "7 of" in done.stdout, done.stderr
    every = read_done(tmp_path / "eval_loss_a.jsonl")
    assert len(every) > 7 and all(every[i] == record for i, record in first.items())
    again = run_here("eval_loss.py", *argv, "--rows=0")
    assert again.returncode == 0 and len((tmp_path / "values.jsonl").read_text().splitlines()) == 2  # not a third time


def test_another_name_is_another_metric_of_which_less_is_better(studied, tmp_path):
    out, base, _ = studied
    argv = [f"--model={base}", f"--data=a={out / 'ift'}", f"--out_dir={tmp_path}", "--rows=2", "--dtype=float32"]
    for more in ([], ["--name=nomask", "--doc_mask=False"]):
        done = run_here("eval_loss.py", *argv, *more)
        assert done.returncode == 0, done.stderr
    found = results(tmp_path)
    assert set(found) == {"loss a", "loss nomask a"} and all(map(falls, found)) and falls("hellaswag_loss")
    assert found["loss a"]["value"] != found["loss nomask a"]["value"] and not falls("lossy_strict_match")


def test_error_of_the_ratio_is_that_of_drawing_rows_anew():
    rng = np.random.default_rng(0)
    targets = rng.integers(1, 200, 300)
    losses = targets * (1 + 0.3 * rng.normal(size=300))
    value, stderr, *_ = score(values_of_rows([{"loss": a, "targets": int(b)} for a, b in zip(losses, targets)]))
    drawn = [(lambda i: losses[i].sum() / targets[i].sum())(rng.integers(300, size=300)) for _ in range(3000)]
    assert value == pytest.approx(losses.sum() / targets.sum()) and stderr == pytest.approx(np.std(drawn), rel=0.06)
    assert math.isclose(score(values_of_rows([{"loss": 3.0, "targets": 2}] * 4))[1], 0.0)


@pytest.mark.parametrize("more, message", [
    (["--data="], "data is not set"), (["--data=a=x,a=y"], "two of one name"), (["--rows=-1"], "rows is negative"),
    (["--data=nowhere"], "no meta.json"), (["--seq_len=32"], "packed for 64"), (["--model=nowhere"], "nowhere: no such folder")])
def test_bad_input_is_one_line(studied, tmp_path, more, message):
    out, base, _ = studied
    given = {"--model": base, "--data": f"a={out / 'ift'}", "--out_dir": tmp_path}
    argv = [f"{knob}={value}" for knob, value in given.items() if not more[0].startswith(knob + "=")] + more
    done = run_here("eval_loss.py", *argv)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_tokens_of_another_tokenizer_are_refused(studied, tmp_path):
    out, base, _ = studied
    shutil.copytree(out / "ift", tmp_path / "data")
    meta = json.loads((tmp_path / "data/meta.json").read_text()) | {"tokenizer_sha256": "0" * 64}
    (tmp_path / "data/meta.json").write_text(json.dumps(meta))
    done = run_here("eval_loss.py", f"--model={base}", f"--data={tmp_path / 'data'}", f"--out_dir={tmp_path}")
    assert done.returncode == 2 and "not the tokenizer of" in done.stderr, done.stderr


def test_rows_without_targets_are_refused():
    with pytest.raises(ValueError, match="nothing in these rows"):
        values_of_rows([{"loss": 0.0, "targets": 0}])


def test_a_loss_that_is_no_number_is_one_line_and_no_result(studied, tmp_path):
    """Finite weights whose logits overflow."""
    out, base, _ = studied
    shutil.copytree(base, tmp_path / "model")
    model = Llama.from_pretrained(base)
    with torch.no_grad():
        model.norm.weight.fill_(3e38)
    model.save_pretrained(tmp_path / "model")
    done = run_here("eval_loss.py", f"--model={tmp_path / 'model'}", f"--data=a={out / 'ift'}", "--dtype=float32",
                    f"--out_dir={tmp_path / 'out'}")
    assert done.returncode == 2 and done.stderr.count("error: ") == 1, done.stderr
    assert f"{tmp_path / 'model'}, item " in done.stderr and "NaN or infinite" in done.stderr
    assert not (tmp_path / "out/results.jsonl").exists()
