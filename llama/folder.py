"""What a model folder holds beside its weights: config.json, and the files that copies carry along.

    base/config.json ----- read_config ---> LlamaConfig(hidden_size=4096, ...)
         tokenizer.json              |
         chat_template.jinja         |  train, merge
         generation_config.json      v
         ... -------------------> out/step_9/config.json      ours, with the base's other keys
                carry_files                  tokenizer.json   ... as they are

This file lies below model.py and knows no tensors.
"""
import json
import math
import shutil
from pathlib import Path

from runtime import named_below, read_object

# files of a base that hold for every model made from it
CARRIED = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
           "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
           "chat_template.json", "generation_config.json")
# keys of a base's config.json that do not hold for another save of it
NOT_CARRIED = ("dtype", "torch_dtype", "rope_parameters", "rope_scaling", "rope_theta",
               "quantization_config", "transformers_version", "_name_or_path", "auto_map")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


# ----------------------------------------------------------------------------- reading config.json
def read_config(folder, fields):
    """FOLDER/config.json, as transformers 4 or 5 write it -> {name: value} for `fields` it sets.

    fields: LlamaConfig's, {name: with its .type}. Raises FileNotFoundError without the file,
    ValueError for what this model does not compute and for values of the wrong type."""
    path = Path(folder) / "config.json"
    if not path.is_file() and (path.parent / "adapter_config.json").is_file():
        raise ValueError(f"{folder} is an adapter: name its base here, and this with --adapter")
    hf = read_object(path, "a model folder holds config.json and *.safetensors")
    if "model_type" not in hf and "config" in hf:
        below = named_below(path.parent, "config.json")
        below = below or named_below(path.parent, "adapter_config.json")
        raise ValueError(f"{folder} is a run, {below or 'without a checkpoint'}")
    check_computed(path, hf)
    check_keys(f"{path}: missing", hf, ("vocab_size", "hidden_size", "intermediate_size",
                                        "num_hidden_layers", "num_attention_heads"))

    # a key that is missing or null has the default of transformers' LlamaConfig
    known = {}
    for key, field in fields.items():
        if hf.get(key) is not None and key not in ("rope_theta", "rope_scaling"):
            check_type(path, key, hf[key], field.type)
            known[key] = hf[key]
    heads = known["num_attention_heads"]
    known.setdefault("num_key_value_heads", heads)
    known.setdefault("head_dim", known["hidden_size"] // heads)
    known.setdefault("rms_norm_eps", 1e-6)
    known.setdefault("max_position_embeddings", 2048)
    check_shape(path, known)
    theta, scaling = read_rope(path, hf)
    known["rope_theta"] = theta
    known["rope_scaling"] = scaling
    return known


def check_shape(path, known):
    """Raise ValueError for numbers that no model can have together."""
    layers = known["num_hidden_layers"]
    heads = known["num_attention_heads"]
    kv_heads = known["num_key_value_heads"]
    head_dim = known["head_dim"]
    # building the modules of a mistyped number would take minutes
    if layers > 1000:
        raise ValueError(f"{path}: num_hidden_layers is {layers}; expected at most 1000")
    if heads % kv_heads:
        raise ValueError(f"{path}: num_key_value_heads is {kv_heads}; expected a divisor of "
                         f"num_attention_heads, {heads}")
    # rotary positions turn pairs of numbers
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"{path}: head_dim is {head_dim}; expected an even number")


