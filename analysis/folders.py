"""Model and adapter folders whose tensors are read one at a time; the checkpoints of a run.

    out/gsm8k-full/step_100/model.safetensors
        PATH.weight [out, in]                      PATH = model.layers.0.self_attn.q_proj
    out/gsm8k-r16/step_100/adapter_model.safetensors
        base_model.model.PATH.lora_A.weight [rank, in]
        base_model.model.PATH.lora_B.weight [out, rank]
        base_model.model.PATH.lora_magnitude_vector [out]      DoRA's
"""
import hashlib
from functools import partial
from pathlib import Path
from typing import NamedTuple

from llama.adapter_config import (AdapterConfig, is_adapter, module_path,
                                  read_adapter_config)
from llama.adapter_files import check_embeddings, open_adapter_weights
from llama.identity import identity_of_files
from llama.weights import PROJECTIONS, check_finite, compare_names, open_weights
from runtime import read_object
from training.checkpoint import checkpoints, read_state


class Checkpoint(NamedTuple):
    """An opened model or adapter folder."""
    folder: Path
    files: dict          # tensor name -> open file that holds it
    identity: str        # tells its weights from others
    rank: int = None     # of an adapter; None for a model
    config: AdapterConfig = None  # the same

    def has(self, layer, module):
        """Whether the folder holds this projection, or an adapter for it."""
        path = module_path(layer, module)
        return f"{path}.weight" in self.files or adapter_name(path, "A.weight") in self.files

    def read(self, name, device):
        """A tensor; raises ValueError where it holds NaN or infinity."""
        tensor = self.files[name].get_tensor(name).to(device)
        check_finite(tensor, self.folder, name)
        return tensor

    def read_weight(self, layer, module, device):
        """A projection of a model, [out, in], in the dtype of the file."""
        return self.read(f"{module_path(layer, module)}.weight", device)

    def read_adapter(self, layer, module, device):
        """A [rank, in], B [out, rank] of an adapter; scale of B A; DoRA's m [out] or None; fp64."""
        path = module_path(layer, module)
        A = self.read(adapter_name(path, "A.weight"), device).double()
        B = self.read(adapter_name(path, "B.weight"), device).double()
        m = None
        if self.config.dora:
            m = self.read(adapter_name(path, "magnitude_vector"), device).double()
        return A, B, self.config.scale_of(layer, module), m


def adapter_name(path, end):
    """PEFT's tensor name of lora_A.weight, lora_B.weight or lora_magnitude_vector."""
    return f"base_model.model.{path}.lora_{end}"


# ----------------------------------------------------------------------------- opening
def open_checkpoint(folder, config, base):
    """A Checkpoint of a model or adapter folder, checked against the base's config.

    base: its Checkpoint, which an adapter must have been trained on."""
    if is_adapter(folder):
        return open_adapter(folder, config, base)
    return open_model(folder, config)


def open_model(folder, config):
    """A Checkpoint of a model folder; raises ValueError for projections that do not fit."""
    shapes, files = open_weights(folder)
    # all projections must be there, in the shapes of the base; other tensors are not read
    expected = {}
    for layer in range(config.num_hidden_layers):
        for module, shape in config.projection_shapes.items():
            expected[f"{module_path(layer, module)}.weight"] = shape
    # what the folder holds of them
    found = {}
    for name, shape in shapes.items():
        path = name.split(".")
        if len(path) > 1 and path[-2] in PROJECTIONS:
            found[name] = shape
    problems = compare_names(expected, found)
    if problems:
        raise ValueError(f"{folder}: its projections do not fit the base's config.json: "
                         f"{problems}")
    if "model.norm.weight" not in files or not embedding_names(files):
        raise ValueError(f"{folder}: its norm or its embeddings are missing: model.norm.weight, "
                         "model.embed_tokens.weight")
    identity = identity_of_files(files)["base_digest"]
    return Checkpoint(Path(folder), files, identity)


def embedding_names(files, first="embed_tokens"):
    """The names under which a model folder has its embedding, or its head: one may be both."""
    names = ["model.embed_tokens.weight", "lm_head.weight"]
    if first == "lm_head":
        names.reverse()
    return [name for name in names if name in files]


def embedding_of(files, which):
    """The weight of a model folder's 'embed_tokens' or 'lm_head'."""
    name = embedding_names(files, which)[0]
    return files[name].get_tensor(name)


def open_adapter(folder, config, base):
    """A Checkpoint of a PEFT folder.

    Raises as read_adapter_config, or ValueError for an adapter that does not fit the base."""
    adapter = read_adapter_config(folder)
    # the tensors that its settings ask for
    expected = {}
    for layer in range(config.num_hidden_layers):
        for module, (rows, columns) in config.projection_shapes.items():
            if adapter.adapts(layer, module):
                rank, _ = adapter.size_of(layer, module)
                path = module_path(layer, module)
                expected[adapter_name(path, "A.weight")] = (rank, columns)
                expected[adapter_name(path, "B.weight")] = (rows, rank)
                if adapter.dora:
                    expected[adapter_name(path, "magnitude_vector")] = (rows,)
    files = open_adapter_weights(folder, expected, lambda: identity_of_files(base.files))
    check_embeddings(folder, files, partial(embedding_of, base.files))

    # what tells it from other adapters
    weights = (Path(folder) / "adapter_model.safetensors").read_bytes()
    digest = hashlib.sha256(weights).hexdigest()
    return Checkpoint(Path(folder), files, digest, adapter.rank, adapter)


# ----------------------------------------------------------------------------- finding
def find_checkpoints(folders):
    """The checkpoints among `folders`, a run folder replaced by all of its complete ones, by steps.

    Raises ValueError for none, FileNotFoundError for a folder that is not there."""
    found = []
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise FileNotFoundError(f"tuned: {folder}: no such folder")
        # a folder without steps is a checkpoint itself
        of_run = [path for _, path in checkpoints(folder)]
        found += of_run or [folder]
    if not found:
        raise ValueError("tuned is not set; see --help")
    for path in found:
        if found.count(path) > 1:
            raise ValueError(f"tuned: {path} is named twice")
    return found


def base_named_by(folders):
    """The base folder that all checkpoints name. Raises ValueError when there is no such folder."""
    named = {}  # the folder -> how it was named: base, base/ and ../here/base are one
    for folder in folders:
        if is_adapter(folder):
            settings = read_object(folder / "adapter_config.json")
            name = settings.get("base_model_name_or_path") or ""
        else:
            name = read_state(folder).get("config", {}).get("base", "")
        named.setdefault(Path(name).resolve(), name)
    # exactly one, and here
    name = list(named.values())[0]
    if len(named) > 1 or not name or not Path(name).is_dir():
        raise ValueError("base is not set, and the checkpoints do not all name the same folder; "
                         "see --help")
    return name
