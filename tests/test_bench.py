"""bench/: training at a tiny shape and on a small model, generation, the kernels' table; that what
fails costs nothing else."""
import json
import shutil
import statistics
import subprocess
from dataclasses import replace

import pytest
import torch
from conftest import need, need_peft, run_here
from samples import programs, word_problems

from bench import kernels, sides, throughput, train
from bench.throughput import SHAPES, Axes, Case
from model import IGNORE, Llama
from training.plan import predict_memory

TINY = ["--shape=tiny", "--device=cpu", "--dtype=float32", "--compile=False", "--repeats=1",
        "--ranks=0,4"]
CPU = torch.device("cpu")


def settings(**changes):
    plain = sides.Settings(device=CPU, dtype=torch.float32, repeats=1, compile=False,
                           lora_dropout=0.0)
    return replace(plain, **changes)


def axes(**changes):
    plain = Axes(sides=("ours", "peer"), ranks=(0, 4), seq_lens=(16,), checkpointing=("none",),
                 batches=(8, 16), microbatch=8, microbatch_tokens=8192)
    return replace(plain, **changes)


# ----------------------------------------------------------------------------- throughput
def test_throughput_from_end_to_end(tmp_path):
    need_peft()
    argv = [*TINY, "--seq_lens=32,16", "--checkpointing=none,block", "--batches=8,16",
            "--microbatch_tokens=32", f"--out={tmp_path}/b.json"]
    done = run_here("bench/throughput.py", *argv)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "b.json").read_text())
    records = content["results"]["training"]
    keys = {(r["seq_len"], r["checkpointing"], r["batch"], r["rank"], r["side"]) for r in records}
    assert len(records) == len(keys) == 2 ** 5 and content["config"]["shape"] == "tiny"
    microbatches = {(r["seq_len"], r["rows"], r["microbatch"]) for r in records}
    assert microbatches == {(32, 1, 1), (32, 2, 1), (16, 1, 1), (16, 2, 2)}
    d, f, layers, vocab = 64, 160, 2, 320
    for r in records:
        assert r["tok_per_s"] > 0 and r["layers"] == r["of_layers"] == layers and r["mfu"] is None
        seq, weights = r["seq_len"], layers * (4 * d * d + 3 * d * f)
        adapters = layers * r["rank"] * (4 * 2 * d + 3 * (d + f))
        per_weight = 4 if r["rank"] else 6
        flops = per_weight * (weights * seq + (seq - 1) * vocab * d)
        flops += 6 * adapters * seq + 6 * layers * d * seq ** 2
        measured = r["tflops"] * 1e12 * statistics.median(r["seconds"])
        assert measured == pytest.approx(flops * r["rows"])
    assert "batch 16: times our full: full 1.00, LoRA r=4 " in done.stdout
    assert "times the peer: full " in done.stdout
    assert "2 of 2 blocks of shape tiny" in done.stdout


def test_both_sides_train_the_same_parameters_and_checkpoint():
    need_peft()
    for rank in (0, 4):
        models = []
        for side in ("ours", "peer"):
            case = Case(side, rank, 16, "block", 1)
            models.append(throughput.random_model(case, SHAPES["tiny"], settings()).train())
        trained = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in models]
        assert trained[0] == trained[1] and models[0].activation_checkpointing == "block"
        assert any(getattr(m, "gradient_checkpointing", False) for m in models[1].modules())


def test_what_does_not_fit_or_fails_is_recorded_and_the_rest_measured(monkeypatch, capsys):
    real = throughput.random_model

    def random_model(case, config, settings):
        if case.side == "ours":
            return real(case, config, settings)
        raise torch.OutOfMemoryError("no room") if case.rank else RuntimeError("a broken\nkernel")

    monkeypatch.setattr(throughput, "random_model", random_model)
    records = list(throughput.measure_all("tiny", SHAPES["tiny"], axes(), settings()))
    assert {(r["side"], r["rank"], r.get("failed")) for r in records} == {
        ("ours", 0, None), ("ours", 4, None), ("peer", 0, "RuntimeError: a broken kernel"),
        ("peer", 4, "out of memory")}
    assert len(records) == 2 * 2 * 2
    printed = capsys.readouterr().out
    assert "peer LoRA r=4" in printed and "out of memory" in printed
    assert "times the peer: nothing" in printed


def test_nothing_is_begun_after_the_time_is_up(tmp_path):
    done = run_here("bench/throughput.py", *TINY, "--seq_lens=16", "--batches=8", "--stop_after=-1",
                    f"--out={tmp_path}/b.json")
    assert done.returncode == 0 and "tok/s" not in done.stdout
    not_begun = "16 tokens, checkpointing none, ours full, batches [8]: not begun within -1 s"
    assert not_begun in done.stdout
    assert json.loads((tmp_path / "b.json").read_text())["results"] == {"training": []}


