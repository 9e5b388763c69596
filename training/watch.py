"""The loss on the sets that train.py watches while it trains.

    {"step": 100, "tokens": 409600, "val": {"val": 1.92, "stories": 2.31}}      a line of log.jsonl
"""
import math

import numpy as np
import torch

from model import IGNORE
from runtime import RANK, WORLD
from training.parallel import all_reduce, is_sharded
from training.rows import evenly_spaced, stack


@torch.no_grad()
def mean_loss(model, rows, microbatch, device, limit=0):
    """Mean loss per target (nats) over `limit` rows of a set (0 = all), without dropout."""
    model.eval()
    total, count = 0.0, 0
    chosen = evenly_spaced(len(rows), limit)
    for i in range(0, len(chosen), WORLD * microbatch):
        first = i + RANK * microbatch
        part = [rows[j] for j in chosen[first:first + microbatch]]
        # pad with rows without targets: a new shape would be compiled again
        tokens, targets, starts = rows[0]
        no_targets = np.full_like(targets, IGNORE)
        while len(part) < microbatch:
            part.append((tokens, no_targets, starts))
        tokens, targets, docs = stack(part, device, model.compiled)
        total += model(tokens, targets, docs if rows.doc_mask else None, reduction="sum")[1].item()
        count += int((targets != IGNORE).sum())
    model.train()
    if is_sharded(model):
        model.reshard()  # without a backward pass the parts outside the blocks would stay gathered
    total, count = all_reduce(total, count, device=device)
    return total / count if count else math.nan


def validate(model, watched, knobs, device):
    """{name: mean loss} of the sets that are watched."""
    return {name: mean_loss(model, rows, knobs.microbatch, device, knobs.eval_rows)
            for name, rows in watched.items()}
