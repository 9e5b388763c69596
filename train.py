"""
Stage 2: finetune a Llama, in full or with LoRA, on token files made by prepare_data.py.

    python train.py --base=models/llama2-7b --data=data/gsm8k --lora_rank=16 --max_epochs=2 --out_dir=out/gsm8k-r16
    torchrun --nproc_per_node=8 train.py config/NAME.py --learning_rate=1e-5
    python train.py config/NAME.py --dry_run=True --gpus=32         # what it would take; needs no GPU, weights or data

out_dir/step_N is a model folder (full) or a PEFT adapter folder (LoRA), with state/ beside the weights for
--resume=True; out_dir/log.jsonl has a line for every step logged and every validation.
Same knobs, same run, on any number of ranks: rows are a function of (seed, epoch, step), dropout masks of (seed, step,
microbatch); ranks take the microbatches of a step in turn.
"""
import hashlib
import json
import math
import os
import re
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from training.checkpoint import checkpoint_state, checkpoints, load_optimizer, lock, newest_checkpoint, save_checkpoint, start_log
from configurator import configure, knob_table
from lion import DecoupledAdamW, DecoupledLionW
from llama.lora_matmul import choose_kernel
from llama.weights import full_tensor
from lora import apply_lora, apply_saved_lora, init_adapters, load_adapter_weights
from model import IGNORE, Llama, LlamaConfig
from training.parallel import all_reduce, all_reduce_gradients, check_replicas, is_sharded, destroy_process_group, shard_model
from training.plan import compare_with_paper, flops_of_batch, predict_memory, shape_of
from training.rows import PlannedRows, TokenRows, held_out, rows_of_step, evenly_spaced, stack
from runtime import (LOCAL_WORLD, PEAK_TFLOPS, RANK, WORLD, append_jsonl, device_name, join_ranks, matmul_flops,
                     one_line_errors, peak_flops, peak_memory, pick_device, pick_dtype, print0, versions, write_whole)

# -----------------------------------------------------------------------------
# what
base = ''                    # model folder: config.json, *.safetensors, tokenizer
scratch = False              # ignore the weights of base and start from random ones (pretraining)
data = ''                    # token folder made by prepare_data.py
val_data = ()                # more sets to watch: NAME=FOLDER, ... (their val.bin, else train.bin)
out_dir = ''                 # run folder, made new
resume = False               # go on from the newest complete checkpoint of out_dir
auto_resume = False          # resume if out_dir holds a checkpoint, else start: for torchrun --max_restarts, sbatch --requeue
resume_from = ''             # start out_dir from this checkpoint (step_N) of another run: its weights, momenta, step
# LoRA
lora_rank = 0                # 0 = full finetuning
lora_alpha = None            # scale is alpha / rank; None = 2 * rank, as in the paper
lora_dropout = 0.05          # on the adapter's input
lora_targets = 'all'         # all | attention | mlp | names with commas, of q k v o gate up down _proj
rslora = False               # scale alpha / sqrt(rank) instead
lora_kernel = 'auto'         # torch: plain products | triton: fused kernels | auto: torch on a CPU, on a GPU the faster
adapter = ''                 # go on from this PEFT folder (its rank, alpha, targets) instead of a new adapter
# batch and duration (exactly one of the three max_)
global_batch = 32            # rows a step
microbatch = 4               # rows at once; memory grows with it, the result does not change
seq_len = 0                  # tokens a row; 0 = the data's (only cpt data can be cut otherwise)
max_steps = 0
max_epochs = 0.0
max_tokens = 0.0             # rounded to whole steps
shuffle = True               # False: rows in file order, epoch after epoch, as those with packing='paper' always are
seed = 1337                  # of row order, adapter init and dropout
# optimizer
optimizer = 'lionw'          # lionw | adamw, both decoupled: weight_decay is not multiplied by the learning rate
learning_rate = 1e-4
beta1 = 0.9
beta2 = 0.95
weight_decay = 0.0
attention_dropout = 0.0      # share of attention probabilities set to zero
grad_clip = 1.0              # largest global L2 norm of the gradient; 0 = off
loss_norm = 'token'          # token: every target of a batch weighs the same | paper: mean of microbatch means
doc_mask = True              # documents in a row do not see each other; False = the paper's
# schedule, in steps
schedule = 'cosine'          # cosine | inv_sqrt | constant
warmup_steps = None          # None = a tenth of the run (cosine) or 0
alpha_f = 0.01               # cosine: last learning rate as a share of the peak
t_scale = 1000               # inv_sqrt: how slowly it falls
alpha_f_decay = 1.0          # inv_sqrt: floor of the fall; 1 = flat, the paper's trapezoid
cooldown_steps = None        # inv_sqrt: linear ramp at the end; None = a fifth of the run
alpha_f_cooldown = 0.0       # inv_sqrt: where the ramp ends
schedule_lag = True          # the paper's stack sets the rate one step late, so the first two steps have rate 0
# watching and saving
log_interval = 1             # steps
eval_interval = 0            # steps between validations; 0 = before the first and after the last step only
eval_rows = 64               # rows of each validation set, evenly spaced; 0 = all
save_interval = 0            # steps between checkpoints; 0 = one at the end
keep_last = 2                # complete checkpoints to keep; 0 = all
async_save = False           # write from copies in the CPU's memory while training goes on; rank 0 holds all trained weights
checkpoint_at = ()           # save there and keep: steps, or tokens where 1e6 or more, such as 500,0.25e9,1e9
max_skipped = 5              # steps in a row that may be skipped because loss or gradient is not finite
# machine
device = 'auto'              # auto | cpu | cuda | cuda:N
dtype = 'auto'               # of activations and frozen weights: auto = bf16 on GPUs that have it, else fp32
param_dtype = 'float32'      # of trained weights in full finetuning, their gradients and momenta
shard = 'auto'               # none: replicas | full: over all ranks (FSDP2) | hybrid: inside groups | auto: none if it fits
shard_ranks = 0              # hybrid: ranks of a group; 0 = those of a node
activation_checkpointing = 'none'   # none | block: keep only each block's input | selective: keep products, redo the rest
compile = False              # torch.compile of each block: minutes at the start, then faster
memory_gb = 0.0              # of a rank, that shard=auto counts on; 0 = what the device has (dry_run: 80)
# planning
dry_run = False              # print what the run would take, and end
gpus = 1                     # dry_run: ranks of the run
gpu = 'H100'                 # dry_run: their name in runtime.PEAK_TFLOPS
mfu = 0.4                    # share of the GPUs' FLOP/s that predicted times assume
data_rows = 0                # dry_run while data is still to be made: its rows, if known

