"""DecoupledLionW and DecoupledAdamW, with the rule and the order of the libraries the paper used.

Decoupled means: weight decay follows the schedule but not the learning rate itself,
p *= 1 - (lr / initial_lr) * weight_decay (llm-foundry llmfoundry/optim/lion.py; composer
composer/optim/decoupled_weight_decay.py). Parameters without a gradient are left alone; state is
made at a parameter's first step, in its dtype.
"""
import math
import warnings
from importlib.util import find_spec

import torch


def local(tensors):
    """What this rank holds of FSDP's tensors: an update is elementwise, so each rank's part is updated alone."""
    return [t.to_local() if hasattr(t, "to_local") else t for t in tensors]


def buckets(columns):
    """Walk over columns (p, grad, state tensors ...) of every parameter in lists of bounded size.

    All operations of an update run on one list before the next: on a CPU a list fits the cache, so
    memory is read and written once an update; on a GPU it bounds the temporaries."""
    columns = list(map(local, columns))
    limit = 2 ** 18 if columns and columns[0][0].device.type == "cpu" else 2 ** 26
    rows, size = [], 0
    for tensors in columns:
        for pieces in zip(*(t.view(-1).split(limit) for t in tensors)):
            rows.append(pieces)
            size += pieces[0].numel()
            if size >= limit:
                yield map(list, zip(*rows))
                rows, size = [], 0
    if rows:
        yield map(list, zip(*rows))


class Decoupled(torch.optim.Optimizer):
    """Common ground of the two: arguments, initial_lr, and the decay factor of a step."""

    def __init__(self, params, lr, betas, weight_decay):
        if not lr > 0:
            raise ValueError(f"learning_rate must be > 0, found {lr}")
        if not all(0 <= b <= 1 for b in betas):
            raise ValueError(f"betas must lie in [0, 1], found {betas}")
        if weight_decay >= 1e-3:
            warnings.warn(f"weight_decay={weight_decay} is not multiplied by the learning rate: it shrinks "
                          f"weights by that share at every step; values far below 1e-3 are usual")
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
            self.update(params, 1 - group["lr"] / group["initial_lr"] * group["weight_decay"], group)
        return loss


class DecoupledLionW(Decoupled):
    """Lion (Chen et al. 2023): p -= lr * sign(b1 m + (1 - b1) g), then m = b2 m + (1 - b2) g.

    sign(0) = 0: an entry whose gradient and momentum are zero does not move. One Triton kernel on a GPU."""

    numbers_per_parameter = 1  # of its state, for training/plan.py's prediction of memory

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, lr, betas, weight_decay)

    def update(self, params, decay, group):
        lr, betas = group["lr"], group["betas"]
        for p in params:
            if not self.state[p]:
                self.state[p]["exp_avg"] = torch.zeros_like(p)
        columns = [(p, p.grad, self.state[p]["exp_avg"]) for p in params]
        if columns and params[0].is_cuda and params[0].dtype != torch.float64 and find_spec("triton"):
            from llama.lion_kernel import lion_step
            for tensors in map(local, columns):
                lion_step(*tensors, decay, lr, betas)
            return
        for p, g, m in buckets(columns):
            if decay != 1:
                torch._foreach_mul_(p, decay)
            direction = torch._foreach_lerp(m, g, 1 - betas[0])
            torch._foreach_sign_(direction)
            torch._foreach_add_(p, direction, alpha=-lr)
            torch._foreach_lerp_(m, g, 1 - betas[1])


class DecoupledAdamW(Decoupled):
    """AdamW (Loshchilov & Hutter 2019) with bias correction; for the comparison of the paper's figure S2."""

    numbers_per_parameter = 2

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.95), weight_decay=1e-5, eps=1e-8):
        super().__init__(params, lr, betas, weight_decay)
        for group in self.param_groups:
            group["eps"] = eps

    def update(self, params, decay, group):
        lr, betas, eps = group["lr"], group["betas"], group["eps"]
        for p in params:
            state = self.state[p]
            if not state:
                state.update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p), step=torch.zeros(()))
            state["step"] += 1
        for step in sorted({self.state[p]["step"].item() for p in params}):  # almost always one
            same = [p for p in params if self.state[p]["step"] == step]
            states = [self.state[p] for p in same]
            columns = [(p, p.grad, s["exp_avg"], s["exp_avg_sq"]) for p, s in zip(same, states)]
            for p, g, m, v in buckets(columns):
                if decay != 1:
                    torch._foreach_mul_(p, decay)
                torch._foreach_mul_(m, betas[0])
                torch._foreach_add_(m, g, alpha=1 - betas[0])
                torch._foreach_mul_(v, betas[1])
                torch._foreach_addcmul_(v, g, g, value=1 - betas[1])
                scale = torch._foreach_sqrt(v)
                torch._foreach_div_(scale, math.sqrt(1 - betas[1] ** step))
                torch._foreach_add_(scale, eps)
                torch._foreach_addcdiv_(p, m, scale, value=-lr / (1 - betas[0] ** step))


# train.py's knob `optimizer`: a new one needs its class and a line here
OPTIMIZERS = {"lionw": DecoupledLionW, "adamw": DecoupledAdamW}
