"""eval_loss.py: train.py's own held-out loss, row by row, of a checkpoint, a base and an adapter; bad input."""
import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import need, need_peft, run_here, run_warm
from transformers import AutoModelForCausalLM

from eval_loss import row_bytes, row_kl, values_of_rows
from evaluation.against import kl_of_row
from evaluation.evals import load_for_eval, read_done
from evaluation.scores import score
from llama.functions import ChunkedCrossEntropy
from lora import load_adapter, merge_lora
from model import IGNORE, Llama
from paper.results import falls
from text.tokenizer import load_tokenizer
from training.rows import TokenRows


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
            if name.startswith("bpb "):
                continue
            assert found["value"] == pytest.approx(logged[step][name.removeprefix("loss ")], rel=1e-5) and found["step"] == step
            assert found["n"] == 7 and found["stderr"] > 0
    assert abs(logged[4]["a"] - logged[0]["a"]) > 0.05  # the adapter was there
    values = [json.loads(line) for line in (out / "run/values.jsonl").read_text().splitlines()]
    assert [v["metric"] for v in values] == ["loss a", "bpb a", "loss b", "bpb b"] and {len(v["values"]) for v in values} == {7}
    assert np.mean(values[0]["values"]) == pytest.approx(logged[4]["a"], rel=1e-5)


def test_two_ranks_and_a_second_start_find_the_same(studied, tmp_path):
    out, base, logged = studied
    argv = [f"--model={base}", f"--data=a={out / 'ift'}", f"--out_dir={tmp_path}", "--dtype=float32"]
    done = run_warm("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "eval_loss.py", *argv, "--rows=7")
    assert done.returncode == 0, done.stderr
    assert results(tmp_path)["loss a"]["value"] == pytest.approx(logged[0]["a"], rel=1e-5)
    first = read_done(tmp_path / "eval_loss_a.jsonl")
    done = run_here("eval_loss.py", *argv, "--rows=0")
    assert done.returncode == 0 and "7 of" in done.stdout, done.stderr
    every = read_done(tmp_path / "eval_loss_a.jsonl")
    assert len(every) > 7 and all(every[i] == record for i, record in first.items())
    again = run_here("eval_loss.py", *argv, "--rows=0")
    assert again.returncode == 0 and len((tmp_path / "values.jsonl").read_text().splitlines()) == 4  # not a third time


def test_another_name_is_another_metric_of_which_less_is_better(studied, tmp_path):
    out, base, _ = studied
    argv = [f"--model={base}", f"--data=a={out / 'ift'}", f"--out_dir={tmp_path}", "--rows=2", "--dtype=float32"]
    for more in ([], ["--name=nomask", "--doc_mask=False"]):
        done = run_here("eval_loss.py", *argv, *more)
        assert done.returncode == 0, done.stderr
    found = results(tmp_path)
    assert set(found) == {"loss a", "loss nomask a", "bpb a", "bpb nomask a"} and all(map(falls, found)) and falls("hellaswag_loss")
    assert found["loss a"]["value"] != found["loss nomask a"]["value"] and not falls("lossy_strict_match")


def test_the_same_tokens_with_another_mask_are_another_set(studied, tmp_path):
    out, base, _ = studied
    argv = [f"--model={base}", f"--out_dir={tmp_path / 'e'}", "--rows=2", "--dtype=float32"]
    data = shutil.copytree(out / "ift", tmp_path / "ift")
    assert run_here("eval_loss.py", *argv, f"--data=a={data}").returncode == 0
    meta = json.loads((data / "meta.json").read_text())
    meta["files"]["train.mask.bin"] = "another"
    (data / "meta.json").write_text(json.dumps(meta))
    done = run_here("eval_loss.py", *argv, f"--data=a={data}")
    assert done.returncode == 2 and "eval_loss_a.jsonl was made with set=" in done.stderr, done.stderr


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


# ----------------------------------------------------------------------------- distance from a base
def divergences(out, base, tokens, targets):
    """Both, by transformers and peft in float64, summed where something is predicted."""
    load = lambda: AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    tuned = need_peft().PeftModel.from_pretrained(load(), out / "run/step_4", autocast_adapter_dtype=False).eval()
    at = targets[0] != IGNORE
    with torch.no_grad():
        logp, logp0 = (torch.log_softmax(model(tokens).logits[0][at], -1) for model in (tuned, load().eval()))
    return ((logp0.exp() * (logp0 - logp)).sum().item(), (logp.exp() * (logp - logp0)).sum().item())


def test_divergence_is_that_of_float64_however_it_is_cut(studied, monkeypatch):
    out, base, _ = studied
    rows = TokenRows(out / "ift", doc_mask=False)
    llama = merge_lora(load_adapter(Llama.from_pretrained(base), out / "run/step_4")).eval()
    plain = Llama.from_pretrained(base).eval()
    for chunk in (2 ** 27, 4 * 512 * 4 * 3):
        monkeypatch.setattr(ChunkedCrossEntropy, "chunk_bytes", chunk)
        for i in (0, 3):
            tokens, targets = (torch.from_numpy(part)[None] for part in rows[i][:2])
            want = divergences(out, base, tokens, targets)
            found = row_kl(llama, plain, rows, i, "cpu")
            assert (found["kl"], found["reverse_kl"]) == pytest.approx(want, rel=1e-3) and want[0] > 0.1
            assert found["targets"] == (targets != IGNORE).sum()
            assert kl_of_row(plain, plain, tokens, targets) == (0, 0)
    assert abs(want[0] - want[1]) > 0.01 * want[0]  # the two directions differ


def test_against_a_base_gives_both_directions(studied, tmp_path):
    out, base, _ = studied
    argv = [f"--model={out / 'run/step_4'}", f"--data=a={out / 'ift'}", f"--out_dir={tmp_path}", "--rows=5", "--dtype=float32",
            f"--against={base}"]
    done = run_here("eval_loss.py", *argv)
    assert done.returncode == 0, done.stderr
    found = results(tmp_path)
    assert set(found) == {"loss a", "bpb a", "kl a", "reverse kl a"} and all(map(falls, found))
    records = read_done(tmp_path / "eval_kl_loss_a.jsonl").values()
    targets = sum(record["targets"] for record in records)
    assert found["kl a"]["value"] == pytest.approx(sum(record["kl"] for record in records) / targets) and len(records) == 5
    assert found["kl a"]["value"] > 0 and found["kl a"]["value"] != found["reverse kl a"]["value"]
    assert found["kl a"]["settings"]["against"]["model"] == str(base)
    done = run_here("eval_loss.py", *argv[:-1], f"--against={out / 'run/step_4'}")  # of another base, in the same file
    assert done.returncode == 2 and "was made with against" in done.stderr, done.stderr


def test_a_base_with_another_vocabulary_is_refused(studied):
    out, base, _ = studied
    small = Llama.from_pretrained(need("golden/models/mha-untied"))
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="against: the base's vocabulary"):
        kl_of_row(Llama.from_pretrained(base), small, tokens, tokens)