_types = {'checkpoint_at': float, 'lora_alpha': float, 'warmup_steps': int, 'cooldown_steps': int}
_choices = {'optimizer': ('lionw', 'adamw'), 'loss_norm': ('token', 'paper'),
            'schedule': ('cosine', 'inv_sqrt', 'constant'), 'dtype': ('auto', 'float32', 'bfloat16', 'float64'),
            'param_dtype': ('float32', 'bfloat16', 'float64'), 'shard': ('auto', 'none', 'full', 'hybrid'),
            'lora_kernel': ('auto', 'torch', 'triton'), 'activation_checkpointing': ('none', 'block', 'selective')}
# may differ between a checkpoint and the run that resumes it
_free = {'out_dir', 'resume', 'auto_resume', 'resume_from', 'async_save', 'checkpoint_at', 'max_skipped', 'shard', 'shard_ranks',
         'activation_checkpointing', 'val_data', 'log_interval', 'eval_interval', 'eval_rows', 'save_interval', 'keep_last',
         'device', 'compile', 'lora_kernel', 'max_steps', 'max_epochs', 'max_tokens', 'memory_gb', 'dry_run', 'gpus', 'gpu', 'mfu',
         'data_rows'}


# ----------------------------------------------------------------------------- schedules
def inv_sqrt_with_warmup(t, t_max, t_warmup, t_scale, t_cooldown, alpha_f_decay=0.0, alpha_f_cooldown=0.0):
    """Multiplier of the learning rate at time t (llm-foundry llmfoundry/optim/scheduler.py): linear warmup,
    inverse square root from 1 towards alpha_f_decay, linear to alpha_f_cooldown over the last t_cooldown."""
    if t < t_warmup:
        return t / t_warmup
    decayed = lambda t: alpha_f_decay + (1 - alpha_f_decay) / math.sqrt((t - t_warmup + t_scale) / t_scale)
    start = max(t_max - t_cooldown, t_warmup)
    if t < start or t_cooldown == 0:
        return decayed(min(t, start))
    return decayed(start) + min(1.0, (t - start) / t_cooldown) * (alpha_f_cooldown - decayed(start))


