"""Checkpoints of train.py: written whole or not at all, found again, and read for any number of ranks.

step_N/ holds the weights (a model folder, or a PEFT adapter folder for LoRA) and state/: state.json, and the momenta,
in optimizer.safetensors or, when FSDP had sharded them, as torch.distributed.checkpoint's files.
"""
import fcntl
import json
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.api import CheckpointException

from lora import save_adapter
from model import fill
from parallel import barrier, is_sharded
from runtime import RANK, fsync_folder, write_whole

TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json")


def checkpoints(folder):
    """Complete checkpoints of a run, [(step, path)], oldest first; step_N.tmp is one that was never finished."""
    found = [(int(p.name[5:]), p) for p in Path(folder).glob("step_*") if p.name[5:].isdigit()]
    return sorted((step, p) for step, p in found if (p / "state" / "state.json").is_file())


def lock(out_dir):
    """Hold out_dir for this run until the process ends; raises ValueError when another process does."""
    file = open(Path(out_dir) / "lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"out_dir: another process is training in {out_dir}") from None
    return file  # closing it would let go


def save_checkpoint(model, optim, out_dir, state, base, keep_last, keep=()):
    """Write out_dir/step_N whole or not at all, then drop the oldest beyond keep_last, but no step of `keep`.

    All ranks must call it. Raises OSError when it could not be written; earlier checkpoints are then untouched."""
    final = Path(out_dir) / f"step_{state['step']}"
    partial = final.with_suffix(".tmp")
    try:
        if RANK == 0:
            shutil.rmtree(partial, ignore_errors=True)
            (partial / "state").mkdir(parents=True)
        barrier()
        if hasattr(model, "lora"):
            save_adapter(model, partial, base)
        else:
            model.save_pretrained(partial)
        names = {p: name for name, p in model.named_parameters()}
        tensors = {f"{names[p]}:{key}": value for p, values in optim.state.items() for key, value in values.items()}
        if is_sharded(model):
            dcp.save(tensors, checkpoint_id=partial / "state")
        elif RANK == 0:
            save_file(tensors, partial / "state" / "optimizer.safetensors")
        if RANK == 0:
            for file in TOKENIZER_FILES:
                if not hasattr(model, "lora") and (Path(base) / file).is_file():
                    shutil.copyfile(Path(base) / file, partial / file)
            (partial / "state" / "state.json").write_text(json.dumps(state, indent=1))
            fsync_folder(partial)
            if final.exists():
                shutil.rmtree(final)
            partial.rename(final)
            fsync_folder(out_dir)
    except (OSError, SafetensorError, CheckpointException) as e:
        if RANK == 0:
            shutil.rmtree(partial, ignore_errors=True)
        kept = [p.name for _, p in checkpoints(out_dir)]
        raise OSError(f"{final} could not be saved ({e}); " +
                      (f"the newest complete checkpoint is {kept[-1]}" if kept else "there is no checkpoint")) from None
    if RANK == 0 and keep_last:
        for step, old in checkpoints(out_dir)[:-keep_last]:
            if step not in keep:
                shutil.rmtree(old)
    barrier()
    return final


@torch.no_grad()
def load_optimizer(model, optim, folder):
    """Put the saved momenta back, for any number of ranks; raises ValueError when they are not of this model."""
    state, parameters, momenta = folder / "state", dict(model.named_parameters()), {}
    if one_file := (state / "optimizer.safetensors").is_file():
        saved = load_file(state / "optimizer.safetensors")
    elif (state / ".metadata").is_file():
        reader = dcp.FileSystemReader(state)
        saved = reader.read_metadata().state_dict_metadata  # shapes and dtypes; the tensors follow below
    else:
        raise ValueError(f"{state}: holds neither optimizer.safetensors nor .metadata")
    for key, value in saved.items():
        name, kind = key.rsplit(":", 1)
        shape, dtype = (value.shape, value.dtype) if one_file else (value.size, value.properties.dtype)
        if name not in parameters or kind != "step" and parameters[name].shape != shape:
            raise ValueError(f"{state}: momentum of {name} {list(shape)} fits no parameter of this model")
        momenta[key] = torch.zeros(()) if kind == "step" else torch.zeros_like(parameters[name], dtype=dtype)
        if one_file:
            momenta[key].copy_(value) if kind == "step" else fill(momenta[key], value)
        optim.state[parameters[name]][kind] = momenta[key]
    if not one_file:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is")  # one rank without a process group is fine
            dcp.load(momenta, storage_reader=reader)


def checkpoint_state(folder, config, fingerprint, free):
    """state.json of a checkpoint to go on from; raises ValueError when it belongs to a run with other knobs than `free`."""
    folder = Path(folder)
    if not (folder / "state" / "state.json").is_file():
        raise ValueError(f"{folder}: no complete checkpoint of train.py (state/state.json is missing)")
    try:
        state = json.loads((folder / "state" / "state.json").read_text())
        before = state["config"]
        if state["data"] != fingerprint:
            raise ValueError(f"resume: {folder} was trained on other data than {config['data']}")
    except (KeyError, TypeError, json.JSONDecodeError) as e:
        raise ValueError(f"{folder}/state/state.json: not written by train.py ({e!r})") from None
    if changed := [k for k in config if k not in free and before.get(k) != config[k]]:
        raise ValueError(f"resume: {folder} was trained with " +
                         ", ".join(f"{k}={before.get(k)!r}, not {config[k]!r}" for k in changed))
    return state


def newest_checkpoint(out_dir):
    """Folder of the newest complete checkpoint; raises ValueError when there is none."""
    if not (found := checkpoints(out_dir)):
        raise ValueError(f"resume: {out_dir} holds no complete checkpoint (step_N/state/state.json)")
    return found[-1][1]


def start_log(path, last_step):
    """Keep the lines of log.jsonl up to last_step: what a killed run logged beyond its checkpoint is done again."""
    lines = [line for line in path.read_text().splitlines(True) if line.endswith("\n")] if path.exists() else []
    kept = "".join(line for line in lines if json.loads(line)["step"] <= last_step)
    write_whole(path, kept)
