"""Stage 2: finetune a Llama, in full or with LoRA, on token files made by prepare_data.py.

    python train.py --base=models/llama2-7b --data=data/gsm8k --lora_rank=16 --max_epochs=2 \\
        --out_dir=out/r16
    torchrun --nproc_per_node=8 train.py config/math_cpt.py --learning_rate=1e-5
    python train.py config/math_cpt.py --dry_run=True --gpus=32     # predict time and memory

    out/r16/log.jsonl       a line for every step logged and every validation
    out/r16/config.json     the knobs
    out/r16/step_N/         a PEFT adapter folder (LoRA) or a model folder (full); for --resume=True
                            state/ in it has the optimizer's state, the step and the knobs

A step of global_batch=8 rows, microbatch=2, on 2 ranks, which alternate microbatches:

    rank 0   rows 0 1   forward, backward   rows 4 5   forward, backward   | sum of gradients,
    rank 1   rows 2 3   forward, backward   rows 6 7   forward, backward   | clip, optimizer

Same knobs, same run, on any number of ranks: rows are a function of (seed, epoch, step), dropout
masks of (seed, step, microbatch) and its length: --compile takes whole rows, else no padding.
"""
import math
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from configurator import configure, default_values, knob_table
from lion import OPTIMIZERS
from llama.identity import identity_of_folder
from llama.lora_matmul import choose_kernel
from llama.weights import full_tensor
from lora import apply_lora, apply_saved_lora, init_adapters
from model import IGNORE, Llama, LlamaConfig
from runtime import (LOCAL_WORLD, RANK, WORLD, catch_stop_signals, device_memory, device_name,
                     join_ranks, matmul_flops, one_line_errors, peak_flops, peak_memory,
                     pick_device, pick_dtype, print0, tune_cpu_memory, versions)
from training.checkpoint import (checkpoint_state, checkpoints, load_optimizer,
                                 load_trained_adapter, lock, newest_checkpoint, save_checkpoint)
from training.checks import (check_first_step, check_knobs, check_optimizer_state,
                             check_steps_left, warn_of_lengths)
from training.loggers import start_files
from training.parallel import (all_reduce, all_reduce_gradients, check_replicas,
                               destroy_process_group, is_sharded, shard_model)
from training.plan import choose_sharding, count_steps, plan_run, print_plan, shape_of, step_at
from training.rows import open_sets, rows_of_step, stack
from training.watch import validate

