"""
The same run on 1, 2, 4 ranks x none, full, hybrid x LoRA, full finetuning, DoRA: losses, weights; resharding.

    python tests/campaigns/rank_campaign.py --out_dir=/tmp/ranks --steps=50

One line a run: the largest difference of its losses (relative) and of its final weights from one process.
The last two runs resume, with 2 ranks and with 1, a checkpoint of a sharded run that was killed on 4.
Status 1 if one differs by more than fp32's rounding (2e-5 and 1e-5). That replicas stay equal and frozen
weights have no gradient is checked by train.py itself.
"""
import itertools
import json
import os
import shutil
import signal
import time
from pathlib import Path

from forks import fork_ranks, make_setting, wait
from safetensors.torch import load_file

from configurator import configure

# -----------------------------------------------------------------------------
out_dir = ''
steps = 50
runs = tuple(f"{kind}-{ranks}-{how}" for kind, ranks, how in itertools.product(("lora", "full", "dora"), (1, 2, 4),
                                                                              ("none", "full", "hybrid")))
KIND = {"lora": ["--lora_rank=3", "--lora_dropout=0.2"], "full": ["--weight_decay=1e-4"],
        "dora": ["--lora_rank=3", "--lora_dropout=0.2", "--dora=True", "--lora_targets=q_proj,v_proj,o_proj,up_proj"]}
# a sign of Lion may turn where a gradient is nearly zero
KNOBS = ["--optimizer=adamw", "--global_batch=8", "--microbatch=1", "--grad_clip=0.5", "--shard_ranks=2", "--warmup_steps=1"]


def results(folder):
    """Losses and final weights of a run."""
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [r["loss"] for r in lines if "loss" in r], load_file(next((folder / f"step_{steps}").glob("*.safetensors")))


def train(folder, ranks, knobs, *more):
    statuses = wait(fork_ranks(ranks, [*knobs, *more, f"--out_dir={folder}", "--auto_resume=True"], f"{folder}.txt"), 600)
    assert not any(statuses), f"{folder}.txt: {statuses}"
    return folder


def kill_half_way(folder, knobs):
    """Kill a run of 4 ranks after a checkpoint; leaves its first one."""
    pids = fork_ranks(4, [*knobs, "--save_interval=2", "--keep_last=0", f"--out_dir={folder}"], f"{folder}.txt")
    while not (folder / "step_2").exists():
        time.sleep(0.001)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    wait(pids)
    for later in folder.glob("step_*"):
        if later.name != "step_2":
            shutil.rmtree(later)
    assert (folder / "step_2/state/.metadata").is_file()


def is_same(name, folder, whole):
    """Print how far a run is from the one of one process, and whether that is fp32's rounding."""
    (losses, weights), (want_losses, want) = results(folder), results(whole)
    apart = max(abs(a - b) / b for a, b in zip(losses, want_losses, strict=True))
    weight = max((weights[k] - want[k]).abs().max().item() for k in want)
    same = apart < 2e-5 and weight < 1e-5 and weights.keys() == want.keys()
    print(f"{name:24} loss {losses[0]:.4f} -> {losses[-1]:.4f}, apart {apart:.1e}; weights apart {weight:.1e}"
          f"{'' if same else '  WRONG'}", flush=True)
    return same


def campaign(folder):
    knobs = make_setting(folder / "setting") + [*KNOBS, f"--max_steps={steps}"]
    for old in folder.glob("run-*"):
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    whole = {kind: train(folder / f"run-{kind}", 1, [*knobs, *KIND[kind]]) for kind in KIND}
    same = []
    for run in runs:
        kind, ranks, how = run.split("-")
        same.append(is_same(run, train(folder / f"run-{run}", int(ranks), [*knobs, *KIND[kind]], f"--shard={how}"), whole[kind]))
    sharded = [*knobs, *KIND["full"], "--shard=full"]
    kill_half_way(folder / "run-killed", sharded)
    for ranks in (2, 1):
        again = shutil.copytree(folder / "run-killed", folder / f"run-killed-{ranks}")
        same.append(is_same(f"full-full, 4 ranks -> {ranks}", train(again, ranks, sharded), whole["full"]))
    return all(same)


if __name__ == "__main__":
    configure(globals())
    raise SystemExit(0 if campaign(Path(out_dir)) else 1)
