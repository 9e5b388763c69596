"""
Speed and memory of training a small model against Hugging Face transformers + peft, in turn.

    full     fp32 master weights (ours, as train.py) | weights in `dtype` (peer)     LionW | AdamW
    lora     weights in `dtype`, fp32 adapters on all projections, all sides         LionW | AdamW

    a step: rows [4, 512] -> forward -> loss -> backward -> clip -> optimizer -> loss.item()
    floor:  the step's matrix products and nothing else: of weights forward, of inputs' gradients,
            of weights' gradients where they are trained, with the head; then with the adapters' own

    python -m bench.train                                   # random weights of SmolLM2-135M's shape
    python -m bench.train --model=models/smollm2-135m

See bench/sides.py for how the sides are compared, bench/throughput.py for Llama-2's shapes.
"""
import gc
import json
from functools import partial

import torch

from bench.sides import (SIDES, Settings, compare_sides, load_peer, print_machine, product_shapes,
                         ratio_words, rounds_in_turn, write_random_model, write_results)
from configurator import configure, knob_table
from lion import DecoupledLionW
from llama.lora_matmul import choose_kernel
from lora import apply_lora
from model import IGNORE, Llama, LlamaConfig
from runtime import one_line_errors, peak_memory, pick_device, tune_cpu_memory

# -----------------------------------------------------------------------------
model = ''               # model folder; '' = random weights of SmolLM2-135M's shape
parts = ('full', 'lora')
rows = 4                 # rows a step
seq_len = 512            # tokens a row
lora_rank = 16
lora_dropout = 0.05
lora_kernel = 'auto'     # ours: auto | torch | triton
compile = True           # torch.compile of our blocks
repeats = 5              # rounds; the median counts
sides = SIDES            # in turn; one alone is how memory is measured
dtype = 'bfloat16'
device = 'auto'          # auto | cpu | cuda | cuda:N
out = ''                 # also write the results to this JSON file
_choices = {'parts': ('full', 'lora'), 'lora_kernel': ('auto', 'torch', 'triton'),
            'sides': SIDES, 'dtype': ('float32', 'bfloat16')}


# ----------------------------------------------------------------------------- models
def add_peft(model, rank, dropout, **how):
    """peft's adapters on all projections of transformers' model, as peft makes them."""
    from peft import LoraConfig, get_peft_model  # only the peer needs it
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout,
                        target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config, **how)


def load_ours(folder, rank, tokens, settings):
    """Our model as train.py makes it: in fp32 for rank 0, else with adapters.

    tokens: of a microbatch, for which the LoRA kernel is chosen."""
    dtype = settings.dtype if rank else torch.float32
    llama = Llama.from_pretrained(folder, dtype, settings.device)
    llama.compute_dtype = settings.dtype
    if rank:
        apply_lora(llama, rank, 2 * rank, settings.lora_dropout)
        lines = choose_kernel(llama, settings.lora_kernel, tokens, settings.dtype,
                              settings.device, settings.compile)
        for line in lines:
            print(line)
    return llama


def compile_side(side, llama, settings):
    """torch.compile in place: ours by blocks where the settings ask for it, 'compiled' whole."""
    if side == "ours" and settings.compile:
        llama.compile_blocks()
    if side == "compiled":
        llama.compile()


# ----------------------------------------------------------------------------- the floor
class Products:
    """The matrix products of a training step on `tokens` tokens, on random operands.

    With a rank the weights are frozen, and adapters of that rank on all projections are trained."""

    def __init__(self, config, rank, tokens, settings):
        self.trained = not rank
        how = dict(device=settings.device, dtype=settings.dtype)
        of_block, head = product_shapes(config)

        # weights of every block: no cache holds them from one step to the next
        self.weights = []
        for _ in range(config.num_hidden_layers):
            self.weights.append([torch.randn(shape, **how) for shape in of_block])
        self.weights.append([torch.randn(head, **how)])
        # inputs and gradients of outputs may be the same in all blocks
        self.inputs = {}
        self.gradients = {}
        projections = config.projection_shapes.values()
        for N, K in [*of_block, *projections, head]:
            self.inputs[K] = torch.randn(tokens, K, **how)
            self.gradients[N] = torch.randn(tokens, N, **how)

        # A and B of every projection, the same in all blocks
        self.adapters = []
        if rank:
            of_one = [(torch.randn(rank, K, **how), torch.randn(N, rank, **how))
                      for N, K in projections]
            self.adapters = of_one * config.num_hidden_layers

    def of_weights(self):
        for weights in self.weights:
            for w in weights:
                self.inputs[w.shape[1]] @ w.T
        for weights in reversed(self.weights):
            for w in weights:
                N, K = w.shape
                self.gradients[N] @ w
                if self.trained:
                    self.gradients[N].T @ self.inputs[K]

    def of_adapters(self):
        for A, B in self.adapters:
            x = self.inputs[A.shape[1]]
            dy = self.gradients[B.shape[0]]
            P = x @ A.T
            P @ B.T
            # gradients of P, B, x and A
            dP = dy @ B
            dy.T @ P
            dP @ A
            dP.T @ x