# ----------------------------------------------------------------------------- bits per byte
def test_bytes_are_those_of_the_documents_texts(studied):
    out, base, _ = studied
    tok = load_tokenizer(base)
    counts = np.array(tok.byte_counts())
    # whole documents: all of their text is predicted but what a row's first token holds
    rows = TokenRows(out / "cpt", doc_mask=False)
    texts = {json.loads(line)["text"] for line in (out / "text.jsonl").read_text().splitlines()}
    kept = rows.tokens[:len(rows) * rows.seq_len]
    documents = [tok.decode(part) for part in np.split(kept, rows.starts[rows.starts < len(kept)].astype(int)[1:])]
    assert set(documents[:-1]) < texts and len(documents) > 50  # the last one is cut
    firsts = np.arange(len(rows)) * rows.seq_len
    not_predicted = sum(counts[kept[first]] - int(first > 0 and kept[first - 1] == tok.bos_id) for first in firsts)
    found = sum(row_bytes(rows, i, tok, counts) for i in range(len(rows)))
    assert found + not_predicted == sum(len(text.encode()) for text in documents)
    # responses: what of them is in the rows, decoded
    rows = TokenRows(out / "ift")
    for i in range(len(rows)):
        tokens, targets, starts = rows[i]
        kept = [int(id_) for id_ in targets[targets != IGNORE]]
        assert row_bytes(rows, i, tok, counts) == counts[kept].sum() > 0


