"""Weights in and out: a published Hugging Face folder <-> the parameters of a Llama.

    in the files [rows, columns]                here                          under FSDP, 2 ranks
    ...self_attn.q_proj.weight  [32, 32] --+                                  +- rank 0: rows  0..31
    ...self_attn.k_proj.weight  [16, 32] --+-> qkv_proj.weight  [64, 32] --> -+
    ...self_attn.v_proj.weight  [16, 32] --+                                  +- rank 1: rows 32..63

Projections that read the same input are one matrix here and are split again only in files. A rank
reads no more of a file than the rows that it holds. Functions take the model as an argument: this
file lies below model.py. What a folder holds beside its weights is in llama/folder.py.
"""
import json
import math
import os
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from llama.folder import config_json
from runtime import print0

# our matrix -> the published projections it holds, in row order
GROUPS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "o_proj": ("o_proj",),
          "gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# dtypes in files that are the weights themselves; int8, fp8 and the like need scales beside them
PLAIN_DTYPES = ("F64", "F32", "F16", "BF16")


# ----------------------------------------------------------------------------- whole or sharded
def full_tensor(p):
    """The whole of a parameter or gradient, detached; under FSDP all ranks must call it."""
    p = p.detach()
    return p.full_tensor() if hasattr(p, "full_tensor") else p


def local_part(p):
    """(tensor, first row) that this rank holds of a parameter: all, or under FSDP some rows."""
    if not hasattr(p, "to_local"):
        return p, 0
    # the mesh's last dimension shards; one before it replicates
    mesh = p.device_mesh
    shards = mesh.ndim - 1
    chunk = math.ceil(len(p) / mesh.size(shards))
    first = chunk * mesh.get_local_rank(shards)
    return p.to_local(), min(len(p), first)


@torch.no_grad()
def fill(p, full):
    """Set a parameter to the tensor `full`, from which each rank takes the rows that it holds."""
    mine, first = local_part(p)
    mine.copy_(full[first:first + len(mine)])


# ----------------------------------------------------------------------------- names and shapes
def file_tensors(model):
    """Our parameter name -> [(published tensor name, rows)], the rows stacked in that order."""
    table = {}
    shapes = model.config.projection_shapes
    for name, p in model.named_parameters():
        path, _, kind = name.rpartition(".")  # layers.0.mlp.down_proj, weight
        if kind != "weight":  # an adapter's
            continue
        published = path if path == "lm_head" else f"model.{path}"
        parent, _, group = published.rpartition(".")
        if group in GROUPS:
            table[name] = [(f"{parent}.{part}.weight", shapes[part][0]) for part in GROUPS[group]]
        else:
            table[name] = [(f"{published}.weight", len(p))]
    return table


def compare_names(expected, found):
    """One line on how found {name: shape} differs from expected, '' when it does not."""
    wrong = []
    for name in expected.keys() & found.keys():
        if tuple(found[name]) != tuple(expected[name]):
            wrong.append(f"{name} {list(found[name])} for {list(expected[name])}")
    problems = []
    for what, names in (("missing", expected.keys() - found.keys()),
                        ("unexpected", found.keys() - expected.keys()),
                        ("misshaped", wrong)):
        if names:
            some = ", ".join(sorted(names)[:3])
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            problems.append(f"{what} {some}{more}")
    return "; ".join(problems)


# ----------------------------------------------------------------------------- reading
def open_weights(folder, name="model.safetensors"):
    """Shapes {name: shape} and open files {name: file} of a folder's tensors, nothing read yet.

    Raises FileNotFoundError without weights or shard, ValueError for what is not safetensors or
    holds quantised weights."""
    folder = Path(folder)
    shapes = {}
    where = {}
    for file in weight_files(folder, name):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder / file}: missing, though {name}.index.json names it")
        try:
            opened = safe_open(folder / file, framework="pt")
        except (SafetensorError, OSError) as e:
            message = f"{folder / file}: truncated or not a safetensors file ({e})"
            raise ValueError(message) from None
        for tensor in opened.keys():
            # old checkpoints store this table; it is computed here
            if tensor.endswith("rotary_emb.inv_freq"):
                continue
            if tensor in shapes:
                raise ValueError(f"{folder / file}: holds {tensor}, which another shard holds too")
            stored = opened.get_slice(tensor)
            if stored.get_dtype() not in PLAIN_DTYPES:
                raise ValueError(f"{folder / file}: {tensor} is {stored.get_dtype()}, a quantised "
                                 f"weight; expected one of {', '.join(PLAIN_DTYPES)}")
            shapes[tensor] = tuple(stored.get_shape())
            where[tensor] = opened
    return shapes, where


