# %% [markdown]
# # 3 · LoRA by hand
#
# A projection of a Llama is a matrix $W$ that turns each token's vector $x$ into $y = W x$.
# Finetuning would change every number of $W$. LoRA leaves $W$ as it is and learns a detour beside
# it, through a bottleneck of `rank` numbers:
#
#     x [K] ----------------- W [N, K] frozen -----------------.
#       |                                                      (+)---> y [N]
#       '-- dropout --> A [r, K] --> r numbers --> B [N, r] ---'
#                                                 times alpha / r
#
# Here you compute what this layer does, its gradients, what it must remember for them, and what
# is left of it after merging. You do it by hand, and compare with `lora.py` each time.

# %% The knobs: change them here, or say --rank=8 on the command line
import torch
import torch.nn.functional as F
from start import BASE, read_knobs, show, plt

from llama.lora_matmul import keep_mask
from lora import apply_lora, lost_to_rounding, merge_lora
from model import Llama
from paper.looks import FULL, RANKS, name_end

rank = 4
alpha = 8.0
dropout = 0.25    # the share of x's numbers that the detour does not see
tokens = 96       # how many vectors x
size_of_b = 0.02  # of B's numbers, once we pretend that it was trained
seed = 1
out_dir = 'out/lessons'
read_knobs(globals())

# %% [markdown]
# ## The drawing
# `apply_lora` freezes a model and puts the detour on every projection of each block. We look at
# one, `down_proj`, in float64, so that rounding cannot hide a mistake. $W$ is 64 x 172: 11,008
# numbers. With rank 4 the detour has 944, which is 9% of them.

# %%
torch.manual_seed(seed)
model = apply_lora(Llama.from_pretrained(BASE, dtype=torch.float64), rank, alpha, dropout)
layer = model.layers[0].mlp.down_proj
W, A, B = layer.weight, layer.lora_A, layer.lora_B
N, K = W.shape
adapter = A.numel() + B.numel()
print(f"W has {W.numel():,} numbers, A and B {adapter:,}: {adapter / W.numel():.1%}")

assert (N, K) == (64, 172) and W.numel() == 11008
assert A.shape == (rank, K) and B.shape == (N, rank) and adapter == rank * (N + K)
assert not W.requires_grad and A.requires_grad and B.requires_grad
if rank == 4:
    assert adapter == 944 and round(adapter / W.numel(), 2) == 0.09

# %% [markdown]
# ## The first step
# $B$ starts at zero, so the new model computes exactly what the old one did. Then the gradient of
# $A$ is zero, too: in the first step only $B$ moves. $A$ starts random, or nothing would ever move.

# %%
layer.eval()  # no dropout for now
x = torch.randn(tokens, K, dtype=torch.float64, requires_grad=True)
dy = torch.randn(tokens, N, dtype=torch.float64)  # the gradient of the loss by y
y = layer(x)
dA, dB = torch.autograd.grad(y, (A, B), dy)
print(f"at the start: |dA| = {dA.norm():.1f}, |dB| = {dB.norm():.1f}")

assert torch.equal(y, F.linear(x, W))
assert dA.norm() == 0 and dB.norm() > 0

# %% [markdown]
# ## The gradient
# Let us pretend that $B$ was trained. For the rows $x$ of a whole batch, with $s = \alpha / r$:
#
# | forward | backward |
# |---|---|
# | $P = x A^T$, the bottleneck | $dP = s \, dy \, B$ |
# | $y = x W^T + s \, P B^T$ | $dB = s \, dy^T P$, $\quad dA = dP^T x$ |
# | | $dx = dy \, W + dP \, A$ |
#
# There is no $dW = dy^T x$, the third of full finetuning's three large products, and a matrix as
# large as $W$ that never exists. `llama/lora_matmul.py` has these lines; autograd agrees.

# %%
with torch.no_grad():
    B.normal_(0, size_of_b)
    s = alpha / rank
    P = x @ A.T
    y = x @ W.T + s * P @ B.T
    dP = s * dy @ B
    by_hand = {"y": y, "dx": dy @ W + dP @ A, "dA": dP.T @ x, "dB": s * dy.T @ P}
y = layer(x)
found = dict(zip(("y", "dx", "dA", "dB"), (y, *torch.autograd.grad(y, (x, A, B), dy))))
for name, value in by_hand.items():
    print(f"{name}: by hand and by lora.py differ by {(value - found[name]).abs().max():.1g}")
    assert torch.allclose(value, found[name], rtol=1e-10, atol=1e-10)

# %% [markdown]
# ## Dropout as a hash
# The detour sees $x$ with some numbers set to zero. A backward pass needs the same zeros again.
# Instead of keeping the mask, `keep_mask` computes it: it scrambles each position's number
# together with a seed and compares the result with a threshold. Same seed, same mask, on any
# device; so two integers are all there is to keep.

# %%
drop = round(dropout * 2 ** 32)
seeds = torch.tensor([12345, 67890], dtype=torch.int32)
mask = keep_mask(seeds, x, drop)
print(f"kept {mask.double().mean():.1%} of the numbers, expected {1 - dropout:.0%}")
assert torch.equal(mask, keep_mask(seeds, x, drop, again=True))
deviation = (dropout * (1 - dropout) / mask.numel()) ** 0.5  # of a share of so many coin tosses
assert abs(mask.double().mean() - (1 - dropout)) <= 5 * deviation
assert dropout == 0 or not torch.equal(mask, keep_mask(seeds + 1, x, drop))

