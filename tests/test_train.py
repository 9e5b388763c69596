"""train.py: schedules and whole runs against the original Trainer, exact resume, loss weighting, bad input."""
import contextlib
import ctypes
import gc
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, golden, need, run_here, run_stage, run_warm
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from warm import Warm

import lion
import train
from configurator import default_values
from evaluation.evals import find_model
from training.checkpoint import checkpoints, save_checkpoint
from training.checks import check_first_step, check_optimizer_state
from training.rows import TokenRows
from training.watch import mean_loss
from lora import apply_lora
from model import IGNORE, Llama, LlamaConfig

TINY = LlamaConfig(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                   num_key_value_heads=2, head_dim=8, max_position_embeddings=64, tie_word_embeddings=True)


def tiny_model(dtype=torch.float32):
    model = Llama(TINY).to(dtype).init_weights(0)
    model.compute_dtype = dtype
    return model


def write_tokens(folder, tokens, targets=None, starts=(), **meta):
    """A token folder as prepare_data.py makes it: tokens [rows, T]; targets the same with IGNORE, or None for cpt."""
    tokens = np.asarray(tokens)
    folder.mkdir(parents=True, exist_ok=True)
    tokens.astype("<u2").tofile(folder / "train.bin")
    np.asarray(starts, "<u8").tofile(folder / "train.docs.bin")
    if targets is not None:
        (np.asarray(targets) != IGNORE).astype("u1").tofile(folder / "train.mask.bin")
    counts = {"tokens": tokens.size, "rows": len(tokens), "sha256": f"{tokens.sum()}"}
    (folder / "meta.json").write_text(json.dumps({
        "format": 1, "kind": "cpt" if targets is None else "ift", "dtype": "uint16", "seq_len": tokens.shape[1],
        "vocab_size": 61, "bos_id": 1, "eos_id": 2, "tokenizer_sha256": "none", "tokenizer_name": "none",
        "splits": {"train": counts}, **meta}))
    return folder


@pytest.fixture
def setting(tmp_path):
    """A tiny base and 10 rows of 16 tokens, and the command line that trains on them."""
    tiny_model().save_pretrained(tmp_path / "base")
    tokens = np.random.default_rng(0).integers(3, 61, (10, 16))
    write_tokens(tmp_path / "data", tokens, starts=[0, 5, 20, 47, 80, 131])
    return tmp_path, [f"--base={tmp_path / 'base'}", f"--data={tmp_path / 'data'}", "--global_batch=4",
                      "--microbatch=2", "--dtype=float32", "--learning_rate=1e-3"]


# ----------------------------------------------------------------------------- the original Trainer
def batches(text, per_epoch, duration):
    """'2ba', '1ep', '0.1dur' -> batches, as composer counts them."""
    number, unit = float(text.rstrip("abdepurtok")), text.lstrip("0123456789.")
    if unit == "dur":
        total, total_unit = float(duration.rstrip("abeptok")), duration.lstrip("0123456789.")
        return int(number * total * (per_epoch if total_unit == "ep" else 1))
    return number * (per_epoch if unit == "ep" else 1)


def multiplier(scheduler, args, duration, per_epoch):
    """Our function of t for a recorded scheduler."""
    count = lambda key, default: batches(args.get(key, default), per_epoch, duration)
    t_max = count("t_max", "1dur")
    if scheduler == "cosine_with_warmup":
        return lambda t: train.cosine_with_warmup(t, t_max, count("t_warmup", "0ba"), args.get("alpha_f", 0.0))
    return lambda t: train.inv_sqrt_with_warmup(t, t_max, count("t_warmup", "0ba"), count("t_scale", "0ba"),
                                                count("t_cooldown", "0ba"), args["alpha_f_decay"], args["alpha_f_cooldown"])


def test_schedules_equal_the_original_at_every_recorded_time():
    points = 0
    for run in golden("schedules")["multipliers"]:
        ours = multiplier(run["scheduler"], run["args"], run["max_duration"], run["batches_per_epoch"])
        for t, want in zip(run["t"], run["a"]):
            assert ours(t) == pytest.approx(want, abs=1e-12), (run["name"], t)
            points += 1
    assert points > 1900


def test_learning_rate_of_every_step_equals_the_original_trainer():
    for run in golden("schedules")["trainer_lr"]:
        steps = int(batches("1dur", run["batches_per_epoch"], run["max_duration"]))
        count = lambda key: round(batches(run["args"][key], run["batches_per_epoch"], run["max_duration"]))
        knobs = dict(learning_rate=run["lr"], schedule_lag=True, warmup_steps=count("t_warmup"))
        if run["scheduler"] == "cosine_with_warmup":
            knobs.update(schedule="cosine", alpha_f=run["args"].get("alpha_f", 0.0))
        else:
            knobs.update(schedule="inv_sqrt", t_scale=count("t_scale"), cooldown_steps=count("t_cooldown"),
                         alpha_f_decay=run["args"]["alpha_f_decay"], alpha_f_cooldown=run["args"]["alpha_f_cooldown"])
        knobs = SimpleNamespace(**{**default_values(vars(train)), **knobs})
        for step, want in enumerate(run["lr_used_by_step"]):
            assert train.learning_rate_at(step, steps, knobs) == pytest.approx(want, rel=1e-9, abs=1e-18), (run["name"], step)


