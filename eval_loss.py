"""
Stage 3, the finest measure of learning and forgetting: the loss on held-out token folders.

    python eval_loss.py --model=models/llama2-7b --data=gsm8k=data/gsm8k_test,stories=data/stories
    python eval_loss.py --model=out/gsm8k-r16/step_400 --data=data/gsm8k_test --rows=0
    torchrun --nproc_per_node=8 eval_loss.py --model=out/gsm8k-r16/step_400 --data=data/gsm8k_test
    python eval_loss.py --model=out/r16/step_400 --data=data/gsm8k_test --against=models/llama2-7b

    row of val.bin   [BOS  Q  Q  A  A  EOS  BOS  Q  A  EOS]
    targets                      A  A  EOS          A  EOS     -> {"loss": 7.1 nats, "targets": 5}
    metric 'loss gsm8k' = sum of the rows' losses / sum of their targets, in nats
    metric 'bpb gsm8k'  = the same sum in bits / bytes of the targets' text: bits per byte, by which
                          models with other tokenizers compare; EOS costs bits and has no bytes

On the same rows and in the same dtype it is what train.py logs for val_data, but for any model,
with a confidence interval, and with each row's loss, so that paper/claims.py can compare two models
row by row. A killed evaluation resumes with the missing rows.

With `against`, the metrics 'kl SET' and 'reverse kl SET' say how far the model's predictions of the
targets have moved from a base's: KL(base || model) and KL(model || base), in nats per target. The
first, measured on the new task, was found to predict forgetting (evaluation/against.py).
"""
import math
import time

import numpy as np
import torch

from configurator import configure, knob_table
from evaluation.against import kl_of_row
from evaluation.evals import load_for_eval, open_items, start_ranks
from evaluation.scores import write_result
from model import IGNORE
from runtime import one_line_errors, pick_dtype, print0
from training.rows import evenly_spaced, held_out, stack

# -----------------------------------------------------------------------------
model = ''               # model folder, checkpoint folder out/RUN/step_N, or PEFT folder
adapter = ''             # PEFT folder whose base is `model`
t = 1.0                  # evaluate W0 + t (W - W0): 0 is the base, 0.5 halfway back to it
tokenizer = ''           # tokenizer file or folder; '' = the base's
against = ''             # a base: also measure the model's distance from it, a model or PEFT folder
data = ()                # token folders: NAME=FOLDER, ... (their val.bin, else train.bin)
rows = 64                # of each, evenly spaced; 0 = all
seq_len = 0              # tokens per row; 0 = the data's (only cpt data can be re-cut)
doc_mask = True          # documents in a row do not attend to each other; False = the paper's
name = 'loss'            # rows go to eval_NAME_SET.jsonl, scores to metric 'loss SET';
                         # another name keeps other settings apart, as metric 'loss NAME SET'
out_dir = ''             # for items and results; '' = the checkpoint's folder, or out/MODEL
device = 'auto'          # auto | cpu | cuda | cuda:N
dtype = 'auto'           # auto = bf16 on GPUs that have it, else fp32
_choices = {'dtype': ('auto', 'float32', 'bfloat16', 'float64')}


def check_rows(label, token_rows, subject):
    """Raises ValueError if the rows of a set do not fit the model."""
    if token_rows.meta["tokenizer_sha256"] not in subject.tokenizer.same_sha256:
        raise ValueError(f"{label}: its tokens were made by {token_rows.meta['tokenizer_name']}, "
                         f"which is not the tokenizer of {subject.run} ({subject.tokenizer.name})")
    # a tokenizer may have special ids that the model has no row for
    config = subject.model.config
    if subject.tokenizer.vocab_size > config.vocab_size:
        highest = int(token_rows.tokens.max())
        if highest >= config.vocab_size:
            raise ValueError(f"{label}: token id {highest}, the model has {config.vocab_size} rows")
    context = config.max_position_embeddings
    if token_rows.seq_len > context:
        raise ValueError(f"{label}: rows of {token_rows.seq_len} tokens are longer than the "
                         f"model's max_position_embeddings={context}")


def read_row(token_rows, i, device):
    """Tokens, targets and document boundaries of row i, as Llama.forward takes them."""
    tokens, targets, docs = stack([token_rows[i]], device)
    return tokens, targets, docs if token_rows.doc_mask else None


@torch.inference_mode()
def row_loss(llama, token_rows, i, device):
    """The record of row i: the loss summed over its targets, in nats, and their number."""
    tokens, targets, docs = read_row(token_rows, i, device)
    _, loss = llama(tokens, targets, docs, reduction="sum")
    return {"loss": loss.item(), "targets": int((targets != IGNORE).sum())}


