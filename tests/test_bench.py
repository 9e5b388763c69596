"""bench/train.py's training part on a tiny shape, bench/kernels.py's table; that what fails costs nothing else."""
import json
import statistics
from dataclasses import replace

import pytest
import torch
from conftest import run_here

from bench import train as bench
from bench import kernels as bench_kernels
from model import IGNORE
from training.plan import predict_memory

TINY = ["--parts=training", "--shape=tiny", "--device=cpu", "--dtype=float32", "--compile=False", "--repeats=1", "--ranks=0,4"]


@pytest.fixture
def knobs(monkeypatch):
    """Knobs of the module, as main would set them."""
    def choose(**values):
        for name, value in {"shape": "tiny", "device": torch.device("cpu"), "dtype": "float32", "compile": False, "repeats": 1,
                            "sides": ("ours", "peer"), "seq_lens": (16,), "checkpointing": ("none",), "batches": (8, 16),
                            "ranks": (0, 4), "lora_dropout": 0.0, **values}.items():
            monkeypatch.setattr(bench, name, value, raising=False)
    return choose


def test_the_training_part_from_end_to_end(tmp_path):
    argv = [*TINY, "--seq_lens=32,16", "--checkpointing=none,block", "--batches=8,16", "--microbatch_tokens=32",
            f"--out={tmp_path}/b.json"]
    done = run_here("bench/train.py", *argv)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "b.json").read_text())
    records = content["results"]["training"]
    keys = {(r["seq_len"], r["checkpointing"], r["batch"], r["rank"], r["side"]) for r in records}
    assert len(records) == len(keys) == 2 ** 5 and content["config"]["shape"] == "tiny"
    assert {(r["seq_len"], r["rows"], r["microbatch"]) for r in records} == {(32, 1, 1), (32, 2, 1), (16, 1, 1), (16, 2, 2)}
    d, f, layers, vocab = 64, 160, 2, 320
    for r in records:
        assert r["tok_per_s"] > 0 and r["layers"] == r["of_layers"] == layers and r["mfu"] is None
        seq, weights = r["seq_len"], layers * (4 * d * d + 3 * d * f)
        adapters = layers * r["rank"] * (4 * 2 * d + 3 * (d + f))
        flops = (4 if r["rank"] else 6) * (weights * seq + (seq - 1) * vocab * d) + 6 * adapters * seq + 6 * layers * d * seq ** 2
        assert r["tflops"] * 1e12 * statistics.median(r["seconds"]) == pytest.approx(flops * r["rows"])
    assert "batch 16: times our full: full 1.00, LoRA r=4 " in done.stdout and "times the peer: full " in done.stdout
    assert "2 of 2 blocks of shape tiny" in done.stdout


def test_a_step_by_microbatches_has_the_gradient_of_the_whole_batch(knobs, monkeypatch):
    knobs()
    batch, found = bench.batch_of(3, 16, 320), []
    assert (batch[1][:, :-1] == batch[0][:, 1:]).all() and (batch[1][:, -1] == IGNORE).all()
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda ps, most: found.append([p.grad.clone() for p in ps]))
    for side in ("ours", "peer"):
        torch.manual_seed(0)
        llama = bench.random_model(side, bench.SHAPES["tiny"], 4, "none").train()
        for p in llama.parameters():
            if p.requires_grad:
                torch.nn.init.normal_(p, 0, 0.02)
        start = [p.detach().clone() for p in llama.parameters()]
        for at_once in (3, 2):
            for p, old in zip(llama.parameters(), start):
                p.data.copy_(old)
            bench.training_step(side, llama, at_once)(*batch)
        assert all(p.grad is None for p in llama.parameters())
        assert any(not torch.equal(p, old) for p, old in zip(llama.parameters(), start))
    for whole, parts in (found[:2], found[2:]):
        for a, b in zip(whole, parts):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_both_sides_train_the_same_parameters_and_checkpoint(knobs):
    knobs()
    for rank in (0, 4):
        mine, theirs = (bench.random_model(side, bench.SHAPES["tiny"], rank, "block").train() for side in ("ours", "peer"))
        trained = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (mine, theirs)]
        assert trained[0] == trained[1] and mine.activation_checkpointing == "block"
        assert any(getattr(m, "gradient_checkpointing", False) for m in theirs.modules())


