"""
Speed and memory against Hugging Face transformers + peft, in one process, runs of both in turn.

    python -m bench.train                                            # what the machine can run, with random weights
    python -m bench.train --model=models/smollm2-135m                # SmolLM2-135M's real weights instead of random ones
    python -m bench.train --parts=training --ranks=0,16 --batches=16 # Llama-2-7B's shape, on a GPU

full, lora, greedy, samples: a small model. Same weights, data, dtype and threads for both sides; each figure is the median
over --repeats rounds. The peer gets its fastest settings known to us: weights in `dtype` (no autocast), SDPA attention,
fused AdamW; peft adapters as peft makes them. Ours: full finetuning keeps fp32 master weights, as train.py does, and LoRA
fp32 adapters.

training: full finetuning and LoRA by rank, sequence length, activation checkpointing and batch size, the axes of the paper's
figure S10. Its batches are those of a node of eight GPUs; this GPU takes an eighth, without communication, and at most
`microbatch` rows and `microbatch_tokens` at once. Random weights, one model in memory at a time; the peer's adapters are in
`dtype`. The shape has as many blocks as all of ours fit with by training/plan.py; what does not fit all the same is recorded as out of
memory. FLOPs are the true ones (training/plan.py), what checkpointing computes again not counted; MFU is their share of the data
sheet's.
"""
import contextlib
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from configurator import configure, knob_table
from lion import DecoupledLionW
from llama.lora_matmul import choose_kernel
from lora import LoRAProjection, apply_lora
from model import IGNORE, Llama, LlamaConfig
from training.plan import PUBLISHED, flops_of_batch, predict_memory
from runtime import device_name, one_line_errors, peak_flops, peak_memory, pick_device, versions, write_whole

# -----------------------------------------------------------------------------
parts = ()               # full, lora, greedy, samples, training; none = what the machine can run: on a CPU all but training
repeats = 3              # rounds; the median counts
compile = True           # torch.compile of our blocks in training; the peer stays eager, compile_peer tries it
compile_peer = False
lora_kernel = 'auto'     # ours, training: auto | torch | triton
lora_dropout = 0.05
dtype = 'bfloat16'
device = 'auto'          # auto | cpu | cuda | cuda:N
side = 'both'            # both in turn | ours | peer: one alone, which is how peak memory is measured
out = ''                 # also write the results to this JSON file, as they come
# full, lora, greedy, samples
model = ''               # model folder; '' = random weights of SmolLM2-135M's shape
rows = 4                 # full, lora: rows a step
seq_len = 512            # and tokens a row
lora_rank = 16
prompts = 16             # greedy: prompts at once, of 32 to 96 tokens
samples = 50             # samples: of one prompt of 128 tokens, temperature 0.8, top_p 0.95
new_tokens = 64          # of each continuation
# training
shape = '7b'             # 7b, 13b: Llama-2's | tiny
ranks = (0, 16, 64, 256, 512)   # 0 = full finetuning
seq_lens = (4096, 1024)
checkpointing = ('none', 'block')
batches = (8, 16, 32, 64, 128, 256)   # rows a step of eight GPUs
microbatch = 8           # rows at once, at most
microbatch_tokens = 8192 # and tokens at once
stop_after = 0           # seconds after which no further model is begun; 0 = none
_choices = {'parts': ('full', 'lora', 'greedy', 'samples', 'training'), 'dtype': ('float32', 'bfloat16'),
            'shape': ('7b', '13b', 'tiny'), 'lora_kernel': ('auto', 'torch', 'triton'), 'side': ('both', 'ours', 'peer'),
            'checkpointing': ('none', 'block')}

GPUS = 8  # of the paper's node
SHAPES = {"7b": PUBLISHED["Llama-2-7b-hf"], "13b": PUBLISHED["Llama-2-13b-hf"],
          "tiny": LlamaConfig(vocab_size=320, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
                              num_key_value_heads=4, head_dim=16)}
