"""Many ranks on CPUs with gloo: the same run as one process, however the model is sharded; kills, signals, resharding."""
import fcntl
import gc
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, run_here, run_stage
from safetensors.torch import load_file, save_file
from test_train import limited_file_size, setting, tiny_model, wait_for_line  # noqa: F401 (a fixture)
from warm import Warm

import train as stage
from training.checkpoint import checkpoints, lock, save_checkpoint
from training.plan import step_at
from configurator import configure
from lion import DecoupledAdamW

KNOBS = ["--max_steps=7", "--global_batch=8", "--microbatch=1", "--grad_clip=0.5", "--eval_interval=3", "--max_skipped=2"]
KIND = {"lora": ["--lora_rank=3", "--lora_dropout=0.2"], "full": ["--weight_decay=1e-4"],
        "dora": ["--lora_rank=3", "--lora_dropout=0.2", "--dora=True"]}


def last_of(knobs):
    """The last value given for each knob, as a command line."""
    return list({knob.split("=")[0]: knob for knob in knobs}.values())


def launch(setting, ranks, out, *more, script="train.py"):
    """train.py under torchrun, in the background."""
    folder, knobs = setting
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", script,
            *last_of([*knobs, *KNOBS, *more, f"--out_dir={folder / out}"])]
    return Warm(argv, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"})


def changed(setting, lines):
    """A script that is train.py after `lines`, which may look at the rank."""
    script = setting[0] / "changed.py"
    script.write_text(f"import os, runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\nrank = int(os.environ['RANK'])\n{lines}\n"
                      f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n")
    return script


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
    gc.collect()  # lets go of the lock of an earlier one
    result = run_here("train.py", *last_of([*knobs, *KNOBS, *more, f"--out_dir={folder / out}"]))
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_mistake_on_one_rank_ends_all_with_its_message(setting):
    """The second rank does not find the weights."""
    folder, _ = setting
    script = changed(setting, f"if rank: sys.argv = ['--base={folder / 'nowhere'}' if arg.startswith('--base=') else arg "
                              "for arg in sys.argv]")
    process = launch(setting, 2, "out", script=script)
    output = process.communicate(timeout=300)[0]  # without it the other rank would wait for ten minutes at least
    assert process.returncode and "nowhere/config.json: not found" in output
    assert not (folder / "out/step_7").exists()


def test_steps_without_a_finite_loss_are_skipped_and_counted_and_end_the_run(setting):
    folder, _ = setting
    weights = load_file(folder / "base/model.safetensors")
    weights["model.norm.weight"][:] = 3e38  # finite, as loading demands; logits and gradients are not
    save_file(weights, folder / "base/model.safetensors", {"format": "pt"})
    result = run_here("train.py", *last_of([*setting[1], *KNOBS, f"--out_dir={folder / 'out'}"]))
    assert result.returncode == 2 and "2 steps in a row without a finite loss" in result.stderr
    lines = [json.loads(line) for line in (folder / "out/log.jsonl").read_text().splitlines()]
    assert [len(line["skipped"]) for line in lines] == [8, 8] and not list((folder / "out").glob("step_*"))


def test_trunk_branches_and_keeps_its_checkpoints(setting):
    """The paper's schedule: a branch resumes a trunk's step with another schedule, momenta and rows included."""
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
def test_activation_checkpointing_changes_no_gradient(setting, kind):
    folder, _ = setting
    train_alone(setting, "plain", *KIND[kind], "--max_steps=2")
    train_alone(setting, "block", *KIND[kind], "--max_steps=2", "--activation_checkpointing=block")
    got, want = (weights(folder / run, 2) for run in ("block", "plain"))
    assert all(torch.equal(got[k], want[k]) for k in want)


def test_ranks_that_do_not_divide_the_batch_are_refused_with_the_nearest_that_do(setting, monkeypatch):
    monkeypatch.setattr("runtime.WORLD", 3)
    result = run_here("train.py", *last_of([*setting[1], *KNOBS, "--out_dir=out"]))
    assert result.returncode == 2
    assert "microbatch=1 on 3 ranks does not divide global_batch=8; the nearest that does is 9" in result.stderr


# ----------------------------------------------------------------------------- campaigns, a handful of each
@pytest.mark.slow
def test_kills_at_random_moments_lose_nothing(tmp_path):
    result = run_stage("tests/campaigns/kill_campaign.py", "--kills=6", f"--out_dir={tmp_path}", OMP_NUM_THREADS=1)
    said = result.stdout + result.stderr
    assert result.returncode == 0 and "6 kills" in said and " 0 faults" in said, said


@pytest.mark.slow
def test_sharded_and_replicated_ranks_are_the_run_of_one(tmp_path):
    """And a run that is killed on 4 ranks is resumed with 2, and with 1."""
    result = run_stage("tests/campaigns/rank_campaign.py", "--steps=7", "--runs=lora-2-none,full-4-hybrid,lora-2-full,dora-2-full", f"--out_dir={tmp_path}",
                       OMP_NUM_THREADS=1)
    assert result.returncode == 0 and len(result.stdout.splitlines()) == 6, result.stdout + result.stderr


# ----------------------------------------------------------------------------- checkpoints
def test_saving_from_copies_writes_the_same_and_its_errors_surface(tmp_path):
    from concurrent.futures import ThreadPoolExecutor
    model = tiny_model()
    optim = DecoupledAdamW(model.parameters(), lr=1e-3)
    model(torch.arange(32).view(2, 16), torch.arange(32).view(2, 16))[1].backward()
    optim.step()
    pool, folders = ThreadPoolExecutor(1), [tmp_path / "a", tmp_path / "b"]
    save_checkpoint(model, optim, folders[0], {"step": 1}, "base", 2)
    saving = save_checkpoint(model, optim, folders[1], {"step": 1}, "base", 2, pool=pool)
    optim.step()  # training goes on
    saving.result()
    for file in ("model.safetensors", "state/optimizer.safetensors", "state/state.json"):
        assert (folders[0] / "step_1" / file).read_bytes() == (folders[1] / "step_1" / file).read_bytes()
    with limited_file_size(1000):
        with pytest.raises(OSError, match="step_2 could not be saved.*newest complete checkpoint is step_1"):
            save_checkpoint(model, optim, folders[1], {"step": 2}, "base", 2, pool=pool).result()
    assert [p.name for p in folders[1].iterdir()] == ["step_1"]


def test_a_checkpoint_loses_its_name_before_it_is_deleted(tmp_path, monkeypatch):
    """Killed while an old checkpoint is deleted: no half of it under its name, and the next run removes the rest."""
    model = tiny_model()

    def save(step):
        save_checkpoint(model, DecoupledAdamW(model.parameters()), tmp_path, {"step": step}, "base", 1)

    save(1)
    with monkeypatch.context() as patched:
        patched.setattr("training.checkpoint.shutil.rmtree", lambda path, ignore_errors=False: ignore_errors or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            save(2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_1.old.tmp", "step_2"]
    lock(tmp_path).close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lock", "step_2"]


def test_checkpoint_of_before_skipped_steps_were_counted(setting):
    folder, _ = setting
    train_alone(setting, "out", "--max_steps=2")
    state = json.loads((folder / "out/step_2/state/state.json").read_text())
    del state["skipped"]
    (folder / "out/step_2/state/state.json").write_text(json.dumps(state))
    train_alone(setting, "out", "--max_steps=3", "--resume=True")
    assert json.loads((folder / "out/step_3/state/state.json").read_text())["skipped"] == 0


def test_auto_resume_starts_and_goes_on(setting):
    """The command of a job that is started again: from nothing, after a death without a checkpoint, and after one with."""
    folder, _ = setting
    train_alone(setting, "whole", "--schedule=constant")
    (folder / "out").mkdir()
    (folder / "out/log.jsonl").write_text('{"step": 0, "val": {}}\n{"step": 1, "loss": 1.0}\n')
    train_alone(setting, "out", "--schedule=constant", "--auto_resume=True", "--max_steps=3")
    train_alone(setting, "out", "--schedule=constant", "--auto_resume=True")
    same_run(folder / "out", folder / "whole")


# ----------------------------------------------------------------------------- two nodes
TWO = [*KIND["lora"], "--optimizer=adamw", "--max_steps=80", "--eval_interval=0"]


def agent(setting, node, port, out, script="train.py"):
    """A torchrun agent of its own, with one rank, as a second node would run it."""
    folder, knobs = setting
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--max_restarts=3",
         "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}", "--rdzv_id=run", "--local_addr=localhost",
         f"--rdzv_conf=is_host={int(node == 0)},keep_alive_interval=1,keep_alive_max_attempt=2", script,
         *last_of([*knobs, *KNOBS, *TWO, "--save_interval=4", "--auto_resume=True", f"--out_dir={folder / out}"])],
        cwd=ROOT, text=True, stdout=open(folder / f"{out}-{node}.txt", "a"), stderr=subprocess.STDOUT,
        # or torch 2.13's agents, which reuse the first round's address, never tell it to one that returns
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})


@pytest.mark.slow
def test_two_nodes_survive_the_loss_and_return_of_one(setting):
    folder, _ = setting
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    # the second node dies whole in its sixth step: its agent, then its rank
    dies = changed(setting, "import signal, lion\n"
                            "step, calls = lion.DecoupledAdamW.step, []\n"
                            "def step_or_die(self, *args):\n"
                            "    calls.append(1)\n"
                            "    if len(calls) == 6:\n"
                            "        os.kill(os.getppid(), signal.SIGKILL)\n"
                            "        os.kill(os.getpid(), signal.SIGKILL)\n"
                            "    return step(self, *args)\n"
                            "lion.DecoupledAdamW.step = step_or_die")
    nodes = [agent(setting, 0, port, "two"), agent(setting, 1, port, "two", script=dies)]
    assert nodes[1].wait(timeout=300) == -signal.SIGKILL, (folder / "two-0.txt").read_text()
    assert [step for step, _ in checkpoints(folder / "two")] == [4]
    time.sleep(3)  # it was away
    nodes[1] = agent(setting, 1, port, "two")
    assert [node.wait(timeout=500) for node in nodes] == [0, 0], (folder / "two-0.txt").read_text()
    assert list(log_of(folder / "two")[0]) == list(range(1, 81))
    train_alone(setting, "whole", *TWO)
    same_run(folder / "two", folder / "whole", 80)


def test_replicas_that_drift_apart_are_refused(setting):
    folder, _ = setting
    script = changed(setting, "import lion\nif rank: lion.DecoupledLionW.update = lambda *args: None")
    output = launch(setting, 2, "out", *KIND["lora"], "--shard=none", script=script).communicate(timeout=100)[0]
    assert "replicas drifted apart" in output and not checkpoints(folder / "out")


# ----------------------------------------------------------------------------- the paper's durations
def test_eight_durations_come_from_one_trunk(monkeypatch):
    def knobs(tokens):
        argv = ["config/cpt_durations.py", "--global_batch=192", "--seq_len=4096", f"--max_tokens={tokens}",
                f"--out_dir=out/math/{tokens}"]
        return configure(dict(vars(stage)), argv)

    def at(tokens):
        return step_at(tokens, 192 * 4096)

    monkeypatch.chdir(ROOT)
    trunk = knobs("20e9")
    keep = [at(n) if n >= 1e6 else int(n) for n in trunk["checkpoint_at"]]
    assert keep == [318, 636, 1018, 2034, 4069, 8138, 16276] and trunk["cooldown_steps"] == 5086 and not trunk["resume_from"]
    branches = [knobs(f"{n}e9") for n in (1, 2, 4, 8, 16)]
    assert [b["resume_from"] for b in branches] == [f"out/math/20B/step_{step}" for step in keep[2:]]
    assert [at(b["max_tokens"]) - b["cooldown_steps"] for b in branches] == keep[2:]
    assert at(20e9) == 25431 and at(4e9) == 5086
    with pytest.raises(SystemExit):
        knobs("0.5e9")
