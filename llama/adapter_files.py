"""adapter_model.safetensors of a PEFT folder: opened, and checked against its base.

    metadata    base_digest, base_sample, ...            the base it was trained on, see identity.py
    tensors     ...q_proj.lora_A.weight [rank, in]       exactly those that adapter_config.json asks
                ...q_proj.lora_B.weight [out, rank]      for, in their shapes
                ...embed_tokens.weight [V, D]            in some files, and then the base's own
"""
import torch

from llama.adapter_config import MERGE, named_base
from llama.identity import BF16_STEP, is_same_base
from llama.weights import compare_names, local_part, open_weights

# what peft saves along with some adapters, as it is in the base unless it was trained
EMBEDDINGS = ("base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight")


def open_adapter_weights(folder, expected, base_identity):
    """{name: open file} of a PEFT folder; expected {name: shape}, base_identity() of the base.

    Raises ValueError when a tensor is missing, unexpected or misshaped, or was trained on another
    base. An adapter of peft's names no base; then base_identity is not called."""
    shapes, where = open_weights(folder, "adapter_model.safetensors")
    for file in list(where.values())[:1]:  # one file holds them all
        trained_on = file.metadata() or {}
        if "base_fingerprint" in trained_on and not is_same_base(trained_on, base_identity()):
            named = named_base(folder)
            which = f"; its adapter_config.json names {named}" if named else ""
            raise ValueError(f"{folder}: this adapter was trained on another base model{which}")
    # embeddings are compared by value, in check_embeddings
    for name in EMBEDDINGS:
        shapes.pop(name, None)
    problems = compare_names(expected, shapes)
    if problems:
        raise ValueError(f"{folder}: adapter does not fit this model: {problems}")
    return where


def check_embeddings(folder, where, of_base):
    """Raise ValueError unless embeddings that peft saved along with an adapter are the base's.

    of_base: from 'embed_tokens' or 'lm_head' to its weight."""
    for name in EMBEDDINGS:
        if name not in where:
            continue
        p = of_base(name.split(".")[-2])
        stored = where[name].get_slice(name)
        is_same = tuple(stored.get_shape()) == tuple(p.shape)
        mine, first = local_part(p)
        if is_same and len(mine):
            # as the dtypes of both round; fp16 on the way to bf16 may round to the other side
            theirs = stored[first:first + len(mine)]
            ours = mine.cpu().to(theirs.dtype).to(p.dtype)
            step = 0.0
            if theirs.dtype == torch.float16 and p.dtype == torch.bfloat16:
                step = BF16_STEP
            smallest = step * 2 ** -17
            is_same = torch.allclose(ours, theirs.to(p.dtype), rtol=step, atol=smallest)
        if not is_same:
            raise ValueError(f"{folder}: {name} {stored.get_shape()} is not the base's: trained or "
                             f"resized embeddings are not supported; {MERGE}")
