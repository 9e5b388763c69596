"""LoRA on Llama's projections; PEFT adapters read and written; merging, also as a script.

        x [.., K] -----> W [N, K], frozen -----------------------> + ---> y [.., N]
           |                                                       ^
           +--> dropout --> A [r, K] --> P [.., r] --> B [N, r] --> * alpha/r

    python lora.py --base=FOLDER --adapter=FOLDER --out=FOLDER      # writes a merged model folder

Projections with the same input are one matrix W (GROUPS in llama/weights.py); their adapters act on
row slices of it, so x is read once. A and B are fp32 and are cast to x's dtype where they are used.
The matmul, its backward pass and what is saved for it are in llama/lora_matmul.py; which
projections an adapter folder adapts, and at which rank, in llama/adapter_config.py; DoRA, which
also trains the rows' lengths, in llama/dora.py.
"""
import json
import math
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from llama.adapter_config import adapter_json, read_adapter_config, scale_of
from llama.adapter_files import check_embeddings, open_adapter_weights
from llama.dora import dora, dora_change, dora_parts
from llama.folder import carry_files
from llama.identity import identity_of
from llama.lora_matmul import adapter_parts, lora_matmul
from llama.pissa import beginnings, doubled, start_as_principal
from llama.weights import (GROUPS, PROJECTIONS, check_finite, fill, full_tensor, write_safetensors)
from model import Llama, Projection

# ----------------------------------------------------------------------------- knobs of the script
base = ""           # model folder the adapter was trained on
adapter = ""        # PEFT adapter folder
out = ""            # folder to write the merged model to
dtype = "float32"   # of the merged weights; bf16 rounds small updates away, their share is printed
_choices = {"dtype": ("float32", "bfloat16", "float16")}

TARGETS = {"all": PROJECTIONS, "attention": PROJECTIONS[:4], "mlp": PROJECTIONS[4:]}


# ----------------------------------------------------------------------------- the module
class LoRAProjection(nn.Module):
    """A Projection with adapters on some of its parts, whose A and B are stacked.

    sizes: {part: (rank, alpha)} of those parts. Ranks below the largest are padded with zeros,
    which stay zero in training; scales other than the largest become factors in B.
    lora: the other settings, as in model.lora."""

    def __init__(self, projection, sizes, lora):
        super().__init__()
        self.parts = projection.parts
        self.weight = projection.weight
        self.adapted = list(sizes)
        self.sizes = sizes
        self.dropout = lora["dropout"]
        self.kernel = "torch"  # see choose_kernel

        # the largest rank and scale, for all parts
        self.rank = max(rank for rank, _ in sizes.values())
        scales = [scale_of(rank, alpha, lora["rslora"]) for rank, alpha in sizes.values()]
        self.scale = max(scales, key=abs)
        self.factors = {}
        for name, scale in zip(sizes, scales):
            self.factors[name] = scale / self.scale if self.scale else 1.0

        # (start, end) of the adapted parts' rows in the weight
        spans = []
        end = 0
        for name, rows in self.parts.items():
            start = end
            end += rows
            if name in sizes:
                spans.append((start, end))
        self.spans = tuple(spans)

        # A_i [rank, K] and B_i [rows of its part, rank] of all adapters, stacked
        device = self.weight.device
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        columns = self.weight.shape[1]
        rows = sum(end - start for start, end in spans)
        A = torch.empty(len(sizes) * self.rank, columns, device=device, dtype=dtype)
        B = torch.empty(rows, self.rank, device=device, dtype=dtype)
        self.lora_A = nn.Parameter(A)
        self.lora_B = nn.Parameter(B)
        # DoRA: the lengths of the adapted rows
        self.lora_magnitude = None
        if lora["dora"]:
            self.lora_magnitude = nn.Parameter(torch.empty(rows, device=device, dtype=dtype))

    def forward(self, x):
        dropout = self.dropout if self.training else 0.0
        seeds = None
        if dropout:
            # seeds of this call's dropout masks: two numbers per adapter, on the CPU
            shape = (len(self.adapted), 2)
            seeds = torch.randint(-2 ** 31, 2 ** 31, shape, dtype=torch.int32)
        weight = self.weight.to(x.dtype)
        rows = x.flatten(0, -2)
        y = lora_matmul(self.kernel, rows, weight, self.lora_A, self.lora_B, self.spans, self.scale,
                        dropout, seeds)
        if self.lora_magnitude is not None:
            y = dora(self, y, rows, dropout, seeds)
        return y.view(*x.shape[:-1], -1)

    def init_weights(self, init="default"):
        """PEFT's: A kaiming_uniform(a=sqrt(5)), which is U(-1, 1) / sqrt(K); B = 0; DoRA's m = |W|.

        'zero_a': A = 0, B by that rule, U(-1, 1) / sqrt(rank). 'pissa': see llama/pissa.py.
        The weight must be loaded already."""
        if init == "pissa":
            start_as_principal(self)
            return
        # drawn whole on the CPU, so that values do not depend on device and sharding
        A = torch.zeros(self.lora_A.shape, dtype=self.lora_A.dtype)
        B = torch.zeros(self.lora_B.shape, dtype=self.lora_B.dtype)
        drawn = B if init == "zero_a" else A
        bound = drawn.shape[1] ** -0.5
        drawn.uniform_(-bound, bound)
        fill(self.lora_A, A)
        fill(self.lora_B, B)
        if self.lora_magnitude is not None:
            # of the full weight: under FSDP this rank's shard has other rows
            lengths = full_tensor(self.weight).to(A.dtype).norm(dim=1)
            fill(self.lora_magnitude, torch.cat([lengths[start:end] for start, end in self.spans]))

    def deltas(self):
        """Projection name -> the change of its weight, [rows, K], in the dtype of A and B."""
        if self.lora_magnitude is not None:
            changes = [dora_change(*part, self.scale) for part in dora_parts(self)]
            return dict(zip(self.adapted, changes))
        a, b = adapter_parts(self.lora_A, self.lora_B, self.spans, self.lora_A.dtype)
        return {name: self.scale * (b_i @ a_i) for name, a_i, b_i in zip(self.adapted, a, b)}


