"""
The same run on 1, 2 and 4 ranks x none, full, hybrid x LoRA and full finetuning: losses, final weights, adapters, gradients.

    python tests/rank_campaign.py --out_dir=/tmp/ranks --steps=50

One line a run: the largest difference of its losses (relative) and of its final weights from one process. Status 1 if
they differ by more than fp32's rounding (2e-5 and 1e-5), or if ranks end with different weights.
"""
import json
import shutil
from pathlib import Path

import torch
from forks import fork_ranks, make_setting, wait
from safetensors.torch import load_file

from configurator import configure

# -----------------------------------------------------------------------------
out_dir = ''
steps = 50
ranks = (1, 2, 4)
kinds = ('lora', 'full')
shards = ('none', 'full', 'hybrid')
optimizer = 'adamw'      # a sign of Lion may turn where a gradient is nearly zero
KIND = {"lora": ["--lora_rank=3", "--lora_dropout=0.2"], "full": ["--weight_decay=1e-4"]}


def train(folder, n, argv):
    """Losses and final weights of a run on n ranks."""
    shutil.rmtree(folder, ignore_errors=True)
    statuses = wait(fork_ranks(n, [*argv, f"--out_dir={folder}"], f"{folder}.txt"), 600)
    assert not any(statuses), f"{folder}.txt: {statuses}"
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [r["loss"] for r in lines if "loss" in r], load_file(next((folder / f"step_{steps}").glob("*.safetensors")))


def compare(folder):
    """Number of runs that are not the run of one process."""
    wrong = 0
    knobs = make_setting(folder / "setting") + ["--global_batch=8", "--microbatch=1", "--grad_clip=0.5", "--shard_ranks=2",
                                                f"--max_steps={steps}", f"--optimizer={optimizer}", f"--warmup_steps={steps // 5}"]
    for kind in kinds:
        losses, weights = train(folder / f"{kind}-one", 1, [*knobs, *KIND[kind]])
        for n in ranks:
            for how in shards:
                got_losses, got = train(folder / f"{kind}-{n}-{how}", n, [*knobs, *KIND[kind], f"--shard={how}"])
                apart = max(abs(a - b) / b for a, b in zip(got_losses, losses, strict=True))
                weight = max((got[k] - weights[k]).abs().max().item() for k in weights)
                same = apart < 2e-5 and weight < 1e-5 and got.keys() == weights.keys()
                wrong += not same
                print(f"{kind:5}{n} ranks, {how:7} loss {losses[0]:.4f} -> {losses[-1]:.4f}, apart {apart:.1e}; weights apart "
                      f"{weight:.1e}{'' if same else '  WRONG'}", flush=True)
    return wrong


if __name__ == "__main__":
    configure(globals())
    raise SystemExit(1 if compare(Path(out_dir)) else 0)