def cosine_with_warmup(t, t_max, t_warmup, alpha_f=0.0):
    """Multiplier at time t (composer composer/optim/scheduler.py): linear warmup, half a cosine to alpha_f."""
    if t < t_warmup:
        return t / t_warmup
    x = min(1.0, (t - t_warmup) / (t_max - t_warmup)) if t_max > t_warmup else 1.0
    return alpha_f + (1 - alpha_f) * (1 + math.cos(math.pi * x)) / 2


def check_tokenizer(folder, meta, vocab_size):
    """Refuse data made with another tokenizer than the one in the model's folder."""
    if meta["vocab_size"] > vocab_size:
        raise ValueError(f"data has a vocabulary of {meta['vocab_size']}, the model of {vocab_size}")
    files = [p for p in (Path(folder) / "tokenizer.model", Path(folder) / "tokenizer.json") if p.is_file()]
    hashes = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    if not files:
        print0(f"note: {folder} has no tokenizer, so only the size of the data's vocabulary could be checked")
    elif meta["tokenizer_sha256"] not in hashes.values():
        raise ValueError(f"data was made with another tokenizer than the model's: {meta['tokenizer_name']}, sha256 "
                         f"{meta['tokenizer_sha256'][:12]}; {folder} has " +
                         ", ".join(f"{name} {sha[:12]}" for name, sha in hashes.items()))


# ----------------------------------------------------------------------------- loss
def backward_batch(model, rows, batch, microbatch, device, loss_norm="token", doc_mask=True, seed=0, step=0):
    """Gradients of one global batch, accumulated over this rank's microbatches; returns its part of the loss.

    rows: the set; batch: indices of the batch's rows. Sums over ranks are the batch's gradient and loss, also when
    there is one rank. loss_norm 'token': sum of token losses / number of targets in the whole batch, however it is cut.
    'paper': mean over microbatches, weighted by rows, of each one's token mean (composer 0.23)."""
    starts = range(RANK * microbatch, len(batch), WORLD * microbatch)
    parts = [[rows[i] for i in batch[start:start + microbatch]] for start in starts]
    targets_in_batch, = all_reduce(sum(int((t != IGNORE).sum()) for part in parts for _, t, _ in part), device=device)
    if not targets_in_batch:
        raise ValueError(f"step {step}: no token of the batch is a target; is the data all masked?")
    total = torch.zeros((), device=device)
    for start, part in zip(starts, parts):
        tokens, targets, docs = stack(part, device)
        # dropout masks follow from this, so that a resumed run draws the same ones
        torch.manual_seed(int(np.random.SeedSequence([seed, step, start]).generate_state(1, np.uint64)[0]))
        loss = model(tokens, targets, docs if doc_mask else None, reduction="sum")[1]
        if loss_norm == "token":
            loss = loss / targets_in_batch
        else:
            loss = loss / max(1, int((targets != IGNORE).sum())) * len(tokens) / len(batch)
        loss.backward()
        total = total + loss.detach()
    return total


@torch.no_grad()
def mean_loss(model, rows, microbatch, device, limit=0):
    """Mean loss per target (nats) over `limit` rows of a set, evenly spaced (0 = all), without dropout."""
    model.eval()
    total, count, chosen = 0.0, 0, evenly_spaced(len(rows), limit)
    for i in range(0, len(chosen), WORLD * microbatch):
        part = [rows[j] for j in chosen[i + RANK * microbatch:i + (RANK + 1) * microbatch]]
        # filled up with rows that count for nothing: another shape would compile again, and ranks keep in step
        tokens, targets, starts = rows[0]
        part += [(tokens, np.full_like(targets, IGNORE), starts)] * (microbatch - len(part))
        tokens, targets, docs = stack(part, device)
        total += model(tokens, targets, docs if rows.doc_mask else None, reduction="sum")[1].item()
        count += int((targets != IGNORE).sum())
    model.train()
    if is_sharded(model):
        model.reshard()  # without a backward pass the parts outside the blocks would stay gathered
    total, count = all_reduce(total, count, device=device)
    return total / count if count else math.nan


# ----------------------------------------------------------------------------- before the run
def memory_of_rank(device):
    """Bytes that a rank may use: memory_gb, or what its device has."""
    if memory_gb or dry_run:
        return (memory_gb or 80) * 1e9
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // LOCAL_WORLD


