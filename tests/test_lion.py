"""DecoupledLionW and DecoupledAdamW against the original optimizers, step by step."""
import pytest
import torch
from conftest import golden

from lion import DecoupledAdamW, DecoupledLionW

CLASSES = {"DecoupledLionW": DecoupledLionW, "DecoupledAdamW": DecoupledAdamW}


def replay(run):
    """Yield (our optimizer, our params, recorded step) after every recorded step of a run."""
    params = [torch.nn.Parameter(torch.tensor(p)) for p in run["initial_params"]]
    optimizer = CLASSES[run["optimizer"]](params, lr=run["initial_lr"], betas=run["betas"],
                                          weight_decay=run["weight_decay"])
    for step in run["steps"]:
        for p, g in zip(params, step["grads"]):
            p.grad = None if g is None else torch.tensor(g)
        optimizer.param_groups[0]["lr"] = step["lr"]
        optimizer.step()
        yield optimizer, params, step


@pytest.mark.parametrize("kind", ["lionw", "adamw"])
def test_every_step_equals_the_original(kind):
    steps = 0
    for run in golden("optimizers")[kind]:
        for optimizer, params, step in replay(run):
            for i, p in enumerate(params):
                torch.testing.assert_close(p.data, torch.tensor(step["params"][i]), rtol=1e-7, atol=1e-9)
                for name in ("exp_avg", "exp_avg_sq"):
                    if name in step and step[name][i] is not None:
                        want = torch.tensor(step[name][i])
                        torch.testing.assert_close(optimizer.state[p][name], want, rtol=1e-7, atol=1e-12)
            steps += 1
    assert steps > 10


def lion_by_hand(p, grads, lr, b1, b2, wd, initial):
    m = torch.zeros_like(p)
    for g in grads:
        p = p * (1 - lr / initial * wd)
        p = p - lr * torch.sign(b1 * m + (1 - b1) * g)
        m = b2 * m + (1 - b2) * g
    return p, m


@pytest.mark.parametrize("shape", [(3,), (700, 801)])  # the second is cut into several pieces
def test_lion_equals_formula_in_float64(shape):
    torch.manual_seed(0)
    start, grads = torch.randn(shape, dtype=torch.float64), [torch.randn(shape, dtype=torch.float64) for _ in range(4)]
    p = torch.nn.Parameter(start.clone())
    optimizer = DecoupledLionW([p], lr=1e-2, betas=(0.9, 0.95), weight_decay=1e-4)
    optimizer.param_groups[0]["lr"] = 5e-3  # as a schedule would: decay follows lr / initial_lr
    for g in grads:
        p.grad = g
        optimizer.step()
    want, m = lion_by_hand(start, grads, 5e-3, 0.9, 0.95, 1e-4, 1e-2)
    torch.testing.assert_close(p.data, want, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], m, rtol=1e-14, atol=1e-14)


def test_zero_gradient_and_missing_gradient_do_not_move():
    still, frozen = torch.nn.Parameter(torch.ones(5)), torch.nn.Parameter(torch.ones(5))
    optimizer = DecoupledLionW([still, frozen], lr=1.0)
    still.grad = torch.zeros(5)
    optimizer.step()
    assert torch.equal(still.data, torch.ones(5)) and torch.equal(frozen.data, torch.ones(5))
    assert frozen not in optimizer.state or not optimizer.state[frozen]


@pytest.mark.parametrize("bad", [dict(lr=0.0), dict(lr=-1.0), dict(lr=float("nan")), dict(betas=(0.9, 1.5)),
                                 dict(betas=(-0.1, 0.9))])
def test_bad_arguments(bad):
    for cls in CLASSES.values():
        with pytest.raises(ValueError, match="learning_rate|betas"):
            cls([torch.nn.Parameter(torch.ones(1))], **bad)


def test_large_weight_decay_warns():
    with pytest.warns(UserWarning, match="weight_decay=0.5"):
        DecoupledLionW([torch.nn.Parameter(torch.ones(1))], weight_decay=0.5)