# the layer in training draws its two integers from torch's generator: draw the same ones
layer.train()
torch.manual_seed(seed)
y = layer(x)
torch.manual_seed(seed)
seeds = torch.randint(-2 ** 31, 2 ** 31, (1, 2), dtype=torch.int32)[0]
seen = x * keep_mask(seeds, x, drop) / (1 - dropout)  # scaled up, so that the mean stays
assert torch.allclose(y, x @ W.T + s * seen @ A.T @ B.T)

# %% [markdown]
# ## What is kept for backward
# The table above needs $x$ for $dA$ and $P$ for $dB$. Written in plain PyTorch, dropout keeps its
# mask *and* the thinned copy of $x$: with the default knobs 348 numbers a token. By hand it is
# $x$ and $P$: 176. Full finetuning keeps $x$ alone, 172, for its $dW$. A rank costs `rank` numbers
# per token and layer; the copies cost `K` each. PyTorch tells us what it keeps if we ask.


# %%
def numbers_kept(run, *weights):
    """Numbers a token that autograd keeps for the backward pass of run(), beside the weights."""
    kept = {}

    def pack(tensor):
        if tensor.dtype == torch.float64:  # not the integers of a seed
            kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    for weight in weights:
        kept.pop(weight.data_ptr(), None)
    return sum(tensor.numel() for tensor in kept.values()) / tokens


def plain_lora(layer):
    detour = F.linear(F.linear(F.dropout(x, dropout), layer.lora_A), layer.lora_B)
    return F.linear(x, layer.weight) + s * detour


kept = {"plain PyTorch": [], "lora.py": []}
ranks = sorted({1, 8, 32, 64, 128, rank})
for r in ranks:
    wrapped = apply_lora(Llama.from_pretrained(BASE, dtype=torch.float64), r, alpha, dropout)
    other = wrapped.layers[0].mlp.down_proj
    kept["plain PyTorch"].append(numbers_kept(lambda: plain_lora(other), *other.parameters()))
    kept["lora.py"].append(numbers_kept(lambda: other(x), *other.parameters()))
trained = W.clone().requires_grad_()
full = numbers_kept(lambda: F.linear(x, trained), trained)
at = ranks.index(rank)
print(f"numbers a token kept at rank {rank}: plain PyTorch {kept['plain PyTorch'][at]:.0f}, "
      f"lora.py {kept['lora.py'][at]:.0f}, full finetuning {full:.0f}")
assert full == K and kept["lora.py"] == [K + r for r in ranks]
assert kept["plain PyTorch"] == [(2 * K if dropout else K) + r for r in ranks]
if (rank, dropout > 0) == (4, True):
    assert kept["plain PyTorch"][at] == 348 and kept["lora.py"][at] == 176

# %%
figure, ax = plt.subplots(figsize=(5, 3))
for (name, values), colour in zip(kept.items(), (RANKS[3], RANKS[1])):
    ax.plot(ranks, values, "o-", color=colour)
    name_end(ax, ranks[-1], values[-1], name, colour)
ax.axhline(full, color=FULL, ls="--")
name_end(ax, None, full, "full finetuning", FULL)
ax.set(xlabel="LoRA rank", ylabel="numbers kept a token", ylim=(0, None))
ax.set_title(f"Kept for backward by one projection ({N} x {K}), dropout {dropout}")
show(figure, out_dir, "3_lora")

# %% [markdown]
# ## Merging
# $W + s B A$ is a matrix of $W$'s shape: add it once and the detour is gone, at no cost for whoever
# uses the model. In float64 nothing changes. But weights are published in bfloat16, which keeps 8
# bits of a number: where the change is much smaller than a number of $W$, it is rounded away.

# %%
model.eval()
with torch.no_grad():
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            p.normal_(0, size_of_b)
        elif not name.endswith("lora_A"):
            p.copy_(p.bfloat16())  # a base as it is published
    ids = torch.randint(model.config.vocab_size, (1, 64))
    before, _ = model(ids)
    lost = lost_to_rounding(model, torch.bfloat16)
    merge_lora(model)
    after, _ = model(ids)
print(f"merged: logits differ by {(after - before).abs().max():.1g}; "
      f"in bfloat16 {lost:.1%} of the change would be lost")
assert torch.allclose(before, after, rtol=1e-8, atol=1e-8)
assert torch.finfo(torch.bfloat16).eps == 2 ** -7  # 8 bits, the first of which is always 1

# %% [markdown]
# ## Questions
# Each is answered by changing a knob and reading what the lesson prints.
#
# 1. `rank`: from which rank on has the detour as many numbers as $W$ itself?
# 2. `dropout = 0.0`: what do plain PyTorch and `lora.py` keep then, and why is it the same?
# 3. `size_of_b`: how small must $B$'s numbers be before merging to bfloat16 loses half of the
#    change? (A hundred steps of Lion at a rate of 1e-4 move each of them by 0.01 at most.)