def test_bits_per_byte_is_the_loss_over_the_bytes(studied, tmp_path):
    out, base, _ = studied
    done = run_here("eval_loss.py", f"--model={base}", f"--data=b={out / 'cpt'}", f"--out_dir={tmp_path}", "--rows=0",
                    "--dtype=float32")
    assert done.returncode == 0, done.stderr
    tok = load_tokenizer(base)
    counts = np.array(tok.byte_counts())
    rows = TokenRows(out / "cpt")
    nats = sum(record["loss"] for record in read_done(tmp_path / "eval_loss_b.jsonl").values())
    size = sum(row_bytes(rows, i, tok, counts) for i in range(len(rows)))
    assert results(tmp_path)["bpb b"]["value"] == pytest.approx(nats / math.log(2) / size)
    assert results(tmp_path)["bpb b"]["n"] == len(rows)


# ----------------------------------------------------------------------------- between base and tuned
def test_t_is_an_adapter_scaled_and_its_results_stand_apart(studied, tmp_path):
    out, base, logged = studied
    shutil.copytree(out / "run", tmp_path / "run", ignore=shutil.ignore_patterns("eval_*", "results.jsonl"))
    for t in (0, 0.5, 1):
        done = run_here("eval_loss.py", f"--model={tmp_path / 'run/step_4'}", f"--data=a={out / 'ift'}", "--rows=7",
                        "--dtype=float32", f"--t={t}")
        assert done.returncode == 0, done.stderr
    at = {0: results(tmp_path / "run/step_4/t_0"), 0.5: results(tmp_path / "run/step_4/t_0.5"), 1: results(tmp_path / "run")}
    assert at[0]["loss a"]["value"] == pytest.approx(logged[0]["a"], rel=1e-5)
    assert at[1]["loss a"]["value"] == pytest.approx(logged[4]["a"], rel=1e-5)
    assert at[0.5]["loss a"]["settings"]["t"] == 0.5 and at[0.5]["loss a"]["step"] == 4
    # half of the adapter, which is half of alpha
    config = json.loads((tmp_path / "run/step_4/adapter_config.json").read_text())
    (tmp_path / "run/step_4/adapter_config.json").write_text(json.dumps({**config, "lora_alpha": config["lora_alpha"] / 2}))
    half = load_for_eval(str(tmp_path / "run/step_4"))
    (tmp_path / "run/step_4/adapter_config.json").write_text(json.dumps(config))
    mixed = load_for_eval(str(tmp_path / "run/step_4"), t=0.5)
    for p, q in zip(half.model.parameters(), mixed.model.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)
    assert mixed.identity["weights"] != load_for_eval(str(base)).identity["weights"] and "t" not in half.identity


def test_t_of_a_full_model_mixes_all_weights(studied, tmp_path):
    out, base, _ = studied
    done = run_here("train.py", f"--base={base}", f"--data={out / 'ift'}", f"--out_dir={tmp_path / 'run'}", "--max_steps=2",
                    "--global_batch=4", "--dtype=float32", "--learning_rate=1e-2")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "run/step_2"
    mixed = load_for_eval(str(folder), t=0.25).model
    before, after = (Llama.from_pretrained(path) for path in (base, folder))
    assert not torch.equal(before.norm.weight, after.norm.weight)
    for p, p0, p1 in zip(mixed.parameters(), before.parameters(), after.parameters(), strict=True):
        assert torch.allclose(p, 0.75 * p0 + 0.25 * p1, atol=1e-6)
    # in bf16 it is mixed before it is rounded
    half = load_for_eval(str(folder), dtype=torch.bfloat16, t=0.25).model
    assert half.norm.weight.dtype == half.compute_dtype == torch.bfloat16
    assert torch.equal(half.norm.weight, mixed.norm.weight.bfloat16())


@pytest.mark.parametrize("t, message", [(-0.5, "t must be at least 0"), (0.5, "no W0 to go back to")])
def test_t_without_a_way_back_is_refused(studied, t, message):
    out, base, _ = studied
    with pytest.raises(ValueError, match=message):
        load_for_eval(str(out / "run/step_4" if t < 0 else base), t=t)
