"""
Stage 2: finetune a Llama, in full or with LoRA, on token files made by prepare_data.py.

    python train.py --base=models/llama2-7b --data=data/gsm8k --lora_rank=16 --max_epochs=2 --out_dir=out/gsm8k-r16
    python train.py config/NAME.py --learning_rate=1e-5

out_dir/step_N is a model folder (full) or a PEFT adapter folder (LoRA), with state/ beside the weights for
--resume=True; out_dir/log.jsonl has a line for every step logged and every validation.
Same knobs, same run: rows are a function of (seed, epoch, step), dropout masks of (seed, step, microbatch).
"""
import hashlib
import json
import math
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from configurator import configure, knob_table
from lion import DecoupledAdamW, DecoupledLionW
from lora import LoRAProjection, apply_lora, load_adapter, save_adapter
from model import IGNORE, Llama, LlamaConfig
from runtime import (append_jsonl, device_name, fsync_folder, matmul_flops, one_line_errors, peak_flops, peak_memory,
                     pick_device, pick_dtype, print0, versions)

# -----------------------------------------------------------------------------
# what
base = ''                    # model folder: config.json, *.safetensors, tokenizer
scratch = False              # ignore the weights of base and start from random ones (pretraining)
data = ''                    # token folder made by prepare_data.py
val_data = ()                # more sets to watch: NAME=FOLDER, ... (their val.bin, else train.bin)
out_dir = ''                 # run folder, made new
resume = False               # go on from the newest complete checkpoint of out_dir
# LoRA
lora_rank = 0                # 0 = full finetuning
lora_alpha = None            # scale is alpha / rank; None = 2 * rank, as in the paper
lora_dropout = 0.05          # on the adapter's input
lora_targets = 'all'         # all | attention | mlp | names with commas, of q k v o gate up down _proj
rslora = False               # scale alpha / sqrt(rank) instead
adapter = ''                 # go on from this PEFT folder (its rank, alpha, targets) instead of a new adapter
# batch and duration (exactly one of the three max_)
global_batch = 32            # rows a step
microbatch = 4               # rows at once; memory grows with it, the result does not change
seq_len = 0                  # tokens a row; 0 = the data's (only cpt data can be cut otherwise)
max_steps = 0
max_epochs = 0.0
max_tokens = 0.0             # rounded up to whole steps
shuffle = True               # False: rows in file order, epoch after epoch
seed = 1337                  # of row order, adapter init and dropout
# optimizer
optimizer = 'lionw'          # lionw | adamw, both decoupled: weight_decay is not multiplied by the learning rate
learning_rate = 1e-4
beta1 = 0.9
beta2 = 0.95
weight_decay = 0.0
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
# machine
device = 'auto'              # auto | cpu | cuda | cuda:N
dtype = 'auto'               # of activations and frozen weights: auto = bf16 on GPUs that have it, else fp32
param_dtype = 'float32'      # of trained weights in full finetuning, their gradients and momenta
compile = False              # torch.compile of each block: minutes at the start, then faster

_types = {'lora_alpha': float, 'warmup_steps': int, 'cooldown_steps': int}
_choices = {'optimizer': ('lionw', 'adamw'), 'loss_norm': ('token', 'paper'),
            'schedule': ('cosine', 'inv_sqrt', 'constant'), 'dtype': ('auto', 'float32', 'bfloat16', 'float64'),
            'param_dtype': ('float32', 'bfloat16', 'float64')}
# may differ between a checkpoint and the run that resumes it
_free = {'out_dir', 'resume', 'val_data', 'log_interval', 'eval_interval', 'eval_rows', 'save_interval', 'keep_last',
         'device', 'compile', 'max_steps', 'max_epochs', 'max_tokens'}


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