@pytest.mark.parametrize("name", ["full-invsqrt", "full-one-microbatch", "lora-cosine"])
def test_whole_run_equals_the_original_trainer(name, tmp_path):
    """Lion, clipping, microbatches and the paper's loss weighting, LoRA and full: losses, rates, final weights."""
    run = next(r for r in golden("train_trace")["runs"] if r["name"] == name)
    rows = run["rows"]
    data = write_tokens(tmp_path / "data", [r["input_ids"] for r in rows], [r["labels"] for r in rows],
                        vocab_size=1 + max(max(r["input_ids"]) for r in rows))
    args, steps = run["scheduler_args"], run["steps"]
    count = lambda key: int(batches(args[key], 0, f"{steps}ba"))
    knobs = dict(base=need(f"golden/{run['base']}"), data=data, out_dir=tmp_path / "out", max_steps=steps,
                 global_batch=run["batch_size"], microbatch=run["microbatch_size"], loss_norm="paper", doc_mask=False,
                 shuffle=False, learning_rate=run["optimizer"]["lr"], weight_decay=run["optimizer"]["weight_decay"],
                 warmup_steps=count("t_warmup"), dtype="float32")
    if run["scheduler"] == "inv_sqrt_with_warmup":
        knobs.update(schedule="inv_sqrt", t_scale=count("t_scale"), cooldown_steps=count("t_cooldown"))
    if run["adapter"]:
        knobs.update(adapter=need(f"golden/{run['adapter']}"))
    result = run_here("train.py", *(f"--{k}={v}" for k, v in knobs.items()))
    assert result.returncode == 0, result.stderr
    log = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    assert [r["loss"] for r in log] == pytest.approx(run["loss_train_total"], abs=2e-3)
    assert log[0]["loss"] == pytest.approx(run["loss_train_total"][0], abs=1e-5)
    assert [r["lr"] for r in log] == pytest.approx(run["lr_used_by_step"], rel=1e-9)
    file = "adapter_model.safetensors" if run["adapter"] else "model.safetensors"
    ours, want = load_file(tmp_path / f"out/step_{steps}" / file), load_file(need(f"golden/{run['final_parameters_file']}"))
    assert len(want) == run["n_trainable_tensors"]
    rename = {k.replace(".default", ""): v for k, v in want.items()}
    far = sum(int(((ours[k] - v).abs() > 1e-5).sum()) for k, v in rename.items())
    assert far <= 0.01 * sum(v.numel() for v in rename.values())  # signs of gradients that are rounding errors