def read_rope(path, hf):
    """(rope_theta, None or the llama3 form) of the keys that transformers 4 and 5 write.

    transformers 4 writes rope_theta and rope_scaling, 5 both in rope_parameters. Where a file has
    both, rope_scaling replaces all of rope_parameters, as in transformers 5.24."""
    # which of the two counts, and its theta
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(hf.get(key), dict | None):
            raise ValueError(f"{path}: {key} is {hf[key]!r:.60}; expected an object or null")
    rope = dict(hf.get("rope_scaling") or hf.get("rope_parameters") or {})
    theta = rope.pop("rope_theta", hf.get("rope_theta", 10000.0))
    if theta is None:
        raise ValueError(f"{path}: rope_theta is null, which no tool computes; write the number "
                         "that the model was trained with (Llama 2: 10000.0)")
    check_type(path, "rope_theta", theta, float)

    # transformers 4 turns a part of each head, transformers 5 all of it
    partial = rope.pop("partial_rotary_factor", hf.get("partial_rotary_factor"))
    check_value(path, "partial_rotary_factor", partial or 1.0, 1.0)
    # how positions beyond the first training are reached
    kinds = {str(rope[key]) for key in ("rope_type", "type") if rope.get(key) is not None}
    if len(kinds) > 1:
        raise ValueError(f"{path}: rope_type and type say {' and '.join(sorted(kinds))}, of which "
                         "tools take different ones; leave the right one")
    if not kinds and "factor" in rope:
        raise ValueError(f"{path}: rope_scaling has a factor, and no rope_type says what it does")
    rope_type = kinds.pop() if kinds else "default"
    if rope_type == "default":
        return float(theta), None
    if rope_type != "llama3":
        raise ValueError(f"{path}: rope_type is {rope_type!r:.60}; this model computes only "
                         "'default' and 'llama3'")
    numbers = ("factor", "high_freq_factor", "low_freq_factor", "original_max_position_embeddings")
    check_keys(f"{path}: rope_type llama3 without", rope, numbers)
    for key in numbers:
        check_type(path, key, rope[key], float)
    return float(theta), rope


def check_computed(path, hf):
    """Raise ValueError for what this model does not compute."""
    check_value(path, "model_type", hf.get("model_type"), "llama")
    check_value(path, "hidden_act", hf.get("hidden_act", "silu"), "silu")
    check_value(path, "attention_bias", hf.get("attention_bias") or False, False)
    check_value(path, "mlp_bias", hf.get("mlp_bias") or False, False)
    if hf.get("quantization_config"):
        raise ValueError(f"{path}: has a quantization_config, so the weights are quantised, which "
                         "are not read; save them in 16 bits with transformers: "
                         "model.dequantize().save_pretrained(folder)")


def check_value(path, key, found, expected):
    if found != expected:
        raise ValueError(f"{path}: {key} is {found!r:.60}; this model computes only {expected!r}")


def check_keys(complaint, found, expected):
    missing = [key for key in expected if found.get(key) is None]
    if missing:
        raise ValueError(f"{complaint} {', '.join(missing)}")


def check_type(path, key, value, kind):
    """Raise ValueError unless a value of config.json is of LlamaConfig's type."""
    if kind is bool:
        fits = isinstance(value, bool)
        expected = "true or false"
    elif kind is float:
        fits = is_number(value) and value > 0
        expected = "a positive number"
    elif key in TOKEN_IDS:
        ids = value if isinstance(value, list) and value else [value]
        fits = all(is_number(i) and isinstance(i, int) for i in ids)
        expected = "an id or a list of ids"
    else:
        fits = is_number(value) and isinstance(value, int) and 0 < value < 2 ** 31
        expected = "a positive whole number"
    if not fits:
        raise ValueError(f"{path}: {key} is {value!r:.60}; expected {expected}")


def is_number(value):
    """Whether a value of a JSON file is a finite number; true and false are none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e300 and math.isfinite(value)


# ----------------------------------------------------------------------------- writing
def config_json(config, dtype):
    """The dict that transformers reads as its LlamaConfig."""
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "attention_bias": False, "mlp_bias": False,
            "torch_dtype": str(dtype).removeprefix("torch."), **vars(config)}


def carry_files(base, folder):
    """Copy to a model folder made from `base` what base holds beside its weights and still holds.

    These are CARRIED, and the keys of config.json that the model folder's own lacks."""
    base = Path(base)
    folder = Path(folder)
    # files, as they are
    for name in CARRIED:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    templates = base / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, folder / templates.name, dirs_exist_ok=True)

    # keys of config.json; ours come first, but for the ids of tokens, which the base may lack
    if not (base / "config.json").is_file():
        return
    before = read_object(base / "config.json")
    config = read_object(folder / "config.json")
    for key in TOKEN_IDS:
        config.pop(key, None)
    for key, value in before.items():
        if key not in NOT_CARRIED:
            config.setdefault(key, value)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
