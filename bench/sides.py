"""The sides of a comparison: ours, the peer (transformers, with peft for LoRA), and the same peer
through torch.compile.

    time      round 1: ours, peer, compiled    round 2: ours, peer, compiled   ...   -> the medians
    memory    ours alone, in a process of its own; then each of the others alone, likewise

All take turns in one process, so that a slow moment of the machine hits all. Same weights, data,
dtype and threads. The peer gets its fastest settings known to us: weights in the dtype of the
computation (no autocast), SDPA attention, fused AdamW. Where the rounds of a side differ by more
than SCATTER no ratio is printed, but the rounds.
"""
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch

from llama.weights import GROUPS
from model import Llama, LlamaConfig
from runtime import device_name, versions, write_whole

SIDES = ("ours", "peer", "compiled")
SCATTER = 0.2  # most that the rounds of a side may differ, as a share of their median
# the shape of HuggingFaceTB/SmolLM2-135M
SMOLLM2_135M = LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
    num_attention_heads=9, num_key_value_heads=3, head_dim=64, max_position_embeddings=8192,
    rope_theta=100000.0, tie_word_embeddings=True)


@dataclass
class Settings:
    """How all sides compute, in every script that trains."""
    device: torch.device
    dtype: torch.dtype
    repeats: int                # rounds, of which the median counts
    compile: bool               # torch.compile of ours
    lora_dropout: float
    lora_kernel: str = "auto"   # of ours


# ----------------------------------------------------------------------------- models
def write_random_model():
    """A temporary model folder of SmolLM2-135M's shape, which goes when the object goes."""
    folder = tempfile.TemporaryDirectory()
    Llama(SMOLLM2_135M).init_weights().save_pretrained(folder.name)
    return folder


def load_peer(folder, dtype, device):
    """transformers' model of a folder."""
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    return model.to(device)


def left_padded(prompts, device):
    """input_ids and attention_mask [prompts, longest], as transformers wants them."""
    width = max(len(prompt) for prompt in prompts)
    ids = []
    mask = []
    for prompt in prompts:
        padding = [0] * (width - len(prompt))
        ids.append(padding + prompt)
        mask.append(padding + [1] * len(prompt))
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def product_shapes(config):
    """[N, K] of a block's products, where projections that read the same input are one, and of the
    head's."""
    shapes = config.projection_shapes
    of_block = []
    for names in GROUPS.values():
        rows = sum(shapes[name][0] for name in names)
        of_block.append((rows, shapes[names[0]][1]))
    return of_block, (config.vocab_size, config.hidden_size)


# ----------------------------------------------------------------------------- time
def in_turn(names, repeats):
    """Yield the names one after the other, `repeats` times."""
    for _ in range(repeats):
        yield from names


def clock(device):
    """Seconds, read when the device has finished what it was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def rounds_in_turn(runs, repeats, device):
    """Seconds of each round of {name: function}, {name: [...]}, one after the other.

    A first round is not counted: caches and freed memory are still those of other sides."""
    seconds = defaultdict(list)
    for name in in_turn(runs, repeats + 1):
        started = clock(device)
        runs[name]()
        seconds[name].append(clock(device) - started)
    return {name: times[1:] for name, times in seconds.items()}


def scatter(seconds):
    """How far rounds lie apart, as a share of their median."""
    return (max(seconds) - min(seconds)) / statistics.median(seconds)


def ratio_words(ours, other):
    """How many times as long `other` takes as `ours`, from the seconds of their rounds."""
    for seconds in (ours, other):
        if scatter(seconds) > SCATTER:
            rounds = ", ".join(f"{s:.3g}" for s in seconds)
            return f"no ratio: rounds of {rounds} s scatter by {scatter(seconds):.0%}"
    return f"{statistics.median(other) / statistics.median(ours):.2f}x"


def print_machine(device):
    """The lines at the head of every bench: the machine, versions, and whether others use it."""
    print(f"{device_name(device)}, {versions()}")
    load = os.getloadavg()[0]
    cores = os.cpu_count()
    if load > cores:
        print(f"the machine is busy: load {load:.1f} on {cores} cores. Threads that wait for each "
              "other can take 20 to 40 times as long there: no figure below is to be trusted")


# ----------------------------------------------------------------------------- memory
def peak_alone(script, side, part, folder, knobs):
    """Peak memory in GB of one side of `script`, in a process of its own that takes a few rounds.

    None where that fails, which is printed."""
    argv = [sys.executable, "-m", script, f"--model={folder}", f"--parts={part}",
            f"--sides={side}", "--repeats=1"]
    # all other knobs as they are here
    for name, value in knobs.items():
        if name not in ("model", "parts", "sides", "repeats", "out"):
            argv.append(f"--{name}={value}")
    done = subprocess.run(argv, text=True, capture_output=True)
    if done.returncode:
        print(f"{part} {side}: its memory was not measured:\n{done.stderr}", flush=True)
        return None
    # the script ends with a line {"peak_gb": ...} when it runs one side
    return json.loads(done.stdout.splitlines()[-1])["peak_gb"]


# ----------------------------------------------------------------------------- results
def compare_sides(script, part, seconds, tokens, folder, knobs):
    """{side: {"tok_per_s", "seconds", "peak_gb"}} from the seconds of rounds of `tokens` tokens.

    With several sides a line is printed for each, then their memory is measured."""
    found = {}
    for side, times in seconds.items():
        found[side] = {"tok_per_s": tokens / statistics.median(times), "seconds": times}
    if len(found) == 1:
        return found
    for side, figures in found.items():
        line = f"{part:8} {side:8} {figures['tok_per_s']:8.1f} tok/s"
        if side != "ours" and "ours" in found:
            line += f"   ours is {ratio_words(seconds['ours'], seconds[side])}"
        print(line, flush=True)
    # a process each: what takes long comes after what is known
    for side, figures in found.items():
        peak = figures["peak_gb"] = peak_alone(script, side, part, folder, knobs)
        if peak is not None:
            print(f"{part:8} {side:8} {peak:8.2f} GB", flush=True)
    return found


def write_results(out, knobs, device, results):
    """Write the results to the JSON file `out`, with knobs and machine; nothing when out is ''."""
    if not out:
        return
    content = {"config": {**knobs, "device": str(device)}, "device": device_name(device),
               "versions": versions(), "results": results}
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, json.dumps(content, indent=1))