# ----------------------------------------------------------------------------- order, loss, rows
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 30), st.integers(0, 2 ** 31), st.integers(2, 4))
def test_every_row_comes_once_an_epoch_whatever_the_batch(n_rows, batch, seed, epochs):
    steps = -(-epochs * n_rows // batch)
    order = np.concatenate([train.rows_of_step(s, batch, n_rows, seed) for s in range(steps)])
    for epoch in range(epochs):
        assert sorted(order[epoch * n_rows:(epoch + 1) * n_rows]) == list(range(n_rows))
    halves = [train.rows_of_step(s, 1, n_rows, seed)[0] for s in range(len(order))]
    assert halves == order.tolist()  # a function of the position alone


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {tuple(train.rows_of_step(e, 50, 50, seed)) for e in range(3) for seed in (1, 2)}
    assert len(orders) == 6


def test_rows_targets_and_documents(tmp_path):
    tokens = np.arange(12).reshape(2, 6)
    folder = write_tokens(tmp_path, tokens, starts=[0, 4, 9])
    rows = TokenRows(folder)
    t, y, starts = rows[0]
    assert t.tolist() == [0, 1, 2, 3, 4, 5] and starts.tolist() == [4]
    assert y.tolist() == [1, 2, 3, IGNORE, 5, IGNORE]  # 4 opens another document, 6 another row
    assert rows[1][1].tolist() == [7, 8, IGNORE, 10, 11, IGNORE]
    assert TokenRows(folder, doc_mask=False)[0][1].tolist() == [1, 2, 3, 4, 5, IGNORE]
    assert train.stack([rows[0], rows[1]], "cpu")[2].tolist() == [0, 4, 6, 9, 12]
    assert [TokenRows(folder, seq_len=4)[i][0].tolist() for i in range(3)] == tokens.reshape(3, 4).tolist()
    masked = write_tokens(tmp_path / "m", tokens, [[IGNORE, IGNORE, 2, 3, IGNORE, 5], [IGNORE] * 6], starts=[0, 4])
    assert TokenRows(masked)[0][1].tolist() == [IGNORE, 2, 3, IGNORE, 5, IGNORE]


def some_rows(n=8, T=16, seed=0):
    """Rows with very different numbers of targets and some documents."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        tokens = rng.integers(0, 61, T)
        targets = np.where(rng.random(T) < i / n, rng.integers(0, 61, T), IGNORE)
        rows.append((tokens, targets, np.sort(rng.choice(np.arange(1, T), i % 3, replace=False))))
    return rows


def gradients(model, rows, microbatch, **how):
    model.zero_grad()
    loss, _ = train.backward_batch(model, rows, range(len(rows)), microbatch, "cpu", **how)
    return loss, torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("lora", [False, True])
def test_gradient_does_not_depend_on_how_a_batch_is_cut(lora):
    model, rows = tiny_model(torch.float64), some_rows()
    if lora:
        apply_lora(model, 4, 8)
        for name, p in model.named_parameters():
            if name.endswith("lora_B"):
                torch.nn.init.normal_(p)
    loss, want = gradients(model, rows, 8)
    for microbatch in (1, 2, 3, 5):
        other, got = gradients(model, rows, microbatch)
        assert abs(other - loss) < 1e-12 * abs(loss)
        assert (got - want).abs().max() < 1e-12 * want.abs().max()


def test_paper_weighting_is_the_mean_of_microbatch_means():
    model, rows = tiny_model(torch.float64), some_rows()[1:]  # 7 rows, the last microbatch is smaller
    loss, got = gradients(model, rows, 3, loss_norm="paper")
    model.zero_grad()
    want = 0.0
    for part in (rows[0:3], rows[3:6], rows[6:7]):
        tokens, targets, docs = train.stack(part, "cpu")
        want = want + model(tokens, targets, docs)[1] * len(part) / len(rows)
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-13)
    reference = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (got - reference).abs().max() < 1e-13 * reference.abs().max() + 1e-16
    assert abs(loss - gradients(model, rows, 3)[0]) > 1e-3  # and is another number than the token mean


def test_padding_is_not_computed_and_changes_nothing():
    """Rows of 40 whose last target lies anywhere: loss and gradient are those of the whole rows, documents kept apart or not."""
    model, rng = tiny_model(torch.float64), np.random.default_rng(3)
    for ends in ((3, 9), (16, 2, 5), (7,), (39, 1), (24,), (33, 12)):
        rows = []
        for end in ends:
            tokens, targets = rng.integers(0, 61, (2, 40))
            targets[end + 1:] = IGNORE
            targets[:rng.integers(0, end + 1)] = IGNORE  # a prompt
            rows.append((tokens, targets, np.sort(rng.choice(np.arange(1, 40), 4, replace=False))))
        for doc_mask in (True, False):
            whole, computed = train.stack(rows, "cpu", compiled=True), train.stack(rows, "cpu")
            assert whole[0].shape == (len(ends), 40) and computed[0].shape == (len(ends), min(-(-(max(ends) + 1) // 16) * 16, 40))
            grads = []
            for tokens, targets, docs in (whole, computed):
                model.zero_grad()
                loss = model(tokens, targets, docs if doc_mask else None, reduction="sum")[1]
                loss.backward()
                grads.append(torch.cat([loss.detach()[None], *(p.grad.flatten() for p in model.parameters())]))
            assert (grads[0] - grads[1]).abs().max() < 1e-12 * grads[0].abs().max()
    nothing = [(tokens.numpy()[0], np.full(40, IGNORE), np.array([3, 8, 20]))]
    assert train.stack(nothing, "cpu")[2].tolist() == [0, 3, 8, 16]


def test_the_log_counts_the_tokens_that_were_computed(setting):
    """Rows of 32 of which at most 5 or 29 tokens are needed: 16 and 32 are computed, two rows at a time, and no more are logged."""
    folder, knobs = setting
    tokens = np.random.default_rng(1).integers(3, 61, (4, 32))
    targets = np.full((4, 32), IGNORE)
    targets[:2, :5], targets[2:, :29] = tokens[:2, :5], tokens[2:, :29]
    write_tokens(folder / "data", tokens, targets, starts=[0, 32, 64, 96])
    knobs = [*knobs[:2], "--dtype=float32", "--global_batch=2", "--microbatch=2", "--shuffle=False", "--max_steps=4"]
    result = run_here("train.py", *knobs, "--log_interval=2", f"--out_dir={folder / 'out'}")
    assert result.returncode == 0, result.stderr
    log = [json.loads(line) for line in (folder / "out/log.jsonl").read_text().splitlines()]
    assert [round(line["tok_per_s"] * line["seconds"], 6) for line in log] == [48, 48]  # means of 2 * 16 and 2 * 32
    assert [line["tokens"] for line in log] == [128, 256]  # a step is two rows of the data
    # compiled, the first two rows would take 32 tokens each; the last step has the others, whose 29 need all 32
    for steps, warned in ((3, True), (4, False)):
        planned = run_here("train.py", *knobs[:-1], f"--max_steps={steps}", "--compile=True", f"--out_dir={folder / 'new'}", "--dry_run=True")
        assert planned.returncode == 0, planned.stderr
        assert ("WARNING: 50% of the tokens are padding, which a compiled model computes too" in planned.stdout) == warned


def test_batch_without_targets_is_refused():
    rows = [(t, np.full_like(y, IGNORE), s) for t, y, s in some_rows(2)]
    with pytest.raises(ValueError, match="no token of the batch is a target"):
        train.backward_batch(tiny_model(), rows, range(len(rows)), 1, "cpu")


# ----------------------------------------------------------------------------- resume and signals
def start(setting, out, *more, script="train.py", program=Warm):
    """train.py in the background."""
    folder, knobs = setting
    argv = [sys.executable, script, *knobs, f"--out_dir={folder / out}", *more]
    return program(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_line(process, text):
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"{text!r} was never printed")


def results(folder, step):
    """Weights, momenta and the log without its clock readings."""
    tensors = {}
    for file in sorted((folder / f"step_{step}").rglob("*.safetensors")):
        tensors.update({f"{file.name}:{k}": v for k, v in load_file(file).items()})
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return tensors, [{k: v for k, v in r.items() if k not in ("seconds", "tok_per_s", "peak_gb")} for r in log]


DIES_IN_STEP_6 = f"""
import os, runpy, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import lion

step, calls = lion.DecoupledLionW.step, []

def step_or_die(self, *args):
    calls.append(1)
    if len(calls) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args)

