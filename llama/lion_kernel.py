"""Lion's step as one Triton kernel: parameter, gradient and momentum are read once and written once."""
import triton
import triton.language as tl


@triton.jit
def lion_kernel(p, g, m, numel, decay, lr, weight1, weight2, BLOCK: tl.constexpr):
    """p = decay p - lr sign(lerp(m, g, weight1)), then m = lerp(m, g, weight2); in fp32, rounded once."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < numel
    old = tl.load(m + i, mask=inside, other=0.0).to(tl.float32)
    away = tl.load(g + i, mask=inside, other=0.0).to(tl.float32) - old
    direction = old + weight1 * away
    sign = tl.where(direction > 0, 1.0, 0.0) - tl.where(direction < 0, 1.0, 0.0)
    new = tl.load(p + i, mask=inside, other=0.0).to(tl.float32) * decay - lr * sign
    tl.store(p + i, new.to(p.dtype.element_ty), mask=inside)
    tl.store(m + i, (old + weight2 * away).to(m.dtype.element_ty), mask=inside)


def lion_step(p, g, m, decay, lr, betas):
    """One step on contiguous tensors of one shape, in place; momentum and parameter of fp32 or less."""
    p, g, m = p.view(-1), g.view(-1), m.view(-1)
    if p.numel():
        lion_kernel[(triton.cdiv(p.numel(), 2048),)](p, g, m, p.numel(), decay, lr, 1 - betas[0], 1 - betas[1], BLOCK=2048,
                                                     num_warps=8)
