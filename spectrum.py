"""Stage 4: why. Singular values of every projection before (W0) and after (W) finetuning, and of
the change D = W - W0; how many of them hold 90% of the sum of squares (the effective rank); what a
random matrix would give; whether W keeps W0's leading directions, and has intruders among its own.

    singular values 5 4 2 1    squares 25 16 4 1    running share 54% 89% 98% 100%    rank 3

    effective rank of SmolLM2-135M's q_proj [576 x 576] after 100 steps on GSM8K, mean of 30 blocks
    Gaussian matrix      ##############################                 294
    W0                   ####################                           195
    W - W0, full         #######                                        67
    W - W0, LoRA r=16    #                                              5.5 (Gaussian A and B: 14)

    python spectrum.py --tuned=out/gsm8k-full       # every checkpoint of a run, against its base
    python spectrum.py --base=models/llama2-7b --tuned=out/a/step_9,out/b/step_9 --out=out/ab.json

A checkpoint is a model folder or a PEFT adapter folder. Tensors are read one by one, so
this takes the memory of a few fp64 matrices. Finished matrices are saved in OUT.part; repeat the
command to resume. `python -m paper.plot` draws OUT.
"""
import json
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from analysis.chance import (random_edge, random_lora_singular_values, random_singular_values,
                             rounding_share)
from analysis.directions import compare_directions, leading_vectors
from analysis.folders import base_named_by, find_checkpoints, open_checkpoint, open_model
from analysis.intruders import check_intruder_knobs, intruders, left_vectors
from analysis.kept import check_made_with, default_out, resume_from
from analysis.singular import UNIT, lora_singular_values, singular_values
from analysis.table import summary
from configurator import configure
from llama.dora import dora_change
from lora import resolve_targets
from model import LlamaConfig
from runtime import device_name, one_line_errors, peak_memory, pick_device, versions, write_whole
from training.checkpoint import read_state

# -----------------------------------------------------------------------------
base = ''                # model folder of W0; '' = the one the checkpoints name
tuned = ()               # checkpoints, or a run folder for all of its checkpoints
out = ''                 # JSON file; '' = RUN/spectrum.json, if all checkpoints are of one run
modules = 'all'          # all | attention | mlp | names with commas, of q k v o gate up down _proj
layers = ()              # numbers of blocks; none = all
fractions = (0.5, 0.9, 0.99)   # effective rank: values that hold this share of the squares
subspaces = (1, 4, 16, 64)     # overlap of this many leading directions; none = skip it
intruder_k = 10          # test this many leading directions of W for intruders; 0 = none
intruder_eps = 0.5       # an intruder has no |cosine| of this or more with any of W0's
method = 'auto'          # gram: eigenvalues of A^T A in fp64 | svd | auto: gram if accurate
tolerance = 1e-6         # auto: largest error of a singular value, as a share of the largest
device = 'auto'          # auto | cpu | cuda | cuda:N
_types = {'layers': int}
_choices = {'method': ('auto', 'gram', 'svd')}


# ----------------------------------------------------------------------------- one spectrum
def effective_rank(singular_values, fraction=0.9):
    """Least number of singular values that hold `fraction` of the sum of squares; 0 if all are 0.

    The paper's figure 6, which says "variance explained": its values follow from squares. Raises
    ValueError for values that are negative or not finite, or a fraction outside (0, 1]."""
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1], found {fraction}")
    values = np.sort(np.asarray(singular_values, dtype=np.float64))[::-1]
    if not np.isfinite(values).all() or (values < 0).any():
        raise ValueError("singular values must be finite and not negative")
    # the squares, summed from the largest on
    squares = values ** 2
    if not squares.any():
        return 0
    running = squares.cumsum()
    return int((running < fraction * running[-1]).sum()) + 1


def describe(values, error, method, shape, fractions, lora_rank=None):
    """The record of a spectrum, compared with a random matrix of the same shape and norm.

    With lora_rank, with the product of two random factors of that rank."""
    if lora_rank is None:
        random_values = random_singular_values(*shape)
    else:
        random_values = random_lora_singular_values(*shape, lora_rank)

    # effective ranks
    ranks = {str(share): effective_rank(values, share) for share in fractions}
    random_ranks = {str(share): effective_rank(random_values, share) for share in fractions}

    # values above the largest that a random matrix of this norm has
    norm = values.square().sum().sqrt().item()
    above = values[values > norm * random_edge(*shape)]
    above_share = (above.norm() / norm).item() ** 2 if norm else 0.0
    nine_digits = [float(f"{value:.9g}") for value in values.tolist()]
    return {"norm": norm, "effective_rank": ranks, "random_rank": random_ranks,
            "above_random": len(above), "above_random_share": above_share,
            "error": error, "method": method, "singular_values": nine_digits}


