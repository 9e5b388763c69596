"""
Kill train.py over and over, resume it, and compare the finished run with an unbroken one, bit for bit.

    python tests/campaigns/kill_campaign.py --kills=200 --out_dir=/tmp/kills    # resumes a stopped one

A kill is a SIGKILL to one rank, after which the others are ended as torchrun would, or to all ranks at
once; at a random moment, or on the border of a random phase (before or after a rename, say), which
random moments hit too rarely. After every kill each folder with a checkpoint's name must be readable as
a whole. kills.jsonl gets a line for each kill; the status is 1 if anything was wrong.
"""
import collections
import json
import mmap
import os
import random
import shutil
import signal
import time
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from forks import PHASES, fork_ranks, is_alive, make_setting, wait
from safetensors.torch import load_file

from configurator import configure

# -----------------------------------------------------------------------------
kills = 200              # in all, those of earlier sittings included
out_dir = ''
KINDS = {"lora": (1, ["--lora_rank=3", "--lora_dropout=0.2"]),
         "lora, replicas": (2, ["--lora_rank=3", "--shard=none", "--async_save=True"]),
         "full, async": (1, ["--optimizer=adamw", "--async_save=True"]),
         "full, sharded": (2, ["--optimizer=adamw", "--shard=full"]),
         "full, sharded, async": (2, ["--shard=full", "--async_save=True"])}
KNOBS = ["--max_steps=9", "--save_interval=2", "--global_batch=4", "--microbatch=1"]


def tensors_of(checkpoint):
    """Every tensor of a checkpoint's files; raises whatever is wrong with them."""
    json.loads((checkpoint / "state/state.json").read_text())
    tensors = {f"{f.name}:{k}": v for f in checkpoint.rglob("*.safetensors") for k, v in load_file(f).items()}
    assert any(checkpoint.glob("*.safetensors")) and (checkpoint / "state").is_dir()
    if (checkpoint / "state/.metadata").is_file():
        reader = dcp.FileSystemReader(checkpoint / "state")
        saved = reader.read_metadata().state_dict_metadata
        momenta = {k: torch.zeros(m.size, dtype=m.properties.dtype) for k, m in saved.items()}
        dcp.load(momenta, storage_reader=reader, no_dist=True)
        tensors.update(momenta)
    else:
        assert (checkpoint / "state/optimizer.safetensors").is_file()
    return tensors


def log_of(folder):
    """log.jsonl without its clock readings."""
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in ("seconds", "tok_per_s", "peak_gb")} for line in lines]


def differences(run, whole):
    """What of the finished run is not bit-equal to the unbroken one."""
    got, want = tensors_of(run / "step_9"), tensors_of(whole / "step_9")
    wrong = [k for k in want if k not in got or not torch.equal(got[k], want[k])] + sorted(got.keys() - want.keys())
    return wrong + (["log.jsonl"] if log_of(run) != log_of(whole) else [])


def live_and_die(kind, run, knobs, seconds, chance, beats):
    """One life of the run, from its newest checkpoint to its end or death; returns {at, phase, who} of its death or None."""
    ranks, _ = KINDS[kind]
    victim = chance.randrange(ranks)
    fatal = (victim, chance.randrange(1, 150)) if chance.random() < 0.5 else None
    all_at_once = not fatal and chance.random() < 0.5
    beats[:ranks] = bytes(ranks)
    pids = fork_ranks(ranks, [*knobs, f"--out_dir={run}", "--auto_resume=True"], f"{run}.txt", beats, fatal)
    while not fatal and chance.random() < 0.999 and not beats[victim] and is_alive(pids[victim]):
        time.sleep(0.001)  # most of a short life is its start: leave it behind, most times
    until = time.time() + (120 if fatal else chance.uniform(0, seconds / 2))
    while is_alive(pids[victim]) and time.time() < until:
        time.sleep(0.001)
    phase = PHASES[beats[victim]]
    for pid in pids if all_at_once else [pids[victim]]:
        os.kill(pid, signal.SIGKILL)  # does nothing to one that has ended
    status, = wait([pids[victim]])
    others = [pid for pid in pids if pid != pids[victim]]
    if status != -signal.SIGKILL:
        statuses = [status, *wait(others)]
        assert statuses == [0] * ranks or all_at_once, f"{run}.txt: the run ended with {statuses}"
        return None
    time.sleep(chance.choice([0, 0.2]))  # torchrun notices after a while
    for pid in others:
        os.kill(pid, signal.SIGTERM)
    wait(others, 0.5)
    return {"at": "border" if fatal else "random", "phase": phase, "who": "all" if all_at_once else "one"}


def sit(folder, chance, beats):
    """Kill until kills.jsonl has `kills` lines; returns the number of faults that were seen."""
    record = folder / "kills.jsonl"
    knobs = KNOBS + make_setting(folder / "setting")
    faults, runs = 0, 0
    seconds = {}  # of the unbroken run of each kind

    def count():
        return len(record.read_text().splitlines()) if record.exists() else 0

    while count() < kills:
        kind = chance.choice(list(KINDS))
        ranks, more = KINDS[kind]
        whole = folder / kind.replace(", ", "-")
        run = Path(f"{whole}-killed")
        if kind not in seconds:
            shutil.rmtree(whole, ignore_errors=True)
            started = time.time()
            pids = fork_ranks(ranks, [*knobs, *more, f"--out_dir={whole}"], f"{whole}.txt")
            assert wait(pids) == [0] * ranks, f"{whole}.txt"
            seconds[kind] = time.time() - started
        finished = False
        while not finished and count() < kills:
            death = live_and_die(kind, run, knobs + more, seconds[kind], chance, beats)
            for checkpoint in run.glob("step_*[0-9]"):
                try:
                    tensors_of(checkpoint)
                except Exception as e:
                    faults += 1
                    print(f"{checkpoint}: unreadable after {death}: {e!r}", flush=True)
            if death:
                with open(record, "a") as file:
                    file.write(json.dumps({"kind": kind, **death}) + "\n")
                continue
            finished = (run / "step_9").exists()
            if finished:
                wrong = differences(run, whole)
                if wrong:
                    faults += 1
                    print(f"{run}: not the unbroken run: {wrong[:5]}", flush=True)
                runs += 1
                shutil.rmtree(run)
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    print(f"{len(lines)} kills, {runs} runs finished and compared in this sitting, {faults} faults")
    for key in ("kind", "phase", "at", "who"):
        counts = collections.Counter(line[key] for line in lines).most_common()
        print(f"  {key}: " + ", ".join(f"{name} {n}" for name, n in counts))
    return faults


if __name__ == "__main__":
    configure(globals())
    warnings.filterwarnings("ignore", message="torch.distributed is")  # one process reads what many wrote
    raise SystemExit(1 if sit(Path(out_dir), random.Random(), mmap.mmap(-1, 16)) else 0)
