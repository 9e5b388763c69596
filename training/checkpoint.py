"""Checkpoints of train.py: written whole or not at all, found again, and read for any number of ranks.

step_N/ holds the weights (a model folder, or a PEFT adapter folder for LoRA) and state/: state.json, and the momenta,
in optimizer.safetensors or, when FSDP had sharded them, as torch.distributed.checkpoint's files.
"""
import contextlib
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

from lora import known_by, save_adapter
from llama.weights import fill, full_tensor
from training.parallel import barrier, is_sharded, own_group
from runtime import RANK, fsync_folder, print0, read_object, write_whole

TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json")


def checkpoints(folder):
    """Complete checkpoints of a run, [(step, path)], oldest first; step_N.tmp is one that was never finished."""
    found = [(int(p.name[5:]), p) for p in Path(folder).glob("step_*") if p.name[5:].isdigit()]
    return sorted((step, p) for step, p in found if (p / "state" / "state.json").is_file())


def lock(out_dir):
    """Hold out_dir for this run until the process ends, and delete what a killed one left half done or half deleted.

    Raises ValueError when another process holds it."""
    file = open(Path(out_dir) / "lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"out_dir: another process is training in {out_dir}") from None
    for left in Path(out_dir).glob("step_*.tmp"):
        shutil.rmtree(left)
    return file  # closing it would let go


def save_checkpoint(model, optim, out_dir, state, base, keep_last, keep=(), pool=None):
    """Write out_dir/step_N whole or not at all, then drop the oldest beyond keep_last, but no step of `keep`.

    All ranks must call it. With `pool`, a thread, only copies in the CPU's memory are made here and the rest is done
    there: returns a Future, to be waited for before the next call. Raises OSError (the Future too) when it could not be
    written; earlier checkpoints are then untouched."""
    final = Path(out_dir) / f"step_{state['step']}"
    partial, text = final.with_suffix(".tmp"), json.dumps(state, indent=1)
    names = {p: name for name, p in model.named_parameters()}
    momenta = {f"{names[p]}:{key}": value for p, values in optim.state.items() for key, value in values.items()}
    with whole_or_not(partial):
        if RANK == 0:
            shutil.rmtree(partial, ignore_errors=True)
            (partial / "state").mkdir(parents=True)
        barrier()
        get = full_tensor
        if pool:
            copies = copies_of(model)
            get = lambda p: copies[p] if p in copies else p
            if is_sharded(model):
                written = dcp.async_save(momenta, checkpoint_id=partial / "state", process_group=own_group())
            else:
                momenta = {name: value.to("cpu", copy=True) for name, value in momenta.items() if RANK == 0}

    def write():
        with whole_or_not(partial):
            if RANK == 0 or not pool:  # all ranks gather, or rank 0 has copies
                save_weights(model, partial, base, get)
            if is_sharded(model):  # every rank writes its part
                written.result() if pool else dcp.save(momenta, checkpoint_id=partial / "state")
            elif RANK == 0:
                save_file(momenta, partial / "state" / "optimizer.safetensors")
            if RANK == 0:
                publish(partial, final, text, base)
        for step, old in checkpoints(out_dir)[:-keep_last] if keep_last and RANK == 0 else ():
            if step not in keep:
                drop(old)
        if not pool:
            barrier()
    return pool.submit(write) if pool else write()


@contextlib.contextmanager
def whole_or_not(partial):
    """Turn what goes wrong while `partial` is written into an OSError that says what is left, and remove it."""
    try:
        yield
    except (OSError, SafetensorError, CheckpointException) as e:
        if RANK == 0:
            shutil.rmtree(partial, ignore_errors=True)
        kept = [p.name for _, p in checkpoints(partial.parent)]
        raise OSError(f"{partial.with_suffix('')} could not be saved ({e}); " +
                      (f"the newest complete checkpoint is {kept[-1]}" if kept else "there is no checkpoint")) from None


def save_weights(model, folder, base, get=full_tensor):
    if hasattr(model, "lora"):
        save_adapter(model, folder, base, get)
    else:
        model.save_pretrained(folder, get=get)


def copies_of(model):
    """{parameter: whole of it in the CPU's memory}, on rank 0, for all that save_weights reads and training changes."""
    copies = {}
    for p in model.parameters():
        if p.requires_grad or is_sharded(model) and any(p is known for known in known_by(model)):
            full = full_tensor(p)
            if RANK == 0:
                copies[p] = full.to("cpu", copy=True)
    return copies


def publish(partial, final, text, base):
    """Complete the folder `partial` and give it its name."""
    for file in TOKENIZER_FILES:
        if not (partial / "adapter_config.json").is_file() and (Path(base) / file).is_file():
            shutil.copyfile(Path(base) / file, partial / file)
    (partial / "state" / "state.json").write_text(text)
    fsync_folder(partial)
    if final.exists():
        drop(final)
    partial.rename(final)
    fsync_folder(final.parent)
    print0(f"saved {final}")


def drop(folder):
    """Delete a checkpoint, which loses its name first: half of one must not look like one."""
    shutil.rmtree(folder.rename(folder.with_suffix(".old.tmp")))


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


def read_state(folder):
    """The state.json of a checkpoint of train.py; {} for any other folder. Raises ValueError if it is no whole object."""
    path = folder / "state" / "state.json"
    return read_object(path) if path.is_file() else {}


def checkpoint_state(folder, config, fingerprint, free):
    """state.json of a checkpoint to go on from; raises ValueError when it belongs to a run with other knobs than `free`."""
    folder = Path(folder)
    if not (folder / "state" / "state.json").is_file():
        raise ValueError(f"{folder}: no complete checkpoint of train.py (state/state.json is missing)")
    state = read_state(folder)
    try:
        before = state["config"]
        if state["data"] != fingerprint:
            raise ValueError(f"resume: {folder} was trained on other data than {config['data']}")
    except (KeyError, TypeError) as e:
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
