"""A causal test of intruder dimensions: the same adapter with them scaled down.

    python -m analysis.soften --adapter=out/r16/step_400 --out=out/r16-soft --soften=0.75

    W = W0 + D has intruders u_j (analysis/intruders.py)
    D' = D + (soften - 1) sum of s_j u_j v_j^T      has rank r + as many as they are, at most
    OUT                                             a PEFT folder for D', or for its best rank r

If intruders cause forgetting, OUT forgets less and has learned nearly as much: judge both folders
with eval_loss.py. Not a knob of lora.py, which analysis/ is built on: imports point down.
"""
import json
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from analysis.folders import adapter_name, base_named_by, open_adapter, open_model
from analysis.intruders import check_intruder_knobs, softened
from configurator import configure
from llama.adapter_config import adapter_json, is_adapter, module_path
from llama.identity import identity_of_files
from llama.weights import PROJECTIONS, write_safetensors
from model import LlamaConfig
from runtime import one_line_errors, pick_device

# -----------------------------------------------------------------------------
adapter = ''             # PEFT folder, or checkpoint of a LoRA run
base = ''                # model folder it was trained on; '' = the one it names
out = ''                 # PEFT folder to write
soften = 0.75            # what is left of an intruder: 1 = all of it, 0 = nothing
intruder_k = 10          # so many leading directions of W may be intruders
intruder_eps = 0.5       # they are if no |cosine| with a direction of W0 is at least that
rank = 'kept'            # kept: the best of the adapter's rank, as peft | exact: what it takes
device = 'auto'          # auto | cpu | cuda | cuda:N
_choices = {'rank': ('kept', 'exact')}


class Softened(NamedTuple):
    """What became of an adapter."""
    tensors: dict      # PEFT tensor name -> fp32 tensor
    sizes: dict        # module -> (rank, alpha)
    intruders: int
    directions: int    # that were looked at
    lost: float        # |what the rank could not hold| / |the softened change|


def factors_of(D, rank):
    """A [rank, n] and B [m, rank] of the best approximation of D [m, n] with this rank, fp64, and
    the squares it leaves out and those of D. Both factors get the roots of the singular values."""
    U, S, Vh = torch.linalg.svd(D, full_matrices=False)
    kept = min(rank, len(S))
    roots = S[:kept].sqrt()
    # rows of zeros where the rank is larger than D's sides
    A = D.new_zeros(rank, D.shape[1])
    B = D.new_zeros(D.shape[0], rank)
    A[:kept] = roots[:, None] * Vh[:kept]
    B[:, :kept] = U[:, :kept] * roots
    squares = S.square()
    return A, B, squares[kept:].sum().item(), squares.sum().item()


@torch.inference_mode()
def soften_adapter(before, tuned, blocks, share, k, eps, is_exact, device):
    """The Softened of an adapter.

    before, tuned: Checkpoints (analysis/folders.py) of the base and the adapter; blocks: how many
    the base has; share: what is left of an intruder. is_exact: ranks grow by the intruders of
    their projection, and alphas with them, so that scales stay; else the best of the old rank is
    taken."""
    tensors = {}
    sizes = {}
    total, directions = 0, 0
    left_out, squares = 0.0, 0.0
    places = [(layer, module) for layer in range(blocks) for module in PROJECTIONS]
    for layer, module in tqdm(places, disable=None):
        if not tuned.has(layer, module):
            continue
        # with its intruders scaled
        W0 = before.read_weight(layer, module, device).double()
        A, B, scale, _ = tuned.read_adapter(layer, module, device)
        W, count = softened(W0, W0 + scale * (B @ A), share, k, eps)
        total += count
        directions += min(k, *W.shape)
        # as factors again; those without intruders stay as they are
        rank, alpha = tuned.config.size_of(layer, module)
        if count:
            if is_exact:
                grown = min(rank + count, *W.shape)
                growth = grown / rank
                alpha *= growth ** 0.5 if tuned.config.rslora else growth
                rank = grown
            A, B, missing, whole = factors_of((W - W0) / scale, rank)
            left_out += missing * scale ** 2
            squares += whole * scale ** 2
        else:
            squares += (W - W0).square().sum().item()
        path = module_path(layer, module)
        sizes[path] = (rank, alpha)
        tensors[adapter_name(path, "A.weight")] = A.float().cpu().contiguous()
        tensors[adapter_name(path, "B.weight")] = B.float().cpu().contiguous()
    lost = (left_out / squares) ** 0.5 if squares else 0.0
    return Softened(tensors, sizes, total, directions, lost)


def write_adapter(folder, found, config, blocks, base, metadata):
    """A PEFT folder of a Softened; config: the AdapterConfig it came from."""
    modules = {path.rpartition(".")[2] for path in found.sizes}
    targets = [name for name in PROJECTIONS if name in modules]
    lora = dict(rank=config.rank, alpha=config.alpha, dropout=config.dropout, targets=targets,
                rslora=config.rslora, dora=False)
    content = adapter_json(lora, found.sizes, blocks, str(base))
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(content, indent=2, sort_keys=True))
    write_safetensors(found.tensors, folder / "adapter_model.safetensors", metadata)


if __name__ == "__main__":
    with one_line_errors():
        configure(globals())
        device = pick_device(device)
        if not adapter or not out:
            raise ValueError("adapter or out is not set; see --help")
        if not 0 <= soften <= 1:
            raise ValueError(f"soften must be 0 to 1, found {soften}")
        check_intruder_knobs(intruder_k, intruder_eps)
        if not is_adapter(adapter):
            raise ValueError(f"adapter: {adapter} holds no adapter_config.json")
        if Path(out).exists():
            raise ValueError(f"{out}: exists already; delete it or name another")

        base = base or base_named_by([Path(adapter)])
        shape = LlamaConfig.from_json(base)
        blocks = shape.num_hidden_layers
        before = open_model(base, shape)
        tuned = open_adapter(adapter, shape, before)
        if tuned.config.dora:
            raise ValueError(f"{adapter}: DoRA's change is not B A, into which the softened one "
                             "could go back; soften an adapter without DoRA")
        found = soften_adapter(before, tuned, blocks, soften, intruder_k, intruder_eps,
                               rank == "exact", device)

        # under another name until it is whole
        partial = Path(out).with_name(f"{Path(out).name}.tmp")
        metadata = {"format": "pt", **identity_of_files(before.files)}
        write_adapter(partial, found, tuned.config, blocks, base, metadata)
        partial.rename(out)
        print(f"{out}: {found.intruders} of {found.directions} leading directions were intruders "
              f"and are scaled by {soften}; {found.lost:.2%} of the change did not fit into its "
              "rank\nbefore and after: eval_loss.py --data=LEARNED,SOURCE "
              f"--model={adapter} and --model={out}")