def choose_sharding(model, seq_len, device, ranks, node):
    """(how, predicted bytes of a rank by kind): the knob `shard`; for 'auto' replicas if they take under 80% of its memory.

    node: ranks of a node. Raises ValueError when the groups of 'hybrid' do not divide the ranks."""
    predict = lambda shards: predict_memory(model, optimizer, microbatch, seq_len, global_batch // (microbatch * ranks), ranks,
                                            shards, compile, device.type)
    how, has = shard if ranks > 1 else "none", memory_of_rank(device)
    if how == "auto":
        need = sum(predict(1).values())
        how = "none" if need < 0.8 * has else "full"
        print0(f"shard: replicas need {need / 1e9:.2f} GB of {has / 1e9:.2f} GB a rank, so {how}")
    shards = {"none": 1, "full": ranks, "hybrid": shard_ranks or node}[how]
    if ranks % shards:
        raise ValueError(f"shard=hybrid: groups of {shards} ranks do not divide {ranks}")
    return how, predict(shards)


def check_first_step(model, loss, fresh):
    """What a wrong checkpoint or a wrong wiring shows at once: raises ValueError, or warns of a strange loss."""
    uniform = math.log(model.config.vocab_size)
    if loss > uniform + 1 or fresh and loss < uniform - 2:
        print0(f"WARNING: first loss {loss:.2f}; guessing evenly would give {uniform:.2f}: are base and data right?")
    for name, p in model.named_parameters():
        if not p.requires_grad and p.grad is not None:
            raise ValueError(f"{name} is frozen but has a gradient")
        if p.requires_grad and (p.grad is None or name.endswith("lora_B") and not full_tensor(p.grad).any()):
            raise ValueError(f"{name} is trained but has no gradient")


def count_steps(rows):
    """Steps of the run from max_steps, max_epochs (rounded up) or max_tokens, exactly one of which is set."""
    given = [name for name in ("max_steps", "max_epochs", "max_tokens") if globals()[name] > 0]
    if len(given) != 1:
        raise ValueError(f"give exactly one of max_steps, max_epochs, max_tokens; found {', '.join(given) or 'none'}")
    if max_epochs and not len(rows):
        raise ValueError(f"max_epochs: {data} does not exist yet; to plan in epochs say data_rows, the rows it will have")
    return (max_steps or math.ceil(max_epochs * len(rows) / global_batch - 1e-9) or
            step_at(max_tokens, global_batch * rows.seq_len))


def step_at(tokens, tokens_a_step):
    """The step nearest to a number of tokens: 25,431 for the paper's 20e9."""
    return max(1, round(tokens / tokens_a_step))


def learning_rate_at(step, steps):
    """Learning rate of optimizer step `step` (from 0) of `steps`."""
    t = max(step - 1, 0) if schedule_lag else step + 1
    if schedule == "cosine":
        return learning_rate * cosine_with_warmup(t, steps, int(0.1 * steps) if warmup_steps is None else warmup_steps, alpha_f)
    if schedule == "inv_sqrt":
        cooldown = round(0.2 * steps) if cooldown_steps is None else cooldown_steps
        return learning_rate * inv_sqrt_with_warmup(t, steps, warmup_steps or 0, t_scale, cooldown, alpha_f_decay,
                                                    alpha_f_cooldown)
    return learning_rate * (min(1.0, t / warmup_steps) if warmup_steps else 1.0)


