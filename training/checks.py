"""
What train.py refuses: invalid knobs before anything is loaded, wrong wiring at the first step.

    check_knobs        train.py: error: global_batch must be at least 1, found 0
    check_first_step   train.py: error: layers.0.mlp.down_proj.weight is frozen but has a gradient
"""
import math
import shutil
from pathlib import Path

import torch

from llama.adapter_config import read_adapter_config
from llama.weights import file_tensors, full_tensor
from lora import adapter_tensors
from runtime import pick_device, print0, read_object
from training.checkpoint import checkpoints
from training.loggers import check_loggers


def check_knobs(knobs, ranks):
    """Raise ValueError for mistakes that can be found before anything is loaded.

    knobs: train.py's, as attributes; ranks: of the run, or of the one that is planned."""
    # what has to be set
    for name in ("base",) if knobs.dry_run else ("base", "data", "out_dir"):
        if not getattr(knobs, name):
            raise ValueError(f"{name} is not set; see --help")
    for name in ("global_batch", "microbatch", "log_interval", "gpus"):
        if getattr(knobs, name) < 1:
            raise ValueError(f"{name} must be at least 1, found {getattr(knobs, name)}")
    check_batch(knobs, ranks)
    check_lora(knobs)
    check_loggers(knobs)

    # a run must not overwrite a model, nor a new one another
    described = Path(knobs.out_dir) / "config.json"
    if not knobs.dry_run and described.exists() and "config" not in read_object(described):
        raise ValueError(f"out_dir: {knobs.out_dir} is a model's folder, whose config.json would "
                         "be lost; choose another folder")
    if not knobs.dry_run and (Path(knobs.out_dir) / "meta.json").exists():
        raise ValueError(f"out_dir: {knobs.out_dir} is a folder of data; choose another folder")
    if knobs.resume and knobs.resume_from:
        raise ValueError("resume goes on in out_dir, resume_from starts a new out_dir: "
                         "say one of them")
    is_new = not (knobs.resume or knobs.auto_resume or knobs.dry_run)
    if is_new and (Path(knobs.out_dir) / "log.jsonl").exists():
        go_on = "go on with --resume=True"
        if not checkpoints(knobs.out_dir):
            go_on = "it has no checkpoint yet: start it anew with --auto_resume=True"
        raise ValueError(f"out_dir: {knobs.out_dir} holds a run; {go_on}, or choose another folder")

    # ranges
    for name in ("keep_last", "eval_rows", "eval_interval", "save_interval", "seed", "seq_len",
                 "warmup_steps", "cooldown_steps", "memory_gb"):
        if (getattr(knobs, name) or 0) < 0:
            raise ValueError(f"{name} must not be negative, found {getattr(knobs, name)}")
    for name in ("t_scale", "mfu"):
        if getattr(knobs, name) <= 0:
            raise ValueError(f"{name} must be positive, found {getattr(knobs, name)}")
    if not 0 <= knobs.attention_dropout < 1:
        raise ValueError("attention_dropout must be at least 0 and below 1, "
                         f"found {knobs.attention_dropout}")
    if knobs.lora_rank < 0 or knobs.grad_clip < 0 or knobs.learning_rate <= 0:
        raise ValueError("lora_rank and grad_clip must not be negative, "
                         "learning_rate must be positive")

    # the compiler
    on_cpu = not knobs.dry_run and pick_device(knobs.device).type == "cpu"
    if knobs.compile and on_cpu and not shutil.which("g++"):
        raise ValueError("compile=True on a CPU needs a C++ compiler (g++); say --compile=False")


def warn_of_lengths(knobs, steps, keep):
    """Warn of what does not fit into a run of `steps`; keep: the steps of checkpoint_at."""
    shaped = (knobs.warmup_steps or 0) + (knobs.cooldown_steps or 0)
    if shaped > steps:
        print0(f"WARNING: warmup_steps and cooldown_steps are {shaped} together, of {steps} steps")
    never = sorted(at for at in keep if not 0 < at <= steps)
    if never:
        print0(f"WARNING: checkpoint_at: no step {', '.join(map(str, never))} in 1 to {steps}")


def check_steps_left(first_step, steps, started_from, resume_from):
    """Raise ValueError for a checkpoint that has done more steps than the run has, and for a new
    run that would begin at its end."""
    if first_step > steps:
        raise ValueError(f"resume: {started_from} has done {first_step} steps, more than the "
                         f"{steps} of this run")
    if resume_from and first_step >= steps and started_from == Path(resume_from):
        raise ValueError(f"resume_from: {resume_from} has done {first_step} steps, and the run "
                         f"has {steps} in all, those included; nothing is left to do")