def test_as_many_blocks_as_fit():
    several = axes(seq_lens=(64, 16), checkpointing=("block", "none"))
    config = replace(SHAPES["tiny"], num_hidden_layers=8)

    def need_of(layers):
        needs = []
        for rank in (0, 4):
            for how in ("none", "block"):
                for seq_len in (64, 16):
                    fewer = replace(config, num_hidden_layers=layers)
                    llama = throughput.our_model_on_meta(fewer, rank, how, settings())
                    kinds = predict_memory(llama, "lionw", 2, seq_len, 1, device="cpu")
                    needs.append(sum(kinds.values()))
        return max(needs)

    available = (need_of(5) + need_of(6)) / 2 / 0.93
    assert throughput.blocks_that_fit(config, several, settings(), available).num_hidden_layers == 5
    assert throughput.blocks_that_fit(config, several, settings(), 1).num_hidden_layers == 1


def test_a_script_with_failures_has_another_status():
    done = run_here("bench/throughput.py", *TINY, "--seq_lens=16", "--batches=8",
                    "--checkpointing=none", "--sides=ours", "--lora_kernel=triton")
    assert done.returncode == "1 measurements failed" and "LoRA r=4" in done.stdout
    assert "the kernels need a GPU" in done.stdout


# ----------------------------------------------------------------------------- train, generate
def test_a_step_by_microbatches_has_the_gradient_of_the_whole_batch(monkeypatch):
    need_peft()
    tokens, targets = train.random_batch(3, 16, 320, CPU)
    assert (targets[:, :-1] == tokens[:, 1:]).all() and (targets[:, -1] == IGNORE).all()
    found = []
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_",
                        lambda ps, most: found.append([p.grad.clone() for p in ps]))
    for side in ("ours", "peer"):
        torch.manual_seed(0)
        case = Case(side, 4, 16, "none", 3)
        llama = throughput.random_model(case, SHAPES["tiny"], settings()).train()
        for p in llama.parameters():
            if p.requires_grad:
                torch.nn.init.normal_(p, 0, 0.02)
        start = [p.detach().clone() for p in llama.parameters()]
        for rows_at_once in (3, 2):
            for p, old in zip(llama.parameters(), start):
                p.data.copy_(old)
            optimizer = train.make_optimizer(side, llama)
            train.training_step(side, llama, optimizer, tokens, targets, rows_at_once)
        assert all(p.grad is None for p in llama.parameters())
        assert any(not torch.equal(p, old) for p, old in zip(llama.parameters(), start))
    for whole, parts in (found[:2], found[2:]):
        for a, b in zip(whole, parts):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


REAL_RUN = subprocess.run


def run_module_here(argv, **how):
    """subprocess.run, but `python -m bench.x ...` in this process, which is quicker."""
    if argv[1] != "-m":
        return REAL_RUN(argv, **how)
    return run_here(argv[2].replace(".", "/") + ".py", *argv[3:])


def tiny_model(folder, **changes):
    """A model folder in SmolLM2's vocabulary."""
    shape = dict(hidden_size=18, intermediate_size=16, num_hidden_layers=1, head_dim=2)
    config = replace(sides.SMOLLM2_135M, **{**shape, **changes})
    Llama(config).init_weights().save_pretrained(folder)


@pytest.mark.parametrize("script, parts, knobs", [
    ("train", ("full", "lora"), ["--rows=1", "--seq_len=8", "--compile=False", "--lora_rank=2"]),
    ("generate", ("greedy", "samples"), ["--prompts=2", "--samples=2", "--new_tokens=3"])])
def test_a_small_model_by_both_sides(tmp_path, monkeypatch, script, parts, knobs):
    if script == "train":
        need_peft()
    monkeypatch.setattr(subprocess, "run", run_module_here)
    tiny_model(tmp_path / "model")
    done = run_here(f"bench/{script}.py", f"--model={tmp_path}/model", "--repeats=2",
                    "--sides=ours,peer", "--dtype=float32", "--device=cpu",
                    f"--out={tmp_path}/b.json", *knobs)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "b.json").read_text())["results"]
    assert tuple(results) == parts
    for part in parts:
        for side in ("ours", "peer"):
            assert results[part][side]["tok_per_s"] > 0 and results[part][side]["peak_gb"] > 0
            assert len(results[part][side]["seconds"]) == 2
        assert f"{part:8} ours" in done.stdout and "products alone" in done.stdout
    assert ("LoRA against full" in done.stdout) == (script == "train")


def test_rounds_go_in_turn_and_the_first_is_not_counted(monkeypatch):
    done = []
    monkeypatch.setattr(sides, "clock", lambda device: len(done) ** 2)
    runs = {"a": lambda: done.append("a"), "b": lambda: done.append("b")}
    # a round that ends as the n-th of all takes n^2 - (n - 1)^2
    assert sides.rounds_in_turn(runs, 2, CPU) == {"a": [5, 9], "b": [7, 11]}
    assert done == ["a", "b"] * 3


def test_results_make_their_folder(tmp_path):
    path = tmp_path / "new" / "b.json"
    sides.write_results(str(path), {"repeats": 1}, CPU, {"part": {}})
    assert json.loads(path.read_text())["results"] == {"part": {}}