def check_knobs(ranks):
    """Mistakes that can be told before anything is loaded; raises ValueError."""
    for name in ("base",) if dry_run else ("base", "data", "out_dir"):
        if not globals()[name]:
            raise ValueError(f"{name} is not set; see --help")
    for name in ("global_batch", "microbatch", "log_interval", "gpus"):
        if globals()[name] < 1:
            raise ValueError(f"{name} must be at least 1, found {globals()[name]}")
    if global_batch % (microbatch * ranks):
        raise ValueError(f"microbatch={microbatch}{f' on {ranks} ranks' if ranks > 1 else ''} does not divide global_batch="
                         f"{global_batch}; the nearest that does is "
                         f"{max(1, round(global_batch / (microbatch * ranks))) * microbatch * ranks}")
    if dry_run and gpu not in dict(PEAK_TFLOPS):
        raise ValueError(f"gpu={gpu}: not one of {', '.join(dict(PEAK_TFLOPS))}")
    if resume and resume_from:
        raise ValueError("resume goes on in out_dir, resume_from starts a new out_dir: say one of them")
    if scratch and (lora_rank or adapter):
        raise ValueError("scratch: LoRA needs a pretrained base; say scratch=False or lora_rank=0")
    if not lora_rank and (lora_alpha is not None or lora_targets != "all" or rslora):
        raise ValueError("lora_alpha, lora_targets and rslora say how LoRA is made, but lora_rank is 0" +
                         (": an adapter brings them" if adapter else ", which is full finetuning"))
    if lora_rank and adapter:
        raise ValueError("adapter: it brings its own rank; say lora_rank=0")
    if not 0 <= attention_dropout < 1:
        raise ValueError(f"attention_dropout must be at least 0 and below 1, found {attention_dropout}")
    if lora_rank < 0 or grad_clip < 0 or learning_rate <= 0:
        raise ValueError("lora_rank and grad_clip must not be negative, learning_rate must be positive")
    if not (resume or auto_resume or dry_run) and (Path(out_dir) / "log.jsonl").exists():
        raise ValueError(f"out_dir: {out_dir} holds a run; go on with --resume=True or choose another folder")
    if compile and activation_checkpointing == "selective":
        raise ValueError("activation_checkpointing=selective: a compiled block hides its products; say block, or compile=False")
    if compile and device == "cpu" and not shutil.which("g++"):
        raise ValueError("compile=True on a CPU needs a C++ compiler (g++); say --compile=False")