# ----------------------------------------------------------------------------- data
class TokenRows:
    """Rows of one split of a token folder, memory-mapped: tokens, targets, and where documents begin.

    Raises FileNotFoundError or ValueError when files are missing or do not have the size meta.json says."""

    def __init__(self, folder, split="train", seq_len=0, doc_mask=True):
        folder = Path(folder)
        if not (folder / "meta.json").is_file():
            raise FileNotFoundError(f"{folder}: no meta.json; make the folder with prepare_data.py")
        try:
            self.meta = json.loads((folder / "meta.json").read_text())
            counts = self.meta["splits"][split]
        except (ValueError, KeyError) as e:
            raise ValueError(f"{folder}/meta.json: not a whole meta.json of prepare_data.py ({e!r})") from None
        if seq_len and seq_len != self.meta["seq_len"] and self.meta["kind"] == "ift":
            raise ValueError(f"seq_len={seq_len}: the rows of {folder} are packed for {self.meta['seq_len']}")
        self.seq_len, self.doc_mask = seq_len or self.meta["seq_len"], doc_mask
        read = lambda name, kind, n: read_array(folder / f"{split}.{name}", kind, n)
        self.tokens = read("bin", self.meta["dtype"], counts["tokens"])
        self.starts = read("docs.bin", "uint64", None)
        self.mask = read("mask.bin", "uint8", counts["tokens"]) if self.meta["kind"] == "ift" else None
        if not (n := len(self.tokens) // self.seq_len):
            raise ValueError(f"{folder}/{split}.bin: {len(self.tokens)} tokens make no row of seq_len={self.seq_len}")
        self.n = n
        self.sha256 = counts["sha256"]

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        """Row i: tokens [T] int64, targets [T] int64 (IGNORE where nothing is learned), document starts in it."""
        span = slice(i * self.seq_len, (i + 1) * self.seq_len)
        tokens = self.tokens[span].astype(np.int64)
        targets = np.append(tokens[1:], IGNORE)
        if self.mask is not None:
            targets[:-1][self.mask[span][1:] == 0] = IGNORE
        inside = self.starts[slice(*np.searchsorted(self.starts, [span.start + 1, span.stop]))].astype(np.int64)
        starts = inside - span.start
        if self.doc_mask:
            targets[starts - 1] = IGNORE  # a document's first token cannot be told from another document
        return tokens, targets, starts


def read_array(path, dtype, count):
    """A file as a read-only array of `count` items (None: whatever it holds), mapped, not read."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing")
    array = np.memmap(path, dtype=np.dtype(dtype).newbyteorder("<"), mode="r") if path.stat().st_size else np.zeros(0, dtype)
    if count is not None and len(array) != count:
        raise ValueError(f"{path}: holds {len(array)} items, meta.json says {count}; truncated?")
    return array


def rows_of_step(step, batch, n_rows, seed, shuffle=True):
    """Indices of the `batch` rows of a step: a pure function of its arguments. Every row comes once an epoch;
    epochs are permutations of their own and follow each other without a gap."""
    positions = np.arange(step * batch, (step + 1) * batch)
    rows = positions % n_rows
    if shuffle:
        for epoch in np.unique(positions // n_rows):
            order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(n_rows)
            rows[positions // n_rows == epoch] = order[rows[positions // n_rows == epoch]]
    return rows


def stack(rows, device):
    """Rows of TokenRows as tokens [B, T], targets [B, T] and document borders [n + 1] in the flattened B * T."""
    tokens, targets, starts = zip(*rows)
    T = len(tokens[0])
    borders = np.concatenate([np.append(0, s) + i * T for i, s in enumerate(starts)] + [[len(rows) * T]])
    return (*(torch.from_numpy(np.stack(x)).to(device) for x in (tokens, targets)),
            torch.from_numpy(borders.astype(np.int64)).to(device))


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
def backward_batch(model, rows, microbatch, device, loss_norm="token", doc_mask=True, seed=0, step=0):
    """Gradients of one global batch, accumulated over microbatches; returns its loss as a float tensor.

    loss_norm 'token': sum of token losses / number of targets in the whole batch, however it is cut.
    'paper': mean over microbatches, weighted by rows, of each one's token mean (composer 0.23)."""
    targets_in_batch = sum(int((t != IGNORE).sum()) for _, t, _ in rows)
    if not targets_in_batch:
        raise ValueError(f"step {step}: no token of the batch is a target; is the data all masked?")
    total = 0.0
    for i in range(0, len(rows), microbatch):
        tokens, targets, docs = stack(rows[i:i + microbatch], device)
        # dropout masks follow from this, so that a resumed run draws the same ones
        torch.manual_seed(int(np.random.SeedSequence([seed, step, i]).generate_state(1, np.uint64)[0]))
        loss = model(tokens, targets, docs if doc_mask else None, reduction="sum")[1]
        if loss_norm == "token":
            loss = loss / targets_in_batch
        else:
            loss = loss / max(1, int((targets != IGNORE).sum())) * len(tokens) / len(rows)
        loss.backward()
        total = total + loss.detach()
    return total


@torch.no_grad()
def mean_loss(model, rows, microbatch, device, limit=0):
    """Mean loss per target (nats) over `limit` rows of a set, evenly spaced (0 = all), without dropout."""
    model.eval()
    total, count, n = 0.0, 0, min(limit or len(rows), len(rows))
    chosen = [i * len(rows) // n for i in range(n)]  # neighbours may be of one document
    for i in range(0, n, microbatch):
        part = [rows[j] for j in chosen[i:i + microbatch]]
        # filled up with rows that count for nothing: another shape would compile again
        part += [(part[0][0], np.full_like(part[0][1], IGNORE), part[0][2])] * (microbatch - len(part))
        tokens, targets, docs = stack(part, device)
        total += model(tokens, targets, docs if rows.doc_mask else None, reduction="sum")[1].item()
        count += int((targets != IGNORE).sum())
    model.train()
    return total / count if count else math.nan


# ----------------------------------------------------------------------------- accounting
def flops_of_batch(model, rows, doc_mask=True):
    """FLOPs of one forward and backward over rows: 2 per weight and token forward, 2 for the gradient of the input,
    2 for that of the weight when it is trained; attention causal, inside documents; head only where there is a target."""
    config, trained = model.config, model.embed_tokens.weight.requires_grad
    tokens, targets = sum(len(t) for t, _, _ in rows), sum(int((t != IGNORE).sum()) for _, t, _ in rows)
    per_weight = 6 if trained else 4
    linear = config.num_hidden_layers * sum(n * k for n, k in config.projection_shapes.values())
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad) if not trained else 0
    borders = [np.concatenate([[0], s, [len(t)]]) if doc_mask else np.array([0, len(t)]) for t, _, s in rows]
    pairs = sum(int((np.diff(b) ** 2).sum()) for b in borders) / 2
    attention = 3 * 4 * pairs * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return (tokens * (per_weight * linear + 6 * adapters) + attention +
            targets * per_weight * config.vocab_size * config.hidden_size)


def predict_memory(model, microbatch, seq_len, compute_bytes):
    """Bytes by kind before a step has run: weights, gradients, momentum, activations without checkpointing."""
    c, parameters = model.config, list(model.parameters())
    trained = sum(p.nbytes for p in parameters if p.requires_grad)
    qkv = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    # kept for backward of a block: two residuals, two normed inputs, qkv, rotated q and k, attention output,
    # gate and up, their product
    per_token = c.num_hidden_layers * (4 * c.hidden_size + 2 * qkv + c.num_attention_heads * c.head_dim +
                                       3 * c.intermediate_size)
    copies = sum(p.numel() for p in parameters) * compute_bytes if parameters[0].itemsize > compute_bytes else 0
    return {"weights": sum(p.nbytes for p in parameters), "gradients": trained,
            "optimizer": trained * (2 if optimizer == "adamw" else 1), "compute copies": copies,
            "activations": per_token * microbatch * seq_len * compute_bytes}


def check_first_step(model, loss, fresh):
    """What a wrong checkpoint or a wrong wiring shows at once: raises ValueError, or warns of a strange loss."""
    uniform = math.log(model.config.vocab_size)
    if loss > uniform + 1 or fresh and loss < uniform - 2:
        print0(f"WARNING: first loss {loss:.2f}; guessing evenly would give {uniform:.2f}: are base and data right?")
    for name, p in model.named_parameters():
        if not p.requires_grad and p.grad is not None:
            raise ValueError(f"{name} is frozen but has a gradient")
        if p.requires_grad and (p.grad is None or name.endswith("lora_B") and not p.grad.any()):
            raise ValueError(f"{name} is trained but has no gradient")


# ----------------------------------------------------------------------------- checkpoints
def checkpoints(folder):
    """Complete checkpoints of a run, [(step, path)], oldest first; step_N.tmp is one that was never finished."""
    found = [(int(p.name[5:]), p) for p in Path(folder).glob("step_*") if p.name[5:].isdigit()]
    return sorted((step, p) for step, p in found if (p / "state" / "state.json").is_file())


def save_checkpoint(model, optim, out_dir, state, base, keep_last):
    """Write out_dir/step_N whole or not at all, then drop the oldest beyond keep_last.

    Raises OSError when it could not be written; earlier checkpoints are then untouched."""
    final = Path(out_dir) / f"step_{state['step']}"
    partial = final.with_suffix(".tmp")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "state").mkdir(parents=True)
        if hasattr(model, "lora"):
            save_adapter(model, partial, base)
        else:
            model.save_pretrained(partial)
            for file in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
                if (Path(base) / file).is_file():
                    shutil.copyfile(Path(base) / file, partial / file)
        names = {p: name for name, p in model.named_parameters()}
        tensors = {f"{names[p]}:{key}": value for p, values in optim.state.items() for key, value in values.items()}
        save_file(tensors, partial / "state" / "optimizer.safetensors")
        (partial / "state" / "state.json").write_text(json.dumps(state, indent=1))
        fsync_folder(partial)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        fsync_folder(out_dir)
    except (OSError, SafetensorError) as e:
        shutil.rmtree(partial, ignore_errors=True)
        kept = [p.name for _, p in checkpoints(out_dir)]
        raise OSError(f"{final} could not be saved ({e}); " +
                      (f"the newest complete checkpoint is {kept[-1]}" if kept else "there is no checkpoint")) from None
    for _, old in checkpoints(out_dir)[:-keep_last] if keep_last else []:
        shutil.rmtree(old)
    return final


