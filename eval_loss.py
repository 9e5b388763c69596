"""
Stage 3, learning and forgetting at the finest: the loss of a model on held-out token folders.

    python eval_loss.py --model=models/llama2-7b --data=gsm8k=data/gsm8k_test,stories=data/stories
    python eval_loss.py --model=out/gsm8k-r16/step_400 --data=data/gsm8k_test --rows=0
    torchrun --nproc_per_node=8 eval_loss.py --model=out/gsm8k-r16/step_400 --data=data/gsm8k_test

    row of val.bin   [BOS  Q  Q  A  A  EOS  BOS  Q  A  EOS]
    targets                      A  A  EOS          A  EOS     -> {"loss": 7.1 nats, "targets": 5}
    metric 'loss gsm8k' = sum of the rows' losses / sum of their targets

Over the same rows and in the same dtype it is what train.py logs for its val_data; but of any
model, with an interval, and with each row's loss, so that paper/claims.py can compare two models
row by row. A killed evaluation resumes with the rows it lacks.
"""
import time

import torch

from configurator import configure, knob_table
from evaluation.evals import load_for_eval, open_items, start_ranks
from evaluation.scores import write_result
from model import IGNORE
from runtime import one_line_errors, pick_dtype, print0
from training.rows import evenly_spaced, held_out, stack

# -----------------------------------------------------------------------------
model = ''               # model folder, checkpoint folder out/RUN/step_N, or PEFT folder
adapter = ''             # PEFT folder whose base is `model`
tokenizer = ''           # tokenizer file or folder; '' = the base's
data = ()                # token folders: NAME=FOLDER, ... (their val.bin, else train.bin)
rows = 64                # of each, evenly spaced; 0 = all
seq_len = 0              # tokens a row; 0 = the data's (only cpt data can be cut otherwise)
doc_mask = True          # documents in a row do not see each other; False = the paper's
name = 'loss'            # rows go to eval_NAME_SET.jsonl, scores to metric 'loss SET';
                         # another name keeps other settings apart, as metric 'loss NAME SET'
out_dir = ''             # for items and results; '' = the checkpoint's folder, or out/MODEL
device = 'auto'          # auto | cpu | cuda | cuda:N
dtype = 'auto'           # auto = bf16 on GPUs that have it, else fp32
_choices = {'dtype': ('auto', 'float32', 'bfloat16', 'float64')}


def check_rows(label, token_rows, subject):
    """Raises ValueError where the rows of a set are not for the model."""
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


@torch.inference_mode()
def row_loss(llama, token_rows, i, device):
    """The record of row i: the sum over its targets in nats, and how many they are."""
    tokens, targets, docs = stack([token_rows[i]], device)
    if not token_rows.doc_mask:
        docs = None
    _, loss = llama(tokens, targets, docs, reduction="sum")
    return {"loss": loss.item(), "targets": int((targets != IGNORE).sum())}


def loss_per_target(record):
    return record["loss"] / max(record["targets"], 1)


def values_of_rows(records):
    """One value a row, such that their mean is the loss a target over all rows, and their spread
    that of this ratio of sums (linearised). Raises ValueError without targets."""
    targets = sum(record["targets"] for record in records)
    if not targets:
        raise ValueError("data: nothing in these rows is to be learned")
    # what a row costs beyond the mean for its targets, over the targets of an average row
    mean = sum(record["loss"] for record in records) / targets
    values = []
    for record in records:
        excess = record["loss"] - mean * record["targets"]
        values.append(mean + excess * len(records) / targets)
    return values


if __name__ == "__main__":
    with one_line_errors():
        config = configure(globals())
        print0(knob_table(globals()))
        if not data or rows < 0:
            raise ValueError("data is not set, or rows is negative; see --help")
        # all sets are checked before the first is scored
        sets = held_out(data, seq_len, doc_mask)
        device = start_ranks(device)
        dtype = pick_dtype(dtype, device)
        subject = load_for_eval(model, adapter, device, dtype, tokenizer, out_dir)
        for label, token_rows in sets.items():
            check_rows(label, token_rows, subject)

        for label, token_rows in sets.items():
            started = time.perf_counter()
            # the losses of this rank's rows
            settings = {"set": token_rows.sha256, "seq_len": token_rows.seq_len,
                        "doc_mask": doc_mask}
            chosen = evenly_spaced(len(token_rows), rows)
            items = open_items(subject, f"{name}_{label}", chosen, settings, loss_per_target)
            for i in items.todo:
                items.finish(i, row_loss(subject.model, token_rows, i, device))
            records = items.close()
            # one number for the set
            metric = f"loss {label}" if name == "loss" else f"loss {name} {label}"
            values = values_of_rows(records.values())
            seconds = time.perf_counter() - started
            write_result(subject, metric, values, {**config, **settings}, seconds)
