"""
Speed and memory of generation against Hugging Face transformers, in turn.

    greedy     16 prompts of 32 to 96 tokens    64 new tokens each
    samples    1 prompt of 128 tokens           50 continuations of 64 new tokens, drawn

    python -m bench.generate                               # random weights of SmolLM2-135M's shape
    python -m bench.generate --model=models/smollm2-135m

All sides make exactly `new_tokens` a row; 'compiled' is transformers with a static cache and its
step through torch.compile. See bench/sides.py for how they are compared. Beside them stands the
floor of a decoding step: its matrix products alone, and the time that it takes to read the weights
once.
"""
import gc
import json
import statistics
from functools import partial

import torch

from bench.sides import (SCATTER, SIDES, compare_sides, left_padded, load_peer, print_machine,
                         product_shapes, rounds_in_turn, scatter, write_random_model, write_results)
from configurator import configure, knob_table
from llama.products import can_pack, linear
from model import Llama, LlamaConfig
from runtime import one_line_errors, peak_memory, pick_device

# -----------------------------------------------------------------------------
model = ''               # model folder; '' = random weights of SmolLM2-135M's shape
parts = ('greedy', 'samples')
prompts = 16             # greedy: prompts at once, of 32 to 96 tokens
samples = 50             # samples: of one prompt of 128 tokens, temperature 0.8, top_p 0.95
new_tokens = 64          # of each continuation
repeats = 5              # rounds; the median counts
sides = SIDES            # in turn; one alone is how memory is measured
dtype = 'bfloat16'
device = 'auto'          # auto | cpu | cuda | cuda:N
out = ''                 # also write the results to this JSON file
_choices = {'parts': ('greedy', 'samples'), 'sides': SIDES, 'dtype': ('float32', 'bfloat16')}


FLOOR_PASSES = 8  # of the floor in a round: a decoding step follows another


# ----------------------------------------------------------------------------- one part
def random_prompts(lengths, vocab_size, generator):
    """A list of random ids for each length."""
    prompts = []
    for length in lengths:
        prompts.append(torch.randint(3, vocab_size, (length,), generator=generator).tolist())
    return prompts


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
    if side == "compiled":
        from transformers import CompileConfig  # only the peer needs it
        compile_config = CompileConfig(mode="default")
        compile_config._compile_all_devices = True  # else on GPUs alone
        how.update(cache_implementation="static", compile_config=compile_config)
    llama.generate(padded, attention_mask=mask, max_new_tokens=new_tokens,
                   min_new_tokens=new_tokens, pad_token_id=0, **how)


def generation_rounds(folder, sides, ids, new_tokens, drawing, repeats, dtype, device):
    """Seconds of each round of generating, {side: [...]}, after two to warm up.

    Beside ours and others: of ours with one new token ("first"), and of a step's floor
    ("products" and "reading")."""
    # all models in memory, warmed up
    models = {}
    for side in sides:
        if side == "ours":
            models[side] = Llama.from_pretrained(folder, dtype, device).eval()
        else:
            models[side] = load_peer(folder, dtype, device).eval()
        generate_rows(side, models[side], ids, new_tokens, drawing)

    # what a round runs
    runs = {}
    for side in sides:
        runs[side] = partial(generate_rows, side, models[side], ids, new_tokens, drawing)
    if len(sides) > 1 and "ours" in sides:
        rows = len(ids) * drawing.get("n", 1)
        floor = Floor(LlamaConfig.from_json(folder), rows, dtype, device)
        runs["first"] = partial(generate_rows, "ours", models["ours"], ids, 1, drawing)
        runs["products"] = floor.products
        runs["reading"] = floor.read_weights

    seconds = rounds_in_turn(runs, repeats, device)
    for name in set(seconds) & {"products", "reading"}:
        seconds[name] = [total / FLOOR_PASSES for total in seconds[name]]
    return seconds


# ----------------------------------------------------------------------------- the floor
class Floor:
    """The least that a decoding step of `rows` rows does: its products, and reading its weights.

    Each FLOOR_PASSES times."""

    def __init__(self, config, rows, dtype, device):
        how = dict(dtype=dtype, device=device)
        of_block, head = product_shapes(config)
        shapes = [*of_block * config.num_hidden_layers, head]
        self.weights = [torch.randn(shape, **how) for shape in shapes]
        self.inputs = {K: torch.randn(rows, K, **how) for _, K in shapes}
        # in the order that generation has them
        self.packed = [None] * len(shapes)
        if can_pack(device, dtype):
            reorder = torch.ops.mkldnn._reorder_linear_weight
            self.packed = [reorder(weight) for weight in self.weights]

    def products(self):
        for _ in range(FLOOR_PASSES):
            for weight, packed in zip(self.weights, self.packed):
                linear(self.inputs[weight.shape[1]], weight, packed)

    def read_weights(self):
        for _ in range(FLOOR_PASSES):
            for weight in self.weights:
                weight.sum()


def print_floor(part, seconds, new_tokens):
    """A decoding step of ours beside its floor, from the rounds of generation_rounds."""
    middle = {name: statistics.median(times) for name, times in seconds.items()}
    step = (middle["ours"] - middle["first"]) / (new_tokens - 1)
    larger = max("products", "reading", key=middle.get)
    line = (f"{part:8} a decoding step of ours {step * 1e3:.1f} ms, its products alone "
            f"{middle['products'] * 1e3:.1f}, reading its weights {middle['reading'] * 1e3:.1f}")
    widest = max(scatter(seconds[name]) for name in ("ours", "first", larger))
    if widest > SCATTER:
        print(f"{line}; no ratio: rounds scatter by {widest:.0%}")
    else:
        print(f"{line}: {step / middle[larger]:.2f} times the larger")


# -----------------------------------------------------------------------------
if __name__ == "__main__":
    with one_line_errors():
        config = configure(globals())
        device = pick_device(device)
        alone = len(sides) == 1
        if not alone:
            print(knob_table(globals()))
            print_machine(device)
        random_weights = None if model else write_random_model()
        folder = model or random_weights.name

        results = {}
        for part in parts:
            # the same prompts for all sides
            generator = torch.Generator().manual_seed(0)
            if part == "greedy":
                lengths = torch.randint(32, 97, (prompts,), generator=generator).tolist()
                drawing = {}
                rows = prompts
            else:
                lengths = [128]
                drawing = {"n": samples, "temperature": 0.8, "top_p": 0.95}
                rows = samples
            vocab_size = LlamaConfig.from_json(folder).vocab_size
            ids = random_prompts(lengths, vocab_size, generator)

            seconds = generation_rounds(folder, sides, ids, new_tokens, drawing, repeats,
                                        getattr(torch, dtype), device)
            gc.collect()
            floor = {}
            for name in ("first", "products", "reading"):
                if name in seconds:
                    floor[name] = seconds.pop(name)
            results[part] = compare_sides("bench.generate", part, seconds, rows * new_tokens,
                                          folder, config)
            if floor:
                print_floor(part, {"ours": seconds["ours"], **floor}, new_tokens)
                results[part]["floor"] = {"seconds": floor}
            write_results(out, config, device, results)
        if alone:
            print(json.dumps({"peak_gb": peak_memory(device)}))
