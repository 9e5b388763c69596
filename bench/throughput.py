"""
Training at Llama-2's shapes by rank, sequence length, activation checkpointing and batch size: the
axes of the paper's figure S10, ours and Hugging Face transformers + peft in turn. For a GPU.

    batch 128 of the paper's node    GPU 0 | GPU 1 | ... | GPU 7
    this GPU's eighth, 16 rows       [8 rows] [8 rows]     microbatches, no communication

    python -m bench.throughput --out=b.json
    python -m bench.throughput --ranks=0,16 --seq_lens=4096 --batches=16
    python -m paper.plot --benches=b.json

A microbatch has at most `microbatch` rows and `microbatch_tokens` tokens. Weights are random, one
model is in memory at a time; the peer's adapters are in `dtype`. The shape keeps as many blocks as
all of ours fit with by training/plan.py; what does not fit all the same is recorded as out of
memory. FLOPs are the true ones (training/plan.py), those that checkpointing repeats not counted;
MFU is their share of the data sheet's. See bench/sides.py for how the sides are compared.
"""
import contextlib
import gc
import itertools
import os
import statistics
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from bench.sides import SIDES, Settings, clock, print_machine, write_results
from bench.train import add_peft, compile_side, make_optimizer, random_batch, training_step
from configurator import configure, knob_table
from llama.lora_matmul import choose_kernel
from lora import LoRAProjection, apply_lora
from model import Llama, LlamaConfig
from runtime import one_line_errors, peak_flops, peak_memory, pick_device
from training.plan import PUBLISHED, flops_of_batch, predict_memory

# -----------------------------------------------------------------------------
shape = '7b'             # 7b, 13b: Llama-2's | tiny
ranks = (0, 16, 64, 256, 512)   # 0 = full finetuning
seq_lens = (4096, 1024)
checkpointing = ('none', 'block')
batches = (8, 16, 32, 64, 128, 256)   # rows a step of eight GPUs
microbatch = 8           # rows at once, at most
microbatch_tokens = 8192 # and tokens at once
lora_dropout = 0.05
lora_kernel = 'auto'     # ours: auto | torch | triton
compile = True           # torch.compile of our blocks
repeats = 3              # steps; the median counts
stop_after = 0           # seconds after which no further model is begun; 0 = none
sides = ('ours', 'peer') # and compiled: the peer through torch.compile
dtype = 'bfloat16'
device = 'auto'          # auto | cpu | cuda | cuda:N
out = ''                 # also write the results to this JSON file, as they come
_choices = {'shape': ('7b', '13b', 'tiny'), 'checkpointing': ('none', 'block'),
            'lora_kernel': ('auto', 'torch', 'triton'), 'sides': SIDES,
            'dtype': ('float32', 'bfloat16')}

GPUS = 8  # of the paper's node
TINY = LlamaConfig(vocab_size=320, hidden_size=64, intermediate_size=160, num_hidden_layers=2,
                   num_attention_heads=4, num_key_value_heads=4, head_dim=16)
SHAPES = {"7b": PUBLISHED["Llama-2-7b-hf"], "13b": PUBLISHED["Llama-2-13b-hf"], "tiny": TINY}


