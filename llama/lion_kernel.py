"""Lion's step as one Triton kernel: parameter, gradient and momentum are read and written once.

    numel   [ program 0 | program 1 | program 2 .. ]      2,048 entries each, the last one masked
"""
import triton
import triton.language as tl


@triton.jit
def lion_kernel(p, g, m, numel, decay, lr, weight1, weight2, BLOCK: tl.constexpr):
    """p = decay p - lr sign(lerp(m, g, weight1)), then m = lerp(m, g, weight2); in fp32."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < numel
    old = tl.load(m + i, mask=inside, other=0.0).to(tl.float32)
    away = tl.load(g + i, mask=inside, other=0.0).to(tl.float32) - old

    # the sign of the mix of momentum and gradient, 0 where it is 0
    direction = old + weight1 * away
    sign = tl.where(direction > 0, 1.0, 0.0) - tl.where(direction < 0, 1.0, 0.0)
    new = tl.load(p + i, mask=inside, other=0.0).to(tl.float32) * decay - lr * sign

    # rounded once, to the dtype of each
    tl.store(p + i, new.to(p.dtype.element_ty), mask=inside)
    tl.store(m + i, (old + weight2 * away).to(m.dtype.element_ty), mask=inside)


def lion_step(p, g, m, decay, lr, betas):
    """One step on contiguous tensors of one shape, in place; all of fp32 or less."""
    if not p.numel():
        return
    beta1, beta2 = betas
    programs = triton.cdiv(p.numel(), 2048)
    lion_kernel[(programs,)](p.view(-1), g.view(-1), m.view(-1), p.numel(), decay, lr,
                             1 - beta1, 1 - beta2, BLOCK=2048, num_warps=8)
