"""Many ranks on CPUs with gloo: the same run as one process, however the model is sharded; kills, signals, resharding."""
import fcntl
import json
import math
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
from checkpoint import checkpoints
from conftest import ROOT, run_here
from safetensors.torch import load_file, save_file
from test_train import setting, wait_for_line  # noqa: F401 (a fixture)

KNOBS = ["--max_steps=7", "--global_batch=8", "--microbatch=1", "--grad_clip=0.5", "--eval_interval=3", "--max_skipped=2"]
KIND = {"lora": ["--lora_rank=3", "--lora_dropout=0.2"], "full": ["--weight_decay=1e-4"]}


def last_of(knobs):
    """The last value given for each knob, as a command line."""
    return list({knob.split("=")[0]: knob for knob in knobs}.values())


def launch(setting, ranks, out, *more, script="train.py"):
    """train.py under torchrun, in the background."""
    folder, knobs = setting
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", script,
            *last_of([*knobs, *KNOBS, *more, f"--out_dir={folder / out}"])]
    return subprocess.Popen(argv, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def train(*args):
    process = launch(*args)
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 0, output
    return output


def weights(folder, step=7):
    return load_file(next((folder / f"step_{step}").glob("*.safetensors")))


def log_of(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {r["step"]: r["loss"] for r in lines if "loss" in r}, {r["step"]: r["val"]["val"] for r in lines if "val" in r}


def same_run(got, want, step=7):
    """Losses and final weights, to fp32's rounding (a sign of Lion may turn where a gradient is nearly zero)."""
    for a, b in zip(log_of(got), log_of(want)):
        assert a.keys() == b.keys() and all(abs(a[k] - b[k]) < 2e-5 * b[k] for k in b)
    a, b = weights(got, step), weights(want, step)
    assert a.keys() == b.keys()
    assert max((a[k] - b[k]).abs().max().item() for k in b) < 1e-5


def train_alone(setting, out, *more):
    """The same on one rank, in this process."""
    folder, knobs = setting
    result = run_here("train.py", *last_of([*knobs, *KNOBS, *more, f"--out_dir={folder / out}"]))
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize("kind, optimizer, ranks, how", [
    ("lora", "lionw", 2, "none"), ("full", "adamw", 4, "hybrid"), ("lora", "adamw", 2, "full")])
def test_run_on_many_ranks_is_the_run_of_one(setting, kind, optimizer, ranks, how):
    folder, _ = setting
    knobs = [*KIND[kind], f"--optimizer={optimizer}", f"--val_data=val={folder / 'data'}"]
    train_alone(setting, "one", *knobs)
    output = train(setting, ranks, "many", *knobs, f"--shard={how}", "--shard_ranks=2")
    assert f"{ranks} ranks, shard={how}" in output
    same_run(folder / "many", folder / "one")


def test_sharded_run_killed_on_four_ranks_goes_on_with_two_and_with_one(setting):
    folder, _ = setting
    knobs = [*KIND["full"], "--optimizer=adamw", "--shard=full", "--save_interval=2", "--keep_last=0"]
    train_alone(setting, "one", *knobs)
    killed = launch(setting, 4, "many", *knobs)
    wait_for_line(killed, "saved")
    subprocess.run(["pkill", "-9", "-f", f"out_dir={folder / 'many'}"], check=False)  # torchrun, and its ranks
    killed.communicate()
    for _, later in checkpoints(folder / "many")[1:]:  # if it got that far
        shutil.rmtree(later)
    assert (folder / "many/step_2/state/.metadata").is_file()
    shutil.copytree(folder / "many", folder / "alone")
    train(setting, 2, "many", *knobs, "--resume=True")
    same_run(folder / "many", folder / "one")
    train_alone(setting, "alone", *knobs, "--resume=True")
    same_run(folder / "alone", folder / "one")


def test_mistake_on_one_rank_ends_all_with_its_message(setting):
    """The second rank does not find the weights."""
    folder, _ = setting
    script = folder / "blind.py"
    script.write_text(f"""import os, runpy, sys
sys.path.insert(0, {str(ROOT)!r})
if os.environ["RANK"] == "1":
    sys.argv = ["--base={folder / 'nowhere'}" if arg.startswith("--base=") else arg for arg in sys.argv]
runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
""")
    started = time.time()
    process = launch(setting, 2, "out", script=script)
    output = process.communicate(timeout=100)[0]
    assert process.returncode and "nowhere/config.json: not found" in output
    assert not (folder / "out/step_7").exists() and time.time() - started < 60


def test_steps_without_a_finite_loss_are_skipped_and_counted_and_end_the_run(setting):
    folder, _ = setting
    weights = load_file(folder / "base/model.safetensors")
    weights["model.norm.weight"][0] = math.inf
    save_file(weights, folder / "base/model.safetensors", {"format": "pt"})
    result = run_here("train.py", *last_of([*setting[1], *KNOBS, f"--out_dir={folder / 'out'}"]))
    assert result.returncode == 2 and "2 steps in a row without a finite loss" in result.stderr
    lines = [json.loads(line) for line in (folder / "out/log.jsonl").read_text().splitlines()]
    assert [len(line["skipped"]) for line in lines] == [8, 8] and not list((folder / "out").glob("step_*"))


def test_trunk_branches_and_keeps_its_checkpoints(setting):
    """The paper's schedule: a branch goes on from a trunk's step with another schedule, momenta and rows included."""
    folder, _ = setting
    trunk = ["--schedule=inv_sqrt", "--cooldown_steps=0", "--keep_last=1", "--checkpoint_at=2,4", "--optimizer=adamw"]
    train_alone(setting, "trunk", *trunk, "--max_steps=8")
    assert sorted(p.name for p in (folder / "trunk").glob("step_*")) == ["step_2", "step_4", "step_8"]
    train_alone(setting, "branch", *trunk, "--max_steps=8", "--cooldown_steps=4", f"--resume_from={folder / 'trunk/step_4'}")
    train_alone(setting, "whole", *trunk, "--max_steps=8", "--cooldown_steps=4")
    got, want = (weights(folder / run, 8) for run in ("branch", "whole"))
    assert all(torch.equal(got[k], want[k]) for k in want)
    trunk_end = weights(folder / "trunk", 8)
    assert not all(torch.equal(got[k], trunk_end[k]) for k in want)


def test_second_run_in_the_same_folder_is_refused(setting):
    folder, _ = setting
    (folder / "out").mkdir()
    with open(folder / "out/lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        result = run_here("train.py", *last_of([*setting[1], *KNOBS, f"--out_dir={folder / 'out'}"]))
    assert result.returncode == 2 and "another process is training in" in result.stderr


@pytest.mark.parametrize("kind", KIND)
@pytest.mark.parametrize("what", ["block", "selective"])
def test_activation_checkpointing_changes_no_gradient(setting, kind, what):
    folder, _ = setting
    train_alone(setting, "plain", *KIND[kind], "--max_steps=2")
    train_alone(setting, what, *KIND[kind], "--max_steps=2", f"--activation_checkpointing={what}")
    got, want = (weights(folder / run, 2) for run in (what, "plain"))
    assert all(torch.equal(got[k], want[k]) for k in want)


def test_ranks_that_do_not_divide_the_batch_are_refused_with_the_nearest_that_do(setting, monkeypatch):
    monkeypatch.setattr("runtime.WORLD", 3)
    result = run_here("train.py", *last_of([*setting[1], *KNOBS, "--out_dir=out"]))
    assert result.returncode == 2 and "microbatch=1 on 3 ranks does not divide global_batch=8; the nearest that does is 9" in result.stderr