# ----------------------------------------------------------------------------- models with adapters
def resolve_targets(targets):
    """'all', 'attention', 'mlp', or names (a list, or text with commas) -> tuple of names."""
    if isinstance(targets, str):
        if targets in TARGETS:
            return TARGETS[targets]
        targets = [name.strip() for name in targets.split(",")]
    unknown = [name for name in targets if name not in PROJECTIONS]
    if unknown or not targets:
        found = ", ".join(unknown) or "none"
        raise ValueError(f"lora_targets: found {found}; expected {', '.join(TARGETS)} "
                         f"or some of {', '.join(PROJECTIONS)}")
    return tuple(targets)


def apply_lora(model, rank, alpha, dropout=0.0, targets="all", rslora=False, dora=False):
    """Freeze a model and put new adapters on the targets of every block; returns the model.

    The scale is alpha / rank, or alpha / sqrt(rank) with rslora. For a model on meta, call
    init_adapters once it has its weights. Raises ValueError for invalid values."""
    names = resolve_targets(targets)
    if rank < 1 or not alpha > 0 or not 0 <= dropout <= 0.99:
        raise ValueError("LoRA needs rank >= 1, alpha > 0 and 0 <= dropout <= 0.99, "
                         f"found {rank}, {alpha}, {dropout}")
    lora = dict(rank=rank, alpha=alpha, dropout=dropout, targets=names, rslora=rslora, dora=dora)
    of_block = dict.fromkeys(names, (rank, alpha))
    add_adapters(model, lora, [of_block] * len(model.layers))
    if model.device.type != "meta":
        init_adapters(model)
    return model


def add_adapters(model, lora, sizes):
    """apply_lora without initialization: A and B are left unfilled, no random number is drawn.

    lora: becomes model.lora; sizes: {projection: (rank, alpha)} for each block."""
    if any(isinstance(module, LoRAProjection) for module in model.modules()):
        raise ValueError("the model already has adapters")
    model.requires_grad_(False)
    for block, of_block in zip(model.layers, sizes):
        for parent in (block.self_attn, block.mlp):
            for group, plain in list(parent.named_children()):
                of_group = {name: of_block[name] for name in GROUPS[group] if name in of_block}
                if of_group:
                    setattr(parent, group, LoRAProjection(plain, of_group, lora))
    model.lora = lora
    return model


def init_adapters(model, init="default"):
    """Initialize A and B of every adapter, from torch's random state; init as in init_weights."""
    if init == "pissa":
        model.base_identity = identity_of(model)  # whose weights are about to change
    for module in model.modules():
        if isinstance(module, LoRAProjection):
            module.init_weights(init)


def merge_lora(model):
    """Add each adapter to its weight in fp32 (or better), round once, and drop the adapters."""
    for path, module in list(model.named_modules()):
        if not isinstance(module, LoRAProjection):
            continue
        # the rows of each adapted part
        with torch.no_grad():
            deltas = module.deltas()
            for part, (start, end) in zip(module.adapted, module.spans):
                delta = deltas[part]
                norm = delta.norm().item()
                if not math.isfinite(norm):
                    raise ValueError(f"{path}: the adapter's change of {part} has the norm "
                                     f"{norm:.3g} in {delta.dtype}; expected a finite one")
                merged = module.weight[start:end].to(delta.dtype) + delta
                module.weight[start:end] = merged.to(module.weight.dtype)
        # a plain Projection that reuses the weight
        with torch.device("meta"):
            plain = Projection(module.weight.shape[1], module.parts)
        plain.weight = module.weight
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, plain)
    del model.lora
    return model