SMOLLM2_135M = LlamaConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                            num_attention_heads=9, num_key_value_heads=3, head_dim=64, max_position_embeddings=8192,
                            rope_theta=100000.0, tie_word_embeddings=True)


def peak_of(side, kind, folder):
    """Peak memory in GB of one side alone, in a process of its own that takes two rounds of `kind`."""
    knobs = {name: globals()[name] for name, value in config.items()
             if name not in ("side", "repeats", "out", "model") and not isinstance(value, tuple)}
    argv = [sys.executable, "-m", "bench.train", f"--model={folder}", f"--parts={kind}", f"--side={side}", "--repeats=1",
            *(f"--{name}={value}" for name, value in knobs.items())]
    lines = subprocess.run(argv, check=True, text=True, capture_output=True).stdout.splitlines()
    return json.loads(lines[-1])["peak_gb"]


def training_step(side, module, at_once):
    """A function that takes one step on a batch, `at_once` rows at a time; it reads the loss, as any loop does."""
    trained = [p for p in module.parameters() if p.requires_grad]
    if side == "ours":
        optimizer, loss_of = DecoupledLionW(trained, lr=1e-5), lambda x, y: module(x, y)[1]
    else:
        optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
        loss_of = lambda x, y: module(input_ids=x, labels=x).loss

    def step(tokens, targets):
        for x, y in zip(tokens.split(at_once), targets.split(at_once)):
            loss = loss_of(x, y) * (len(x) / len(tokens))
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
    return step


def batch_of(rows, seq_len, vocab):
    """Tokens and their targets, [rows, seq_len] on the device."""
    tokens = torch.randint(3, vocab, (rows, seq_len), generator=torch.Generator().manual_seed(0)).to(device)
    return tokens, torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], IGNORE)], 1)


def ours(folder, kind):
    """Our model for `kind`, and its loss."""
    llama = Llama.from_pretrained(folder, torch.float32 if kind == "full" else getattr(torch, dtype), device)
    llama.compute_dtype = getattr(torch, dtype)
    if kind == "lora":
        apply_lora(llama, lora_rank, 2 * lora_rank, lora_dropout)
        for line in choose_kernel(llama, lora_kernel, rows * seq_len, getattr(torch, dtype), device, compile):
            print(line)
    if compile and kind in ("full", "lora"):
        for block in llama.layers:
            block.compile()
    return llama


def peer(folder, kind):
    """transformers' model for `kind`, with peft's adapters for LoRA."""
    from transformers import AutoModelForCausalLM
    llama = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="sdpa").to(device)
    if kind == "lora":
        llama = with_peft(llama, lora_rank)
    if compile_peer and kind in ("full", "lora"):
        llama.compile()
    return llama


def with_peft(llama, rank, **how):
    from peft import LoraConfig, get_peft_model
    return get_peft_model(llama, LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=lora_dropout,
                                            target_modules="all-linear", task_type="CAUSAL_LM"), **how)


def training_rounds(folder, kind, sides):
    """Seconds of each round of a training step, {side: [...]}, after two steps to warm up."""
    batch, steps = batch_of(rows, seq_len, 49000), {}
    for name in sides:
        module = (ours if name == "ours" else peer)(folder, kind).train()
        steps[name] = training_step(name, module, rows)
        steps[name](*batch)
        steps[name](*batch)
    return alternate({name: lambda step=step: step(*batch) for name, step in steps.items()}, repeats, device)


def left_padded(texts, device):
    """input_ids and attention_mask of some prompts, as transformers wants them."""
    width = max(map(len, texts))
    padded = lambda rows: torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
    return padded(texts), padded([[1] * len(text) for text in texts])


