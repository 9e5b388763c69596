"""adapter_config.json of a PEFT folder: which projections have an adapter, of which rank and scale.

    {"r": 8, "lora_alpha": 16,                 model.layers.0.self_attn.q_proj    rank 8, alpha 16
     "target_modules": ["q_proj", "v_proj"],   model.layers.0.self_attn.k_proj    none
     "rank_pattern": {"v_proj": 4}}            model.layers.0.self_attn.v_proj    rank 4, alpha 16

Read as peft 0.21.2 reads it (tuners_utils.check_target_module_exists, utils.get_pattern_key). What
this LoRA does not support is refused by name, with what to do about it.
"""
import re
from pathlib import Path
from typing import NamedTuple

from llama.folder import is_number
from llama.weights import PROJECTIONS
from runtime import read_object

MERGE = ("merge it with peft: AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload()"
         ".save_pretrained(out)")
CONVERT = ("convert it with peft: model.save_pretrained(out, "
           "path_initial_model_for_weight_conversion=the adapter before training)")
# key -> the values that this LoRA computes, of which messages name the last one
COMPUTED = {"peft_type": ("LORA",),
            "fan_in_fan_out": (None, False),
            "bias": (None, "none"),
            "lora_bias": (None, False),
            "modules_to_save": (None, []),
            "trainable_token_indices": (None, [], {}),
            "target_parameters": (None, []),
            "layer_replication": (None, []),
            "alora_invocation_tokens": (None, []),
            "arrow_config": (None, {}),
            "kasa_config": (None, {}),
            "monteclora_config": (None, {}),
            "use_qalora": (None, False),
            "use_bdlora": (None, False),
            # the other inits (pissa, olora, loftq ...) change the base's weights as well
            "init_lora_weights": (None, False, "gaussian", "eva", "orthogonal", True)}


class AdapterConfig(NamedTuple):
    """What adapter_config.json says."""
    rank: int
    alpha: float
    dropout: float
    rslora: bool
    dora: bool            # rows have trained lengths
    targets: object       # names, or a regex as text
    excluded: object      # the same
    layers: list          # numbers of blocks; none: all
    layers_pattern: list  # what stands before such a number, as regexes; none: anything
    rank_pattern: dict    # regex of a name's end -> rank
    alpha_pattern: dict

    def adapts(self, layer, name):
        """Whether a projection has an adapter."""
        return self.matches(module_path(layer, name))

    def matches(self, path):
        """Whether a module of this name has an adapter, by peft's rules."""
        if self.excluded and names_fit(self.excluded, path):
            return False
        if not names_fit(self.targets, path):
            return False
        # a regex and a whole name do not look at the blocks' numbers
        if isinstance(self.targets, str) or path in self.targets or not self.layers:
            return True
        for pattern in self.layers_pattern or [r"[^.]*"]:
            found = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", path)
            if found:
                return int(found[1]) in self.layers
        return False

    def size_of(self, layer, name):
        """(rank, alpha) of a projection's adapter."""
        path = module_path(layer, name)
        rank = first_match(self.rank_pattern, path, self.rank)
        alpha = first_match(self.alpha_pattern, path, self.alpha)
        return rank, alpha

    def scale_of(self, layer, name):
        """What B A of a projection is multiplied with."""
        rank, alpha = self.size_of(layer, name)
        return scale_of(rank, alpha, self.rslora)


def module_path(layer, name):
    """Published name of a projection, such as model.layers.0.self_attn.q_proj."""
    part = "self_attn" if name in PROJECTIONS[:4] else "mlp"
    return f"model.layers.{layer}.{part}.{name}"


def scale_of(rank, alpha, rslora):
    """alpha / rank, or with rslora alpha / sqrt(rank)."""
    return alpha / rank ** 0.5 if rslora else alpha / rank


def names_fit(wanted, path):
    """Whether a module is among names (or ends of names), or fits a regex given as text."""
    if wanted == "all-linear":
        return path.split(".")[-1] in PROJECTIONS
    if isinstance(wanted, str):
        return re.fullmatch(wanted, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in wanted)


def first_match(patterns, path, default):
    """Value of the first pattern that fits the end of a name, else the default."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


# ----------------------------------------------------------------------------- reading
def is_adapter(folder):
    """Whether a folder is a PEFT adapter's."""
    return (Path(folder) / "adapter_config.json").is_file()


def named_base(folder):
    """The base model that adapter_config.json names; "" where it names none."""
    name = read_object(Path(folder) / "adapter_config.json").get("base_model_name_or_path")
    return name if isinstance(name, str) else ""