@dataclass
class Axes:
    """What is measured: every combination of these."""
    sides: tuple
    ranks: tuple
    seq_lens: tuple
    checkpointing: tuple
    batches: tuple
    microbatch: int
    microbatch_tokens: int

    def rows_at_once(self, seq_len, batch):
        """Rows of a microbatch."""
        by_tokens = self.microbatch_tokens // seq_len
        return max(1, min(self.microbatch, by_tokens, batch // GPUS))


class Case(NamedTuple):
    """One model to build; batches that share its microbatch are measured with it."""
    side: str
    rank: int
    seq_len: int
    checkpointing: str
    microbatch: int    # rows at once

    def __str__(self):
        return (f"{self.seq_len} tokens, checkpointing {self.checkpointing}, "
                f"{self.side} {method_name(self.rank)}")


def method_name(rank):
    return f"LoRA r={rank}" if rank else "full"


# ----------------------------------------------------------------------------- models
def our_model_on_meta(config, rank, checkpointing, settings):
    """Our model without memory: fp32 weights to train, or weights in `dtype` and fp32 adapters."""
    dtype = settings.dtype if rank else torch.float32
    with torch.device("meta"):
        llama = Llama(config).to(dtype)
    llama.compute_dtype = settings.dtype
    llama.activation_checkpointing = checkpointing
    if rank:
        apply_lora(llama, rank, 2 * rank, settings.lora_dropout)
    return llama


def predicted_bytes(config, rank, seq_len, checkpointing, axes, settings):
    """Memory of our largest batch, by training/plan.py."""
    # how the largest batch is cut
    largest = max(axes.batches)
    rows = axes.rows_at_once(seq_len, largest)
    microbatches = largest // GPUS // rows
    llama = our_model_on_meta(config, rank, checkpointing, settings)
    by_kind = predict_memory(llama, "lionw", rows, seq_len, microbatches,
                             compiled=settings.compile, device=settings.device.type)
    return sum(by_kind.values())


def blocks_that_fit(config, axes, settings, available):
    """The shape with as many blocks, at least one, as all of ours fit in the available bytes."""
    cases = list(itertools.product(axes.ranks, axes.seq_lens, axes.checkpointing))
    for layers in range(config.num_hidden_layers, 0, -1):
        fewer = replace(config, num_hidden_layers=layers)
        needs = [predicted_bytes(fewer, *case, axes, settings) for case in cases]
        # the rest is for what the plan does not count: CUDA's own memory, fragmentation
        if max(needs) < 0.93 * available:
            break
    return fewer


def print_prediction(shape, config, axes, settings, available):
    """One line: blocks, and the predicted memory of each rank at the first length."""
    seq_len = axes.seq_lens[0]
    checkpointing = axes.checkpointing[0]
    words = []
    for rank in axes.ranks:
        need = predicted_bytes(config, rank, seq_len, checkpointing, axes, settings)
        words.append(f"{method_name(rank)} {need / 1e9:.3g} GB")
    print(f"{config.num_hidden_layers} of {SHAPES[shape].num_hidden_layers} blocks of shape "
          f"{shape} in {available / 1e9:.1f} GB; predicted at {seq_len} tokens, checkpointing "
          f"{checkpointing}: {', '.join(words)}")


def memory_of(device):
    """Bytes that the device has: free on a GPU, all of the machine's for a CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def random_model(case, config, settings):
    """A side's model with random weights, made on the device."""
    # ours as train.py has it; norms are vectors of ones
    if case.side == "ours":
        llama = our_model_on_meta(config, case.rank, case.checkpointing, settings)
        llama = llama.to_empty(device=settings.device)
        with torch.no_grad():
            for p in llama.parameters():
                if p.dim() > 1:
                    p.normal_(0, 0.02)
                else:
                    p.fill_(1)
        return llama

    # the peer's; without peft it ends before a model is built
    if case.rank:
        import peft  # noqa: F401
    from transformers import AutoModelForCausalLM
    from transformers import LlamaConfig as PeerConfig
    with torch.device(settings.device):
        llama = AutoModelForCausalLM.from_config(
            PeerConfig(**vars(config), use_cache=False), dtype=settings.dtype,
            attn_implementation="sdpa")
        if case.rank:
            llama = add_peft(llama, case.rank, settings.lora_dropout,
                             autocast_adapter_dtype=False)
    if case.checkpointing == "block":
        llama.gradient_checkpointing_enable({"use_reentrant": False})
    return llama


def choose_kernel_once(llama, case, kernels, settings):
    """As choose_kernel, which measures once for a rank and number of tokens; `kernels` keeps it."""
    adapted = [m for m in llama.modules() if isinstance(m, LoRAProjection)]
    tokens = case.microbatch * case.seq_len
    key = case.rank, tokens
    if key not in kernels:
        lines = choose_kernel(llama, settings.lora_kernel, tokens, settings.dtype,
                              settings.device, settings.compile)
        for line in lines:
            print(line, flush=True)
        kernels[key] = [module.kernel for module in adapted]
    for module, kernel in zip(adapted, kernels[key]):
        module.kernel = kernel


# ----------------------------------------------------------------------------- measuring
def free_last_model(device):
    gc.collect()
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def reset_peak_memory(device):
    """Let peak_memory start again; False where the system cannot do that."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


def measure_case(case, batches, config, kernels, settings):
    """Yield a record for each batch, all with one model.

    What fails becomes a record for each batch that is left: it must not cost other measurements."""
    left = list(batches)
    try:
        for record in measure_batches(case, batches, config, kernels, settings):
            left.remove(record["batch"])
            yield record
        return
    except torch.OutOfMemoryError:
        why = "out of memory"
    except Exception as e:  # the status of the script will be 1
        traceback.print_exc()
        why = " ".join(f"{type(e).__name__}: {e}".split())[:300]
    for batch in left:
        yield {"batch": batch, "rows": batch // GPUS, "failed": why}


def measure_batches(case, batches, config, kernels, settings):
    """Build the model of a case and yield a record for each batch."""
    # the model
    llama = random_model(case, config, settings).train()
    if case.side == "ours" and case.rank:
        choose_kernel_once(llama, case, kernels, settings)
    compile_side(case.side, llama, settings)
    optimizer = make_optimizer(case.side, llama)

    # a batch, and the true FLOPs of one of its rows
    device = settings.device
    tokens, targets = random_batch(max(batches) // GPUS, case.seq_len, config.vocab_size, device)
    row = targets[0].cpu().numpy()
    no_borders = np.array([], int)
    counted = our_model_on_meta(config, case.rank, case.checkpointing, settings)
    flops = flops_of_batch(counted, [(row, row, no_borders)], doc_mask=False)

    # two steps to warm up
    at_once = case.microbatch
    for _ in range(2):
        training_step(case.side, llama, optimizer, tokens[:at_once], targets[:at_once], at_once)

    # each batch: this GPU's eighth
    for batch in batches:
        rows = batch // GPUS
        peak_is_known = reset_peak_memory(device)
        seconds = []
        for _ in range(settings.repeats):
            started = clock(device)
            training_step(case.side, llama, optimizer, tokens[:rows], targets[:rows], at_once)
            seconds.append(clock(device) - started)
        # MFU only where the data sheet's rate is known
        median = statistics.median(seconds)
        rate = flops * rows / median
        peak_rate = peak_flops(device)
        yield {"batch": batch, "rows": rows, "tok_per_s": rows * case.seq_len / median,
               "tflops": rate / 1e12, "mfu": rate / peak_rate if peak_rate else None,
               "peak_gb": peak_memory(device) if peak_is_known else None, "seconds": seconds}


def measure_all(shape, config, axes, settings, stop_after=0):
    """Yield a record for each combination of the axes, and print it as a line."""
    about = {"shape": shape, "layers": config.num_hidden_layers,
             "of_layers": SHAPES[shape].num_hidden_layers}
    began = time.perf_counter()
    kernels = {}  # what was chosen, by rank and number of tokens
    for seq_len, checkpointing in itertools.product(axes.seq_lens, axes.checkpointing):
        # batches of the same microbatch share a model
        groups = {}
        for batch in axes.batches:
            rows_at_once = axes.rows_at_once(seq_len, batch)
            groups.setdefault(rows_at_once, []).append(batch)

        # one model after the other
        speed = {}  # tokens a second by (batch, rank, side)
        for rows_at_once, rank, side in itertools.product(groups, axes.ranks, axes.sides):
            case = Case(side, rank, seq_len, checkpointing, rows_at_once)
            batches = groups[rows_at_once]
            if stop_after and time.perf_counter() - began > stop_after:
                print(f"{case}, batches {batches}: not begun within {stop_after} s", flush=True)
                continue
            free_last_model(settings.device)
            for found in measure_case(case, batches, config, kernels, settings):
                speed[found["batch"], rank, side] = found.get("tok_per_s")
                print(f"{case!s:48} batch {found['batch']:3}, {found['rows']:2} rows by "
                      f"{rows_at_once}:  {training_figures(found)}", flush=True)
                yield {**case._asdict(), **about, **found}
        # what the reader wants to know, from all models of this length
        for batch in axes.batches:
            print(f"{seq_len} tokens, checkpointing {checkpointing}, batch {batch}: "
                  f"{ratios(speed, batch, axes.ranks)}", flush=True)


# ----------------------------------------------------------------------------- words
def training_figures(found):
    """A record in words."""
    if "failed" in found:
        return found["failed"]
    mfu = f"{found['mfu']:.1%}" if found["mfu"] else "n/a"
    peak = f"{found['peak_gb']:.2f}" if found["peak_gb"] else "n/a"
    return (f"{found['tok_per_s']:9.1f} tok/s  {found['tflops']:8.3g} TFLOP/s  MFU {mfu}  "
            f"{peak:>6} GB")


def ratios(speed, batch, ranks):
    """In words: ours over our full finetuning, and over the peer.

    speed: {(batch, rank, side): tokens a second}."""
    # what was not measured has no ratio
    over_full = []
    over_peer = []
    for rank in ranks:
        mine = speed.get((batch, rank, "ours"))
        full = speed.get((batch, 0, "ours"))
        peer = speed.get((batch, rank, "peer"))
        if mine and full:
            over_full.append(f"{method_name(rank)} {mine / full:.2f}")
        if mine and peer:
            over_peer.append(f"{method_name(rank)} {mine / peer:.2f}")
    return (f"times our full: {', '.join(over_full) or 'nothing'}; "
            f"times the peer: {', '.join(over_peer) or 'nothing'}")


# -----------------------------------------------------------------------------
if __name__ == "__main__":
    with one_line_errors():
        config = configure(globals())
        print(knob_table(globals()))

        # the knobs
        for batch in batches:
            if batch < GPUS or batch % GPUS:
                raise ValueError(f"batches: found {batch}, which {GPUS} GPUs cannot share; "
                                 f"expected multiples of {GPUS}")
        longest = SHAPES[shape].max_position_embeddings
        if max(seq_lens) > longest:
            raise ValueError(f"seq_lens: found {max(seq_lens)}, longer than the {longest} of "
                             f"shape={shape}")
        device = pick_device(device)
        print_machine(device)

        # what is measured, and with how many blocks
        settings = Settings(device, getattr(torch, dtype), repeats, compile, lora_dropout,
                            lora_kernel)
        axes = Axes(sides, ranks, seq_lens, checkpointing, batches, microbatch, microbatch_tokens)
        available = memory_of(device)
        model_config = blocks_that_fit(SHAPES[shape], axes, settings, available)
        print_prediction(shape, model_config, axes, settings, available)

        # the results, written as they come
        records = []
        write_results(out, config, device, {"training": records})
        for record in measure_all(shape, model_config, axes, settings, stop_after):
            records.append(record)
            write_results(out, config, device, {"training": records})

        # what did not fit is no failure
        failed = 0
        for record in records:
            failed += record.get("failed", "out of memory") != "out of memory"
        if failed:
            raise SystemExit(f"{failed} measurements failed")