# ----------------------------------------------------------------------------- the run
if __name__ == "__main__":
    with one_line_errors():
        config = configure(globals())
        print0(knob_table(globals()))
        ranks, node = (gpus, min(gpus, 8)) if dry_run else (WORLD, LOCAL_WORLD)
        check_knobs(ranks)
        device = torch.device("meta") if dry_run else join_ranks(pick_device(device))
        before, peaks = 0.0 if dry_run else peak_memory(device), []
        compute_dtype = pick_dtype("bfloat16" if dry_run and dtype == "auto" else dtype, device)
        shape = shape_of(base) if dry_run else LlamaConfig.from_json(base)
        watched = {}
        if dry_run and not (Path(data) / "meta.json").is_file():
            if not seq_len:
                raise ValueError(f"seq_len is not set, and {data or 'data'} does not exist yet to tell it")
            train_rows = PlannedRows(data_rows, seq_len)
            print0(f"{data or 'data'} does not exist yet: assuming " +
                   (f"data_rows={data_rows:,}, " if data_rows else "") + f"rows of {seq_len} tokens, every token a target")
        else:
            train_rows = TokenRows(data, "train", seq_len, doc_mask)
            own = (f"val={data}",) if "val" in train_rows.meta["splits"] else ()
            watched = held_out((*own, *val_data), seq_len, doc_mask)
            for rows in (train_rows, *watched.values()):
                check_tokenizer(base, rows.meta, shape.vocab_size)
        if train_rows.seq_len > shape.max_position_embeddings:
            raise ValueError(f"seq_len={train_rows.seq_len} is longer than the model's max_position_embeddings="
                             f"{shape.max_position_embeddings}")
        steps = count_steps(train_rows)
        started_from, state = None, {"step": 0, "tokens": 0, "skipped": 0}
        goes_on = not dry_run and (resume or auto_resume and checkpoints(out_dir))
        if goes_on or resume_from and not dry_run:
            started_from = newest_checkpoint(out_dir) if goes_on else Path(resume_from)
            new_run = {"learning_rate", "schedule", "warmup_steps", "alpha_f", "t_scale", "alpha_f_decay", "cooldown_steps",
                       "alpha_f_cooldown"}
            # "skipped" is missing in older checkpoints
            state |= checkpoint_state(started_from, config, train_rows.sha256, _free | (set() if goes_on else new_run))

        if dry_run and (first := re.fullmatch(r"step_(\d+)", Path(resume_from).name)):
            state["step"] = int(first[1])

        # model: frozen weights in the compute dtype, trained ones in fp32 (param_dtype for full finetuning). It is made
        # on meta, sharded, and then each rank reads its part
        is_lora = bool(lora_rank or adapter)
        with torch.device("meta"):
            model = Llama(shape).to(compute_dtype if is_lora else getattr(torch, param_dtype))
        if is_lora and (adapter or started_from):
            apply_saved_lora(model, started_from or adapter)
        elif is_lora:
            apply_lora(model, lora_rank, 2 * lora_rank if lora_alpha is None else lora_alpha, lora_dropout,
                       lora_targets, rslora)
        model.compute_dtype = compute_dtype
        model.activation_checkpointing = activation_checkpointing
        for block in model.layers:
            block.self_attn.dropout = attention_dropout
        how, memory = choose_sharding(model, train_rows.seq_len, device, ranks, node)

        # what is going to happen
        tokens_a_step = global_batch * train_rows.seq_len
        epochs = steps * global_batch / len(train_rows) if len(train_rows) else 0
        last = rows_of_step(steps - 1, global_batch, len(train_rows) or global_batch, seed, shuffle, train_rows.packed)
        flops = flops_of_batch(model, [train_rows[i] for i in last], doc_mask)
        peak = dict(PEAK_TFLOPS)[gpu] * 1e12 if dry_run else peak_flops(device)
        rate = mfu * ranks * (peak or matmul_flops(device, compute_dtype))
        print0(f"{base}: {sum(p.numel() for p in model.parameters()):,} parameters, "
               f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,} trained" +
               (f", LoRA r={model.lora['rank']} alpha={model.lora['alpha']} on {' '.join(model.lora['targets'])}" if is_lora
                else ", in full"))
        print0(f"{data or 'data'}: {f'{len(train_rows):,}' if epochs else 'an unknown number of'} rows of {train_rows.seq_len}; "
               f"{steps:,} steps of {global_batch} rows = {tokens_a_step:,} tokens, together {steps * tokens_a_step:,} tokens" +
               (f" = {epochs:.3g} epochs" if epochs else ""))
        print0((gpu if dry_run else device_name(device)) + (f", {ranks} ranks, shard={how}" if ranks > 1 else "") +
               f", {str(compute_dtype)[6:]}: predicted memory of a rank " +
               ", ".join(f"{name} {size / 1e9:.3f}" for name, size in memory.items()) +
               f", together {sum(memory.values()) / 1e9:.3f} GB; predicted time "
               f"{(steps - state['step']) * flops / rate / 3600:.2f} h at {rate / 1e12:.4g} TFLOP/s, {mfu:.0%} of the peak")
        if sum(memory.values()) > memory_of_rank(device):
            print0(f"WARNING: that is more than the {memory_of_rank(device) / 1e9:.2f} GB of a rank; a smaller microbatch, "
                   "activation_checkpointing=block or shard=full need less")
        if dry_run:
            print0("\n".join(compare_with_paper(lora_rank or 64)))
            raise SystemExit(0)
        if is_lora:
            for line in choose_kernel(model, lora_kernel, microbatch * train_rows.seq_len, compute_dtype, device, compile):
                print0(line)
        Path(out_dir).mkdir(parents=True, exist_ok=True)
        held = lock(out_dir) if RANK == 0 else None
        shard_model(model, how, device, compute_dtype, shard_ranks).to_empty(device=device)
        torch.manual_seed(seed)
        if scratch and not started_from:
            model.init_weights(seed)
        else:
            model.load_weights(started_from if started_from and not is_lora else base)
        if is_lora and (adapter or started_from):
            load_adapter_weights(model, started_from or adapter)
        elif is_lora:
            init_adapters(model)
        model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        Optimizer = {"lionw": DecoupledLionW, "adamw": DecoupledAdamW}[optimizer]
        optim = Optimizer(trained, learning_rate, (beta1, beta2), weight_decay)
        if started_from:
            load_optimizer(model, optim, started_from)
        if compile:
            for block in model.layers:
                block.compile()

        log = Path(out_dir) / "log.jsonl"
        if RANK == 0:
            start_log(log, state["step"] if started_from else -1)
            write_whole(Path(out_dir) / "config.json", json.dumps({"config": config, "versions": versions()}, indent=1))
        keep = {step_at(at, tokens_a_step) if at >= 1e6 else int(at) for at in checkpoint_at}

        stop = []  # signals that arrived: the run ends after the step in hand, with a checkpoint
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: (stop.append(number), signal.signal(number, signal.SIG_DFL)))

        def validate(step):
            losses = {name: mean_loss(model, rows, microbatch, device, eval_rows) for name, rows in watched.items()}
            if losses:
                print0(f"step {step}/{steps}  " + "  ".join(f"{name} loss {loss:.4f}" for name, loss in losses.items()))
                append_jsonl(log, {"step": step, "tokens": state["tokens"], "val": losses})

        if not started_from:
            validate(0)
        elif state["step"] >= steps:
            print0(f"{started_from}: the run is complete")
        window, started, skipped_in_a_row = [], time.perf_counter(), 0
        pool, saving = ThreadPoolExecutor(1) if async_save else None, None
        for step in range(first := state["step"], steps):
            clock = time.perf_counter()
            batch = rows_of_step(step, global_batch, len(train_rows), seed, shuffle, train_rows.packed)
            lr = optim.param_groups[0]["lr"] = learning_rate_at(step, steps)
            loss = backward_batch(model, train_rows, batch, microbatch, device, loss_norm, doc_mask, seed, step)
            if not is_sharded(model):
                all_reduce_gradients(trained)
            norm = full_tensor(torch.nn.utils.clip_grad_norm_(trained, grad_clip or math.inf)).item()
            peak_here = (peak_memory(device) - before) * 1e9
            # all ranks stop, or none
            loss, stops, *peaks = all_reduce(loss.item(), len(stop), *(peak_here * (r == RANK) for r in range(WORLD)), device=device)
            done = step + 1
            if not (math.isfinite(loss) and math.isfinite(norm)):  # sums over ranks: all of them see it
                skipped_in_a_row += 1
                state["skipped"] += 1
                print0(f"WARNING: step {done} skipped: loss {loss}, gradient norm {norm}")
                append_jsonl(log, {"step": done, "skipped": batch.tolist(), "loss": str(loss), "grad_norm": str(norm)})
                if skipped_in_a_row >= max_skipped:
                    raise ValueError(f"{max_skipped} steps in a row without a finite loss and gradient norm, the last {done}; "
                                     f"their rows are in {log} under 'skipped'")
            else:
                skipped_in_a_row = 0
                if step == first:
                    check_first_step(model, loss, fresh=scratch and not started_from)
                optim.step()
            optim.zero_grad(set_to_none=True)

            state["tokens"] += tokens_a_step
            window.append(time.perf_counter() - clock)
            if (done % log_interval == 0 or done == steps) and not skipped_in_a_row:
                seconds = sum(window) / len(window)
                speed, tflops = tokens_a_step / seconds, flops / seconds / 1e12
                share = f"{tflops * 1e12 / peak / WORLD:.1%}" if peak else "n/a"
                eta = (steps - done) * seconds
                print0(f"step {done}/{steps} {done / steps:4.0%}  loss {loss:.4f}  lr {lr:.2e}  norm {norm:.3f}  "
                       f"{speed:,.0f} tok/s  {tflops:.2f} TFLOP/s  MFU {share}  "
                       f"ETA {eta // 3600:.0f}:{eta % 3600 // 60:02.0f}:{eta % 60:02.0f}")
                append_jsonl(log, {"step": done, "tokens": state["tokens"], "epoch": done * global_batch / len(train_rows),
                                   "loss": loss, "lr": lr, "grad_norm": norm, "seconds": seconds, "tok_per_s": speed,
                                   "peak_gb": peak_memory(device)})
                window = []
            if saving and saving.done():
                saving = saving.result()  # None, or what went wrong
            if done == steps or eval_interval and done % eval_interval == 0:
                validate(done)
            if done == steps or stops or done in keep or save_interval and done % save_interval == 0:
                state.update(step=done, steps=steps, config=config, data=train_rows.sha256, versions=versions())
                if saving:
                    saving.result()
                if not is_sharded(model):
                    check_replicas(trained)
                saving = save_checkpoint(model, optim, out_dir, state, base, keep_last, keep, pool)
            if stops:
                name = signal.Signals(stop[0]).name if stop else "a signal to another rank"
                print0(f"stopped by {name} after step {done}; --resume=True goes on")
                break
        if saving:
            saving.result()
        print0(f"{time.perf_counter() - started:.0f} s, peak memory {peak_memory(device):.2f} GB; of each rank, above its start: "
               f"{', '.join(f'{peak / 1e9:.3f}' for peak in peaks)} GB")
        destroy_process_group()
