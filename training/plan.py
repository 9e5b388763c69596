"""
What a training run takes, told before it starts from a model on meta: FLOPs, bytes of one rank by kind. train.py prints it,
chooses `shard='auto'` by it, and for --dry_run=True puts it beside the paper's table (appendix H).

Counted are bytes that PyTorch allocates; the CUDA context, NCCL's buffers and fragmentation come on top.
"""
from pathlib import Path

import numpy as np
import torch

from lora import apply_lora
from llama.functions import ChunkedCrossEntropy
from model import IGNORE, Llama, LlamaConfig

_LLAMA3 = dict(vocab_size=128256, num_key_value_heads=8, max_position_embeddings=131072, rope_theta=500000.0,
               rope_scaling={"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                             "original_max_position_embeddings": 8192}, bos_token_id=128000, eos_token_id=128001)
_70B = dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64)
# Shapes of published bases (their config.json), so that a run can be planned before they are downloaded.
PUBLISHED = {
    "Llama-2-7b-hf": LlamaConfig(),
    "Llama-2-13b-hf": LlamaConfig(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40,
                                  num_key_value_heads=40),
    "Llama-2-70b-hf": LlamaConfig(**_70B, num_key_value_heads=8),
    "Llama-3.1-8B": LlamaConfig(intermediate_size=14336, **_LLAMA3),
    "Llama-3.1-70B": LlamaConfig(**_70B, **_LLAMA3),
    "Llama-3.1-405B": LlamaConfig(hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128,
                                  **_LLAMA3),
}


def shape_of(base):
    """LlamaConfig of a folder's config.json, or else of a published name such as meta-llama/Llama-2-7b-hf.

    Raises ValueError when it is neither, or as LlamaConfig.from_json does."""
    if (Path(base) / "config.json").is_file():
        return LlamaConfig.from_json(base)
    if Path(base).name not in PUBLISHED:
        raise ValueError(f"base={base}: no config.json there, and not one of {', '.join(PUBLISHED)}, whose shapes are known")
    return PUBLISHED[Path(base).name]


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


def states(model, optimizer, shards=1):
    """Bytes of weights, gradients and momenta on each of `shards` ranks."""
    weights = sum(p.nbytes for p in model.parameters())
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return {"weights": weights // shards, "gradients": trained // shards,
            "optimizer": trained * {"lionw": 1, "adamw": 2}[optimizer] // shards}


def predict_memory(model, optimizer, rows, seq_len, microbatches=1, ranks=1, shards=1, compiled=False, device="cuda"):
    """Bytes of one rank by kind, at the moment that needs most; the model may be on meta.

    rows, seq_len: of a microbatch, of which a rank takes `microbatches` a step. Two moments compete: the turn from a
    step's last forward pass to its backward pass, with all activations, and the end of that pass, with all gradients."""
    c, compute, full = model.config, model.compute_dtype.itemsize, model.embed_tokens.weight.requires_grad
    tokens, count = rows * seq_len, lambda module: sum(p.numel() for p in module.parameters())
    block, layers, d, f = count(model.layers[0]), c.num_hidden_layers, c.hidden_size, c.intermediate_size
    rest, head = count(model) - layers * block, c.vocab_size * d
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim

    # numbers a token that a block keeps for its backward pass: inputs of two norms, of the products, q, k and v before
    # and after rotation, attention's output, gate and up, and the adapters' x A^T
    inside = 4 * d + (q + 2 * kv) + (q + kv) + 2 * q + 3 * f
    inside += sum(p.shape[0] for name, p in model.layers[0].named_parameters() if name.endswith("lora_A"))
    if device == "cpu" and compute == 2:  # BlockAttention keeps its probabilities
        inside += c.num_attention_heads * seq_len // 2
    products = (q + 2 * kv) + 2 * d + 2 * f
    how = model.activation_checkpointing
    kept = {"none": inside, "block": d, "selective": d + products}[how]
    activations = tokens * compute * (layers * kept + (inside if how != "none" else 0) + 4 * d)  # 4 d: around the loss

    # SwiGLU's backward in fp32, unless the compiler fuses it, is the largest scratch of a block
    of_block = tokens * f * (3 * compute if compiled else 20 + 8 * (compute < 4) + compute)
    logits = [min(tokens * c.vocab_size * size, ChunkedCrossEntropy.chunk_bytes) for size in (compute, 4)]  # and softmax
    of_loss = logits[0] + (logits[1] if device != "cpu" else 0) + (head * compute if full else 0)
    scratch = (4 * head if full else 0) + max(of_block, of_loss)  # the head's new gradient is made in the forward pass
    bucket = 4 * min(trained, 2 ** 18 if device == "cpu" else 2 ** 26)  # of the optimizer
    if shards == 1:
        cast = full and compute < model.embed_tokens.weight.itemsize
        copies = after = compute * (block * (1 if compiled or how != "none" else layers) + head) if cast else 0
        bucket = max(bucket, 4 * min(trained, 2 ** 26) if ranks > 1 else 0)  # of the sum over replicas
    else:  # gathered by FSDP: what is outside the blocks, a block and the next; gradients before they are scattered
        per_block = sum(p.numel() for p in model.layers[0].parameters() if p.requires_grad)
        copies = compute * (rest + 3 * block) + (compute + 4) * per_block
        after = compute * rest + (compute + 4) * (trained - layers * per_block)
    state = states(model, optimizer, shards)
    if device == "cpu":  # there a rank's memory is its process's, which code and threads touched for the first time add to
        state["process"] = 45_000_000
    again = full and (c.tie_word_embeddings or microbatches > 1)  # the embedding's gradient is added to one that exists
    turn = {**state, "gathered or cast": copies, "activations": activations, "scratch": scratch}
    if microbatches == 1:
        turn["gradients"] = 0
    end = {**state, "gathered or cast": after, "activations": tokens * compute * (inside + 4 * d),
           "scratch": max(bucket, of_block, 4 * head * again)}
    return max(turn, end, key=lambda kinds: sum(kinds.values()))


def compare_with_paper(rank):
    """Lines of the paper's table of weights, gradients and optimizer (appendix H), GB a GPU, each figure beside ours."""
    gpus = (1, 8, 16, 32, 64, 128, 256)
    lines = ["The paper's appendix H, GB a GPU for weights, gradients and optimizer: paper | ours. The paper has N weights,",
             f"1% of them trained with LoRA; ours are the model's own count and adapters of rank {rank}.",
             f"{'GPUs':18}" + "".join(f"{n:>18}" for n in gpus)]
    for label, name, weights in (("7B", "Llama-2-7b-hf", 7e9), ("70B", "Llama-2-70b-hf", 70e9),
                                 ("405B", "Llama-3.1-405B", 405e9)):
        with torch.device("meta"):
            models = Llama(PUBLISHED[name]), Llama(PUBLISHED[name]).to(torch.bfloat16)
        apply_lora(models[1], rank, 2 * rank)
        for optimizer, size in (("adamw", 16), ("lionw", 12)):
            for model, paper in zip(models, (size * weights, 2 * weights + size * 0.01 * weights)):
                ours = sum(states(model, optimizer).values())
                lines.append(f"{label:5}{optimizer[:-1]:5}{'+ LoRA' if model is models[1] else 'full':8}" +
                             "".join(f"{paper / n / 1e9:9.2f} |{ours / n / 1e9:7.2f}" for n in gpus))
    return lines
