"""DoRA: LoRA whose rows have lengths m of their own, which are trained (arXiv 2402.09353).

    V  = W + scale B A       1   2   2    length 3        m starts as the lengths of W's rows
    W' = m / |V| V           2   4   4    for m = 6       and is m / |V| = 1 before training

As in peft, |V| is a constant in the backward pass (section 4.3 of the paper), and dropout is on the
whole row, not on the adapter alone, which costs a second product with W:

    y  =  x W^T + (g - 1) dropout(x) W^T + g scale dropout(x) A^T B^T          g = m / |V|
       =  g z + (g - 1) (dropout(x) - x) W^T        z, of lora_matmul: x W^T + scale dropout(x) ...

A layer is a LoRAProjection of lora.py.
"""
import torch

from llama.lora_matmul import adapter_parts, keep_mask


def dora_parts(layer):
    """For each adapter of a layer its rows of W [N, K], a [r, K], b [N, r] and m [N]."""
    dtype = torch.promote_types(layer.lora_A.dtype, torch.float32)
    a, b = adapter_parts(layer.lora_A, layer.lora_B, layer.spans, dtype)
    W = [layer.weight[start:end] for start, end in layer.spans]
    m = layer.lora_magnitude.split([end - start for start, end in layer.spans])
    return zip(W, a, b, m)


def tuned_rows(W, a, b, scale):
    """(V [N, K], |V| [N]), in the dtype of a and b."""
    # in place: one [N, K] instead of two
    V = W.to(a.dtype, copy=True).addmm_(b, a, alpha=scale)
    # a row of zeros stays one: 0 / tiny, where peft has 0 / 0
    return V, V.norm(dim=1).clamp(min=torch.finfo(a.dtype).tiny)


def dora_change(W, a, b, m, scale):
    """W' - W, [N, K]."""
    V, lengths = tuned_rows(W, a, b, scale)
    return (m / lengths)[:, None] * V - W


def dora(layer, z, x, dropout, seeds):
    """y [T, N] of a layer, from lora_matmul's z [T, N] and what that got: x [T, K] and so on."""
    y = z.clone()  # rows of W without an adapter stay as they are
    for i, (W, a, b, m) in enumerate(dora_parts(layer)):
        start, end = layer.spans[i]
        with torch.no_grad():
            _, lengths = tuned_rows(W, a, b, layer.scale)
        g = m / lengths
        y[:, start:end] = g * z[:, start:end]
        if dropout:
            # what is kept grows, what is dropped loses all
            kept = keep_mask(seeds[i], x, round(dropout * 2 ** 32))
            change = torch.where(kept, x * (dropout / (1 - dropout)), -x)
            y[:, start:end] += (g - 1) * (change @ W.to(x.dtype).T)
    return y