lion.DecoupledLionW.step = step_or_die
runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
"""


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_killed_and_resumed_run_is_bit_equal_across_an_epoch(setting, kind):
    """10 rows, 4 a step: 9 steps cross three epoch borders; the kill comes between two checkpoints."""
    folder, _ = setting
    more = ["--max_steps=9", "--save_interval=2", "--eval_interval=3"]
    more += ["--lora_rank=3", "--lora_dropout=0.3"] if kind == "lora" else ["--weight_decay=1e-4"]
    assert start(setting, "whole", *more).wait() == 0
    (folder / "dies.py").write_text(DIES_IN_STEP_6)
    killed = start(setting, "killed", *more, script=folder / "dies.py")
    output = killed.communicate()[0]
    assert killed.returncode == -signal.SIGKILL and "step 5/9" in output, output
    assert [step for step, _ in checkpoints(folder / "killed")][-1] == 4
    resumed = start(setting, "killed", *more, "--resume=True")
    output = resumed.communicate()[0]
    assert resumed.returncode == 0, output
    (want, want_log), (got, got_log) = results(folder / "whole", 9), results(folder / "killed", 9)
    assert want.keys() == got.keys() and all(torch.equal(want[k], got[k]) for k in want)
    assert want_log == got_log


def test_sigterm_saves_and_exits_0_and_resume_goes_on(setting):
    folder, _ = setting
    process = start(setting, "out", "--max_steps=100000", "--lora_rank=2", program=subprocess.Popen)
    wait_for_line(process, "step 3/")
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0 and "stopped by SIGTERM" in output
    (step, path), = checkpoints(folder / "out")
    again = start(setting, "out", f"--max_steps={step + 2}", "--lora_rank=2", "--resume=True")
    assert again.wait(timeout=300) == 0
    assert [s for s, _ in checkpoints(folder / "out")] == [step, step + 2]


def test_knob_that_an_older_checkpoint_does_not_know_counts_as_its_default(setting):
    folder, knobs = setting
    out = [f"--out_dir={folder / 'run'}", "--schedule=constant"]
    assert run_here("train.py", *knobs, *out, "--max_steps=1").returncode == 0
    path = folder / "run/step_1/state/state.json"
    state = json.loads(path.read_text())
    for knob in ("attention_dropout", "rslora", "lora_alpha"):
        del state["config"][knob]
    path.write_text(json.dumps(state))
    gc.collect()  # lets go of the first run's lock
    result = run_here("train.py", *knobs, *out, "--max_steps=2", "--resume=True", "--attention_dropout=0.1")
    assert result.returncode == 2 and "was trained with attention_dropout=0.0 (now 0.1); repeat the first command" in result.stderr
    result = run_here("train.py", *knobs, *out, "--max_steps=2", "--resume=True")
    assert result.returncode == 0, result.stderr


def test_schedule_reaches_every_parameter_group(setting, monkeypatch):
    """Each group keeps its ratio to the first one's learning rate; the log has the first one's."""
    folder, knobs = setting
    rates = []

    class TwoGroups(lion.DecoupledLionW):
        def __init__(self, groups, lr, *more):
            params = groups[0]["params"]
            super().__init__([{"params": params[:3]}, {"params": params[3:], "lr": 16 * lr}], lr, *more)

        def step(self, closure=None):
            rates.append([group["lr"] for group in self.param_groups])
            return super().step(closure)

    monkeypatch.setitem(lion.OPTIMIZERS, "lionw", TwoGroups)
    result = run_here("train.py", *knobs, "--max_steps=6", "--lora_rank=2", f"--out_dir={folder / 'run'}")
    assert result.returncode == 0, result.stderr
    assert all(second == pytest.approx(16 * first) for first, second in rates)
    assert len({first for first, _ in rates}) > 3
    log = [json.loads(line) for line in (folder / "run/log.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in log if "lr" in line] == [first for first, _ in rates]


def test_new_optimizer_trains(setting, monkeypatch):
    folder, knobs = setting

    class Sign(lion.Decoupled):
        def update(self, params, decay, group):
            for p in params:
                p -= group["lr"] * p.grad.sign()

    monkeypatch.setitem(lion.OPTIMIZERS, "sign", Sign)
    result = run_here("train.py", *knobs, "--max_steps=2", "--optimizer=sign", f"--out_dir={folder / 'run'}")
    assert result.returncode == 0, result.stderr
    gc.collect()  # lets go of the first run's lock
    result = run_here("train.py", *knobs, "--max_steps=4", "--optimizer=sign", f"--out_dir={folder / 'run'}", "--resume=True")
    assert result.returncode == 0, result.stderr


@contextlib.contextmanager
def limited_file_size(limit):
    """What a full disk does to a program, for files beyond `limit` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_half_written_checkpoint_is_ignored_and_full_disk_keeps_the_last(tmp_path):
    model = apply_lora(tiny_model(), 2, 4)
    optim = lion.DecoupledLionW([p for p in model.parameters() if p.requires_grad])
    save = lambda step: save_checkpoint(model, optim, tmp_path, {"step": step}, "base", 2)
    save(1)
    (tmp_path / "step_7.tmp").mkdir()
    (tmp_path / "step_8").mkdir()  # complete by name only
    with limited_file_size(1000), pytest.raises(OSError, match="step_2 could not be saved.*newest complete checkpoint is step_1"):
        save(2)
    assert [s for s, _ in checkpoints(tmp_path)] == [1] and not (tmp_path / "step_2").exists()
    for step in (3, 4):
        save(step)
    assert [s for s, _ in checkpoints(tmp_path)] == [3, 4]


