"""
Peak memory of every rank, predicted and measured, of a model of 47M parameters on CPUs.

    python tests/campaigns/rank_memory.py --out_dir=/tmp/memory
    python tests/campaigns/rank_memory.py --out_dir=/tmp/memory --ranks=2 --shards=full --more=--lora_rank=16,--microbatch=2

Measured is VmHWM above what the rank used before it made the model, after three steps; status 1 if a
prediction is off by more than 10%. glibc has to give freed tensors back at once (ALLOCATOR), or its reuse of
memory would be measured as well.
"""
import os
import re
import shutil
import sys
from pathlib import Path

ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
if __name__ == "__main__" and not ALLOCATOR.items() <= os.environ.items():
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALLOCATOR})

import numpy as np  # noqa: E402
from forks import fork, fork_ranks, wait  # noqa: E402

from configurator import configure  # noqa: E402

# -----------------------------------------------------------------------------
out_dir = ''
ranks = (1, 2, 4)
shards = ('none', 'full')
more = ()                # further knobs of train.py
SHAPE = dict(vocab_size=8192, hidden_size=512, intermediate_size=1408, num_hidden_layers=12, num_attention_heads=8,
             num_key_value_heads=8, head_dim=64, max_position_embeddings=512)


def make_base(folder):
    from test_train import write_tokens

    from model import Llama, LlamaConfig
    Llama(LlamaConfig(**SHAPE)).init_weights(0).save_pretrained(folder / "base")
    write_tokens(folder / "data", np.random.default_rng(0).integers(3, 8000, (12, 256)), vocab_size=8192)


def measure(folder, n, how):
    """(predicted, measured of each rank) in GB."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    (folder / "out.txt").unlink(missing_ok=True)
    knobs = {"base": folder / "base", "data": folder / "data", "out_dir": folder / "out", "max_steps": 3, "device": "cpu",
             "dtype": "float32", "global_batch": 4, "microbatch": 1, "shard": how, "learning_rate": 1e-4}
    knobs.update(knob.removeprefix("--").split("=") for knob in more)
    knobs.update({} if "lora_rank" in knobs else {"scratch": True})  # no pages of a mapped file in the count
    statuses = wait(fork_ranks(n, [f"--{k}={v}" for k, v in knobs.items()], folder / "out.txt"), 600)
    said = (folder / "out.txt").read_text()
    assert not any(statuses), said
    print(re.search(r"predicted memory of a rank, GB: (.*);", said)[1])
    return (float(re.search(r"together ([\d.]+);", said)[1]),
            [float(x) for x in re.search(r"above its start: (.*) GB", said)[1].split(", ")])


if __name__ == "__main__":
    configure(globals())
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    assert wait([fork(lambda: make_base(folder), folder / "base.txt")]) == [0], (folder / "base.txt").read_text()
    far = 0
    for n in ranks:
        for how in shards if n > 1 else ("none",):
            predicted, measured = measure(folder, n, how)
            far += any(abs(m / predicted - 1) > 0.1 for m in measured)
            print(f"{n} ranks, {how}: predicted {predicted:.3f} GB, measured " +
                  ", ".join(f"{m:.3f} ({m / predicted - 1:+.1%})" for m in measured), flush=True)
    raise SystemExit(1 if far else 0)
