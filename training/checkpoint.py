"""
Checkpoints of train.py: written in full or not at all, and read by any number of ranks.

    out/RUN/step_500/                     the weights: a model folder, or a PEFT adapter folder
        adapter_model.safetensors ...
        state/state.json                  step, tokens, knobs, identity of the base and the data
        state/optimizer.safetensors       the optimizer's state, "NAME:exp_avg" and the like; or,
        state/.metadata, *.distcp         when FSDP had sharded it, torch.distributed.checkpoint's

A checkpoint is written as step_500.tmp, forced to disk and then renamed: every step_N is whole.
"""
import contextlib
import fcntl
import json
import os
import shutil
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from llama.adapter_files import open_adapter_weights
from llama.folder import carry_files
from llama.identity import identity_of, identity_of_folder, is_same_base
from llama.pissa import halves, start_from
from llama.weights import check_finite, fill, full_tensor, local_part, write_safetensors
from lora import LoRAProjection, adapter_tensors, load_adapter_weights, save_adapter
from training.parallel import barrier, gloo_group, is_sharded
from runtime import RANK, fsync_folder, print0, read_object, write_whole


# ----------------------------------------------------------------------------- the run's folder
def checkpoints(folder):
    """Complete checkpoints of a run, [(step, path)], oldest first; a step_N.tmp does not count."""
    found = []
    for path in Path(folder).glob("step_*"):
        step = path.name.removeprefix("step_")
        if step.isdigit() and (path / "state" / "state.json").is_file():
            found.append((int(step), path))
    return sorted(found)


def newest_checkpoint(out_dir):
    """Folder of the newest complete checkpoint; raises ValueError when there is none."""
    found = checkpoints(out_dir)
    if not found:
        raise ValueError(f"resume: {out_dir} holds no complete checkpoint "
                         "(step_N/state/state.json); say --auto_resume=True, which starts anew "
                         "where there is none")
    _, path = found[-1]
    return path


