"""
Speed and memory of generation against Hugging Face transformers, both sides in turn.

    greedy     16 prompts of 32 to 96 tokens    64 new tokens each
    samples    1 prompt of 128 tokens           50 continuations of 64 new tokens, drawn

    python -m bench.generate                               # random weights of SmolLM2-135M's shape
    python -m bench.generate --model=models/smollm2-135m

Both sides make exactly `new_tokens` a row. See bench/sides.py for how they are compared.
"""
import gc
import json
from collections import defaultdict

import torch

from bench.sides import (SIDES, clock, compare_sides, in_turn, left_padded, load_peer,
                         write_random_model, write_results)
from configurator import configure, knob_table
from model import Llama
from runtime import device_name, one_line_errors, peak_memory, pick_device, versions

# -----------------------------------------------------------------------------
model = ''               # model folder; '' = random weights of SmolLM2-135M's shape
parts = ('greedy', 'samples')
prompts = 16             # greedy: prompts at once, of 32 to 96 tokens
samples = 50             # samples: of one prompt of 128 tokens, temperature 0.8, top_p 0.95
new_tokens = 64          # of each continuation
repeats = 3              # rounds; the median counts
side = 'both'            # both in turn | ours | peer: one alone, which is how memory is measured
dtype = 'bfloat16'
device = 'auto'          # auto | cpu | cuda | cuda:N
out = ''                 # also write the results to this JSON file
_choices = {'parts': ('greedy', 'samples'), 'side': ('both', 'ours', 'peer'),
            'dtype': ('float32', 'bfloat16')}


# ----------------------------------------------------------------------------- one part
def random_prompts(lengths, generator):
    """A list of random ids for each length."""
    return [torch.randint(3, 49000, (length,), generator=generator).tolist() for length in lengths]


def generate_rows(side, llama, ids, new_tokens, drawing):
    """One round of a side: `new_tokens` after each prompt.

    drawing: {} for greedy, or n, temperature and top_p."""
    if side == "ours":
        llama.generate(ids, new_tokens, **drawing)
        return
    # transformers has other names for the same
    padded, mask = left_padded(ids, llama.device)
    how = {"do_sample": False}
    if drawing:
        how = {"do_sample": True, "temperature": drawing["temperature"], "top_k": 0,
               "top_p": drawing["top_p"], "num_return_sequences": drawing["n"]}
    llama.generate(padded, attention_mask=mask, max_new_tokens=new_tokens,
                   min_new_tokens=new_tokens, pad_token_id=0, **how)


def generation_rounds(folder, sides, ids, new_tokens, drawing, repeats, dtype, device):
    """Seconds of each round of generating, {side: [...]}, after one to warm up."""
    # both models in memory, warmed up
    models = {}
    for side in sides:
        if side == "ours":
            models[side] = Llama.from_pretrained(folder, dtype, device).eval()
        else:
            models[side] = load_peer(folder, dtype, device).eval()
        generate_rows(side, models[side], ids, new_tokens, drawing)

    # a round of each in turn
    seconds = defaultdict(list)
    for side in in_turn(sides, repeats):
        started = clock(device)
        generate_rows(side, models[side], ids, new_tokens, drawing)
        seconds[side].append(clock(device) - started)
    return seconds


# -----------------------------------------------------------------------------
if __name__ == "__main__":
    with one_line_errors():
        config = configure(globals())
        device = pick_device(device)
        sides = SIDES if side == "both" else (side,)
        if side == "both":
            print(knob_table(globals()))
            print(f"{device_name(device)}, {versions()}")
        random_weights = None if model else write_random_model()
        folder = model or random_weights.name

        results = {}
        for part in parts:
            # the same prompts for both sides
            generator = torch.Generator().manual_seed(0)
            if part == "greedy":
                lengths = torch.randint(32, 97, (prompts,), generator=generator).tolist()
                drawing = {}
                rows = prompts
            else:
                lengths = [128]
                drawing = {"n": samples, "temperature": 0.8, "top_p": 0.95}
                rows = samples
            ids = random_prompts(lengths, generator)

            seconds = generation_rounds(folder, sides, ids, new_tokens, drawing, repeats,
                                        getattr(torch, dtype), device)
            gc.collect()
            results[part] = compare_sides("bench.generate", part, seconds, rows * new_tokens,
                                          folder, config)
            write_results(out, config, device, results)
        if side != "both":
            print(json.dumps({"peak_gb": peak_memory(device)}))
