"""DecoupledLionW and DecoupledAdamW, as computed by the libraries that the paper used.

    a step of Lion      p *= 1 - (lr / initial_lr) * weight_decay
                        p -= lr * sign(beta1 m + (1 - beta1) g)      m: momentum, g: gradient
                        m  = beta2 m + (1 - beta2) g

Decoupled means: weight decay follows the schedule but not the learning rate itself (llm-foundry
llmfoundry/optim/lion.py; composer composer/optim/decoupled_weight_decay.py). Parameters without a
gradient are skipped; state is created at a parameter's first step, in its dtype.
"""
import math
import warnings
from importlib.util import find_spec

import torch


def local(tensors):
    """This rank's shards of FSDP tensors: an update is elementwise, so they are enough."""
    return [t.to_local() if hasattr(t, "to_local") else t for t in tensors]


def buckets(columns):
    """Yield buckets of bounded size; columns: (p, grad, state tensors ...) of each parameter.

    A bucket is a list of flat pieces of each kind, and an update runs on one before the next: on a
    CPU it fits in cache, so memory is read and written once; on a GPU it bounds temporaries."""
    pieces = []
    size = 0
    for tensors in columns:
        tensors = local(tensors)
        limit = 2 ** 18 if tensors[0].device.type == "cpu" else 2 ** 26
        for piece in zip(*(t.view(-1).split(limit) for t in tensors)):
            pieces.append(piece)
            size += piece[0].numel()
            if size >= limit:
                yield map(list, zip(*pieces))
                pieces = []
                size = 0
    if pieces:
        yield map(list, zip(*pieces))


class Decoupled(torch.optim.Optimizer):
    """What both optimizers share: arguments, initial_lr and each step's decay factor."""

    def __init__(self, params, lr, betas, weight_decay):
        if not lr > 0:
            raise ValueError(f"learning_rate must be > 0, found {lr}")
        if not all(0 <= beta <= 1 for beta in betas):
            raise ValueError(f"betas must lie in [0, 1], found {betas}")
        if weight_decay >= 1e-3:
            warnings.warn(f"weight_decay={weight_decay} shrinks weights by that share every step, "
                          "at any learning rate; values far below 1e-3 are usual")
        super().__init__(params, dict(lr=lr, betas=tuple(betas), weight_decay=weight_decay))
        for group in self.param_groups:
            group["initial_lr"] = group["lr"]

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            # 1 - weight_decay at the peak of the schedule, closer to 1 elsewhere
            decay = 1 - group["lr"] / group["initial_lr"] * group["weight_decay"]
            self.update(params, decay, group)
        return loss


class DecoupledLionW(Decoupled):
    """Lion (Chen et al. 2023). sign(0) = 0: p stays where its gradient and momentum are zero."""

    numbers_per_parameter = 1  # of optimizer state, for training/plan.py's memory prediction

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, lr, betas, weight_decay)

    def update(self, params, decay, group):
        lr = group["lr"]
        beta1, beta2 = group["betas"]
        columns = []
        for p in params:
            state = self.state[p]
            if not state:
                state["exp_avg"] = torch.zeros_like(p)
            columns.append((p, p.grad, state["exp_avg"]))

        # one Triton kernel per parameter
        on_gpu = params and params[0].is_cuda and params[0].dtype != torch.float64
        if on_gpu and find_spec("triton"):
            from llama.lion_kernel import lion_step
            for tensors in columns:
                lion_step(*local(tensors), decay, lr, (beta1, beta2))
            return

        # otherwise the whole update, bucket by bucket
        for p, g, m in buckets(columns):
            if decay != 1:
                torch._foreach_mul_(p, decay)
            direction = torch._foreach_lerp(m, g, 1 - beta1)
            torch._foreach_sign_(direction)
            torch._foreach_add_(p, direction, alpha=-lr)
            torch._foreach_lerp_(m, g, 1 - beta2)


class DecoupledAdamW(Decoupled):
    """AdamW (Loshchilov & Hutter 2019) with bias correction, as in the paper's figure S2."""

    numbers_per_parameter = 2

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.95), weight_decay=1e-5, eps=1e-8):
        super().__init__(params, lr, betas, weight_decay)
        for group in self.param_groups:
            group["eps"] = eps

    def update(self, params, decay, group):
        lr = group["lr"]
        beta1, beta2 = group["betas"]
        # grouped by step count, which sets the bias correction; there is almost always one group
        columns_at = {}
        for p in params:
            state = self.state[p]
            if not state:
                state["exp_avg"] = torch.zeros_like(p)
                state["exp_avg_sq"] = torch.zeros_like(p)
                state["step"] = torch.zeros(())
            state["step"] += 1
            columns = columns_at.setdefault(state["step"].item(), [])
            columns.append((p, p.grad, state["exp_avg"], state["exp_avg_sq"]))

        for step, columns in columns_at.items():
            for p, g, m, v in buckets(columns):
                if decay != 1:
                    torch._foreach_mul_(p, decay)
                # running means of g and g^2
                torch._foreach_mul_(m, beta1)
                torch._foreach_add_(m, g, alpha=1 - beta1)
                torch._foreach_mul_(v, beta2)
                torch._foreach_addcmul_(v, g, g, value=1 - beta2)
                # p -= lr * m / (sqrt(v) + eps), m and v bias-corrected
                scale = torch._foreach_sqrt(v)
                torch._foreach_div_(scale, math.sqrt(1 - beta2 ** step))
                torch._foreach_add_(scale, group["eps"])
                torch._foreach_addcdiv_(p, m, scale, value=-lr / (1 - beta1 ** step))


# train.py's knob `optimizer`: a new one needs a class and a line here
OPTIMIZERS = {"lionw": DecoupledLionW, "adamw": DecoupledAdamW}
