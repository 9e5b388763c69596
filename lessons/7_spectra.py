# %% [markdown]
# # 7 · Spectra
#
# The paper asks why LoRA learns less, and looks at what full finetuning changes: $D = W - W_0$.
# Its singular values say how strong $D$ is in each of its directions. LoRA has `rank` of them.
# The paper finds that full finetuning needs 10 to 100 times as many to hold 90% of the squares.
#
# But a large number proves nothing until you know what noise would give. That comes first.

# %% The knobs: change them here, or say --steps=400 on the command line
import tempfile
from pathlib import Path

import numpy as np
import torch
from start import BASE, read_knobs, show, plt

from analysis.chance import random_edge, random_singular_values
from analysis.folders import open_checkpoint, open_model
from analysis.singular import singular_values
from model import LlamaConfig
from paper.looks import CHANCE, FULL, RANKS, name_end
from quickstart import prepare, run_script, toy_math, write_jsonl
from spectrum import analyse, effective_rank

steps = 80
full_learning_rate = 5e-4
lora_learning_rate = 5e-3
lora_rank = 4
strength = 1.5           # of a direction hidden in noise, as a share of noise's largest value
layer = 2
module = 'up_proj'
seed = 1
out_dir = 'out/lessons'
read_knobs(globals())

# %% [markdown]
# ## What noise gives
# The *effective rank* is how many singular values, from the largest on, hold 90% of the sum of
# squares. A 4096 x 4096 matrix of pure noise has 2,089: half of its side. The paper's 2,000 is not
# far from that. Noise has no favourite direction, so no few directions can hold it.
#
# The law of Marchenko and Pastur says what the values of noise are without drawing any. It says,
# too, how large the largest is, the *edge*: only what stands above it cannot be noise.

# %%
side = 400
law = random_singular_values(side, side)  # of a matrix of norm 1
torch.manual_seed(seed)
noise = torch.randn(side, side, dtype=torch.float64)
noise = noise / noise.norm()
drawn, _, _ = singular_values(noise)
print(f"400 x 400: effective rank {effective_rank(drawn)} drawn, {effective_rank(law)} by the law; "
      f"largest {drawn[0]:.4f}, edge {random_edge(side, side):.4f}")

assert effective_rank(random_singular_values(4096, 4096)) == 2089
assert abs(effective_rank(drawn) - effective_rank(law)) <= 3
assert np.abs(drawn.numpy() - law).max() < 0.003
assert abs(drawn[0] / random_edge(side, side) - 1) < 0.03

# %% [markdown]
# ## A direction in the noise
# Now one true direction, $u v^T$, is hidden in that noise: with 1.5 times the edge it is plain to
# see, the one value above the edge. The effective rank has hardly moved: it looks at where the
# squares are, not at what matters.

# %%
u, v = torch.randn(2, side, dtype=torch.float64)
hidden = strength * random_edge(side, side) * torch.outer(u / u.norm(), v / v.norm())
values, _, _ = singular_values(noise + hidden)
edge = random_edge(side, side)
print(f"with a hidden direction: largest {values[0] / edge:.2f} of the edge, second "
      f"{values[1] / edge:.2f}; effective rank {effective_rank(values)}")
if (strength, seed) == (1.5, 1):
    assert values[0] > 1.5 * edge and values[1] < edge
    assert effective_rank(drawn) - effective_rank(values) <= 10

# %% [markdown]
# ## A real change
# A small real model that has only read children's stories learns word problems, in full and with
# LoRA. (`train.py` warns that its first loss is worse than an even guess. Such text is news to it.)
# Then `analyse` in `spectrum.py` reads one projection before and after. For $W_0$, $W$ and $D$ it
# says how many values hold 90%, how many noise of that shape would need (for LoRA: noise of that
# rank), and how many values stand above the edge.

# %%
scratch = tempfile.TemporaryDirectory()
source = Path(scratch.name, "problems.jsonl")
data = Path(scratch.name, "tokens")
write_jsonl(source, toy_math(400, seed))
prepare(data, source=source, tokenizer=BASE, seq_len=256, kind="ift",
        template="Question: {question}\\nAnswer:", response_field="answer")