# -----------------------------------------------------------------------------
base = ''                    # model folder: config.json, *.safetensors, tokenizer
scratch = False              # ignore the weights of base and start from random ones (pretraining)
data = ''                    # token folder made by prepare_data.py
val_data = ()                # more sets to watch: NAME=FOLDER, ... (their val.bin, else train.bin)
out_dir = ''                 # folder of the run; created
resume = False               # from the newest complete checkpoint of out_dir
auto_resume = False          # if out_dir has one, else start: for torchrun --max_restarts, sbatch
resume_from = ''             # start out_dir from this checkpoint (step_N) of another run
# LoRA
lora_rank = 0                # 0 = full finetuning
lora_alpha = None            # scale is alpha / rank; None = 2 * rank, as in the paper
lora_dropout = 0.05          # on the adapter's input
lora_targets = 'all'         # all | attention | mlp | names with commas: q_proj,v_proj,down_proj
rslora = False               # scale alpha / sqrt(rank) instead
lora_init = 'default'        # A random, B zero | zero_a: B random | pissa: leading part of weights
lora_plus = 1.0              # learning rate of B / that of A; LoRA+ recommends 16
dora = False                 # DoRA: train the rows' lengths too; with lora_dropout twice the work
lora_kernel = 'auto'         # torch: plain matmuls | triton: fused | auto: the faster on a GPU
adapter = ''                 # continue this PEFT folder (with its rank, alpha, dropout)
# batch and duration (exactly one of the three max_)
global_batch = 32            # rows per step
microbatch = 4               # rows at once; sets memory, and changes nothing but dropout masks
seq_len = 0                  # tokens per row; 0 = the data's (only cpt data can be re-cut)
max_steps = 0
max_epochs = 0.0
max_tokens = 0.0             # rounded to whole steps
shuffle = True               # False: rows in file order, as those of packing='paper' always are
seed = 1337                  # of row order, adapter init and dropout
# optimizer
optimizer = 'lionw'          # lionw | adamw; decoupled: the rate does not multiply weight_decay
learning_rate = 1e-4
beta1 = 0.9
beta2 = 0.95
weight_decay = 0.0
attention_dropout = 0.0      # share of attention probabilities set to zero
grad_clip = 1.0              # largest global L2 norm of the gradient; 0 = off
loss_norm = 'token'          # token: all targets weigh equally | paper: mean of microbatch means
doc_mask = True              # documents in a row do not attend to each other; False = the paper's
# schedule, in steps
schedule = 'cosine'          # cosine | inv_sqrt | constant
warmup_steps = None          # None = a tenth of the run (cosine) or 0
alpha_f = 0.01               # cosine: last learning rate as a share of the peak
t_scale = 1000               # inv_sqrt: how slowly it falls
alpha_f_decay = 1.0          # inv_sqrt: floor of the fall; 1 = flat: a trapezoid (WSD)
cooldown_steps = None        # inv_sqrt: linear ramp at the end; None = a fifth of the run
alpha_f_cooldown = 0.0       # inv_sqrt: where the ramp ends
schedule_lag = True          # as in the paper: one step late; with warmup the first two have rate 0
# watching and saving
log_interval = 1             # steps
eval_interval = 0            # steps between validations; 0 = only before the first, after the last
eval_rows = 64               # rows of each validation set, evenly spaced; 0 = all
save_interval = 0            # steps between checkpoints; 0 = one at the end
keep_last = 2                # complete checkpoints to keep; 0 = all
async_save = False           # write while training continues, from copies in rank 0's CPU memory
checkpoint_at = ()           # save and keep at these steps, or tokens if >= 1e6: 500,0.25e9,1e9
max_skipped = 5              # give up after this many non-finite losses or gradients in a row
wandb = ''                   # also log to this Weights & Biases project
tensorboard = ''             # also log to this folder, in a subfolder named after the run
# machine
device = 'auto'              # auto | cpu | cuda | cuda:N
dtype = 'auto'               # of activations and frozen weights; auto: bf16 if a GPU has it
param_dtype = 'float32'      # of trained weights in full finetuning, their gradients and momenta
shard = 'auto'               # none: replicas | full | hybrid: inside groups | auto: none if it fits
shard_ranks = 0              # hybrid: ranks per group; 0 = one node
activation_checkpointing = 'none'  # block: save only each block's input, recompute the rest
compile = False              # torch.compile of each block: minutes at the start, then faster
memory_gb = 0.0              # memory per rank, for shard=auto; 0 = all (dry_run: all of gpu's)
# planning, in training/plan.py
mfu = 0.4                    # fraction of peak FLOP/s assumed in predicted times
dry_run = False              # print the plan and stop
gpus = 1                     # ranks to plan for
gpu = 'H100'                 # a name in runtime.GPUS
data_rows = 0                # rows of data not prepared yet, if known

_types = {'checkpoint_at': float, 'lora_alpha': float, 'warmup_steps': int, 'cooldown_steps': int}
_choices = {'optimizer': tuple(OPTIMIZERS), 'loss_norm': ('token', 'paper'),
            'schedule': ('cosine', 'inv_sqrt', 'constant'),
            'dtype': ('auto', 'float32', 'bfloat16', 'float64'),
            'lora_init': ('default', 'zero_a', 'pissa'),
            'param_dtype': ('float32', 'bfloat16', 'float64'),
            'shard': ('auto', 'none', 'full', 'hybrid'), 'lora_kernel': ('auto', 'torch', 'triton'),
            'activation_checkpointing': ('none', 'block')}
# may differ between a checkpoint and the run that resumes it
_free = {'out_dir', 'resume', 'auto_resume', 'resume_from', 'max_steps', 'max_epochs', 'max_tokens',
         'val_data', 'log_interval', 'eval_interval', 'eval_rows', 'save_interval', 'keep_last',
         'async_save', 'checkpoint_at', 'max_skipped', 'device', 'lora_kernel', 'shard',
         'shard_ranks', 'activation_checkpointing', 'memory_gb', 'mfu', 'dry_run', 'gpus', 'gpu',
         'data_rows', 'wandb', 'tensorboard'}
