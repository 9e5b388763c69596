"""PiSSA (Meng et al. 2024, arXiv 2404.02948): adapters begin as the leading part of the weights.

    W0 = U S V^T      A0 = sqrt(S_r / scale) V_r^T     B0 = U_r sqrt(S_r / scale)     as peft 0.21.2
    W0 - scale B0 A0 is frozen, A and B are trained from A0 and B0 on: the model begins as the base

    W0 - scale B0 A0 + scale B A  =  W0 + scale [B, -B0] [A; A0]     so a file holds rank 2 r

The right side is an adapter of the published base, which any reader of PEFT folders loads; peft
writes the same when it converts one (path_initial_model_for_weight_conversion). The two are equal
up to the rounding of the frozen weights, which are in 16 bits on a GPU.
"""
import torch

from llama.weights import fill


def start_as_principal(module):
    """Fill A and B of a LoRAProjection with A0 and B0, and take their product out of its weight.

    Raises ValueError where the rank is larger than a side of a weight, or as start_from does."""
    r = module.rank
    A = torch.empty(module.lora_A.shape, dtype=module.lora_A.dtype)
    B = torch.empty(module.lora_B.shape, dtype=module.lora_B.dtype)
    row = 0
    for i, (start, end) in enumerate(module.spans):
        weight = module.weight[start:end].detach().to(A.dtype)
        if r > min(weight.shape):
            raise ValueError(f"lora_init=pissa: lora_rank={r} is larger than a side of a weight "
                             f"{list(weight.shape)}")
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        roots = (S[:r] / module.scale).sqrt()
        A[i * r:(i + 1) * r] = roots[:, None] * Vh[:r]
        B[row:row + end - start] = U[:, :r] * roots
        row += end - start
    start_from(module, A, B)


@torch.no_grad()
def start_from(module, A0, B0):
    """Fill A and B of a LoRAProjection, stacked as it has them, and take their product out of its
    weight. Raises ValueError where the weight is sharded."""
    if hasattr(module.weight, "to_local"):
        raise ValueError("lora_init=pissa changes whole weights; say --shard=none")
    fill(module.lora_A, A0)
    fill(module.lora_B, B0)
    module.begun_as = (module.lora_A.detach().clone(), module.lora_B.detach().clone())
    deltas = module.deltas()
    for part, (start, end) in zip(module.adapted, module.spans):
        left = module.weight[start:end].to(deltas[part].dtype) - deltas[part]
        module.weight[start:end] = left.to(module.weight.dtype)


# ----------------------------------------------------------------------------- files
def beginnings(model):
    """{parameter: (what stands behind it in a file of rank 2 r, along which axis)}; none: {}."""
    behind = {}
    for module in model.modules():
        if hasattr(module, "begun_as"):
            A0, B0 = module.begun_as
            behind[module.lora_A] = (A0, 0)
            behind[module.lora_B] = (-B0, 1)
    return behind


def doubled(rank, alpha, rslora):
    """Rank and alpha of the form of rank 2 r, of the same scale."""
    return 2 * rank, alpha * (2 ** 0.5 if rslora else 2)


def halves(name, tensor):
    """(what was trained, what it began as) of a tensor of a file of rank 2 r."""
    if ".lora_A." in name:
        return tensor.chunk(2, 0)
    trained, begun = tensor.chunk(2, 1)
    return trained, -begun
