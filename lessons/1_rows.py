# %% [markdown]
# # 1 · From records to rows
#
# A language model is trained on rows: `seq_len` token ids each, and for every token the id that
# should come next. Data come as records: a question and its answer. This lesson follows thirty
# word problems from one to the other, and asks what a boundary between two of them is.
#
#     record  {"question": ..., "answer": ...}
#     tokens  BOS Question: ... Answer: Now there are ... #### 9 EOS
#     mask     0      0     ...    0     1    1    1  ...   1  1  1       1: this token is learned
#     rows    [ problem 3 | problem 7 | problem 19 | padding ]

# %% The knobs: change them here, or say --packing=none on the command line
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from start import BASE, read_knobs, show, plt

from eval_gsm8k import build_prompt
from model import IGNORE, Llama
from prepare_data import encode_turns
from quickstart import prepare, toy_math, write_jsonl
from text.encode import make_encoder
from text.tokenizer import load_tokenizer
from training.rows import TokenRows, stack

problems = 30
seq_len = 512            # tokens a row
packing = 'best_fit'     # best_fit | none: one problem a row
train_on_prompt = False  # True: questions are learned as well
doc_mask = True          # False: the problems in a row see each other, as in the paper
out_dir = 'out/lessons'
_choices = {'packing': ('best_fit', 'none')}
read_knobs(globals())

# %% [markdown]
# ## Tokens and masks
# `encode_turns` takes what is only read and what is learned, and returns ids and a mask. What is
# read gets the mask 0. The answer gets 1, and so does EOS, the token that says "I am done": a model
# that never learns it talks on for ever.

# %%
tok = load_tokenizer(BASE)
record = next(toy_math(problems, seed=1))
prompt = build_prompt(record["question"], shots=[])
dtype = np.dtype("<u2")
bos = np.array(tok.bos_id, dtype).tobytes()
eos = np.array(tok.eos_id, dtype).tobytes()
turns = [(prompt, record["answer"])]
ids, mask, why = encode_turns(make_encoder(tok, dtype), turns, seq_len, bos, eos)
ids = np.frombuffer(ids, dtype).tolist()
learned = np.frombuffer(mask, np.uint8).tolist()
first = learned.index(1)
print("read:   ", repr(tok.decode(ids[:first])))
print("learned:", repr(tok.decode(ids[first:])))
print(f"{len(ids)} tokens, {sum(learned)} of them are learned")

assert record["answer"].startswith("6 - 4 = <<6-4=2>>2") and record["answer"].endswith("#### 1")
assert why == "" and ids[0] == tok.bos_id and ids[-1] == tok.eos_id
assert tok.decode(ids[:first]).strip() == prompt
assert learned == [0] * first + [1] * (len(ids) - first)

# %% [markdown]
# ## Rows
# `prepare_data.py` does this for all records and packs them into rows. Every problem is whole and
# comes once. Packing is a puzzle: which problems go together so that the fewest rows are needed?
# `pack_best_fit` in `text/packing.py` takes the longest first, each into the fullest row that
# still has room for it. With the default knobs 30 problems fill 8 rows, and 12% is padding.
#
# What is printed first is what it says to everybody: its knobs, counts, lengths and three examples.

# %%
scratch = tempfile.TemporaryDirectory()
source = Path(scratch.name, "problems.jsonl")
folder = Path(scratch.name, "tokens")
write_jsonl(source, toy_math(problems, seed=1))
prepare(folder, source=source, tokenizer=BASE, seq_len=seq_len, kind="ift", packing=packing,
        template="Question: {question}\\nAnswer:", response_field="answer",
        train_on_prompt=train_on_prompt)
counts = json.loads((folder / "meta.json").read_text())["splits"]["train"]
rows = TokenRows(folder, doc_mask=doc_mask)
padding = counts["padding"] / counts["tokens"]
targets = sum(int((rows[i][1] != IGNORE).sum()) for i in range(len(rows)))
print(f"{len(rows)} rows, {padding:.0%} padding, {targets / counts['tokens']:.0%} is learned")

assert counts["tokens"] == len(rows) * seq_len and targets <= counts["targets"]
if (problems, seq_len, packing) == (30, 512, "best_fit"):
    assert len(rows) == 8 and round(padding, 2) == 0.12

# %% [markdown]
# ## What a row says
# `rows[i]` is what `train.py` sees: tokens, targets and the places where problems start. The target
# of a token is the token after it, or `IGNORE` where there is nothing to learn: questions, padding,
# and the last token of each problem. What follows there is somebody else's beginning.

# %%
i = max(range(len(rows)), key=lambda i: len(rows[i][2]))  # the row with most problems
tokens, row_targets, starts = rows[i]
is_target = row_targets[:-1] != IGNORE
print(f"row {i}: problems start at 0 and {starts.tolist()}")

assert (row_targets[:-1][is_target] == tokens[1:][is_target]).all()
assert row_targets[-1] == IGNORE and (row_targets[starts - 1] == IGNORE).all()

# %% [markdown]
# ## What a boundary is
# A row holds several problems, and a Llama looks back at everything in its row. Unless it is told
# not to: with `docs`, the borders, each problem sees itself alone and counts positions from 0. Then
# the second problem's logits are what they would be if it were alone in the world, up to rounding.
# Without borders they differ. The paper trained without (its stack had no such mask).

# %%
model = Llama.from_pretrained(BASE)
batch, _, docs = stack([rows[i]], "cpu")
begin, end = docs.tolist()[1:3]
with torch.no_grad():
    in_row, _ = model(batch, docs=docs if doc_mask else None)
    alone, _ = model(batch[:, begin:end])
moved = (in_row[:, begin:end] - alone).abs().max().item()
print(f"the second problem's logits in its row and alone differ by up to {moved:.1g}")
assert moved < 1e-3 if doc_mask else moved > 1

# %% [markdown]
# ## The picture
# Grey is read, blue is learned, yellow is padding. A line is a boundary.

# %%
figure, ax = plt.subplots(figsize=(6.5, 0.9 + 0.18 * len(rows)))
looks = {"only read": "#BBBBBB", "learned": "#0072B2", "padding": "#FCE8A6"}
for y in range(len(rows)):
    ids, row_targets, starts = rows[y]
    colours = np.where(np.append(IGNORE, row_targets[:-1]) == IGNORE, "only read", "learned")
    last = starts[-1] if len(starts) else seq_len
    if (ids[last:] == tok.eos_id).all():
        colours[last:] = "padding"
    for name, colour in looks.items():
        spans = [(x, 1) for x in np.flatnonzero(colours == name)]
        ax.broken_barh(spans, (y - 0.4, 0.8), color=colour, label=name if y == 0 else None)
    ax.vlines(starts, y - 0.45, y + 0.45, color="black", lw=1)
ax.set_xlim(0, seq_len)
ax.invert_yaxis()
ax.grid(False)
ax.set_xlabel("position in the row, tokens")
ax.set_ylabel("row")
ax.set_title(f"{problems} problems in {len(rows)} rows: {padding:.0%} padding")
ax.legend(ncols=3, loc="upper left", bbox_to_anchor=(0, -0.2), handlelength=1)
show(figure, out_dir, "1_rows")

# %% [markdown]
# ## Questions
# Each is answered by changing a knob and reading what the lesson prints.
#
# 1. `packing = 'none'`: how many rows is an epoch now, and how much of it is padding?
# 2. `train_on_prompt = True`: which share of the tokens is learned now? What would the model learn
#    from them that it does not learn from answers?
# 3. `doc_mask = False`: how far do the logits of the second problem move?