# and these too in a run that branches off with resume_from
_schedule = {'learning_rate', 'schedule', 'warmup_steps', 'alpha_f', 't_scale', 'alpha_f_decay',
             'cooldown_steps', 'alpha_f_cooldown'}


# ----------------------------------------------------------------------------- schedules
def inv_sqrt_with_warmup(t, t_max, t_warmup, t_scale, t_cooldown, alpha_f_decay=0.0,
                         alpha_f_cooldown=0.0):
    """Multiplier of the learning rate at time t (llm-foundry llmfoundry/optim/scheduler.py): linear
    warmup, inverse square root from 1 to alpha_f_decay, linear to alpha_f_cooldown at the end."""
    def decayed(t):
        fall = 1 / math.sqrt((t - t_warmup + t_scale) / t_scale)
        return alpha_f_decay + (1 - alpha_f_decay) * fall

    if t < t_warmup:
        return t / t_warmup
    start = max(t_max - t_cooldown, t_warmup)  # of the cooldown
    if t < start or t_cooldown == 0:
        return decayed(min(t, start))
    share = min(1.0, (t - start) / t_cooldown)
    return decayed(start) + share * (alpha_f_cooldown - decayed(start))


def cosine_with_warmup(t, t_max, t_warmup, alpha_f=0.0):
    """Multiplier at time t (composer composer/optim/scheduler.py): linear warmup, half a cosine."""
    if t < t_warmup:
        return t / t_warmup
    x = min(1.0, (t - t_warmup) / (t_max - t_warmup)) if t_max > t_warmup else 1.0
    return alpha_f + (1 - alpha_f) * (1 + math.cos(math.pi * x)) / 2


def learning_rate_at(step, steps, knobs):
    """Learning rate of step `step` (from 0) of `steps`. A new schedule is another `elif` here."""
    t = max(step - 1, 0) if knobs.schedule_lag else step + 1
    warmup = knobs.warmup_steps or 0
    if knobs.schedule == "cosine":
        if knobs.warmup_steps is None:
            warmup = int(0.1 * steps)
        multiplier = cosine_with_warmup(t, steps, warmup, knobs.alpha_f)
    elif knobs.schedule == "inv_sqrt":
        cooldown = knobs.cooldown_steps
        if cooldown is None:
            cooldown = round(0.2 * steps)
        multiplier = inv_sqrt_with_warmup(t, steps, warmup, knobs.t_scale, cooldown,
                                          knobs.alpha_f_decay, knobs.alpha_f_cooldown)
    elif knobs.schedule == "constant":
        multiplier = min(1.0, t / warmup) if warmup else 1.0
    else:
        raise ValueError(f"schedule={knobs.schedule}: learning_rate_at in train.py lacks it")
    return knobs.learning_rate * multiplier


# ----------------------------------------------------------------------------- model and optimizer
def make_model(shape, compute_dtype, knobs, saved_adapter=""):
    """The Llama to train, on meta: without memory or weights, but with LoRA if the knobs say so.

    Frozen weights in compute_dtype, trained ones in fp32, or in param_dtype if all are trained.
    saved_adapter: a PEFT folder that sets rank, alpha and targets instead of the knobs."""
    is_lora = bool(knobs.lora_rank or knobs.adapter)
    weight_dtype = compute_dtype if is_lora else getattr(torch, knobs.param_dtype)
    with torch.device("meta"):
        model = Llama(shape).to(weight_dtype)
    if saved_adapter and knobs.lora_init != "pissa":  # a pissa file has twice the rank
        apply_saved_lora(model, saved_adapter)
    elif is_lora:
        alpha = 2 * knobs.lora_rank if knobs.lora_alpha is None else knobs.lora_alpha
        apply_lora(model, knobs.lora_rank, alpha, knobs.lora_dropout, knobs.lora_targets,
                   knobs.rslora, knobs.dora)
    model.compute_dtype = compute_dtype
    model.activation_checkpointing = knobs.activation_checkpointing
    for block in model.layers:
        block.self_attn.dropout = knobs.attention_dropout
    return model


