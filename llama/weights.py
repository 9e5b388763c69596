"""Weights in and out: a published Hugging Face folder <-> the parameters of a Llama.

    in the files [rows, columns]                here                          under FSDP, 2 ranks
    ...self_attn.q_proj.weight  [32, 32] --+                                  +- rank 0: rows  0..31
    ...self_attn.k_proj.weight  [16, 32] --+-> qkv_proj.weight  [64, 32] --> -+
    ...self_attn.v_proj.weight  [16, 32] --+                                  +- rank 1: rows 32..63

Projections that read the same input are one matrix here and are split again only in files. A rank
reads no more of a file than the rows that it holds. Functions take the model as an argument: this
file lies below model.py.
"""
import json
import math
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from runtime import read_object

# our matrix -> the published projections it holds, in row order
GROUPS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "o_proj": ("o_proj",),
          "gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


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


# ----------------------------------------------------------------------------- config.json
def read_config(folder, fields):
    """FOLDER/config.json, as transformers 4 or 5 write it -> {name: value} for `fields` it sets.

    Raises FileNotFoundError without the file, ValueError for what this model does not compute."""
    path = Path(folder) / "config.json"
    hf = read_object(path, "a model folder holds config.json and *.safetensors")

    # transformers 4 writes rope_theta and rope_scaling, transformers 5 both in rope_parameters
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", hf.get("rope_theta", 10000.0))
    rope_type = rope.get("rope_type", rope.get("type", "default"))

    # what this model does not compute
    check_value(path, "model_type", hf.get("model_type"), "llama")
    check_value(path, "hidden_act", hf.get("hidden_act", "silu"), "silu")
    check_value(path, "attention_bias", hf.get("attention_bias", False), False)
    check_value(path, "mlp_bias", hf.get("mlp_bias", False), False)
    if rope_type == "llama3":
        check_keys(f"{path}: rope_type llama3 without", rope,
                   ("factor", "high_freq_factor", "low_freq_factor",
                    "original_max_position_embeddings"))
    else:
        check_value(path, "rope_type", rope_type, "default")
    check_keys(f"{path}: missing", hf, ("vocab_size", "hidden_size", "intermediate_size",
                                        "num_hidden_layers", "num_attention_heads"))


    # a key that is missing or null has LlamaConfig's default, but for these
    known = {key: hf[key] for key in fields if hf.get(key) is not None}
    known.setdefault("num_key_value_heads", hf["num_attention_heads"])
    known.setdefault("head_dim", hf["hidden_size"] // hf["num_attention_heads"])
    known["rope_theta"] = float(theta)
    known["rope_scaling"] = rope if rope_type == "llama3" else None
    return known


def check_value(path, key, found, expected):
    if found != expected:
        raise ValueError(f"{path}: {key} is {found!r}; this model computes only {expected!r}")


def check_keys(complaint, found, expected):
    missing = [key for key in expected if key not in found]
    if missing:
        raise ValueError(f"{complaint} {', '.join(missing)}")


def config_json(config, dtype):
    """The dict that transformers reads as its LlamaConfig."""
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "attention_bias": False, "mlp_bias": False,
            "torch_dtype": str(dtype).removeprefix("torch."), **vars(config)}


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

    Raises FileNotFoundError without weights or shard, ValueError for what is not safetensors."""
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
            shapes[tensor] = tuple(opened.get_slice(tensor).get_shape())
            where[tensor] = opened
    return shapes, where


def weight_files(folder, name):
    """Names of the files that hold a folder's weights: `name`, or the shards in its index."""
    index = folder / f"{name}.index.json"
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
            return sorted(set(weight_map.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            message = f"{index}: cut short, or not an index with a weight_map ({e!r})"
            raise ValueError(message) from None
    if (folder / name).is_file():
        return [name]

    # pickles run code when they are read
    hint = ""
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    if pickles:
        tool = "transformers, AutoModelForCausalLM"
        if name.startswith("adapter"):
            tool = "peft, AutoPeftModelForCausalLM"
        hint = (f"; {pickles[0]} is a pickle and is not read: convert it with "
                f"{tool}.from_pretrained(folder).save_pretrained(folder)")
    raise FileNotFoundError(f"{folder}: neither {name} nor {index.name}{hint}")


@torch.no_grad()
def load_weights(model, folder):
    """Fill a model's weights in place, tensor by tensor from mapped files.

    Every tensor is used exactly once: missing, unexpected or misshaped names raise ValueError with
    the list; a folder without safetensors raises FileNotFoundError."""
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
            row += rows


def read_tied_head(folder, config, shapes, where, table):
    """Tied embeddings stored under the head's name, alone or twice: change table or shapes."""
    if "model.embed_tokens.weight" not in shapes:
        table["embed_tokens.weight"] = [("lm_head.weight", config.vocab_size)]
        return
    head = where["lm_head.weight"].get_tensor("lm_head.weight")
    embedding = where["model.embed_tokens.weight"].get_tensor("model.embed_tokens.weight")
    if not torch.equal(head, embedding):
        raise ValueError(f"{folder}: config.json ties lm_head to embed_tokens, "
                         "but their tensors differ")
    del shapes["lm_head.weight"]


# ----------------------------------------------------------------------------- writing
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
                tensors[name] = part
                index[name] = file
                total += part.nbytes
        if writes:
            save_file(tensors, folder / file, metadata={"format": "pt"})
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