def load_optimizer(model, optim, folder):
    """Put the saved momenta back; raises ValueError when they are not of this model."""
    parameters = dict(model.named_parameters())
    for key, value in load_file(folder / "state" / "optimizer.safetensors").items():
        name, kind = key.rsplit(":", 1)
        if name not in parameters or kind != "step" and parameters[name].shape != value.shape:
            raise ValueError(f"{folder}/state: momentum of {name} {list(value.shape)} fits no parameter of this model")
        p = parameters[name]
        optim.state[p][kind] = value if kind == "step" else value.to(p.device)


def newest_checkpoint(out_dir, config, fingerprint):
    """(folder, state) to resume from; raises ValueError when there is none or it belongs to another run."""
    if not (found := checkpoints(out_dir)):
        raise ValueError(f"resume: {out_dir} holds no complete checkpoint (step_N/state/state.json)")
    folder = found[-1][1]
    try:
        state = json.loads((folder / "state" / "state.json").read_text())
        before = state["config"]
        if state["data"] != fingerprint:
            raise ValueError(f"resume: {folder} was trained on other data than {config['data']}")
    except (KeyError, TypeError, json.JSONDecodeError) as e:
        raise ValueError(f"{folder}/state/state.json: not written by train.py ({e!r})") from None
    if changed := [k for k in config if k not in _free and before.get(k) != config[k]]:
        raise ValueError(f"resume: {folder} was trained with " +
                         ", ".join(f"{k}={before.get(k)!r}, not {config[k]!r}" for k in changed))
    return folder, state


