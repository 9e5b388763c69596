# %% [markdown]
# # 4 · Lion against AdamW
#
# The paper trains with Lion. It keeps one running mean $m$ of the gradients $g$ and uses nothing
# but its sign:
#
#     Lion    p -= lr * sign(0.9 m + 0.1 g)            every number moves by lr, up or down
#     AdamW   p -= lr * m / sqrt(v)                    v: a running mean of g squared
#
# So Lion needs half the memory, wants a smaller learning rate, and never takes a smaller step by
# itself. That last point is why the schedule matters, and this lesson is about it.

# %% The knobs: change them here, or say --noise=0.0 on the command line
from types import SimpleNamespace

import torch
from start import read_knobs, show, plt

from lion import OPTIMIZERS, DecoupledAdamW, DecoupledLionW
from model import Llama
from train import cosine_with_warmup, inv_sqrt_with_warmup, learning_rate_at
from training.plan import count, shape_of

learning_rate = 0.01
steps = 2000
noise = 1.0            # deviation of the gradients' noise
schedule_lag = True    # the paper's stack sets the rate a step late
seed = 1
out_dir = 'out/lessons'
read_knobs(globals())

# %% [markdown]
# ## One step by hand
# First the two rules as `lion.py` computes them, against the formulas. Lion compares the *old*
# mean, mixed with the new gradient, and only then updates the mean, with another beta.

# %%
torch.manual_seed(seed)
g1, g2 = torch.randn(2, 5, dtype=torch.float64)
p = torch.zeros(5, dtype=torch.float64, requires_grad=True)
lion = DecoupledLionW([p], lr=0.1, betas=(0.9, 0.95))
for g in (g1, g2):
    p.grad = g
    lion.step()
m = 0.05 * g1  # after the first step
assert torch.allclose(p, -0.1 * g1.sign() - 0.1 * (0.9 * m + 0.1 * g2).sign())

# %% [markdown]
# ## What AdamW sees and Lion does not
# One number's gradient is always 1, another's is 1 and -1 in turn. AdamW notices: the second
# moves a nineteenth as far, as its mean almost cancels while its square does not. Lion moves
# both by the full rate. And a gradient that is a thousand times as large changes neither.