folders = []
for rank, rate in ((0, full_learning_rate), (lora_rank, lora_learning_rate)):
    run = Path(scratch.name, f"r{rank}")
    run_script("train.py", base=BASE, data=data, out_dir=run, lora_rank=rank, learning_rate=rate,
               max_steps=steps, global_batch=2, microbatch=2, log_interval=20, seed=seed,
               device="cpu")
    folders.append(run / f"step_{steps}")

# %%
shape = LlamaConfig.from_json(BASE)
before = open_model(BASE, shape)
checkpoints = [open_checkpoint(folder, shape, before) for folder in folders]
records = analyse(before, checkpoints, layer, module, "cpu", fractions=(0.9,), subspaces=(1, 8),
                  method="svd", tolerance=1e-6, intruder_k=8, intruder_eps=0.5)
names = {None: "base", 0: "full", 1: f"LoRA r={lora_rank}"}
found = {}
for record in records:
    key = names[record["checkpoint"]], record["matrix"]
    found[key] = record
    print(f"{key[0]:9} {key[1]:2}: effective rank {record['effective_rank']['0.9']:3}, noise "
          f"{record['random_rank']['0.9']:3}; {record['above_random']} values above the edge hold "
          f"{record['above_random_share']:.0%} of the squares")
full = found["full", "D"]
lora = found[names[1], "D"]

# %% [markdown]
# The change of full finetuning has more than three times the effective rank of LoRA's, which cannot
# be above `lora_rank`. Still it is below noise's, because a few directions stand above the edge. So
# both are true: the change has a high rank, and the part of it that is surely not noise a low one.

# %%
assert lora["effective_rank"]["0.9"] <= lora_rank
assert len(lora["singular_values"]) == lora_rank
as_given = [80, 5e-4, 5e-3, 4, 2, "up_proj", 1]
if [steps, full_learning_rate, lora_learning_rate, lora_rank, layer, module, seed] == as_given:
    assert full["effective_rank"]["0.9"] > 3 * lora["effective_rank"]["0.9"]
    assert full["effective_rank"]["0.9"] < full["random_rank"]["0.9"]
    assert 1 <= full["above_random"] <= 16

# %%
figure, ax = plt.subplots(figsize=(5, 3))
rows, columns = full["shape"]
law = random_singular_values(rows, columns)
for name, values, colour in (("full finetuning", full["singular_values"], FULL),
                             (names[1], lora["singular_values"], RANKS[1]),
                             ("noise", law, CHANCE)):
    values = np.array(values) / np.linalg.norm(values)
    places = np.arange(1, len(values) + 1)
    ax.plot(places, values, "o-", ms=2.5, color=colour)
    name_end(ax, places[-1], values[-1], name, colour)
ax.axhline(random_edge(rows, columns), color=CHANCE, ls="--", lw=1)
name_end(ax, None, random_edge(rows, columns), "the edge of noise", CHANCE)
ax.set_ylim(0)
ax.set_xlabel("number of the singular value, from the largest")
ax.set_ylabel("singular value, share of the norm")
ax.set_title(f"Few directions of a change stand above noise (block {layer}, {module})")
show(figure, out_dir, "7_spectra")

# %% [markdown]
# ## Intruders
# Shuttleworth et al. (2024) found that LoRA brings *intruder dimensions*: leading directions of $W$
# that are like none of $W_0$'s. `analysis/intruders.py` takes the 8 leading left singular vectors
# of $W$ and counts those whose cosine with every one of $W_0$'s is below a half.

# %%
for name in (names[0], names[1]):
    record = found[name, "W"]
    cosines = " ".join(f"{cosine:.2f}" for cosine in record["max_cosines"])
    print(f"{name:9} W: {record['intruders']} of 8 leading directions are intruders; largest "
          f"cosines {cosines}; a random direction has {record['random_cosine']:.2f}")
    assert record["intruders"] == sum(cosine < 0.5 for cosine in record["max_cosines"])

# %% [markdown]
# ## Questions
# Each is answered by changing a knob and reading what the lesson prints.
#
# 1. `strength`: how weak can the hidden direction be before nothing stands above the edge? What is
#    its value then, and whose is it?
# 2. `lora_rank = 16`: what is LoRA's effective rank now, and what would noise of that rank have?
# 3. `full_learning_rate = 5e-5`: does a smaller change have a higher or a lower effective rank, and
#    how much of it stands above the edge?
