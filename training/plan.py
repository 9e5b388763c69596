"""
The cost of a training run, predicted from a model on meta: steps, FLOPs, hours, bytes per rank.

    python -m training.plan config/math_cpt.py --gpus=32     # needs no GPU, no weights and no data
    python train.py config/math_cpt.py --gpus=32 --dry_run=True                          # the same

train.py prints the same lines before a run and chooses `shard='auto'` by them. Memory over a step:

    bytes        turn: all activations, scratch of the loss
      |         /\\
      |        /  \\___ end: all gradients, scratch of the optimizer
      |  _____/       \\__
      |  weights, momenta, gathered copies
      +---- forward | backward | update --->

It counts what PyTorch allocates; the CUDA context, NCCL's buffers and fragmentation come on
top.
"""
import math
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import torch

from lion import OPTIMIZERS
from llama.attention import in_blocks
from llama.functions import ChunkedCrossEntropy
from lora import apply_lora
from model import IGNORE, Llama, LlamaConfig
from runtime import GPUS, ROOT, print0
from training.rows import PlannedRows, check_length, open_sets, rows_of_step, without_padding

_LLAMA3 = dict(vocab_size=128256, num_key_value_heads=8, max_position_embeddings=131072,
               rope_theta=500000.0, bos_token_id=128000, eos_token_id=128001,
               rope_scaling={"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                             "original_max_position_embeddings": 8192})
_70B = dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64)
# Shapes of published bases (their config.json): a run can be planned before they are downloaded.
PUBLISHED = {
    "Llama-2-7b-hf": LlamaConfig(),
    "Llama-2-13b-hf": LlamaConfig(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40,
                                  num_attention_heads=40, num_key_value_heads=40),
    "Llama-2-70b-hf": LlamaConfig(**_70B, num_key_value_heads=8),
    "Llama-3.1-8B": LlamaConfig(intermediate_size=14336, **_LLAMA3),
    "Llama-3.1-70B": LlamaConfig(**_70B, **_LLAMA3),
    "Llama-3.1-405B": LlamaConfig(hidden_size=16384, intermediate_size=53248, num_hidden_layers=126,
                                  num_attention_heads=128, **_LLAMA3),
}


def shape_of(base):
    """LlamaConfig of a folder's config.json, or of a published name (meta-llama/Llama-2-7b-hf).

    Raises ValueError when it is neither, or as LlamaConfig.from_json does."""
    if (Path(base) / "config.json").is_file():
        return LlamaConfig.from_json(base)
    name = Path(base).name
    if name not in PUBLISHED:
        known = ", ".join(PUBLISHED)
        raise ValueError(f"base={base}: no config.json there, and not one of {known}, "
                         "whose shapes are known")
    return PUBLISHED[name]


# ----------------------------------------------------------------------------- steps
def step_at(tokens, tokens_a_step):
    """The step nearest to a number of tokens: 25,431 for the paper's 20e9."""
    return max(1, round(tokens / tokens_a_step))


def count_steps(knobs, rows):
    """Steps of the run: from max_steps, max_epochs (rounded up) or max_tokens, whichever is set."""
    names = ("max_steps", "max_epochs", "max_tokens")
    given = [name for name in names if getattr(knobs, name) > 0]
    if len(given) != 1:
        found = ", ".join(given) or "none"
        raise ValueError(f"give exactly one of max_steps, max_epochs, max_tokens; found {found}")
    if knobs.max_steps:
        return knobs.max_steps
    if knobs.max_tokens:
        return step_at(knobs.max_tokens, knobs.global_batch * rows.seq_len)
    if not len(rows):
        raise ValueError(f"max_epochs: {knobs.data} does not exist yet; to plan in epochs say "
                         "data_rows, the rows it will have")
    # 1e-9: a product that is too large by its last bit is no step more
    return math.ceil(knobs.max_epochs * len(rows) / knobs.global_batch - 1e-9)


# ----------------------------------------------------------------------------- FLOPs
def flops_of_batch(model, rows, doc_mask=True):
    """FLOPs of one forward and backward pass over rows (tokens, targets, starts).

    2 a weight and token forward, 2 for the gradient of the input, 2 for that of a trained weight;
    attention causal, inside documents; the head only where there is a target."""
    # pairs of tokens that see each other, or would if attention were not causal
    config = model.config
    tokens, targets, pairs = 0, 0, 0
    for row_tokens, row_targets, starts in rows:
        tokens += len(row_tokens)
        targets += int((row_targets != IGNORE).sum())
        borders = np.concatenate([[0], starts if doc_mask else [], [len(row_tokens)]])
        pairs += int((np.diff(borders) ** 2).sum())

    # frozen weights need no gradient of their own
    trains_all = model.embed_tokens.weight.requires_grad
    per_weight = 6 if trains_all else 4
    weights = config.num_hidden_layers * sum(n * k for n, k in config.projection_shapes.values())
    adapters = 0 if trains_all else count_trained(model)
    # QK^T and the sum over V: 2 products, 2 FLOPs each, of half of all pairs; backward twice that
    width = config.num_attention_heads * config.head_dim
    attention = 3 * 4 * (pairs / 2) * config.num_hidden_layers * width
    head = targets * per_weight * config.vocab_size * config.hidden_size
    return tokens * (per_weight * weights + 6 * adapters) + attention + head


def flops_of_step(model, knobs, rows, step, compiled):
    """FLOPs of one step of the run and the tokens that it computes, over all ranks.

    All steps take about as many. Padding that is left out does not count."""
    n_rows = len(rows) or knobs.global_batch
    batch = rows_of_step(step, knobs.global_batch, n_rows, knobs.seed, knobs.shuffle, rows.packed)
    flops = 0
    tokens = 0
    for first in range(0, len(batch), knobs.microbatch):
        microbatch = [rows[i] for i in batch[first:first + knobs.microbatch]]
        computed = without_padding(microbatch, compiled)
        flops += flops_of_batch(model, computed, knobs.doc_mask)
        tokens += sum(len(row_tokens) for row_tokens, _, _ in computed)
    return flops, tokens


# ----------------------------------------------------------------------------- memory
def count(module):
    """Parameters of a module."""
    return sum(p.numel() for p in module.parameters())


def count_trained(module):
    """Those that are trained."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def states(model, optimizer, shards=1):
    """Bytes of weights, gradients and momenta on each of `shards` ranks."""
    weights = sum(p.nbytes for p in model.parameters())
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    # an optimizer that does not say what it keeps is counted as Adam
    momenta = getattr(OPTIMIZERS.get(optimizer), "numbers_per_parameter", 2)
    return {"weights": weights // shards, "gradients": trained // shards,
            "optimizer": trained * momenta // shards}


def predict_memory(model, optimizer, rows, seq_len, microbatches=1, ranks=1, shards=1,
                   compiled=False, device="cuda", documents=False):
    """Bytes of one rank by kind, at the moment that needs most; the model may be on meta.

    rows, seq_len: of a microbatch, of which a rank takes `microbatches` a step. documents: whether
    packed ones are told apart. Two moments compete: the turn from a step's last forward pass to its
    backward pass, and that one's end."""
    # what is there all the time
    config = model.config
    trains_all = model.embed_tokens.weight.requires_grad
    tokens = rows * seq_len
    state = states(model, optimizer, shards)
    if device == "cpu":
        # a rank's memory is its process's: code and threads that are used for the first time
        state["process"] = 45_000_000
    gathered_at_turn, gathered_at_end = gathered_copies(model, shards, compiled)

    # activations: of all blocks at the turn, of the first one at the end
    lean = model.activation_checkpointing == "none" and not compiled
    attention_compiled = compiled and not documents
    in_block = numbers_in_block(model, seq_len, device, lean, attention_compiled)
    around_loss = 4 * config.hidden_size
    kept = config.num_hidden_layers * in_block
    if model.activation_checkpointing != "none":
        # the inputs of all, and all of the one that is being computed again
        kept = config.num_hidden_layers * config.hidden_size + in_block
    number = tokens * model.compute_dtype.itemsize

    # scratch: the head's new gradient, in fp32, is made in the forward pass
    head_gradient = 4 * config.vocab_size * config.hidden_size if trains_all else 0
    of_block = scratch_of_block(model, tokens, compiled)
    of_loss = scratch_of_loss(model, tokens, device)
    of_update = scratch_of_update(model, ranks, shards, device)
    # at the end it is added to one that exists, by an earlier microbatch or the tied embedding
    adds_head = microbatches > 1 or config.tie_word_embeddings

    turn = {**state, "gathered or cast": gathered_at_turn,
            "activations": number * (kept + around_loss),
            "scratch": head_gradient + max(of_block, of_loss)}
    if microbatches == 1:
        turn["gradients"] = 0  # none before the first backward pass
    end = {**state, "gathered or cast": gathered_at_end,
           "activations": number * (in_block + around_loss),
           "scratch": max(of_update, of_block, head_gradient if adds_head else 0)}
    return max(turn, end, key=lambda kinds: sum(kinds.values()))


def attention_widths(config):
    """Numbers a token of the queries, and of the keys (or the values)."""
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    return queries, keys


def numbers_in_block(model, seq_len, device, lean, attention_compiled):
    """Numbers a token that a block keeps for its backward pass; lean: as Block in model.py has it.

    The compiler also leaves out what `lean` does where LoRA has plain products, but keeps it for
    kernels; the larger number is taken."""
    config = model.config
    queries, keys = attention_widths(config)
    # inputs of the two norms
    numbers = 2 * config.hidden_size
    # queries and keys after rotation, values, attention's output
    numbers += 2 * queries + 2 * keys
    # gate and up
    numbers += 2 * config.intermediate_size
    if not lean:
        # outputs of the two norms, the input of down
        numbers += 2 * config.hidden_size + config.intermediate_size
    for module in model.layers[0].modules():
        if hasattr(module, "lora_A"):
            # x A^T of the adapters
            numbers += len(module.lora_A)
            # DoRA: products before they are rescaled
            if module.lora_magnitude is not None:
                numbers += len(module.weight)
                # with dropout, the second product too, and masks of a byte a number
                if module.dropout:
                    masks = len(module.spans) * module.weight.shape[1]
                    numbers += len(module.lora_B) + masks // model.compute_dtype.itemsize
    # BlockAttention keeps its probabilities, and its output in both layouts
    if in_blocks(seq_len, model.compute_dtype, device, attention_compiled):
        numbers += config.num_attention_heads * seq_len // 2 + queries
    return numbers


def scratch_of_block(model, tokens, compiled):
    """Bytes of a block's largest scratch: SwiGLU's backward pass, in fp32 unless it is compiled."""
    number = model.compute_dtype.itemsize
    if compiled:
        bytes_a_number = 3 * number
    else:
        # five numbers in fp32, two more where they are cast, and the result
        bytes_a_number = 20 + (8 if number < 4 else 0) + number
    return tokens * model.config.intermediate_size * bytes_a_number


def scratch_of_loss(model, tokens, device):
    """Bytes of a chunk's logits, their softmax in fp32, and a trained head in the compute dtype."""
    config = model.config
    number = model.compute_dtype.itemsize
    logits = tokens * config.vocab_size
    scratch = min(number * logits, ChunkedCrossEntropy.chunk_bytes)
    if device != "cpu":  # there it is made in smaller pieces
        scratch += min(4 * logits, ChunkedCrossEntropy.chunk_bytes)
    if model.embed_tokens.weight.requires_grad:
        scratch += number * config.vocab_size * config.hidden_size
    return scratch


def scratch_of_update(model, ranks, shards, device):
    """Bytes of one bucket of the optimizer, or of the sum of gradients over replicas."""
    limit = 2 ** 18 if device == "cpu" else 2 ** 26
    if shards == 1 and ranks > 1:
        limit = 2 ** 26
    return 4 * min(count_trained(model), limit)


def gathered_copies(model, shards, compiled):
    """Bytes of weights that exist a second time, gathered or cast: at the turn, at the end."""
    number = model.compute_dtype.itemsize
    layers = model.config.num_hidden_layers
    block = count(model.layers[0])
    if shards == 1:
        # replicas: fp32 weights are cast for the products, and stay so until the block is done
        weight = model.embed_tokens.weight
        if not weight.requires_grad or number >= weight.itemsize:
            return 0, 0
        recomputes = model.activation_checkpointing != "none"
        blocks = 1 if compiled or recomputes else layers
        head = model.config.vocab_size * model.config.hidden_size
        cast = number * (blocks * block + head)
        return cast, cast
    # FSDP gathers what is outside the blocks, a block and the next; and gradients are whole until
    # they are scattered
    outside = count(model) - layers * block
    trained_in_block = count_trained(model.layers[0])
    trained_outside = count_trained(model) - layers * trained_in_block
    turn = number * (outside + 3 * block) + (number + 4) * trained_in_block
    end = number * outside + (number + 4) * trained_outside
    return turn, end


def choose_sharding(model, knobs, seq_len, device_type, ranks, ranks_a_node, available):
    """How the model is sharded, and the predicted bytes of a rank by kind.

    The knob `shard`; 'auto' takes replicas if they need less than 80% of the bytes `available` to a
    rank. Raises ValueError when the groups of 'hybrid' do not divide the ranks."""
    def predict(shards):
        microbatches = knobs.global_batch // (knobs.microbatch * ranks)
        return predict_memory(model, knobs.optimizer, knobs.microbatch, seq_len, microbatches,
                              ranks, shards, knobs.compile, device_type, knobs.doc_mask)

    how = knobs.shard if ranks > 1 else "none"
    if how == "auto":
        need = sum(predict(1).values())
        how = "none" if need < 0.8 * available else "full"
        print0(f"shard: replicas need {need / 1e9:.2f} GB of {available / 1e9:.2f} GB a rank, "
               f"so {how}")
    shards = {"none": 1, "full": ranks, "hybrid": knobs.shard_ranks or ranks_a_node}[how]
    if ranks % shards:
        raise ValueError(f"shard=hybrid: groups of {shards} ranks do not divide {ranks}")
    return how, predict(shards)


# ----------------------------------------------------------------------------- the printed plan
def print_plan(knobs, model, rows, steps, first_step, machine, ranks, how, memory, available, rate):
    """Print what is going to happen: three lines on model, data and machine, and a warning.

    machine: its name; memory, available: bytes of a rank, by kind and in all; rate: FLOP/s of all
    ranks together. Returns the FLOPs of a token."""
    # the model
    method = "in full"
    if hasattr(model, "lora"):
        targets = " ".join(model.lora["targets"])
        kind = "DoRA" if model.lora["dora"] else "LoRA"
        method = (f"{kind} r={model.lora['rank']} alpha={model.lora['alpha']} "
                  f"dropout={model.lora['dropout']:g} on {targets}")
    print0(f"{knobs.base}: {count(model):,} parameters, {count_trained(model):,} trained, {method}")

    # the data
    number_of = f"{len(rows):,}" if len(rows) else "an unknown number of"
    tokens_a_step = knobs.global_batch * rows.seq_len
    duration = f"{steps * tokens_a_step:,} tokens"
    if len(rows):
        duration += f" = {steps * knobs.global_batch / len(rows):.3g} epochs"
    print0(f"{knobs.data or 'data'}: {number_of} rows of {rows.seq_len}; {steps:,} steps of "
           f"{knobs.global_batch} rows = {tokens_a_step:,} tokens, together {duration}")

    # the machine
    flops, tokens_computed = flops_of_step(model, knobs, rows, steps - 1, knobs.compile)
    seconds = (steps - first_step) * flops / rate
    if ranks > 1:
        machine += f", {ranks} ranks, shard={how}"
    dtype = str(model.compute_dtype).removeprefix("torch.")
    kinds = ", ".join(f"{name} {size / 1e9:.3f}" for name, size in memory.items())
    together = sum(memory.values())
    print0(f"{machine}, {dtype}: predicted memory of a rank, GB: {kinds}, "
           f"together {together / 1e9:.3f}; predicted time {duration_text(seconds)} "
           f"at {rate / 1e12:.4g} TFLOP/s, {knobs.mfu:.0%} of the peak")
    if together > available:
        print0(f"WARNING: that is more than the {available / 1e9:.2f} GB of a rank; a smaller "
               "microbatch, activation_checkpointing=block or shard=full need less")
    if knobs.compile:
        _, needed = flops_of_step(model, knobs, rows, steps - 1, compiled=False)
        if needed < 0.75 * tokens_computed:
            print0(f"WARNING: {1 - needed / tokens_computed:.0%} of the tokens are padding, which "
                   "a compiled model computes too; pack the rows, or say --compile=False")
    return flops / tokens_computed


def duration_text(seconds):
    """Seconds in the unit that fits: s, min or h."""
    if seconds < 60:
        return f"{seconds:.2g} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.2f} h"


def planned_rows(knobs, shape):
    """Rows of the data; where they are still to be made, as many as data_rows says."""
    name = knobs.data or "data"
    if (Path(knobs.data) / "meta.json").is_file():
        train_rows, _ = open_sets(knobs, shape)
        return train_rows
    if not knobs.seq_len:
        raise ValueError(f"seq_len is not set, and {name} does not exist yet to tell it")
    known = f"data_rows={knobs.data_rows:,}, " if knobs.data_rows else ""
    print0(f"{name} does not exist yet: assuming {known}rows of {knobs.seq_len} tokens, "
           "every token a target")
    rows = PlannedRows(knobs.data_rows, knobs.seq_len)
    check_length(rows, shape)
    return rows


def plan_run(model, knobs):
    """Print what a run on knobs.gpus GPUs would take; the model is on meta.

    Raises ValueError for knobs that cannot be."""
    known = {name: (tflops, gigabytes) for name, tflops, gigabytes in GPUS}
    if knobs.gpu not in known:
        raise ValueError(f"gpu={knobs.gpu}: not one of {', '.join(known)}")
    tflops, gigabytes = known[knobs.gpu]
    rows = planned_rows(knobs, model.config)
    steps = count_steps(knobs, rows)
    # a branch adds the steps after its checkpoint
    branch = re.fullmatch(r"step_(\d+)", Path(knobs.resume_from).name)
    first_step = int(branch[1]) if branch else 0
    available = (knobs.memory_gb or gigabytes) * 1e9
    gpus_a_node = min(knobs.gpus, 8)
    how, memory = choose_sharding(model, knobs, rows.seq_len, "cuda", knobs.gpus, gpus_a_node,
                                  available)
    rate = knobs.mfu * knobs.gpus * tflops * 1e12
    print_plan(knobs, model, rows, steps, first_step, knobs.gpu, knobs.gpus, how, memory, available,
               rate)
    print0("\n".join(compare_with_paper(knobs.lora_rank or 64)))


def compare_with_paper(rank):
    """Lines of the paper's table of weights, gradients and optimizer (appendix H), beside ours."""
    gpus = (1, 8, 16, 32, 64, 128, 256)
    lines = ["The paper's appendix H, GB a GPU for weights, gradients and optimizer: paper | ours. "
             "The paper has N weights,",
             "1% of them trained with LoRA; ours are the model's own count and adapters of rank "
             f"{rank}.",
             f"{'GPUs':18}" + "".join(f"{n:>18}" for n in gpus)]
    # N of the paper, and our model of that size
    sizes = (("7B", 7e9, "Llama-2-7b-hf"), ("70B", 70e9, "Llama-2-70b-hf"),
             ("405B", 405e9, "Llama-3.1-405B"))
    for label, weights, name in sizes:
        with torch.device("meta"):
            full = Llama(PUBLISHED[name])
            lora = Llama(PUBLISHED[name]).to(torch.bfloat16)
        apply_lora(lora, rank, 2 * rank)
        # bytes a trained weight: 4 each for itself, its gradient and its momenta
        for optimizer, trained_bytes in (("adamw", 16), ("lionw", 12)):
            in_full = trained_bytes * weights
            with_lora = 2 * weights + trained_bytes * 0.01 * weights
            for method, model, paper in (("full", full, in_full), ("+ LoRA", lora, with_lora)):
                ours = sum(states(model, optimizer).values())
                # both divided by the GPUs
                cells = [f"{paper / n / 1e9:9.2f} |{ours / n / 1e9:7.2f}" for n in gpus]
                lines.append(f"{label:5}{optimizer[:-1]:5}{method:8}" + "".join(cells))
    return lines


if __name__ == "__main__":
    # train.py has the knobs and says what is trained; with dry_run it calls plan_run
    sys.argv.append("--dry_run=True")
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