# %%
def last_move(optimizer, scale):
    """How far the last of 201 steps moves the two numbers, as a share of the learning rate."""
    p = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optim = optimizer([p], lr=0.1, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(201):
        before = p.detach().clone()
        p.grad = scale * torch.tensor([1.0, (-1.0) ** step], dtype=torch.float64)
        optim.step()
    return (p.detach() - before).abs() / 0.1


for name, optimizer in OPTIMIZERS.items():
    steady, in_turn = last_move(optimizer, scale=1).tolist()
    print(f"{name}: steady gradient {steady:.3f}, alternating {in_turn:.3f} of the rate")
    assert torch.allclose(last_move(optimizer, 1), last_move(optimizer, 1000), atol=1e-6)
assert torch.allclose(last_move(DecoupledLionW, 1), torch.ones(2).double())
assert torch.allclose(last_move(DecoupledAdamW, 1), torch.tensor([1, 1 / 19]).double(), atol=1e-4)

# %% [markdown]
# ## Memory
# Llama-2-7B has 6.74 billion weights. In fp32, Lion's means take 27 GB, AdamW's two 54 GB.

# %%
with torch.device("meta"):
    weights = count(Llama(shape_of("Llama-2-7b-hf")))
gigabytes = {name: 4e-9 * weights * optimizer.numbers_per_parameter
             for name, optimizer in OPTIMIZERS.items()}
print(f"{weights:,} weights; GB of state: "
      f"{gigabytes['lionw']:.1f} of Lion, {gigabytes['adamw']:.1f} of AdamW")
assert weights == 6738415616
assert round(gigabytes["lionw"]) == 27 and round(gigabytes["adamw"]) == 54

# %% [markdown]
# ## The paper's schedules
# Continued pretraining rises for 1,000 steps, stays, and falls to zero over the last fifth of its
# 25,431 steps. Finetuning rises for a tenth of the run, then falls along half a cosine to a
# hundredth.
#
# The paper's stack sets the rate *after* a step from the time *before* it. So step $s$ has the rate
# meant for $s - 1$, the first two steps have the rate zero, and the last rate is never used.

# %%
pretraining = [inv_sqrt_with_warmup(t, 25431, 1000, 1000, 25431 // 5, alpha_f_decay=1.0)
               for t in (0, 500, 1000, 20345, 22888, 25431)]
finetuning = [cosine_with_warmup(t, 386, 38, alpha_f=0.01) for t in (0, 19, 38, 212, 386)]
assert pretraining == [0, 0.5, 1, 1, 0.5, 0]
assert torch.allclose(torch.tensor(finetuning), torch.tensor([0, 0.5, 1, 0.505, 0.01]))

knobs = SimpleNamespace(schedule="cosine", warmup_steps=None, alpha_f=0.01,
                        learning_rate=learning_rate, schedule_lag=schedule_lag)
rates = [learning_rate_at(step, steps, knobs) / learning_rate for step in range(steps)]
print("rates of the first steps, as shares:", [round(rate, 4) for rate in rates[:4]])
print("and of the last:", round(rates[-1], 5))
if schedule_lag:
    assert rates[:2] == [0, 0] and rates[2] > 0
    assert rates[-1] == cosine_with_warmup(steps - 2, steps, steps // 10, 0.01)

# %% [markdown]
# ## Coming to rest
# Four hundred numbers have to find their way to zero. Each has a gradient that points away from it,
# with noise, as in training. With a constant rate Lion ends up hopping around the target, as far
# from it as its steps and the noise make it. With the cosine it comes more than twice as near,
# because its steps shrink. AdamW takes smaller steps where the noise wins, and hops less than half
# as far.


# %%
def distances(optimizer, schedule):
    """Root mean square distance from the target after each step."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.randn(400, generator=generator, requires_grad=True)
    optim = optimizer([p], lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    knobs.schedule = schedule
    found = []
    for step in range(steps):
        optim.param_groups[0]["lr"] = learning_rate_at(step, steps, knobs)
        p.grad = p.detach() + noise * torch.randn(400, generator=generator)
        optim.step()
        found.append(p.detach().square().mean().sqrt().item())
    return found


knobs.warmup_steps = steps // 10
curves = {}
for name, optimizer in (("Lion", DecoupledLionW), ("AdamW", DecoupledAdamW)):
    for schedule in ("constant", "cosine"):
        curves[name, schedule] = distances(optimizer, schedule)
settled = {key: sum(curve[-30:]) / 30 for key, curve in curves.items()}
for (name, schedule), distance in settled.items():
    print(f"{name:5} {schedule:8} settles {distance:.4f} from the target")
if (learning_rate, steps, noise) == (0.01, 2000, 1.0):
    assert settled["Lion", "cosine"] < 0.5 * settled["Lion", "constant"]
    assert settled["AdamW", "constant"] < 0.5 * settled["Lion", "constant"]

# %%
figure, (above, below) = plt.subplots(2, 1, figsize=(5, 4), sharex=True, height_ratios=(1, 2))
colours = {"Lion": "#D55E00", "AdamW": "#0072B2"}
for (name, schedule), curve in curves.items():
    style = "-" if schedule == "cosine" else ":"
    below.plot(curve, style, color=colours[name], label=f"{name}, {schedule} rate")
for schedule, style in (("constant", ":"), ("cosine", "-")):
    knobs.schedule = schedule
    shares = [learning_rate_at(step, steps, knobs) / learning_rate for step in range(steps)]
    above.plot(shares, style, color="black", label=schedule)
above.set_ylabel("learning rate,\nshare of the peak")
above.set_title("A constant rate keeps Lion hopping around the target")
above.legend(loc="lower center")
below.set_yscale("log")
below.set_yticks([0.03, 0.1, 0.3, 1], ["0.03", "0.1", "0.3", "1"])
below.minorticks_off()
below.set_xlabel("step")
below.set_ylabel("distance from the target, rms")
below.legend(loc="upper right")
show(figure, out_dir, "4_optimizers")

# %% [markdown]
# ## Questions
# Each is answered by changing a knob and reading what the lesson prints.
#
# 1. `schedule_lag = False`: which rates do the first three steps have now, and the last?
# 2. `learning_rate = 0.02`: how much farther from the target does Lion settle with a constant
#    rate? And AdamW?
# 3. `noise = 0.0`: which of the two comes to rest under a constant rate, and which does not?