def test_rounds_that_scatter_have_no_ratio():
    assert sides.ratio_words([1.0, 1.1, 0.95], [2.0, 2.1, 1.9]) == "2.00x"
    for ours, other in (([1.0, 1.1, 1.3], [2.0, 2.0, 2.0]), ([2.0, 2.0, 2.0], [1.0, 1.1, 1.3])):
        words = sides.ratio_words(ours, other)
        assert words == "no ratio: rounds of 1, 1.1, 1.3 s scatter by 27%"


def test_a_busy_machine_is_named(monkeypatch, capsys):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    for load, busy in ((1.9, False), (2.1, True)):
        monkeypatch.setattr("os.getloadavg", lambda: (load, 0, 0))
        sides.print_machine(CPU)
        printed = capsys.readouterr().out
        assert ("load 2.1 on 2 cores" in printed) == busy
        assert torch.backends.cpu.get_cpu_capability() in printed


@pytest.mark.parametrize("rank", [0, 4])
def test_the_floor_has_the_products_of_a_step_and_no_others(rank):
    from torch.utils.flop_counter import FlopCounterMode
    config = SHAPES["tiny"]
    floor = train.Products(config, rank, 10, settings())
    hidden, inner = config.hidden_size, config.intermediate_size
    weights = config.num_hidden_layers * (4 * hidden ** 2 + 3 * hidden * inner)
    weights += config.vocab_size * hidden
    adapters = config.num_hidden_layers * rank * (4 * 2 * hidden + 3 * (hidden + inner))
    for products, flops in ((floor.of_weights, (4 if rank else 6) * 10 * weights),
                            (floor.of_adapters, 6 * 10 * adapters)):
        with FlopCounterMode(display=False) as counter:
            products()
        assert counter.get_total_flops() == flops


# ----------------------------------------------------------------------------- evals
def test_evals_by_both_sides(tmp_path):
    stories = need("data/stories260k")
    tiny_model(tmp_path, vocab_size=512)
    for file in stories.glob("tokenizer*"):
        shutil.copyfile(file, tmp_path / file.name)
    done = run_here("bench/evals.py", f"--model={tmp_path}", "--device=cpu",
                    f"--gsm8k_test={word_problems(tmp_path / 'test.jsonl', 4, seed=1)}",
                    f"--gsm8k_train={word_problems(tmp_path / 'train.jsonl', 8, seed=2)}",
                    f"--humaneval={programs(tmp_path / 'programs.jsonl')}",
                    "--items=2", "--programs=2", "--repeats=1", "--dtype=float32",
                    f"--out={tmp_path}/e.json")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "e.json").read_text())["results"]
    assert results["gsm8k"]["ours"]["new_tokens"] == results["gsm8k"]["peer"]["new_tokens"]
    assert "2 of 2 answers equal" in done.stdout
    assert set(results["starts"]) == {"sandboxed", "bare"}


# ----------------------------------------------------------------------------- mistakes
@pytest.mark.parametrize("script, more, wanted", [
    ("bench/throughput.py", ["--batches=12"], "batches: found 12"),
    ("bench/throughput.py", ["--seq_lens=4097"], "seq_lens: found 4097"),
    ("bench/throughput.py", ["--ranks=x"], "ranks"),
    ("bench/train.py", ["--parts=greedy"], "parts"),
    ("bench/spectrum.py", ["--size=0"], "size"),
    ("bench/kernels.py", ["--shapes=7b", "--device=cpu"], "need a GPU"),
    ("bench/evals.py", [], "expected a model folder")])
def test_mistakes_are_one_line(script, more, wanted):
    done = run_here(script, *more)
    assert done.returncode == 2 and wanted in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


# ----------------------------------------------------------------------------- kernels
def test_the_kernel_table(tmp_path):
    done = run_here("bench/kernels.py", "--ranks=4", "--rows=24", "--dtype=float32", "--repeats=1",
                    "--device=cpu", f"--out={tmp_path}/k.json")
    assert done.returncode == 0, done.stderr
    records = json.loads((tmp_path / "k.json").read_text())["results"]["kernels"]
    assert {r["group"] for r in records} == {"qkv", "o", "gate_up", "down"}
    names = {r["variant"] for r in records}
    assert names >= {"plain", "peft", "torch"} and len(records) == 4 * len(names)
    assert all(r["forward_ms"] > 0 and r["error"] < 1e-5 for r in records)
    assert "of plain" in done.stdout


def test_a_variant_that_fails_does_not_end_the_table(monkeypatch, capsys):
    real = kernels.measure_variant

    def measure_variant(variant, *rest):
        if variant == "plain":
            raise ZeroDivisionError
        return real(variant, *rest)

    monkeypatch.setattr(kernels, "measure_variant", measure_variant)
    records = list(kernels.kernel_table(("tiny",), (8,), (2,), settings(lora_dropout=0.05)))
    assert {"failed" in r for r in records if r["variant"] == "plain"} == {True}
    assert {"failed" in r for r in records if r["variant"] != "plain"} == {False}
    assert "FAILED: ZeroDivisionError" in capsys.readouterr().out