def weight_files(folder, name):
    """Names of the files that hold a folder's weights: `name`, else the shards in its index.

    That is transformers' order; what it passes over is printed."""
    index = folder / f"{name}.index.json"
    if (folder / name).is_file():
        shards = folder.glob(f"{Path(name).stem}-*-of-*.safetensors")
        older = sorted(path.name for path in shards)
        # mlx-lm writes an index of this one file as well
        if index.is_file() and name.encode() not in index.read_bytes():
            older.append(index.name)
        if older:
            print0(f"note: {folder / name} is read, as transformers does; "
                   f"passed over beside it: {', '.join(older)}")
        return [name]
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
            return sorted({str(file) for file in weight_map.values()})
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            message = f"{index}: cut short, or not an index with a weight_map ({e})"
            raise ValueError(message) from None

    # pickles run code when they are read
    hint = ""
    pickles = []
    for pattern in ("pytorch_model*.bin", "adapter_model*.bin", "*.pth"):
        pickles += sorted(path.name for path in folder.glob(pattern))
    if pickles:
        tool = "transformers, AutoModelForCausalLM"
        if name.startswith("adapter"):
            tool = "peft, AutoPeftModelForCausalLM"
        arguments = "folder"
        if pickles[0].endswith(".pth"):
            # litgpt's, which no tool finds by its name
            arguments = "folder, state_dict=torch.load(it)"
        if pickles[0] == "lit_model.pth":
            tool = f"litgpt convert_from_litgpt, then {tool}"
        hint = (f"; {pickles[0]} is a pickle and is not read: convert it with "
                f"{tool}.from_pretrained({arguments}).save_pretrained(folder)")
    raise FileNotFoundError(f"{folder}: neither {name} nor {index.name}{hint}")


def check_finite(tensor, folder, name):
    """Raise ValueError, by the tensor's name, where it holds NaN or infinity."""
    if not tensor.numel():
        return
    # one pass without a mask: least and largest are NaN where any entry is
    least, largest = tensor.aminmax()
    if not (math.isfinite(least) and math.isfinite(largest)):
        raise ValueError(f"{folder}: {name} holds NaN or infinity in {tensor.dtype}")


@torch.no_grad()
def load_weights(model, folder, device=None):
    """Fill a model's weights in place, tensor by tensor from mapped files.

    device: where to make the memory of a model on meta. Every tensor is used exactly once: missing,
    unexpected or misshaped names raise ValueError with the list, as do NaN and infinity; a folder
    without safetensors raises FileNotFoundError."""
    shapes, where = open_weights(folder)
    table = file_tensors(model)
    if model.config.tie_word_embeddings and "lm_head.weight" in shapes:
        read_tied_head(folder, model.config, shapes, where, table)

    # names and shapes first, so that nothing is half loaded
    parameters = dict(model.named_parameters())
    expected = {}
    for name, parts in table.items():
        for published, rows in parts:
            expected[published] = (rows, *parameters[name].shape[1:])
    problems = compare_names(expected, shapes)
    if problems:
        raise ValueError(f"{folder}: weights do not fit config.json: {problems}")
    if device is not None:
        take_memory(model, device)
        parameters = dict(model.named_parameters())

    # of each tensor the rows that this rank holds
    for name, parts in table.items():
        mine, first = local_part(parameters[name])
        row = -first  # where the next tensor begins in what this rank holds
        for published, rows in parts:
            begin = max(row, 0)
            end = min(row + rows, len(mine))
            if begin < end:
                part = where[published].get_slice(published)[begin - row:end - row]
                mine[begin:end].copy_(part)
                check_finite(mine[begin:end], folder, published)
            row += rows