def start_log(path, last_step):
    """Keep the lines of log.jsonl up to last_step: what a killed run logged beyond its checkpoint is done again."""
    lines = [line for line in path.read_text().splitlines(True) if line.endswith("\n")] if path.exists() else []
    kept = "".join(line for line in lines if json.loads(line)["step"] <= last_step)
    path.with_suffix(".tmp").write_text(kept)
    path.with_suffix(".tmp").rename(path)


def count_steps(rows):
    """Steps of the run from max_steps, max_epochs or max_tokens, exactly one of which is set."""
    given = [name for name in ("max_steps", "max_epochs", "max_tokens") if globals()[name] > 0]
    if len(given) != 1:
        raise ValueError(f"give exactly one of max_steps, max_epochs, max_tokens; found {', '.join(given) or 'none'}")
    steps = max_steps or max_epochs * len(rows) / global_batch or max_tokens / (global_batch * rows.seq_len)
    return math.ceil(steps - 1e-9)


def learning_rate_at(step, steps):
    """Learning rate of optimizer step `step` (from 0) of `steps`."""
    t = max(step - 1, 0) if schedule_lag else step + 1
    if schedule == "cosine":
        return learning_rate * cosine_with_warmup(t, steps, int(0.1 * steps) if warmup_steps is None else warmup_steps, alpha_f)
    if schedule == "inv_sqrt":
        cooldown = round(0.2 * steps) if cooldown_steps is None else cooldown_steps
        return learning_rate * inv_sqrt_with_warmup(t, steps, warmup_steps or 0, t_scale, cooldown, alpha_f_decay, alpha_f_cooldown)
    return learning_rate * (min(1.0, t / warmup_steps) if warmup_steps else 1.0)