# ----------------------------------------------------------------------------- PEFT folders: out
class Place(NamedTuple):
    """Where a PEFT tensor is in the model: some rows of a parameter, and its first columns."""
    parameter: nn.Parameter
    row: int       # the first one
    shape: tuple   # rows, and columns of a matrix
    factor: float  # parameter = factor * tensor of the file

    def view(self, tensor):
        """What the file holds of a tensor in the parameter's shape."""
        return tensor[self.row:self.row + self.shape[0]][..., :self.shape[-1]]


def adapter_tensors(model):
    """PEFT tensor name -> its Place."""
    tensors = {}
    for path, module in model.named_modules():
        if not isinstance(module, LoRAProjection):
            continue
        parent, _, _ = path.rpartition(".")
        A = module.lora_A
        B = module.lora_B
        m = module.lora_magnitude
        first_of_A = first_of_B = 0
        for name, (start, end) in zip(module.adapted, module.spans):
            published = f"base_model.model.model.{parent}.{name}"
            rank, _ = module.sizes[name]
            factor = module.factors[name]
            rows = end - start
            tensors[f"{published}.lora_A.weight"] = Place(A, first_of_A, (rank, A.shape[1]), 1.0)
            tensors[f"{published}.lora_B.weight"] = Place(B, first_of_B, (rows, rank), factor)
            if m is not None:
                tensors[f"{published}.lora_magnitude_vector"] = Place(m, first_of_B, (rows,), 1.0)
            first_of_A += module.rank
            first_of_B += rows
    return tensors


def save_adapter(model, folder, base_name="", get=full_tensor):
    """Write adapter_config.json and adapter_model.safetensors as peft 0.11.1 names them.

    get(parameter) is the tensor to write, by default the parameter's current value. Under FSDP all
    ranks must call this: all gather, rank 0 writes."""
    places = adapter_tensors(model)
    pissa_starts = beginnings(model)  # PiSSA's file also has what A and B began as
    tensors = {}
    for name, place in places.items():
        p = place.parameter
        if not place.factor:
            raise ValueError(f"{name}: alpha 0 beside another alpha is merged, but not saved again")
        part = place.view(get(p)) / place.factor
        if p in pissa_starts:
            begun, axis = pissa_starts[p]
            part = torch.cat([part, place.view(begun).to(part.device)], axis)
        tensors[name] = part.to("cpu").contiguous()
    metadata = {"format": "pt", **identity_of(model)}
    if dist.is_initialized() and dist.get_rank() != 0:
        return

    # the settings: rank and alpha of each module
    sizes = {}
    for path, module in model.named_modules():
        if isinstance(module, LoRAProjection):
            parent, _, _ = path.rpartition(".")
            for name, size in module.sizes.items():
                sizes[f"model.{parent}.{name}"] = size
    lora = dict(model.lora)
    if pissa_starts:
        # all are of one size
        lora["rank"], lora["alpha"] = doubled(lora["rank"], lora["alpha"], lora["rslora"])
        sizes = dict.fromkeys(sizes, (lora["rank"], lora["alpha"]))
    config = adapter_json(lora, sizes, len(model.layers), base_name)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    write_safetensors(tensors, folder / "adapter_model.safetensors", metadata)


# ----------------------------------------------------------------------------- PEFT folders: in
def load_adapter(model, folder):
    """Put the adapters of a PEFT folder on a plain model, in place; returns the model.

    Raises FileNotFoundError, or ValueError as apply_saved_lora and load_adapter_weights do."""
    return load_adapter_weights(apply_saved_lora(model, folder, trains=False), folder)


def apply_saved_lora(model, folder, trains=True):
    """Add adapters with the settings of a PEFT folder, not its weights; returns the model.

    Raises ValueError when the settings are not supported or match nothing, or if it `trains` and
    scales differ within a group: training would then move their B at different speeds."""
    config = read_adapter_config(folder)
    sizes = []
    found = set()
    for layer in range(len(model.layers)):
        adapted = [name for name in PROJECTIONS if config.adapts(layer, name)]
        of_block = {name: config.size_of(layer, name) for name in adapted}
        sizes.append(of_block)
        found.update(of_block)
    if not found:
        raise ValueError(f"{folder}: target_modules of adapter_config.json match no projection "
                         "of this model")
    names = tuple(name for name in PROJECTIONS if name in found)
    lora = dict(rank=config.rank, alpha=config.alpha, dropout=config.dropout, targets=names,
                rslora=config.rslora, dora=config.dora)
    add_adapters(model, lora, sizes)
    for path, module in model.named_modules():
        if not trains or not isinstance(module, LoRAProjection):
            continue
        if set(module.factors.values()) != {1.0}:
            raise ValueError(f"{folder}: rank_pattern or alpha_pattern gives {path} the sizes "
                             f"{module.sizes}; to be trained here they need one alpha / rank: "
                             "train it with peft, or merge it")
    return model


