"""Products with a weight, y = x W^T, by the fastest library at hand.

    generating on a CPU         oneDNN, the weight in its own order (`packed`)
    compiled, AVX512, fp32      oneDNN in a block's y = x W^T and dx = dy W, and in the head's y;
                                PyTorch's where it is faster: dW = dy^T x, adapters, the head's dx
    all else                    PyTorch's, which on a CPU is MKL in fp32 and oneDNN in bf16

With AVX512, oneDNN's fp32 products take 0.77 to 0.98 of the time of MKL's; with AVX2 alone (Zen 3)
1.01 to 1.23 of it (NOTES.md, 2026-11-30 and 2026-12-01). They round in another order, so uncompiled
training, the plain reference, stays as it is to the last bit.
"""
import torch
import torch.nn.functional as F

HAS_ONEDNN = torch.backends.mkldnn.is_available()
HAS_AVX512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def can_pack(device, dtype):
    """Whether oneDNN has an order of its own for weights: in fp32, and in bf16 with AVX512."""
    if device.type != "cpu" or not HAS_ONEDNN:
        return False
    if dtype == torch.bfloat16:
        return HAS_AVX512
    return dtype == torch.float32


def by_onednn(x, compiled):
    """Whether products of x go to oneDNN."""
    on_cpu = x.device.type == "cpu"
    return compiled and on_cpu and x.dtype == torch.float32 and HAS_ONEDNN and HAS_AVX512


# an operator of its own: the compiler would choose again how to compute it
@torch.library.custom_op("llama::onednn", mutates_args=())
def onednn(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x weight^T for x [..., K] and weight [N, K], which may be a transpose and is not copied."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


@onednn.register_fake
def _(x, weight):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


class OneDNNLinear(torch.autograd.Function):
    """y [..., N] = x [..., K] weight^T, by oneDNN."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return onednn(x, weight)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        x_needs_it, weight_needs_it = ctx.needs_input_grad
        dx = onednn(dy, weight.T) if x_needs_it else None
        dw = dy.flatten(0, -2).T @ x.flatten(0, -2) if weight_needs_it else None
        return dx, dw


def linear(x, weight, packed=None):
    """x weight^T for x [..., K]; with `packed`, the weight in oneDNN's own order, if given."""
    if packed is not None:
        return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    weight = weight.to(x.dtype)
    if by_onednn(x, torch.compiler.is_compiling()):
        return OneDNNLinear.apply(x, weight)
    return F.linear(x, weight)


def product(x, weight, compiled):
    """x weight^T without a derivative of its own."""
    return onednn(x, weight) if by_onednn(x, compiled) else x @ weight.T