def check_knobs():
    """Mistakes that can be told before anything is loaded; raises ValueError."""
    for name in ("base", "data", "out_dir"):
        if not globals()[name]:
            raise ValueError(f"{name} is not set; see --help")
    for name in ("global_batch", "microbatch", "log_interval"):
        if globals()[name] < 1:
            raise ValueError(f"{name} must be at least 1, found {globals()[name]}")
    if global_batch % microbatch:
        raise ValueError(f"microbatch={microbatch} does not divide global_batch={global_batch}")
    if scratch and (lora_rank or adapter):
        raise ValueError("scratch: LoRA needs a pretrained base; say scratch=False or lora_rank=0")
    if lora_rank and adapter:
        raise ValueError("adapter: it brings its own rank; say lora_rank=0")
    if lora_rank < 0 or grad_clip < 0 or learning_rate <= 0:
        raise ValueError("lora_rank and grad_clip must not be negative, learning_rate must be positive")
    if not resume and (Path(out_dir) / "log.jsonl").exists():
        raise ValueError(f"out_dir: {out_dir} holds a run; go on with --resume=True or choose another folder")
    if compile and device == "cpu" and not shutil.which("g++"):
        raise ValueError("compile=True on a CPU needs a C++ compiler (g++); say --compile=False")


# ----------------------------------------------------------------------------- the run
if __name__ == "__main__":
    with one_line_errors():
        config = configure(globals())
        print0(knob_table(globals()))
        check_knobs()
        device = pick_device(device)
        compute_dtype = pick_dtype(dtype, device)
        train_rows = TokenRows(data, "train", seq_len, doc_mask)
        held_out = {"val": data} if "val" in train_rows.meta["splits"] else {}
        held_out.update(entry.split("=", 1) if "=" in entry else (Path(entry).name, entry) for entry in val_data)
        watched = {name: TokenRows(folder, "val" if (Path(folder) / "val.bin").exists() else "train", seq_len, doc_mask)
                   for name, folder in held_out.items()}
        shape = LlamaConfig.from_json(base)
        for rows in (train_rows, *watched.values()):
            check_tokenizer(base, rows.meta, shape.vocab_size)
        if train_rows.seq_len > shape.max_position_embeddings:
            raise ValueError(f"seq_len={train_rows.seq_len} is longer than the model's max_position_embeddings="
                             f"{shape.max_position_embeddings}")
        steps = count_steps(train_rows)
        started_from, state = (newest_checkpoint(out_dir, config, train_rows.sha256) if resume else
                               (None, {"step": 0, "tokens": 0}))
        Path(out_dir).mkdir(parents=True, exist_ok=True)

        # model: frozen weights in the compute dtype, trained ones in fp32 (param_dtype for full finetuning)
        is_lora = bool(lora_rank or adapter)
        torch.manual_seed(seed)
        if scratch and not resume:
            model = Llama(shape).to(getattr(torch, param_dtype)).init_weights(seed).to(device)
        else:
            folder = base if is_lora or not resume else started_from
            model = Llama.from_pretrained(folder, compute_dtype if is_lora else getattr(torch, param_dtype), device)
        if is_lora and (adapter or resume):
            load_adapter(model, started_from or adapter)
        elif is_lora:
            apply_lora(model, lora_rank, 2 * lora_rank if lora_alpha is None else lora_alpha, lora_dropout,
                       lora_targets, rslora)
        model.compute_dtype = compute_dtype
        model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        Optimizer = {"lionw": DecoupledLionW, "adamw": DecoupledAdamW}[optimizer]
        optim = Optimizer(trained, learning_rate, (beta1, beta2), weight_decay)
        if resume:
            load_optimizer(model, optim, started_from)
        if compile:
            for block in model.layers:
                block.compile()

        # what is going to happen
        count = sum(p.numel() for p in model.parameters())
        batch = [train_rows[i] for i in rows_of_step(0, global_batch, len(train_rows), seed, shuffle)]
        flops = flops_of_batch(model, batch, doc_mask)
        memory = predict_memory(model, microbatch, train_rows.seq_len, compute_dtype.itemsize)
        peak = peak_flops(device)
        rate = 0.4 * (peak or matmul_flops(device, compute_dtype))
        print0(f"{base}: {count:,} parameters, {sum(p.numel() for p in trained):,} trained" +
               (f", LoRA r={model.lora['rank']} alpha={model.lora['alpha']} on {' '.join(model.lora['targets'])}" if is_lora else ", in full"))
        print0(f"{data}: {len(train_rows):,} rows of {train_rows.seq_len}; {steps:,} steps of {global_batch} rows = "
               f"{steps * global_batch * train_rows.seq_len:,} tokens = {steps * global_batch / len(train_rows):.3g} epochs")
        print0(f"{device_name(device)}, {str(compute_dtype)[6:]}: predicted memory " +
               ", ".join(f"{name} {size / 1e9:.2f}" for name, size in memory.items()) +
               f", together {sum(memory.values()) / 1e9:.2f} GB; predicted time {(steps - state['step']) * flops / rate / 3600:.2f} h "
               f"at {rate / 1e12:.3g} TFLOP/s")
        log = Path(out_dir) / "log.jsonl"
        start_log(log, state["step"])
        (Path(out_dir) / "config.json").write_text(json.dumps({"config": config, "versions": versions()}, indent=1))

        stop = []  # signals that arrived: the run ends after the step in hand, with a checkpoint
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: (stop.append(number), signal.signal(number, signal.SIG_DFL)))

        def validate(step):
            losses = {name: mean_loss(model, rows, microbatch, device, eval_rows) for name, rows in watched.items()}
            if losses:
                print0(f"step {step}/{steps}  " + "  ".join(f"{name} loss {loss:.4f}" for name, loss in losses.items()))
                append_jsonl(log, {"step": step, "tokens": state["tokens"], "val": losses})

        if not resume:
            validate(0)
        elif state["step"] >= steps:
            print0(f"{started_from}: the run is complete")
        window, started = [], time.perf_counter()
        for step in range(first := state["step"], steps):
            clock = time.perf_counter()
            batch = [train_rows[i] for i in rows_of_step(step, global_batch, len(train_rows), seed, shuffle)]
            lr = optim.param_groups[0]["lr"] = learning_rate_at(step, steps)
            loss = backward_batch(model, batch, microbatch, device, loss_norm, doc_mask, seed, step)
            norm = torch.nn.utils.clip_grad_norm_(trained, grad_clip or math.inf)
            loss, norm = loss.item(), norm.item()
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise ValueError(f"step {step + 1}: loss {loss}, gradient norm {norm}; the rows were "
                                 f"{rows_of_step(step, global_batch, len(train_rows), seed, shuffle).tolist()}")
            if step == first:
                check_first_step(model, loss, fresh=scratch and not resume)
            optim.step()
            optim.zero_grad(set_to_none=True)

            done = step + 1
            state["tokens"] += global_batch * train_rows.seq_len
            window.append(time.perf_counter() - clock)
            if done % log_interval == 0 or done == steps:
                seconds = sum(window) / len(window)
                speed, tflops = global_batch * train_rows.seq_len / seconds, flops / seconds / 1e12
                mfu = f"{tflops * 1e12 / peak:.1%}" if peak else "n/a"
                eta = (steps - done) * seconds
                print0(f"step {done}/{steps} {done / steps:4.0%}  loss {loss:.4f}  lr {lr:.2e}  norm {norm:.3f}  "
                       f"{speed:,.0f} tok/s  {tflops:.2f} TFLOP/s  MFU {mfu}  "
                       f"ETA {eta // 3600:.0f}:{eta % 3600 // 60:02.0f}:{eta % 60:02.0f}")
                append_jsonl(log, {"step": done, "tokens": state["tokens"], "epoch": done * global_batch / len(train_rows),
                                   "loss": loss, "lr": lr, "grad_norm": norm, "seconds": seconds, "tok_per_s": speed,
                                   "peak_gb": peak_memory(device)})
                window = []
            if done == steps or eval_interval and done % eval_interval == 0:
                validate(done)
            if done == steps or stop or save_interval and done % save_interval == 0:
                state.update(step=done, config=config, data=train_rows.sha256, versions=versions())
                saved = save_checkpoint(model, optim, out_dir, state, base, keep_last)
                print0(f"saved {saved}")
            if stop:
                print0(f"stopped by {signal.Signals(stop[0]).name} after step {done}; --resume=True goes on")
                raise SystemExit(0)
        print0(f"{time.perf_counter() - started:.0f} s, peak memory {peak_memory(device):.2f} GB")