def check_batch(knobs, ranks):
    """Raise ValueError unless the microbatches of all ranks divide the batch."""
    rows_at_once = knobs.microbatch * ranks
    if knobs.global_batch % rows_at_once:
        on_ranks = f" on {ranks} ranks" if ranks > 1 else ""
        nearest = max(1, round(knobs.global_batch / rows_at_once)) * rows_at_once
        raise ValueError(f"microbatch={knobs.microbatch}{on_ranks} does not divide global_batch="
                         f"{knobs.global_batch}; the nearest that does is {nearest}")


def check_lora(knobs):
    """Raise ValueError for knobs of LoRA that contradict each other."""
    if knobs.scratch and (knobs.lora_rank or knobs.adapter):
        raise ValueError("scratch: LoRA needs a pretrained base; say scratch=False or lora_rank=0")
    if knobs.lora_rank and knobs.adapter:
        raise ValueError("adapter: it brings its own rank; say lora_rank=0")
    says_how = knobs.lora_alpha is not None or knobs.lora_targets != "all"
    says_how = says_how or knobs.rslora or knobs.dora or knobs.lora_init != "default"
    if says_how and not knobs.lora_rank:
        why = ": an adapter brings them" if knobs.adapter else ", which is full finetuning"
        raise ValueError("lora_alpha, lora_targets, rslora, dora and lora_init say how LoRA is "
                         "made, but lora_rank is 0" + why)
    if knobs.adapter:
        brought = read_adapter_config(knobs.adapter).dropout
        # 0.05 is the default, so nobody may have asked for it
        if knobs.lora_dropout not in (brought, 0.05):
            raise ValueError(f"lora_dropout={knobs.lora_dropout:g}: {knobs.adapter} brings its "
                             f"own, {brought:g}")
    if not 0 < knobs.lora_plus < math.inf:
        raise ValueError("lora_plus is a ratio of rates; it must be positive, "
                         f"found {knobs.lora_plus}")
    if knobs.lora_plus != 1 and not (knobs.lora_rank or knobs.adapter):
        raise ValueError("lora_plus is the ratio of the rates of B and A, but lora_rank is 0, "
                         "which is full finetuning")
    if knobs.lora_init == "pissa" and knobs.shard in ("full", "hybrid"):
        raise ValueError("lora_init=pissa changes whole weights; say --shard=none")
    if knobs.lora_init == "pissa" and knobs.dora:
        raise ValueError("lora_init=pissa: DoRA's change is not scale B A, of which rank 2 r would "
                         "hold the difference; say --dora=False")


def check_first_step(model, loss, is_from_scratch):
    """Raise ValueError for a wrong wiring before the first step; warn of a strange loss.

    is_from_scratch: whether the weights were random."""
    # a model that knows nothing guesses evenly; a pretrained one must not be worse
    uniform = math.log(model.config.vocab_size)
    if loss > uniform + 1 or is_from_scratch and loss < uniform - 2:
        print0(f"WARNING: first loss {loss:.2f}; guessing evenly would give {uniform:.2f}: "
               "are base and data right?")
    saved = set(file_tensors(model))
    in_adapter = {id(place.parameter) for place in adapter_tensors(model).values()}
    parameters = dict(model.named_parameters())
    partners = {}  # name of a factor -> the other one
    for name, p in parameters.items():
        if name.endswith("lora_A"):
            B = name.removesuffix("lora_A") + "lora_B"
            partners[name] = parameters[B]
            partners[B] = p
    for name, p in parameters.items():
        if p.requires_grad and name not in saved and id(p) not in in_adapter:
            raise ValueError(f"{name} is trained but would neither be loaded nor saved: give it a "
                             "place in file_tensors (llama/weights.py) or adapter_tensors "
                             "(lora.py)")
        if not p.requires_grad:
            if p.grad is not None:
                raise ValueError(f"{name} is frozen but has a gradient")
            continue
        # a factor's gradient is zero while the other factor is zero; otherwise it must move
        is_dead = p.grad is None
        if name in partners and not is_dead and full_tensor(partners[name]).any():
            is_dead = not full_tensor(p.grad).any()
        if is_dead:
            raise ValueError(f"{name} is trained but has no gradient")


def check_optimizer_state(model, optim):
    """Raise ValueError after the first step for state that a checkpoint could not hold."""
    for name, p in model.named_parameters():
        for kind, value in optim.state.get(p, {}).items():
            found = f"of type {type(value).__name__}"
            if isinstance(value, torch.Tensor):
                if value.dim() == 0 or value.shape == p.shape:
                    continue
                found = f"of shape {list(value.shape)}"
            raise ValueError(f"{name}: the optimizer's state {kind!r} is {found}; checkpoints hold "
                             f"tensors of the parameter's shape, {list(p.shape)}, or of one "
                             "number, torch.tensor(0.0)")