def take_memory(model, device):
    """As model.to_empty, which from the meta device imports sympy, for a second."""
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            empty = torch.empty(p.shape, dtype=p.dtype, device=device)
            setattr(module, name, torch.nn.Parameter(empty, requires_grad=p.requires_grad))


def read_tied_head(folder, config, shapes, where, table):
    """Tied embeddings stored under the head's name, alone or twice: change table or shapes."""
    if "model.embed_tokens.weight" not in shapes:
        table["embed_tokens.weight"] = [("lm_head.weight", config.vocab_size)]
        return
    head = where["lm_head.weight"].get_tensor("lm_head.weight")
    check_finite(head, folder, "lm_head.weight")
    embedding = where["model.embed_tokens.weight"].get_tensor("model.embed_tokens.weight")
    if not torch.equal(head, embedding):
        raise ValueError(f"{folder}: config.json ties lm_head to embed_tokens, "
                         "but their tensors differ")
    del shapes["lm_head.weight"]


# ----------------------------------------------------------------------------- writing
def write_safetensors(tensors, path, metadata=None):
    """Write {name: tensor} so that equal content gives equal bytes, readable as the umask allows.

    safetensors itself writes metadata in random order and files that only their owner may read."""
    # a file made by Python has the mode that every other one has
    with open(path, "wb"):
        mode = os.stat(path).st_mode
    save_file(tensors, path, metadata)
    os.chmod(path, mode)
    if not metadata:
        return
    # 8 bytes with the header's length, the header, the tensors: sorted, it is as long as before
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(metadata.items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":"))
        file.seek(8)
        file.write(text.encode().ljust(length))


def save_pretrained(model, folder, dtype=None, shard_bytes=5 * 10 ** 9, get=full_tensor):
    """Write a folder that from_pretrained and transformers read; dtype None keeps the parameters'.

    get(parameter) is the tensor to write, by default the parameter as it is now. Under FSDP all
    ranks must call it: all gather, rank 0 writes."""
    folder = Path(folder)
    # rank 0 clears the folder, before anything is written
    writes = not dist.is_initialized() or dist.get_rank() == 0
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
        # shards or an index of an earlier model would be read with the new one
        for old in (*folder.glob("model*.safetensors"), folder / "model.safetensors.index.json"):
            old.unlink(missing_ok=True)

    index = {}  # tensor -> its file
    total = 0   # bytes
    p = None    # the parameter at hand; `full` is the whole of it
    shards = plan_shards(model, dtype, shard_bytes)
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name, parameter, first, rows in shard:
            if parameter is not p:
                p = parameter
                full = get(parameter)
            if writes:
                # a copy, because safetensors refuses slices of one storage
                part = full[first:first + rows].to("cpu", dtype or p.dtype, copy=True)
                check_finite(part, folder, name)
                tensors[name] = part
                index[name] = file
                total += part.nbytes
        if writes:
            write_safetensors(tensors, folder / file, {"format": "pt"})
    if not writes:
        return

    # last, what makes it a model folder
    if len(shards) > 1:
        listing = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / "model.safetensors.index.json").write_text(json.dumps(listing, indent=2))
    config = config_json(model.config, dtype or model.embed_tokens.weight.dtype)
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def plan_shards(model, dtype, shard_bytes):
    """A list [(published name, parameter, first row, rows)] for each file, in the files' order.

    A file holds at most shard_bytes, or one tensor."""
    parameters = dict(model.named_parameters())
    shards = [[]]
    size = 0
    for name, parts in file_tensors(model).items():
        p = parameters[name]
        row_bytes = p.numel() // len(p) * (dtype or p.dtype).itemsize
        first = 0
        for published, rows in parts:
            nbytes = rows * row_bytes
            if size + nbytes > shard_bytes and shards[-1]:
                shards.append([])
                size = 0
            shards[-1].append((published, p, first, rows))
            size += nbytes
            first += rows
    return shards