def test_what_does_not_fit_or_fails_is_recorded_and_the_rest_measured(knobs, monkeypatch, capsys):
    knobs()
    real = bench.random_model

    def model(side, config, rank, how):
        if side == "peer":
            raise torch.OutOfMemoryError("no room") if rank else RuntimeError("a broken\nkernel")
        return real(side, config, rank, how)

    monkeypatch.setattr(bench, "random_model", model)
    records = list(bench.training())
    assert {(r["side"], r["rank"], r.get("failed")) for r in records} == {
        ("ours", 0, None), ("ours", 4, None), ("peer", 0, "RuntimeError: a broken kernel"), ("peer", 4, "out of memory")}
    assert len(records) == 2 * 2 * 2
    said = capsys.readouterr().out
    assert "peer LoRA r=4" in said and "out of memory" in said and "times the peer: nothing" in said


def test_nothing_is_begun_after_the_time_is_up():
    done = run_here("bench/train.py", *TINY, "--seq_lens=16", "--batches=8", "--stop_after=-1")
    assert done.returncode == 0 and "tok/s" not in done.stdout
    assert "16 tokens, checkpointing none, ours full, batches [8]: not begun within -1 s" in done.stdout


def test_as_many_blocks_as_fit(knobs, monkeypatch, capsys):
    knobs(seq_lens=(64, 16), checkpointing=("block", "none"))
    config = replace(bench.SHAPES["tiny"], num_hidden_layers=8)
    need = lambda layers: max(sum(predict_memory(bench.on_meta(replace(config, num_hidden_layers=layers), rank, how), "lionw", 2,
                                                 seq, 1, device="cpu").values())
                              for rank in (0, 4) for how in ("none", "block") for seq in (64, 16))
    monkeypatch.setattr(bench.os, "sysconf", lambda name: (need(5) + need(6)) / 2 / 0.93 if name == "SC_PHYS_PAGES" else 1)
    assert bench.blocks_that_fit(config).num_hidden_layers == 5
    assert "5 of 8 blocks" in capsys.readouterr().out
    monkeypatch.setattr(bench.os, "sysconf", lambda name: 1)
    assert bench.blocks_that_fit(config).num_hidden_layers == 1


@pytest.mark.parametrize("script, more, wanted", [
    ("bench/train.py", ["--parts=training", "--batches=12"], "batches: found 12"),
    ("bench/train.py", ["--parts=training", "--seq_lens=4097"], "seq_lens: found 4097"), ("bench/train.py", ["--ranks=x"], "ranks"),
    ("bench/kernels.py", ["--shapes=7b", "--device=cpu"], "need a GPU"), ("bench/evals.py", [], "expected a model folder")])
def test_mistakes_are_one_line(script, more, wanted):
    done = run_here(script, *more)
    assert done.returncode == 2 and wanted in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_the_kernel_table(tmp_path):
    done = run_here("bench/kernels.py", "--ranks=4", "--rows=24", "--dtype=float32", "--repeats=1", "--device=cpu",
                    f"--out={tmp_path}/k.json")
    assert done.returncode == 0, done.stderr
    records = json.loads((tmp_path / "k.json").read_text())["results"]["kernels"]
    assert {r["group"] for r in records} == {"qkv", "o", "gate_up", "down"}
    names = {r["variant"] for r in records}
    assert names >= {"plain", "peft", "torch"} and len(records) == 4 * len(names)
    assert all(r["forward_ms"] > 0 and r["error"] < 1e-5 for r in records) and "of plain" in done.stdout


def test_a_variant_that_fails_does_not_end_the_table(monkeypatch, capsys):
    for name, value in {"shapes": ("tiny",), "rows": (8,), "ranks": (2,), "device": torch.device("cpu"), "dtype": "float32",
                        "repeats": 1}.items():
        monkeypatch.setattr(bench_kernels, name, value)
    real = bench_kernels.measure
    monkeypatch.setattr(bench_kernels, "measure", lambda name, *rest: real(name, *rest) if name != "plain" else 1 / 0)
    records = list(bench_kernels.table())
    assert {"failed" in r for r in records if r["variant"] == "plain"} == {True}
    assert {"failed" in r for r in records if r["variant"] != "plain"} == {False}
    assert "FAILED: ZeroDivisionError" in capsys.readouterr().out


def test_a_script_with_failures_says_so_by_its_status():
    done = run_here("bench/train.py", *TINY, "--seq_lens=16", "--batches=8", "--checkpointing=none", "--side=ours",
                    "--lora_kernel=triton")
    assert done.returncode == "1 measurements failed" and "LoRA r=4" in done.stdout and "the kernels need a GPU" in done.stdout