@torch.no_grad()
def load_adapter_weights(model, folder):
    """Fill a model's adapters from a PEFT folder; raises as open_adapter_weights."""
    places = adapter_tensors(model)
    expected = {name: place.shape for name, place in places.items()}
    where = open_adapter_weights(Path(folder), expected, lambda: identity_of(model))

    def of_base(name):
        return model.head_weight if name == "lm_head" else model.embed_tokens.weight

    check_embeddings(folder, where, of_base)
    # collect the tensors of each parameter, then fill it once
    values = {}
    for name, place in places.items():
        p = place.parameter
        tensor = where[name].get_tensor(name)
        check_finite(tensor, folder, name)
        if p not in values:
            values[p] = torch.zeros(p.shape, dtype=p.dtype)
        place.view(values[p]).copy_(tensor.to(p.dtype) * place.factor)
    for p, value in values.items():
        fill(p, value)
    return model


# ----------------------------------------------------------------------------- the script
def lost_to_rounding(model, dtype):
    """Share |round(W + D) - (W + D)| / |D| of the adapters' change D that dtype rounds away."""
    lost = 0.0
    total = 0.0
    for module in model.modules():
        if not isinstance(module, LoRAProjection):
            continue
        deltas = module.deltas()
        for name, (start, end) in zip(module.adapted, module.spans):
            delta = deltas[name]
            # where adding the change in fp32 and in dtype differ
            exact = module.weight[start:end] + delta
            rounded = exact.to(dtype).to(exact.dtype)
            lost += (rounded - exact).square().sum().item()
            total += delta.square().sum().item()
    return (lost / total) ** 0.5 if total else 0.0


@torch.inference_mode()
def merge_folders(base, adapter, out, dtype):
    """Write base + adapter to the folder `out` in `dtype`, and check that it computes the same.

    Returns (largest logit difference of the written model, largest logit, share lost to rounding).
    Raises ValueError, leaving nothing under `out`, when merged and unmerged logits disagree."""
    if Path(out).exists():
        raise ValueError(f"{out}: exists already; delete it or name another")

    # logits of some tokens before and after merging
    model = load_adapter(Llama.from_pretrained(base), adapter).eval()
    length = min(64, model.config.max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (1, length), generator=generator)
    want, _ = model(tokens)
    largest = want.abs().max().item()
    lost = lost_to_rounding(model, dtype)
    merge_lora(model)
    merged, _ = model(tokens)
    in_fp32 = (merged - want).abs().max().item()

    # write under a temporary name, and read it back
    out = Path(out)
    partial = out.with_name(f"{out.name}.tmp")
    try:
        model.save_pretrained(partial, dtype)
        again, _ = Llama.from_pretrained(partial)(tokens)
    except ValueError:  # beyond what dtype holds
        shutil.rmtree(partial)
        raise
    written = (again - want).abs().max().item()

    # fp32 may differ by arithmetic alone, 16-bit weights by their rounding as well
    # NaN fails both comparisons; an all-zero row has lost its token to an overflow on the way
    bound = 1e-4 if dtype == torch.float32 else 0.1
    agrees = in_fp32 <= 1e-4 * largest and written <= bound * largest
    if not agrees or not want.any(-1).all():
        shutil.rmtree(partial)
        raise ValueError(f"merged and unmerged logits differ by {written:.3g} (largest logit "
                         f"{largest:.3g}, {in_fp32:.3g} before rounding to {dtype}): "
                         "nothing was written")

    # add the tokenizer, and only then give it its final name
    carry_files(base, partial)
    partial.rename(out)
    return written, largest, lost


if __name__ == "__main__":
    from configurator import configure
    from runtime import one_line_errors

    with one_line_errors():
        for name, value in configure(globals()).items():
            if not value:
                raise ValueError(f"{name} is not set; see --help")
        difference, largest, lost = merge_folders(base, adapter, out, getattr(torch, dtype))
        print(f"{out}: merged and unmerged logits agree to {difference:.3g} "
              f"(largest logit "
              f"{largest:.3g}); {lost:.2%} of the change was lost to rounding to {dtype}")