# ----------------------------------------------------------------------------- bad input
def without(more, knobs):
    """Knobs that `more` does not set again."""
    return [knob for knob in knobs if knob.split("=")[0] not in {m.split("=")[0] for m in more}]


def refused(setting, *more, wanted):
    """The command line plus `more` ends with status 2, one line on stderr holding `wanted`, and no checkpoint."""
    folder, knobs = setting
    knobs = without(more, knobs + ["--max_steps=2", f"--out_dir={folder / 'out'}"])
    result = run_here("train.py", *knobs, *more)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, (result.stdout, result.stderr)
    assert wanted in result.stderr and result.stderr.startswith("train.py: error: ")
    assert not list(folder.glob("out/step_*"))


@pytest.mark.parametrize("more, wanted", [
    (["--learning_rat=1"], "nearest is learning_rate"),
    (["--max_steps=two"], "max_steps"),
    (["--max_epochs=1", "--max_steps=2"], "exactly one of max_steps"),
    (["--lora_rank=4", "--lora_targets=q_proj,w_proj"], "w_proj"),
    (["--lora_rank=4", "--scratch=True"], "scratch"),
    (["--lora_targets=mlp"], "lora_rank is 0, which is full finetuning"), (["--lora_alpha=8"], "lora_rank is 0"),
    (["--lora_rank=4", "--lora_kernel=triton", "--device=cpu"], "lora_kernel=triton: the kernels need a GPU"),
    (["--global_batch=0"], "global_batch"),
    (["--device=cuda:0"], "no GPU"), (["--device=gpu"], "device=gpu: expected auto, cpu, cuda or cuda:N"),
    (["--device=mps"], "device=mps: expected auto, cpu, cuda or cuda:N"),
    (["--resume=True"], "state.json); say --auto_resume=True"),
    (["--keep_last=-1"], "keep_last must not be negative, found -1"), (["--eval_rows=-1"], "eval_rows must not be negative"),
    (["--seed=-1"], "seed must not be negative, found -1"), (["--warmup_steps=-5"], "warmup_steps must not be negative"),
    (["--seq_len=-5"], "seq_len must not be negative"),
    (["--schedule=inv_sqrt", "--t_scale=0"], "t_scale must be positive"), (["--mfu=0"], "mfu must be positive"),
    (["--out_dir={base}/../data"], "is a folder of data; choose another folder"),
    (["--out_dir={base}"], "is a model's folder, whose config.json would be lost"),
    (["--seq_len=100"], "longer than the model's max_position_embeddings=64"),
    (["--adapter=nowhere"], "adapter_config.json: not found"),
    (["--data=nowhere"], "meta.json"),
    (["--base=nowhere"], "config.json: not found"),
    (["--val_data=other=nowhere"], "nowhere"),
    (["--out_dir=/proc/nothing"], "/proc/nothing"),
])
def test_bad_command_lines(setting, more, wanted):
    if more == ["--device=cuda:0"] and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    more = [word.format(base=setting[0] / "base") for word in more]
    if "--seq_len=100" in more:  # as cpt data may be cut anywhere, only the model sets the bound
        write_tokens(setting[0] / "data", np.ones((3, 100)))
    refused(setting, *more, wanted=wanted)