def lock(out_dir):
    """Lock out_dir until the process ends; delete what a killed run left unfinished.

    Returns the file, which must stay open. Raises ValueError when another process holds it."""
    # the kernel releases the lock when the process ends, however it ends
    file = open(Path(out_dir) / "lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"out_dir: another process is training in {out_dir}") from None
    for unfinished in Path(out_dir).glob("step_*.tmp"):
        shutil.rmtree(unfinished)
    return file


def start_log(path, last_step):
    """Keep log.jsonl's lines up to last_step: later steps will be done again.

    Raises ValueError for a line that train.py did not write."""
    kept = []
    if path.exists():
        for number, line in enumerate(path.read_text().splitlines(True), 1):
            # a line that was cut short has no end
            if not line.endswith("\n"):
                continue
            try:
                is_kept = json.loads(line)["step"] <= last_step
            except (ValueError, KeyError, TypeError, RecursionError) as e:
                message = f"{path}, line {number}: not written by train.py ({e!r})"
                raise ValueError(message) from None
            if is_kept:
                kept.append(line)
    write_whole(path, "".join(kept))


# ----------------------------------------------------------------------------- save
def dcp():
    """torch.distributed.checkpoint, for sharded state; importing it takes as long as torch."""
    import torch.distributed.checkpoint
    return torch.distributed.checkpoint


def save_checkpoint(model, optim, out_dir, state, base, keep_last, keep=(), pool=None):
    """Write out_dir/step_N whole or not at all, then delete the oldest beyond keep_last.

    state: the content of state.json, "step" included. keep: steps never to delete, marked so in
    their state.json. All ranks must call this. With `pool`, a thread, it only copies to CPU memory
    and the thread writes the copies: returns a Future, to be waited for before the next call.
    Raises OSError (as does the Future) when writing fails; earlier checkpoints are then
    untouched."""
    final = Path(out_dir) / f"step_{state['step']}"
    partial = final.with_suffix(".tmp")
    # now: training changes `state` while the thread writes
    text = json.dumps({**state, "kept": state["step"] in keep}, indent=1)
    momenta = named_state(model, optim)

    # an empty folder
    with all_or_nothing(partial):
        if RANK == 0:
            shutil.rmtree(partial, ignore_errors=True)
            (partial / "state").mkdir(parents=True)
        barrier()

    # write at once: all ranks gather weights and write their part of the momenta
    if pool is None:
        with all_or_nothing(partial):
            save_weights(model, partial, base)
            if is_sharded(model):
                dcp().save(momenta, checkpoint_id=partial / "state")
            elif RANK == 0:
                write_safetensors(momenta, partial / "state" / "optimizer.safetensors")
            publish(partial, final, text, base)
        delete_oldest(out_dir, keep_last, keep)
        barrier()
        return None

    # or copy, and let the thread write
    with all_or_nothing(partial):
        copies = copies_of(model)
        saving = None
        if is_sharded(model):
            saving = dcp().async_save(momenta, checkpoint_id=partial / "state",
                                      process_group=gloo_group())
        elif RANK == 0:
            momenta = {key: tensor.to("cpu", copy=True) for key, tensor in momenta.items()}

    def write_copies():
        with all_or_nothing(partial):
            if RANK == 0:
                save_weights(model, partial, base, lambda p: copies.get(p, p))
            if saving:
                saving.result()
            elif RANK == 0:
                write_safetensors(momenta, partial / "state" / "optimizer.safetensors")
            publish(partial, final, text, base)
        delete_oldest(out_dir, keep_last, keep)

    return pool.submit(write_copies)


def named_state(model, optim):
    """{"NAME:exp_avg": tensor} of all that the optimizer keeps."""
    names = {p: name for name, p in model.named_parameters()}
    momenta = {}
    for p, tensors in optim.state.items():
        for kind, tensor in tensors.items():
            momenta[f"{names[p]}:{kind}"] = tensor
    return momenta


@contextlib.contextmanager
def all_or_nothing(partial):
    """Remove `partial` if it cannot be written, and raise an OSError that says what is left."""
    try:
        yield
    except (OSError, SafetensorError, dcp().CheckpointException) as e:
        if RANK == 0:
            shutil.rmtree(partial, ignore_errors=True)
        found = checkpoints(partial.parent)
        left = "there is no checkpoint"
        if found:
            left = f"the newest complete checkpoint is {found[-1][1].name}"
        raise OSError(f"{partial.with_suffix('')} could not be saved ({e}); {left}") from None


def save_weights(model, folder, base, get=full_tensor):
    """Write the adapter, or a model without one whole; get(parameter) is the tensor to write."""
    if hasattr(model, "lora"):
        save_adapter(model, folder, base, get)
    else:
        model.save_pretrained(folder, get=get)


def copies_of(model):
    """{parameter: whole of it in the CPU's memory}, on rank 0, of what training changes."""
    copies = {}
    for p in model.parameters():
        if p.requires_grad:
            full = full_tensor(p)
            if RANK == 0:
                copies[p] = full.to("cpu", copy=True)
    return copies


def publish(partial, final, text, base):
    """Complete the folder `partial` and give it its name, on rank 0."""
    if RANK != 0:
        return
    # a model folder brings its tokenizer; an adapter's is its base's
    if not (partial / "adapter_config.json").is_file():
        carry_files(base, partial)
    (partial / "state" / "state.json").write_text(text)
    # on disk before it gets the name; a checkpoint of that name is replaced
    fsync_folder(partial)
    if final.exists():
        delete_checkpoint(final)
    partial.rename(final)
    fsync_folder(final.parent)
    print0(f"saved {final}")


def delete_oldest(out_dir, keep_last, keep):
    """Delete all checkpoints but the newest keep_last (0: keep all) and the steps `keep`."""
    if RANK != 0 or not keep_last:
        return
    for step, folder in checkpoints(out_dir)[:-keep_last]:
        if step not in keep and not read_state(folder).get("kept"):
            delete_checkpoint(folder)


def delete_checkpoint(folder):
    """Delete a checkpoint, which loses its name first: half of one must not look like one."""
    shutil.rmtree(folder.rename(folder.with_suffix(".old.tmp")))


# ----------------------------------------------------------------------------- resume
def read_state(folder):
    """state.json of a checkpoint of train.py, {} of any other folder; ValueError if broken."""
    path = folder / "state" / "state.json"
    return read_object(path) if path.is_file() else {}


def checkpoint_state(folder, config, defaults, rows, free):
    """state.json of a checkpoint to resume from.

    Raises ValueError when its run had other data than `rows` (TokenRows), or other knobs than
    `config`, except those in `free`. A knob that it does not know had its default.
    Folders are compared by content: a run resumes even if its base and data were moved."""
    folder = Path(folder)
    steps = ", ".join(path.name for _, path in checkpoints(folder))
    if steps:
        raise ValueError(f"resume_from: {folder} is a run; give one of its checkpoints: {steps}")
    if not (folder / "state" / "state.json").is_file():
        raise ValueError(f"{folder}: no complete checkpoint of train.py "
                         "(state/state.json is missing)")
    state = read_state(folder)
    try:
        before = {**defaults, **state["config"]}
        data = state["data"]
    except (KeyError, TypeError) as e:
        raise ValueError(f"{folder}/state/state.json: not written by train.py ({e!r})") from None
    for key in ("step", "tokens", "skipped"):
        value = state.get(key, 0)
        if type(value) is not int or value < 0:
            raise ValueError(f"{folder}/state/state.json: {key}: expected a count, found "
                             f"{str(value)[:40]!r}")
    # knobs that make it a different run
    changed = []
    for knob, value in config.items():
        if knob in free or before[knob] == value:
            continue
        if not means_the_same(knob, before[knob], value, state, config):
            changed.append(f"{knob}={before[knob]!r} (now {value!r})")
    if changed:
        raise ValueError(f"resume: {folder} was trained with {', '.join(changed)}; repeat the "
                         "first command, or start another out_dir")
    # an older checkpoint knows the sha256 of train.bin alone
    if data not in (rows.identity, rows.sha256):
        raise ValueError(f"resume: {folder} was trained on other data than {config['data']}, on "
                         f"that of {before['data']}; start another out_dir")
    return state


def means_the_same(knob, before, value, state, config):
    """Whether a changed knob leaves a checkpoint's run the same."""
    if knob == "data":
        return True  # its content is compared
    # the masks of dropout are drawn for each microbatch, compiled by another generator; losses are
    # the same sum
    if knob == "compile" or knob == "microbatch" and config["loss_norm"] == "token":
        print0(f"note: {knob} was {before}, and is {value} from here on: the same loss but for "
               "rounding, and other masks if there is dropout")
        return True
    if knob not in ("base", "adapter"):
        return False
    if os.path.realpath(str(before)) == os.path.realpath(value):
        return True
    if knob == "base" and (config["lora_rank"] or config["adapter"]):
        return True  # its adapter is checked against it where it is loaded
    if knob == "base" and isinstance(state.get("base"), dict):
        found = identity_of_folder(value)
        return found is not None and is_same_base(state["base"], found)
    return False


@torch.no_grad()
def load_optimizer(model, optim, folder):
    """Put the saved state of the optimizer back, for any number of ranks.

    Raises ValueError when it is not of this model."""
    state = folder / "state"
    # names, shapes and dtypes of what was saved
    is_one_file = (state / "optimizer.safetensors").is_file()
    if is_one_file:
        try:
            saved = load_file(state / "optimizer.safetensors")
        except SafetensorError as e:
            raise ValueError(f"{state}/optimizer.safetensors: truncated or not a safetensors "
                             f"file ({e})") from None
        shapes = {key: (tensor.shape, tensor.dtype) for key, tensor in saved.items()}
    elif (state / ".metadata").is_file():
        reader = dcp().FileSystemReader(state)
        described = reader.read_metadata().state_dict_metadata
        shapes = {key: (d.size, d.properties.dtype) for key, d in described.items()}
    else:
        raise ValueError(f"{state}: holds neither optimizer.safetensors nor .metadata")

    # make the tensors, sharded as their parameters are; a count of steps is one number
    parameters = dict(model.named_parameters())
    momenta = {}
    for key, (shape, dtype) in shapes.items():
        name, _, kind = key.rpartition(":")
        if name not in parameters or len(shape) and parameters[name].shape != shape:
            raise ValueError(f"{state}: momentum of {name} {list(shape)} fits no parameter of "
                             "this model")
        p = parameters[name]
        momenta[key] = torch.zeros_like(p, dtype=dtype) if len(shape) else torch.zeros(())
        optim.state[p][kind] = momenta[key]

    # a momentum that is missing would silently begin at zero
    trained = [p for p in parameters.values() if p.requires_grad]
    kinds = {tuple(sorted(optim.state.get(p, ()))) for p in trained}
    if len(kinds) > 1:
        raise ValueError(f"{state}: some parameters have other momenta than others")

    # fill them: each rank takes what it holds
    if is_one_file:
        for key, tensor in saved.items():
            check_finite(tensor, state, key)
            if tensor.dim():
                fill(momenta[key], tensor)
            else:
                momenta[key].copy_(tensor)
        return
    with warnings.catch_warnings():
        # one rank without a process group is fine
        warnings.filterwarnings("ignore", message="torch.distributed is")
        dcp().load(momenta, storage_reader=reader)
    for key, tensor in momenta.items():
        mine, _ = local_part(tensor)
        check_finite(mine, state, key)


def load_trained_adapter(model, folder, init="default"):
    """Fill a model's adapters from a checkpoint, or from the PEFT folder that training begins with.

    init: the run's lora_init. Raises as load_adapter_weights, or as start_from with 'pissa'."""
    if init == "pissa":
        resume_pissa(model, folder)
    else:
        load_adapter_weights(model, folder)


@torch.no_grad()
def resume_pissa(model, folder):
    """Fill A and B from a file of rank 2 r (llama/pissa.py), and take what they began as out of the
    weights. That is in the file: another machine's SVD could have other signs."""
    model.base_identity = identity_of(model)
    places = adapter_tensors(model)
    expected = {}
    for name, place in places.items():
        rows, columns = place.shape
        is_A = ".lora_A." in name
        expected[name] = (2 * rows, columns) if is_A else (rows, 2 * columns)
    where = open_adapter_weights(Path(folder), expected, lambda: model.base_identity)

    # both halves, stacked as the parameters are
    trained = {}
    begun = {}
    for name, place in places.items():
        p = place.parameter
        tensor = where[name].get_tensor(name)
        check_finite(tensor, folder, name)
        for values, half in zip((trained, begun), halves(name, tensor)):
            if p not in values:
                values[p] = torch.empty(p.shape, dtype=p.dtype)
            place.view(values[p]).copy_(half)

    for module in model.modules():
        if isinstance(module, LoRAProjection):
            start_from(module, begun[module.lora_A], begun[module.lora_B])
            fill(module.lora_A, trained[module.lora_A])
            fill(module.lora_B, trained[module.lora_B])