def alternate(runs, repeats, device):
    """Seconds of `repeats` rounds of every run, {name: [...]}, in turn, so that a slow moment of the machine hits all."""
    seconds = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def generation_rounds(folder, kind, sides):
    """Seconds of each round of generating, {side: [...]}; both make exactly new_tokens a row."""
    generator = torch.Generator().manual_seed(0)
    lengths = [128] if kind == "samples" else torch.randint(32, 97, (prompts,), generator=generator).tolist()
    texts = [torch.randint(3, 49000, (n,), generator=generator).tolist() for n in lengths]
    how = dict(n=samples, temperature=0.8, top_p=0.95) if kind == "samples" else {}
    hf = (dict(do_sample=True, temperature=0.8, top_p=0.95, top_k=0, num_return_sequences=samples)
          if kind == "samples" else dict(do_sample=False))
    ids, mask = left_padded(texts, device)
    runs = {}
    for name in sides:
        module = (ours if name == "ours" else peer)(folder, kind).eval()
        if name == "ours":
            runs[name] = lambda module=module: module.generate(texts, new_tokens, **how)
        else:
            runs[name] = lambda module=module: module.generate(
                ids, attention_mask=mask, max_new_tokens=new_tokens, min_new_tokens=new_tokens, pad_token_id=0, **hf)
        runs[name]()
    return alternate(runs, repeats, device)


def compare(folder, kind):
    """Measure both sides (or the one of the knob `side`) in `kind`; returns {side: figures} and prints them as a line."""
    trains = kind in ("full", "lora")
    seconds = (training_rounds if trains else generation_rounds)(folder, kind, sides)
    count = rows * seq_len if trains else new_tokens * (samples if kind == "samples" else prompts)
    found = {name: {"tok_per_s": count / statistics.median(times), "seconds": times} for name, times in seconds.items()}
    gc.collect()
    if side == "both":
        for name in sides:
            found[name]["peak_gb"] = peak_of(name, kind, folder)
        mine, theirs = found["ours"], found["peer"]
        print(f"{kind:8} ours {mine['tok_per_s']:8.1f} tok/s {mine['peak_gb']:5.2f} GB   peer {theirs['tok_per_s']:8.1f} "
              f"tok/s {theirs['peak_gb']:5.2f} GB   {mine['tok_per_s'] / theirs['tok_per_s']:.2f}x", flush=True)
    return found


# ----------------------------------------------------------------------------- training at the paper's shape
def method(rank):
    return f"LoRA r={rank}" if rank else "full"