def test_what_does_not_fit_into_a_run_is_said(setting):
    folder, knobs = setting
    more = ["--max_steps=4", "--warmup_steps=3", "--cooldown_steps=2", "--checkpoint_at=2,9,0.5", f"--out_dir={folder}/out"]
    result = run_here("train.py", *without(more, knobs), *more)
    assert result.returncode == 0, result.stderr
    assert "WARNING: warmup_steps and cooldown_steps are 5 together, of 4 steps" in result.stdout
    assert "WARNING: checkpoint_at: no step 0, 9 in 1 to 4" in result.stdout
    assert (folder / "out/step_2").is_dir()
    # a run, and an adapter, are no models to start from
    (folder / "adapter").mkdir()
    (folder / "adapter/adapter_config.json").write_text("{}")
    for base, message in ((folder / "out", "is a run, but in step_2, step_4 below it; name one of these"),
                          (folder / "adapter", "is an adapter: name its base here, and this with --adapter")):
        more = [f"--base={base}", f"--out_dir={folder}/other", "--max_steps=2"]
        result = run_here("train.py", *without(more, knobs), *more)
        assert result.returncode == 2 and message in result.stderr, result.stderr


def test_a_run_is_not_resumed_for_fewer_steps_than_it_has_done(setting):
    """Its config.json stays, which says what plots and claims are of."""
    folder, knobs = setting
    run = [*knobs, f"--out_dir={folder}/run"]
    assert run_warm("train.py", *run, "--max_steps=3").returncode == 0
    before = (folder / "run/config.json").read_text()
    result = run_warm("train.py", *run, "--resume=True", "--max_steps=2")
    assert result.returncode == 2 and "step_3 has done 3 steps, more than the 2 of this run" in result.stderr, result.stderr
    assert (folder / "run/config.json").read_text() == before
    result = run_warm("train.py", *run, "--resume=True", "--max_steps=3")
    assert result.returncode == 0 and "step_3: the run is complete" in result.stdout and "above its start: 0 GB" in result.stdout


def break_data(folder, how):
    meta = json.loads((folder / "data/meta.json").read_text())
    if how == "truncated":
        os.truncate(folder / "data/train.bin", 100)
    elif how == "vocabulary":
        write_tokens(folder / "data", np.full((4, 16), 61), vocab_size=62)
    elif how == "tokenizer":
        shutil.copy(need("data/stories260k/tokenizer.model"), folder / "base")
    elif how == "masked":
        write_tokens(folder / "data", np.ones((4, 16)), np.full((4, 16), IGNORE))
    elif how == "empty":
        write_tokens(folder / "data", np.ones((0, 16)))
    elif how == "garbage meta":
        (folder / "data/meta.json").write_text("{")


@pytest.mark.parametrize("how, wanted", [
    ("truncated", "truncated"), ("vocabulary", "token id 61, the model a vocabulary of 61"), ("tokenizer", "prepare the data again with --tokenizer="),
    ("masked", "no token of the batch is a target"), ("empty", "make no row"), ("garbage meta", "meta.json")])
def test_bad_data(setting, how, wanted):
    break_data(setting[0], how)
    refused(setting, wanted=wanted)


def test_foreign_checkpoint_and_existing_run_are_refused(setting):
    folder, knobs = setting
    out = ["--lora_rank=2", f"--out_dir={folder / 'run'}"]
    assert run_here("train.py", *knobs, *out, "--max_steps=1").returncode == 0
    for more, wanted in [([], "holds a run"), (["--resume=True", "--lora_rank=3"], "lora_rank=2 (now 3)"),
                         (["--resume=True", f"--data={folder / 'other'}"], "other")]:
        if "other" in wanted:
            write_tokens(folder / "other", np.full((5, 16), 7))
        result = run_here("train.py", *without(more, knobs + out), *more, "--max_steps=3")
        assert result.returncode == 2 and wanted in result.stderr, result.stderr
    # the run's folder for one of its checkpoints
    branch = without([f"--out_dir={folder / 'branch'}"], knobs + out)
    result = run_here("train.py", *branch, f"--out_dir={folder / 'branch'}", f"--resume_from={folder / 'run'}", "--max_steps=3")
    assert result.returncode == 2 and "is a run; give one of its checkpoints: step_1" in result.stderr, result.stderr
    # as many steps as it has done already
    result = run_here("train.py", *branch, f"--out_dir={folder / 'branch'}", f"--resume_from={folder / 'run/step_1'}", "--max_steps=1")
    assert result.returncode == 2 and "step_1 has done 1 steps, and the run has 1 in all" in result.stderr, result.stderr
    assert not (folder / "branch").exists()
    # runs are no model to evaluate
    result = run_here("eval_loss.py", f"--model={folder}", f"--data={folder}/data")
    assert result.returncode == 2 and "holds runs; give a checkpoint of one of them: run" in result.stderr, result.stderr
    # but a model is, though runs lie in its folder
    (folder / "base/run").mkdir()
    (folder / "base/run/log.jsonl").touch()
    assert find_model(str(folder / "base")) == (folder / "base", str(folder / "base"), "")
    (folder / "run/step_1/state/state.json").write_text("{}")
    result = run_here("train.py", *knobs, *out, "--resume=True", "--max_steps=3")
    assert result.returncode == 2 and "not written by train.py" in result.stderr