def read_adapter_config(folder):
    """The AdapterConfig of a PEFT folder.

    Raises FileNotFoundError, or ValueError for what this LoRA does not compute."""
    path = Path(folder) / "adapter_config.json"
    config = read_object(path, "an adapter folder holds it and adapter_model.safetensors")
    if "peft_type" not in config:
        raise ValueError(f"{path}: has no peft_type, so it is not peft's; merge it with the tool "
                         "that wrote it (mlx-lm's: python -m mlx_lm fuse)")
    # options that this LoRA does not compute
    for key, allowed in COMPUTED.items():
        found = config.get(key)
        if found not in allowed:
            advice = CONVERT if key == "init_lora_weights" else MERGE
            raise ValueError(f"{path}: {key} is {found!r:.60}; only {allowed[-1]!r} is supported; "
                             f"{advice}")
    missing = [key for key in ("r", "lora_alpha", "target_modules") if config.get(key) is None]
    if missing:
        raise ValueError(f"{path}: missing {', '.join(missing)}")

    # one block may stand without a list, and one pattern too
    layers = config.get("layers_to_transform")
    if not isinstance(layers, list):
        layers = [] if layers is None else [layers]
    layers_pattern = config.get("layers_pattern") or []
    if isinstance(layers_pattern, str):
        layers_pattern = [layers_pattern]
    read = AdapterConfig(config["r"], config["lora_alpha"], config.get("lora_dropout") or 0.0,
                         config.get("use_rslora") or False, config.get("use_dora") or False,
                         config["target_modules"], config.get("exclude_modules") or [], layers,
                         layers_pattern,
                         config.get("rank_pattern") or {}, config.get("alpha_pattern") or {})
    check_types(path, read)

    # peft puts adapters on these too
    for name in ("lm_head", "model.embed_tokens"):
        if read.targets != "all-linear" and read.matches(name):
            raise ValueError(f"{path}: target_modules puts an adapter on {name}; here they go on "
                             f"{', '.join(PROJECTIONS)}; {MERGE}")
    return read


def check_types(path, config):
    """Raise ValueError for values of the wrong type, and for what is no regex."""
    # numbers
    for rank in (config.rank, *values_of(path, "rank_pattern", config.rank_pattern)):
        if not isinstance(rank, int) or isinstance(rank, bool) or not 0 < rank < 2 ** 20:
            raise ValueError(f"{path}: r or rank_pattern has {rank!r:.60}; expected a rank from 1")
    for alpha in (config.alpha, *values_of(path, "alpha_pattern", config.alpha_pattern)):
        if not is_number(alpha):
            raise ValueError(f"{path}: lora_alpha or alpha_pattern has {alpha!r:.60}; expected a "
                             "number")
    if not is_number(config.dropout) or not 0 <= config.dropout <= 0.99:
        raise ValueError(f"{path}: lora_dropout is {config.dropout!r:.60}; expected 0 to 0.99")
    # switches and names
    for key, value in (("use_rslora", config.rslora), ("use_dora", config.dora)):
        if not isinstance(value, bool):
            raise ValueError(f"{path}: {key} is {value!r:.60}; expected true or false")
    for key, names in (("target_modules", config.targets), ("exclude_modules", config.excluded),
                       ("layers_pattern", config.layers_pattern)):
        texts = [names] if isinstance(names, str) else names
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{path}: {key} is {names!r:.60}; expected text or a list of names")
    if not all(isinstance(layer, int) for layer in config.layers):
        raise ValueError(f"{path}: layers_to_transform is {config.layers!r:.60}; expected numbers "
                         "of blocks")
    # regexes: each is compiled
    try:
        config.matches(module_path(0, "q_proj"))
        config.size_of(0, "q_proj")
        for pattern in (*config.rank_pattern, *config.alpha_pattern, *config.layers_pattern):
            re.compile(pattern)
    except re.error as e:
        raise ValueError(f"{path}: {e.pattern!r:.60} is no regular expression ({e})") from None


def values_of(path, key, patterns):
    if not isinstance(patterns, dict):
        raise ValueError(f"{path}: {key} is {patterns!r:.60}; expected an object")
    return patterns.values()


# ----------------------------------------------------------------------------- writing
def adapter_json(lora, sizes, blocks, base_name):
    """The dict that peft reads as its LoraConfig.

    lora: model.lora; sizes: {module: (rank, alpha)}; blocks: how many the model has."""
    # the targets' names, or one by one the modules if some blocks have no adapters
    targets = list(sizes)
    if len(sizes) == len(lora["targets"]) * blocks:
        targets = list(lora["targets"])
    # modules of another rank or alpha one by one: peft forgets the order of patterns
    ranks = {}
    alphas = {}
    for path, (rank, alpha) in sizes.items():
        if rank != lora["rank"]:
            ranks[path] = rank
        if alpha != lora["alpha"]:
            alphas[path] = alpha
    return {"peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_name,
            "r": lora["rank"],
            "lora_alpha": lora["alpha"],
            "lora_dropout": lora["dropout"],
            "target_modules": targets,
            "use_rslora": lora["rslora"],
            "use_dora": lora["dora"],
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "modules_to_save": None,
            "layers_to_transform": None,
            "rank_pattern": ranks,
            "alpha_pattern": alphas}