def rows_at_once(seq, batch):
    """Rows of a microbatch."""
    return max(1, min(microbatch, microbatch_tokens // seq, batch // GPUS))


def on_meta(config, rank, how):
    """Our model without memory, as train.py makes it: fp32 weights to train, or weights in `dtype` and fp32 adapters."""
    with torch.device("meta"):
        llama = Llama(config).to(getattr(torch, dtype) if rank else torch.float32)
    llama.compute_dtype, llama.activation_checkpointing = getattr(torch, dtype), how
    return apply_lora(llama, rank, 2 * rank, lora_dropout) if rank else llama


def blocks_that_fit(config):
    """The shape with as many of its blocks, one at least, as fit the device whatever is trained, by plan.predict_memory."""
    has = (torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else
           os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    cases = list(itertools.product(ranks, checkpointing, seq_lens))

    def need(fewer, rank, how, seq):
        at_once = rows_at_once(seq, max(batches))
        return sum(predict_memory(on_meta(fewer, rank, how), "lionw", at_once, seq, max(batches) // GPUS // at_once,
                                  compiled=compile, device=device.type).values())

    for layers in range(config.num_hidden_layers, 0, -1):
        fewer = replace(config, num_hidden_layers=layers)
        if layers == 1 or all(need(fewer, *case) < 0.93 * has for case in cases):  # the rest: CUDA's own, fragmentation
            print(f"training: {layers} of {config.num_hidden_layers} blocks of shape {shape} in {has / 1e9:.1f} GB; predicted at "
                  f"{seq_lens[0]} tokens, checkpointing {checkpointing[0]}: " + ", ".join(
                      f"{method(rank)} {need(fewer, rank, checkpointing[0], seq_lens[0]) / 1e9:.3g} GB" for rank in ranks))
            return fewer


def random_model(name, config, rank, how):
    """A side's model with random weights, made on the device."""
    if name == "ours":
        llama = on_meta(config, rank, how).to_empty(device=device)
        with torch.no_grad():
            for p in llama.parameters():
                p.normal_(0, 0.02) if p.dim() > 1 else p.fill_(1)
        return llama
    from transformers import AutoModelForCausalLM, LlamaConfig as PeerConfig
    with torch.device(device):
        llama = AutoModelForCausalLM.from_config(PeerConfig(**vars(config), use_cache=False), dtype=getattr(torch, dtype),
                                                 attn_implementation="sdpa")
        llama = with_peft(llama, rank, autocast_adapter_dtype=False) if rank else llama
    if how == "block":
        llama.gradient_checkpointing_enable({"use_reentrant": False})
    return llama


def choose_once(llama, rank, tokens, chosen={}):
    """As choose_kernel, which measures only once for a rank and number of tokens."""
    adapted = [m for m in llama.modules() if isinstance(m, LoRAProjection)]
    if (rank, tokens) not in chosen:
        for line in choose_kernel(llama, lora_kernel, tokens, getattr(torch, dtype), device, compile):
            print(line, flush=True)
        chosen[rank, tokens] = [m.kernel for m in adapted]
    for m, kernel in zip(adapted, chosen[rank, tokens]):
        m.kernel = kernel


def forget_peak():
    """Let peak_memory begin anew; False where the system does not."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    with contextlib.suppress(OSError):
        return bool(Path("/proc/self/clear_refs").write_text("5"))
    return False


def training_of(name, config, rank, how, seq, at_once, some):
    """Yield a record for each batch of `some`, which share a microbatch of `at_once` rows, of one side's training."""
    left, why = list(some), ""
    try:
        llama = random_model(name, config, rank, how).train()
        if name == "ours" and rank:
            choose_once(llama, rank, at_once * seq)
        if name == "ours" and compile:
            for block in llama.layers:
                block.compile()
        elif name == "peer" and compile_peer:
            llama.compile()
        step, (tokens, targets) = training_step(name, llama, at_once), batch_of(max(some) // GPUS, seq, config.vocab_size)
        row = targets[0].cpu().numpy()
        flops = flops_of_batch(on_meta(config, rank, how), [(row, row, np.array([], int))], doc_mask=False)
        for _ in range(2):
            step(tokens[:at_once], targets[:at_once])
        for batch in some:
            count = batch // GPUS
            known = forget_peak()
            seconds = alternate({name: lambda: step(tokens[:count], targets[:count])}, repeats, device)[name]
            rate, peak = flops * count / statistics.median(seconds), peak_flops(device)
            left.remove(batch)
            yield {"batch": batch, "rows": count, "tok_per_s": count * seq / statistics.median(seconds), "tflops": rate / 1e12,
                   "mfu": rate / peak if peak else None,
                   "peak_gb": peak_memory(device) if known else None, "seconds": seconds}
    except torch.OutOfMemoryError:
        why = "out of memory"
    except Exception as e:  # whatever it is, it must not cost the other measurements; the script's status will be 1
        traceback.print_exc()
        why = " ".join(f"{type(e).__name__}: {e}".split())[:300]
    for batch in left:
        yield {"batch": batch, "rows": batch // GPUS, "failed": why}


def training():
    """Yield a record for each sequence length, checkpointing, batch, rank and side, and print it as a line."""
    began, config = time.perf_counter(), blocks_that_fit(SHAPES[shape])
    for seq, how in itertools.product(seq_lens, checkpointing):
        groups, speed = {}, {}  # batches by rows at once; tokens a second by (batch, rank, side)
        for batch in batches:
            groups.setdefault(rows_at_once(seq, batch), []).append(batch)
        for (at_once, some), rank, name in itertools.product(groups.items(), ranks, sides):
            what = f"{seq} tokens, checkpointing {how}, {name} " + method(rank)
            if stop_after and time.perf_counter() - began > stop_after:
                print(f"{what}, batches {some}: not begun within {stop_after} s", flush=True)
                continue
            gc.collect()  # the model before
            torch.compiler.reset()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            for found in training_of(name, config, rank, how, seq, at_once, some):
                speed[found["batch"], rank, name] = found.get("tok_per_s")
                print(f"{what:48} batch {found['batch']:3}, {found['rows']:2} rows by {at_once}: ", figures(found), flush=True)
                yield {"side": name, "rank": rank, "seq_len": seq, "checkpointing": how, "microbatch": at_once, "shape": shape,
                       "layers": config.num_hidden_layers, "of_layers": SHAPES[shape].num_hidden_layers, **found}
        for batch in batches:
            print(f"{seq} tokens, checkpointing {how}, batch {batch}: " + ratios(speed, batch), flush=True)


def figures(found):
    """A record in words."""
    if "failed" in found:
        return found["failed"]
    share, peak = (f"{found['mfu']:.1%}" if found["mfu"] else "n/a"), (f"{found['peak_gb']:.2f}" if found["peak_gb"] else "n/a")
    return f"{found['tok_per_s']:9.1f} tok/s  {found['tflops']:8.3g} TFLOP/s  MFU {share}  {peak:>6} GB"


def ratios(speed, batch):
    """In words: ours over our full finetuning and over the peer, of tokens a second by (batch, rank, side)."""
    def words(over):
        pairs = [(rank, speed.get((batch, rank, "ours")), speed.get((batch, *over(rank)))) for rank in ranks]
        return ", ".join(f"{method(rank)} {mine / other:.2f}" for rank, mine, other in pairs if mine and other) or "nothing"
    return f"times our full: {words(lambda rank: (0, 'ours'))}; times the peer: {words(lambda rank: (rank, 'peer'))}"


def save(results, machine):
    if out:
        write_whole(out, json.dumps({"config": {**config, "device": str(device)}, **machine, "results": results}, indent=1))


# -----------------------------------------------------------------------------
if __name__ == "__main__":
    with one_line_errors(), tempfile.TemporaryDirectory() as _scratch:
        config = configure(globals())
        if side == "both":
            print(knob_table(globals()))
        if wrong := [batch for batch in batches if batch < GPUS or batch % GPUS]:
            raise ValueError(f"batches: found {wrong[0]}, which {GPUS} GPUs cannot share; expected multiples of {GPUS}")
        if max(seq_lens) > SHAPES[shape].max_position_embeddings:
            raise ValueError(f"seq_lens: found {max(seq_lens)}, longer than the {SHAPES[shape].max_position_embeddings} of "
                             f"shape={shape}")
        device = pick_device(device)
        parts = parts or (("training",) if device.type == "cuda" else ()) + ("full", "lora", "greedy", "samples")
        if not model and set(parts) != {"training"}:
            Llama(SMOLLM2_135M).init_weights().save_pretrained(_scratch)
        folder = model or _scratch
        sides = ("ours", "peer") if side == "both" else (side,)
        results, machine = {}, {"device": device_name(device), "versions": versions()}
        if side == "both":
            print(f"{machine['device']}, {machine['versions']}")
        for kind in parts:
            if kind != "training":
                results[kind] = compare(folder, kind)
            for record in training() if kind == "training" else ():
                results.setdefault(kind, []).append(record)
                save(results, machine)
            save(results, machine)
        if side == "both" and {"full", "lora"} <= results.keys():
            print("LoRA against full, both ours: "
                  f"{results['lora']['ours']['tok_per_s'] / results['full']['ours']['tok_per_s']:.2f}x")
        if side != "both":
            print(json.dumps({"peak_gb": peak_memory(device)}))
        if failed := sum(record.get("failed", "out of memory") != "out of memory" for record in results.get("training", ())):
            raise SystemExit(f"{failed} measurements failed")