# ----------------------------------------------------------------------------- steps
def random_batch(rows, seq_len, vocab_size, device):
    """Tokens and their targets, [rows, seq_len] each."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, vocab_size, (rows, seq_len), generator=generator).to(device)
    # the last token has no target
    nothing = torch.full_like(tokens[:, :1], IGNORE)
    targets = torch.cat([tokens[:, 1:], nothing], 1)
    return tokens, targets


def make_optimizer(side, llama):
    trained = [p for p in llama.parameters() if p.requires_grad]
    if side == "ours":
        return DecoupledLionW(trained, lr=1e-5)
    return torch.optim.AdamW(trained, lr=1e-5, fused=True)


def training_step(side, llama, optimizer, tokens, targets, rows_at_once):
    """One step on a batch by microbatches; it reads the loss, as any loop does."""
    for x, y in zip(tokens.split(rows_at_once), targets.split(rows_at_once)):
        if side == "ours":
            loss = llama(x, y)[1]
        else:
            loss = llama(input_ids=x, labels=x).loss
        # all rows have the same number of targets, so the batch's loss is the mean over rows
        loss = loss * (len(x) / len(tokens))
        loss.backward()
    # the step
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    loss.item()


def training_rounds(folder, sides, rank, rows, seq_len, settings):
    """Seconds of each round of a training step, {side: [...]}, after three steps to warm up.

    Beside several sides their floor is timed, as "products" and, with a rank, "adapters"."""
    vocab_size = LlamaConfig.from_json(folder).vocab_size
    tokens, targets = random_batch(rows, seq_len, vocab_size, settings.device)

    # all models in memory, warmed up
    models = {}
    optimizers = {}
    for side in sides:
        if side == "ours":
            llama = load_ours(folder, rank, rows * seq_len, settings)
        else:
            llama = load_peer(folder, settings.dtype, settings.device)
            if rank:
                llama = add_peft(llama, rank, settings.lora_dropout)
        compile_side(side, llama, settings)
        models[side] = llama.train()
        optimizers[side] = make_optimizer(side, llama)
        for _ in range(2):
            training_step(side, llama, optimizers[side], tokens, targets, rows)

    # what a round runs: a step of each side, and their floor
    runs = {}
    for side in sides:
        runs[side] = partial(training_step, side, models[side], optimizers[side], tokens, targets,
                             rows)
    if len(sides) > 1:
        floor = Products(LlamaConfig.from_json(folder), rank, rows * seq_len, settings)
        runs["products"] = floor.of_weights
        if rank:
            runs["adapters"] = floor.of_adapters
    return rounds_in_turn(runs, settings.repeats, settings.device)


def add_floor(part, results, products, adapters):
    """Put the rounds of a part's floor into its results, and print a step of ours beside them.

    products, adapters: seconds; adapters is None in full finetuning."""
    results["products"] = {"seconds": products}
    if adapters:
        results["adapters"] = {"seconds": adapters}
    if "ours" not in results:
        return
    ours = results["ours"]["seconds"]
    print(f"{part:8} ours over its matrix products alone: {ratio_words(products, ours)}")
    if adapters:
        both = [p + a for p, a in zip(products, adapters)]
        print(f"{part:8} ours over these and the adapters' own: {ratio_words(both, ours)}")


# -----------------------------------------------------------------------------
if __name__ == "__main__":
    with one_line_errors():
        config = configure(globals())
        device = pick_device(device)
        if device.type == "cpu":
            tune_cpu_memory()  # as train.py does; it serves all sides
        settings = Settings(device, getattr(torch, dtype), repeats, compile, lora_dropout,
                            lora_kernel)
        alone = len(sides) == 1
        if not alone:
            print(knob_table(globals()))
            print_machine(device)
        random_weights = None if model else write_random_model()
        folder = model or random_weights.name

        results = {}
        for part in parts:
            rank = lora_rank if part == "lora" else 0
            seconds = training_rounds(folder, sides, rank, rows, seq_len, settings)
            gc.collect()
            products = seconds.pop("products", None)
            adapters = seconds.pop("adapters", None)
            results[part] = compare_sides("bench.train", part, seconds, rows * seq_len, folder,
                                          config)
            if products:
                add_floor(part, results[part], products, adapters)
            write_results(out, config, device, results)
        if alone:
            print(json.dumps({"peak_gb": peak_memory(device)}))
        elif "ours" in sides and len(results) == 2:
            full = results["full"]["ours"]["seconds"]
            lora = results["lora"]["ours"]["seconds"]
            print(f"LoRA against full, both ours: {ratio_words(lora, full)}")