@pytest.mark.parametrize("change", ["mask", "documents", "row length"])
def test_the_same_tokens_with_other_targets_are_other_data(setting, change):
    """train.bin alone does not say what is learned; a checkpoint of before knew no more."""
    folder, knobs = setting
    tokens = np.random.default_rng(1).integers(3, 61, (8, 16))
    given = {"tokens": tokens, "targets": tokens, "starts": [0], "files": {"train.mask.bin": "a", "train.docs.bin": "b"}}
    other = dict(given)
    if change == "row length":
        given["targets"] = other["targets"] = None
        other["tokens"] = tokens.reshape(16, 8)
    else:
        name = "train.mask.bin" if change == "mask" else "train.docs.bin"
        other["files"] = {**given["files"], name: "c"}
    write_tokens(folder / "data", **given)
    run = [f"--out_dir={folder / 'run'}", "--lora_rank=2"]
    assert run_here("train.py", *knobs, *run, "--max_steps=1").returncode == 0
    write_tokens(folder / "data", **other)
    gc.collect()
    done = run_here("train.py", *knobs, *run, "--max_steps=2", "--resume=True")
    assert done.returncode == 2 and "was trained on other data than" in done.stderr, done.stderr
    # a checkpoint that knows the sha256 of train.bin alone
    path = folder / "run/step_1/state/state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({**state, "data": f"{tokens.sum()}"}))
    gc.collect()
    done = run_here("train.py", *knobs, *run, "--max_steps=2", "--resume=True")
    assert done.returncode == 0, done.stderr


def test_checkpoints_that_were_to_be_kept_stay_when_the_resumed_run_keeps_others(setting):
    folder, knobs = setting
    run = [f"--out_dir={folder / 'run'}", "--keep_last=1"]
    assert run_here("train.py", *knobs, *run, "--max_steps=4", "--checkpoint_at=1,2").returncode == 0
    gc.collect()
    done = run_here("train.py", *knobs, *run, "--max_steps=6", "--checkpoint_at=5", "--resume=True")
    assert done.returncode == 0, done.stderr
    assert [step for step, _ in checkpoints(folder / "run")] == [1, 2, 5, 6]


def test_a_run_that_died_before_its_first_checkpoint_says_how_to_go_on(setting):
    folder, knobs = setting
    run = [f"--out_dir={folder / 'run'}", "--max_steps=1"]
    assert run_here("train.py", *knobs, *run).returncode == 0
    shutil.rmtree(folder / "run/step_1")
    gc.collect()
    done = run_here("train.py", *knobs, *run)
    assert done.returncode == 2 and "no checkpoint yet: start it anew with --auto_resume=True" in done.stderr, done.stderr
    done = run_here("train.py", *knobs, *run, "--auto_resume=True")
    assert done.returncode == 0 and (folder / "run/step_1").is_dir(), done.stderr


def test_an_adapter_brings_its_dropout(setting):
    folder, knobs = setting
    run = ["--max_steps=1", f"--out_dir={folder / 'run'}"]
    assert run_here("train.py", *knobs, *run, "--lora_rank=2", "--lora_dropout=0.25").returncode == 0
    adapter = f"--adapter={folder / 'run/step_1'}"
    refused(setting, adapter, "--lora_dropout=0.5", wanted="step_1 brings its own, 0.25")
    for more in ([], ["--lora_dropout=0.25"]):
        done = run_here("train.py", *knobs, adapter, *more, "--max_steps=1", f"--out_dir={folder / f'run{len(more)}'}")
        assert done.returncode == 0 and "r=2 alpha=4 dropout=0.25 on" in done.stdout, done.stdout + done.stderr