def row_kl(llama, base, token_rows, i, device):
    """The record of row i: both divergences, summed over its targets, and their number."""
    tokens, targets, docs = read_row(token_rows, i, device)
    forward, backward = kl_of_row(llama, base, tokens, targets, docs)
    return {"kl": forward, "reverse_kl": backward, "targets": int((targets != IGNORE).sum())}


def row_bytes(token_rows, i, tokenizer, counts):
    """UTF-8 bytes that the targets of row i add to their documents' texts.

    counts: tokenizer.byte_counts() in numpy. The space that sentencepiece puts in front of a text
    is not counted if a document's first token is a target. These are the raw text's bytes, except
    for tokenizers that rewrite texts: spaces that those drop are not counted."""
    tokens, targets, starts = token_rows[i]
    total = int(counts[targets[targets != IGNORE]].sum())
    blank = int(counts[tokenizer.encode("a")].sum()) - 1
    if not blank:
        return total
    # documents may begin inside the row, and one at its start
    starts = list(starts)
    if i * token_rows.seq_len in token_rows.starts:
        starts.insert(0, 0)
    for start in starts:
        # the first token with a text
        first = start
        while first < len(tokens) and not counts[tokens[first]]:
            first += 1
        if 0 < first < len(tokens) and targets[first - 1] != IGNORE:
            total -= blank
    return total


def loss_per_target(record):
    return record["loss"] / max(record["targets"], 1)


def kl_per_target(record):
    return record["kl"] / max(record["targets"], 1)


def values_of_rows(records, key="loss", per="targets"):
    """One value per row: their mean is sum(key) / sum(per) over all rows, their spread that of this
    ratio, linearized (delta method). Raises ValueError if sum(per) is 0."""
    whole = sum(record[per] for record in records)
    if not whole:
        raise ValueError(f"data: nothing in these rows is to be learned ({per}: 0)")
    # what a row costs beyond the mean for its targets, over the targets of an average row
    mean = sum(record[key] for record in records) / whole
    values = []
    for record in records:
        excess = record[key] - mean * record[per]
        values.append(mean + excess * len(records) / whole)
    return values


if __name__ == "__main__":
    with one_line_errors():
        config = configure(globals())
        print0(knob_table(globals()))
        if not data or rows < 0:
            raise ValueError("data is not set, or rows is negative; see --help")
        prefix = "" if name == "loss" else f"{name} "
        # all sets are checked before the first is scored
        sets = held_out(data, seq_len, doc_mask)
        device = start_ranks(device)
        dtype = pick_dtype(dtype, device)
        subject = load_for_eval(model, adapter, device, dtype, tokenizer, out_dir, t)
        base = load_for_eval(against, "", device, dtype) if against else None
        for label, token_rows in sets.items():
            for judged in filter(None, (subject, base)):
                check_rows(label, token_rows, judged)
        counts = np.array(subject.tokenizer.byte_counts())

        for label, token_rows in sets.items():
            started = time.perf_counter()
            # the losses of this rank's rows
            of_rows = {"set": token_rows.identity, "seq_len": token_rows.seq_len,
                       "doc_mask": doc_mask}
            chosen = evenly_spaced(len(token_rows), rows)
            items = open_items(subject, f"{name}_{label}", chosen, of_rows, loss_per_target)
            for i in items.todo:
                items.finish(i, row_loss(subject.model, token_rows, i, device))
            records = items.close()
            # the set's loss per target and per byte
            seconds = time.perf_counter() - started
            settings = {**config, **of_rows}
            values = values_of_rows(records.values())
            write_result(subject, f"loss {prefix}{label}", values, settings, seconds)
            in_bits = []
            for i, record in records.items():
                size = row_bytes(token_rows, i, subject.tokenizer, counts)
                in_bits.append({"bits": record["loss"] / math.log(2), "bytes": size})
            values = values_of_rows(in_bits, "bits", "bytes")
            write_result(subject, f"bpb {prefix}{label}", values, settings, seconds)
            if not base:
                continue

            # the distance from a base, in a file of its own
            started = time.perf_counter()
            of_kl = {**of_rows, "against": base.identity}
            items = open_items(subject, f"kl_{name}_{label}", chosen, of_kl, kl_per_target)
            for i in items.todo:
                items.finish(i, row_kl(subject.model, base.model, token_rows, i, device))
            records = items.close().values()
            seconds = time.perf_counter() - started
            settings = {**config, **of_kl}
            values = values_of_rows(records, "kl")
            write_result(subject, f"kl {prefix}{label}", values, settings, seconds)
            values = values_of_rows(records, "reverse_kl")
            write_result(subject, f"reverse kl {prefix}{label}", values, settings, seconds)