def make_optimizer(model, knobs):
    """The optimizer. To add one: a class and its line in OPTIMIZERS, both in lion.py.

    With lora_plus, B has its own learning rate: LoRA+ (Hayou et al. 2024, arXiv 2402.12354)."""
    # parameter groups: each may have its own "lr", and keeps its ratio to learning_rate
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = [{"params": list(trained.values())}]
    if knobs.lora_plus != 1:
        faster = [p for name, p in trained.items() if name.endswith("lora_B")]
        others = [p for name, p in trained.items() if not name.endswith("lora_B")]
        rate = knobs.learning_rate * knobs.lora_plus
        groups = [{"params": others}, {"params": faster, "lr": rate}]
    betas = (knobs.beta1, knobs.beta2)
    optim = OPTIMIZERS[knobs.optimizer](groups, knobs.learning_rate, betas, knobs.weight_decay)
    for group in optim.param_groups:
        group["lr_scale"] = group["lr"] / knobs.learning_rate
    return optim


# ----------------------------------------------------------------------------- loss
def backward_batch(model, dataset, batch, microbatch, device, loss_norm="token", doc_mask=True,
                   seed=0, step=0):
    """Accumulate this rank's gradients of one global batch; returns its part of the loss, and the
    number of tokens computed, without the padding beyond the last target of a microbatch.

    batch: indices of its rows in the dataset. Summed over ranks, these are the batch's gradient and
    loss. loss_norm 'token': sum of token losses / number of targets in the whole batch, however it
    is split. 'paper': mean of the microbatches' token means, weighted by rows (composer)."""
    offsets = range(RANK * microbatch, len(batch), WORLD * microbatch)
    microbatches = []
    targets_here = 0
    for offset in offsets:
        rows = [dataset[i] for i in batch[offset:offset + microbatch]]
        microbatches.append(rows)
        targets_here += sum(int((targets != IGNORE).sum()) for _, targets, _ in rows)
    targets_in_batch, = all_reduce(targets_here, device=device)
    if not targets_in_batch:
        raise ValueError(f"step {step}: no token of the batch is a target; is the data all masked?")

    total = torch.zeros((), device=device)
    computed = 0
    for offset, rows in zip(offsets, microbatches):
        tokens, targets, docs = stack(rows, device, model.compiled)
        computed += tokens.numel()
        # the seed of this microbatch's dropout masks: a resumed run draws the same ones
        dropout_seed = np.random.SeedSequence([seed, step, offset]).generate_state(1, np.uint64)[0]
        torch.manual_seed(int(dropout_seed))
        loss = model(tokens, targets, docs if doc_mask else None, reduction="sum")[1]
        if loss_norm == "token":
            loss = loss / targets_in_batch
        else:
            targets_in_microbatch = int((targets != IGNORE).sum())
            loss = loss / max(1, targets_in_microbatch) * len(tokens) / len(batch)
        loss.backward()
        total = total + loss.detach()
    return total, computed


# ----------------------------------------------------------------------------- what is logged
def log_step(log, record, steps, flops, peak):
    """Print a step and log it as `record`. flops: of a step; peak: FLOP/s of a GPU, if known."""
    done = record["step"]
    rate = flops / record["seconds"]
    mfu = f"{rate / peak / WORLD:.1%}" if peak else "n/a"
    eta = (steps - done) * record["seconds"]
    hours, minutes, seconds = eta // 3600, eta % 3600 // 60, eta % 60
    print0(f"step {done}/{steps} {done / steps:4.0%}  loss {record['loss']:.4f}  "
           f"lr {record['lr']:.2e}  norm {record['grad_norm']:.3f}  "
           f"{record['tok_per_s']:,.0f} tok/s  {rate / 1e12:.2f} TFLOP/s  MFU {mfu}  "
           f"ETA {hours:.0f}:{minutes:02.0f}:{seconds:02.0f}")
    log.append(record)


def log_losses(log, step, steps, tokens, losses):
    """Print and log the losses of the sets that are watched."""
    if losses:
        text = "  ".join(f"{name} loss {loss:.4f}" for name, loss in losses.items())
        print0(f"step {step}/{steps}  {text}")
        log.append({"step": step, "tokens": tokens, "val": losses})