# ----------------------------------------------------------------------------- one projection
def analyse(before, checkpoints, layer, module, device, fractions, subspaces, method, tolerance,
            intruder_k=0, intruder_eps=0.5):
    """Records of one projection: W0, then W and D of every checkpoint that holds it."""
    how = (method, tolerance, fractions)
    W0 = before.read_weight(layer, module, device).double()
    shape = tuple(W0.shape)
    sizes = [k for k in subspaces if k <= min(shape)]
    place = {"layer": layer, "module": module, "shape": shape}

    # the base: its spectrum and leading directions
    of_W0 = singular_values(W0, *how)
    record = describe(*of_W0, shape, fractions)
    records = [{**place, "checkpoint": None, "matrix": "W0", **record}]
    if sizes:
        leading = leading_vectors(W0, sizes, of_W0[0])
    if intruder_k:
        left = left_vectors(W0)

    for i, checkpoint in enumerate(checkpoints):
        if not checkpoint.has(layer, module):
            continue
        # the change; LoRA's singular values come from its factors
        if checkpoint.rank is None:
            stored = checkpoint.read_weight(layer, module, device)
            W = stored.double()
            D = W - W0
            of_D = singular_values(D, *how)
            rounding = rounding_share(stored, D)
        else:
            A, B, scale, m = checkpoint.read_adapter(layer, module, device)
            D = scale * (B @ A)
            values = lora_singular_values(A, B, scale)
            error = max(shape) * UNIT * values[0].item()
            of_D = values, error, "lora"
            if m is not None:  # DoRA's change has no factors
                D = dora_change(W0, A, B, m, scale)
                of_D = singular_values(D, *how)
            W = W0 + D
            rounding = 0.0

        # the finetuned weights
        of_W = singular_values(W, *how)
        record = describe(*of_W, shape, fractions)
        if sizes:
            record.update(compare_directions(leading, W, of_W[0], D, sizes))
        if intruder_k:
            record.update(intruders(W0, W, intruder_k, intruder_eps, left, of_W[0]))
        records.append({**place, "checkpoint": i, "matrix": "W", **record})
        # the change
        lora_rank = len(A) if of_D[2] == "lora" else None
        record = describe(*of_D, shape, fractions, lora_rank)
        record["rounding_share"] = rounding
        records.append({**place, "checkpoint": i, "matrix": "D", **record})
    return records


# ----------------------------------------------------------------------------- the run
if __name__ == "__main__":
    with one_line_errors():
        config = configure(globals())
        device = pick_device(device)

        if not fractions or min(fractions) <= 0 or max(fractions) >= 1:
            raise ValueError(f"fractions must be in (0, 1), found {fractions}")
        if min(subspaces, default=1) < 1 or tolerance <= 0:
            raise ValueError("subspaces and tolerance must be positive, "
                             f"found {subspaces}, {tolerance}")
        if intruder_k:
            check_intruder_knobs(intruder_k, intruder_eps)

        # what to read, where to write
        folders = find_checkpoints(tuned)
        path = Path(out) if out else default_out(folders)
        base = base or base_named_by(folders)
        shape = LlamaConfig.from_json(base)
        modules = resolve_targets(modules)
        blocks = range(shape.num_hidden_layers)
        layers = layers or tuple(blocks)
        if not set(layers) <= set(blocks):
            raise ValueError(f"layers: found {', '.join(map(str, layers))}; "
                             f"{base} has 0 to {blocks[-1]}")
        before = open_model(base, shape)
        checkpoints = [open_checkpoint(folder, shape, before) for folder in folders]

        # what the numbers depend on: a file made with other settings is not continued
        identities = [[checkpoint.folder.name, checkpoint.identity] for checkpoint in checkpoints]
        made_with = {"base": before.identity, "checkpoints": identities,
                     "modules": modules, "layers": layers, "fractions": fractions,
                     "subspaces": subspaces, "method": method, "tolerance": tolerance,
                     "intruder_k": intruder_k, "intruder_eps": intruder_eps}
        made_with = json.loads(json.dumps(made_with))  # tuples become lists, as in the file
        share = 0.9 if 0.9 in fractions else fractions[0]
        if path.is_file():
            check_made_with(path, made_with)
            try:
                text = summary(json.loads(path.read_text())["matrices"], checkpoints, share)
            except (ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
                raise ValueError(f"{path}: damaged ({e!r}); delete it") from None
            print(f"{text}\n{path} is complete already")
            raise SystemExit(0)

        # projection by projection, each kept as a line of OUT.part
        part = Path(f"{path}.part")
        done = resume_from(part, made_with)
        started = time.perf_counter()
        progress = tqdm(total=len(layers) * len(modules), initial=len(done))
        matrices = []
        with open(part, "a") as file, progress, torch.inference_mode():
            for layer in layers:
                for module in modules:
                    records = done.get((layer, module))
                    if records is None:
                        progress.set_postfix_str(f"block {layer} {module}")
                        records = analyse(before, checkpoints, layer, module, device,
                                          fractions, subspaces, method, tolerance,
                                          intruder_k, intruder_eps)
                        file.write(json.dumps(records) + "\n")
                        file.flush()
                        progress.update()
                    matrices += records

        # OUT, and the table
        described = []
        for checkpoint in checkpoints:
            state = read_state(checkpoint.folder)
            described.append({"folder": str(checkpoint.folder), "step": state.get("step"),
                              "tokens": state.get("tokens"), "lora_rank": checkpoint.rank})
        result = {"settings": config, "device": device_name(device), "versions": versions(),
                  "made_with": made_with, "kind": "spectrum", "base": str(base),
                  "checkpoints": described, "matrices": matrices}
        write_whole(path, json.dumps(result))
        part.unlink()
        print(summary(matrices, checkpoints, share))
        seconds = time.perf_counter() - started
        worst = max(r["error"] / (max(r["singular_values"]) or 1) for r in matrices)
        print(f"wrote {path}: {len(matrices)} spectra in {seconds:.0f} s, {device_name(device)}, "
              f"peak memory {peak_memory(device):.2f} GB; singular values are good to {worst:.0e} "
              "of the largest of their matrix")