def test_a_compiler_is_asked_for_on_any_cpu(setting, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("auto", "cpu"):
        refused(setting, "--compile=True", f"--device={device}", wanted="needs a C++ compiler (g++)")


def test_adapter_for_another_base_is_refused(setting):
    folder, knobs = setting
    assert run_here("train.py", *knobs, "--lora_rank=2", "--max_steps=1", f"--out_dir={folder / 'run'}").returncode == 0
    Llama(TINY).init_weights(1).save_pretrained(folder / "base2")
    refused(setting, f"--base={folder / 'base2'}", f"--adapter={folder / 'run/step_1'}", wanted="another base model; its adapter_config.json names ")


def test_validation_looks_at_rows_evenly_spaced():
    class Rows(list):
        doc_mask = False

    seen, model = [], tiny_model()
    model.register_forward_pre_hook(lambda module, args: seen.extend(args[0][args[1][:, 0] != IGNORE, 0].tolist()))
    rows = Rows((np.full(4, i), np.full(4, 1), np.empty(0, np.int64)) for i in range(10))
    mean_loss(model, rows, 2, "cpu", limit=3)
    assert seen == [0, 3, 6]


def test_starting_a_script_imports_neither_the_compiler_nor_sharding():
    """Each takes as long to import as torch, and only some runs need them; to load a model and ask it is none."""
    heavy = ("torch._dynamo", "sympy", "torch.distributed.checkpoint", "torch.distributed.fsdp", "triton", "matplotlib")
    code = ("import sys, torch, train, sample, spectrum, eval_gsm8k, eval_forgetting; from model import Llama\n"
            "model = Llama.from_pretrained(sys.argv[1]); list(model.generate([[1, 5]], 2)); model(torch.ones(1, 3, dtype=int))\n"
            f"print([m for m in {heavy} if m in sys.modules])")
    assert run_stage("-c", code, need("data/stories260k")).stdout == "[]\n"


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_trained_parameter_that_no_file_would_hold_is_refused(lora_rank):
    model = Llama(LlamaConfig(vocab_size=61, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                              num_key_value_heads=2, head_dim=8)).init_weights()
    if lora_rank:
        apply_lora(model, lora_rank, 4)
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    check_first_step(model, 3.0, False)
    model.layers[0].gain = torch.nn.Parameter(torch.ones(16))
    model.layers[0].gain.grad = torch.ones(16)
    with pytest.raises(ValueError, match="layers.0.gain is trained but would neither be loaded nor saved"):
        check_first_step(model, 3.0, False)


class CountingSGD(torch.optim.SGD):
    """An optimizer of somebody's own, which keeps `kept` for each parameter."""
    kept = 1

    def step(self, closure=None):
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            self.state[p]["count"] = self.kept


@pytest.mark.parametrize("kept, message", [
    (1, "'count' is of type int"), ({"a": 1}, "'count' is of type dict"), (None, "'count' is of type NoneType"),
    (torch.zeros(5), r"'count' is of shape \[5\]"), (torch.tensor(1.0), "")], ids=["int", "dict", "None", "shape", "number"])
def test_optimizer_state_that_no_checkpoint_would_hold_is_refused(kept, message):
    model = tiny_model()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optim = CountingSGD(model.parameters(), 0.1)
    optim.kept = kept
    optim.step()
    if not message:
        check_optimizer_state(model, optim)
        return
    with pytest.raises(ValueError, match=f"embed_tokens.weight: the optimizer's state {message}; checkpoints hold"):
        check_optimizer_state(model, optim)


FREED = """
import sys, torch
from runtime import tune_cpu_memory
def kept(numbers):
    def pages():
        return int(open("/proc/self/statm").read().split()[1])
    before = pages()
    blocks = [torch.ones(numbers) for _ in range(8)]
    most = pages()
    del blocks
    return (pages() - before) / (most - before)
torch.set_num_threads(1)
if sys.argv[1] == "keep":
    tune_cpu_memory()
print(kept(6 << 20), kept(16 << 20))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_freed_memory_is_kept_for_the_next_step():
    """The share of eight freed blocks of 24 MB that the process still holds, and of eight of 64 MB."""
    usual = [float(share) for share in run_stage("-c", FREED, "usual").stdout.split()]
    kept = [float(share) for share in run_stage("-c", FREED, "keep").stdout.split()]
    assert max(usual) < 0.2 and kept[0] > 0.9, (usual, kept)
    version = [int(number) for number in platform.libc_ver()[1].split(".")]
    assert kept[1] > 0.9 or version < [2, 35], kept


PRODUCTS = """
import sys, torch
from runtime import tune_cpu_memory
if sys.argv[1] == "tune":
    tune_cpu_memory()
x = torch.ones(301, 64, dtype=torch.bfloat16)
for tokens in [*range(2, 302), 2]:
    x[:tokens].T @ x[:tokens]
"""


def products_made(how, **environment):
    """How many products oneDNN compiles for 300 lengths and the first of them once more."""
    done = run_stage("-c", PRODUCTS, how, ONEDNN_VERBOSE=2, **environment)
    return done.stdout.count("create:cache_miss,cpu,matmul")


def test_products_of_old_lengths_are_dropped(monkeypatch):
    # what a run in this process may have set
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        monkeypatch.delenv(name, raising=False)
    usual = products_made("usual")
    if usual == 0:
        pytest.skip("products in bf16 do not go to oneDNN on this CPU")
    assert products_made("tune") == usual + 1
    # a number of the user's own stays
    assert products_made("tune", ONEDNN_PRIMITIVE_CACHE_CAPACITY=1000) == usual