# ----------------------------------------------------------------------------- the run
if __name__ == "__main__":
    with one_line_errors():
        defaults = default_values(globals())
        config = configure(globals())
        knobs = SimpleNamespace(**config)
        print0(knob_table(globals()))
        check_knobs(knobs, gpus if dry_run else WORLD)
        if dry_run:  # the same as python -m training.plan
            planned_dtype = getattr(torch, "bfloat16" if dtype == "auto" else dtype)
            plan_run(make_model(shape_of(base), planned_dtype, knobs, adapter), knobs)
            raise SystemExit(0)

        # ---- the data
        device = join_ranks(pick_device(device))
        if device.type == "cpu":
            tune_cpu_memory()
        memory_at_start = peak_memory(device)
        shape = LlamaConfig.from_json(base)
        train_rows, watched = open_sets(knobs, shape)
        steps = count_steps(knobs, train_rows)
        tokens_a_step = global_batch * train_rows.seq_len

        # ---- where it starts: at step 0, or at a checkpoint
        state = {"step": 0, "tokens": 0, "skipped": 0}  # saved as state.json
        started_from = None
        if resume or (auto_resume and checkpoints(out_dir)):
            started_from = newest_checkpoint(out_dir)
            may_differ = _free
        elif resume_from:
            started_from = Path(resume_from)
            may_differ = _free | _schedule
        if started_from:
            state |= checkpoint_state(started_from, config, defaults, train_rows, may_differ)
        first_step = state["step"]
        check_steps_left(first_step, steps, started_from, resume_from)

        # ---- the model: on meta, without memory; sharded and filled with weights below
        compute_dtype = pick_dtype(dtype, device)
        is_lora = bool(lora_rank or adapter)
        saved_adapter = (started_from or adapter) if is_lora else ""
        model = make_model(shape, compute_dtype, knobs, saved_adapter)

        # ---- the plan: sharding, memory, time, kernels
        available = memory_gb * 1e9 or device_memory(device)
        how, memory = choose_sharding(model, knobs, train_rows.seq_len, device.type, WORLD,
                                      LOCAL_WORLD, available)
        peak = peak_flops(device)
        rate = mfu * WORLD * (peak or matmul_flops(device, compute_dtype))
        flops_a_token = print_plan(knobs, model, train_rows, steps, first_step,
                                   device_name(device), WORLD, how, memory, available, rate)
        if is_lora:
            tokens = microbatch * train_rows.seq_len
            for line in choose_kernel(model, lora_kernel, tokens, compute_dtype, device, compile):
                print0(line)

        # ---- weights: each rank reads its part
        Path(out_dir).mkdir(parents=True, exist_ok=True)
        held = lock(out_dir) if RANK == 0 else None
        shard_model(model, how, device, compute_dtype, shard_ranks).to_empty(device=device)
        torch.manual_seed(seed)
        if scratch and not started_from:
            model.init_weights(seed)
        else:  # a checkpoint of LoRA holds the adapters alone
            model.load_weights(started_from if started_from and not is_lora else base)
        model.base_identity = identity_of_folder(base)
        if saved_adapter:
            load_trained_adapter(model, saved_adapter, lora_init)
        elif is_lora:
            init_adapters(model, lora_init)
        model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optim = make_optimizer(model, knobs)
        if started_from:
            load_optimizer(model, optim, started_from)
        if compile:
            model.compile_blocks()

        # ---- the run's files
        log = start_files(knobs, config, first_step if started_from else -1)
        keep = {step_at(at, tokens_a_step) if at >= 1e6 else int(at) for at in checkpoint_at}
        warn_of_lengths(knobs, steps, keep)
        pool = ThreadPoolExecutor(1) if async_save else None  # writes while training continues
        saving = None  # Future of the checkpoint that the pool is writing
        stop_signals = catch_stop_signals()

        # ---- the loop
        if not started_from:
            log_losses(log, 0, steps, 0, validate(model, watched, knobs, device))
        elif first_step >= steps:
            print0(f"{started_from}: the run is complete")
        loop_started = time.perf_counter()
        timed = []  # (seconds, tokens) of each step since the last line of the log
        skipped_in_a_row = 0
        peaks = []
        for step in range(first_step, steps):
            step_started = time.perf_counter()
            done = step + 1

            # learning rate of every parameter group
            lr = learning_rate_at(step, steps, knobs)
            for group in optim.param_groups:
                group["lr"] = lr * group["lr_scale"]

            # forward and backward, one microbatch after the other
            batch = rows_of_step(step, global_batch, len(train_rows), seed, shuffle,
                                 train_rows.packed)
            loss, computed = backward_batch(model, train_rows, batch, microbatch, device, loss_norm,
                                            doc_mask, seed, step)

            # sum over ranks: gradients (FSDP has done it) and, in one message, the loss, the
            # tokens, whether any rank was told to stop, and each rank's peak memory
            if not is_sharded(model):
                all_reduce_gradients(trained)
            norm = torch.nn.utils.clip_grad_norm_(trained, grad_clip or math.inf)
            norm = full_tensor(norm).item()  # before it was clipped
            peaks = [0.0] * WORLD
            peaks[RANK] = peak_memory(device) - memory_at_start
            loss, computed, stops, *peaks = all_reduce(loss.item(), computed, len(stop_signals),
                                                       *peaks, device=device)

            # update, or skip the batch if its loss or gradient is not finite; all ranks agree
            if math.isfinite(loss) and math.isfinite(norm):
                skipped_in_a_row = 0
                if step == first_step:
                    check_first_step(model, loss, scratch and not started_from)
                optim.step()
                if step == first_step:
                    check_optimizer_state(model, optim)
            else:
                skipped_in_a_row += 1
                state["skipped"] += 1
                print0(f"WARNING: step {done} skipped: loss {loss}, gradient norm {norm}")
                log.append({"step": done, "skipped": batch.tolist(), "loss": str(loss),
                            "grad_norm": str(norm)})
                if skipped_in_a_row >= max_skipped:
                    raise ValueError(f"{max_skipped} steps in a row without a finite loss and "
                                     f"gradient norm, the last {done}; their rows are in "
                                     f"{log.path} under 'skipped'")
            optim.zero_grad(set_to_none=True)

            # log
            state["tokens"] += tokens_a_step
            timed.append((time.perf_counter() - step_started, computed))
            if (done % log_interval == 0 or done == steps) and not skipped_in_a_row:
                seconds, computed = np.mean(timed, axis=0).tolist()
                timed = []
                epoch = done * global_batch / len(train_rows)
                record = {"step": done, "tokens": state["tokens"], "epoch": epoch, "loss": loss,
                          "lr": lr, "grad_norm": norm, "seconds": seconds,
                          "tok_per_s": computed / seconds, "peak_gb": peak_memory(device)}
                log_step(log, record, steps, flops_a_token * computed, peak)

            # validate
            if saving and saving.done():
                saving.result()  # raises if writing it failed
            if done == steps or eval_interval and done % eval_interval == 0:
                losses = validate(model, watched, knobs, device)
                log_losses(log, done, steps, state["tokens"], losses)

            # save
            is_time = save_interval and done % save_interval == 0
            if done == steps or stops or done in keep or is_time:
                state.update(step=done, steps=steps, config=config, data=train_rows.identity,
                             base=model.base_identity, versions=versions())
                if saving:
                    saving.result()
                if not is_sharded(model):
                    check_replicas(trained)
                saving = save_checkpoint(model, optim, out_dir, state, base, keep_last, keep, pool)

            if stops:
                mine = [signal.Signals(number).name for number in stop_signals]
                name = mine[0] if mine else "a signal to another rank"
                print0(f"stopped by {name} after step {done}; --resume=True goes on")
                break

        # ---- the end
        if saving:
            saving.result()
        seconds = time.perf_counter() - loop_started
        of_each_rank = ", ".join(f"{gb:.3f}" for gb in peaks) or "0"
        print0(f"{seconds:.0f} s, peak memory {peak_memory(device):.2f} GB; "
               f"of each rank, above its start: {of_each_rank} GB")
        destroy_process_group()
