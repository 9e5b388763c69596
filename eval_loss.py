"""
Stage 3, learning and forgetting at the finest: the loss of a model on held-out token folders, row by row.

    python eval_loss.py --model=models/llama2-7b --data=gsm8k_test=data/gsm8k_test,stories=data/stories
    python eval_loss.py --model=out/gsm8k-r16/step_400 --data=data/gsm8k_test --rows=0
    torchrun --nproc_per_node=8 eval_loss.py --model=out/gsm8k-r16/step_400 --data=data/gsm8k_test

Over the same rows and in the same dtype it is train.py's val_data, nats a target, as metric 'loss NAME'; but of any model, with
an interval, and with each row's loss, so that paper/claims.py can compare two models row by row. A killed evaluation goes on.
"""
import time
from functools import partial

import torch

from configurator import configure, knob_table
from evaluation.evals import evaluate, load_for_eval, start_ranks, write_result
from model import IGNORE
from training.rows import held_out, evenly_spaced, stack
from runtime import one_line_errors, pick_dtype, print0

# -----------------------------------------------------------------------------
model = ''               # model folder, checkpoint folder out/RUN/step_N, or PEFT folder
adapter = ''             # PEFT folder whose base is `model`
tokenizer = ''           # tokenizer file or folder; '' = the base's
data = ()                # token folders of prepare_data.py: NAME=FOLDER, ... (their val.bin, else train.bin)
rows = 64                # of each, evenly spaced; 0 = all
seq_len = 0              # tokens a row; 0 = the data's (only cpt data can be cut otherwise)
doc_mask = True          # documents in a row do not see each other; False = the paper's
name = 'loss'            # rows go to eval_NAME_SET.jsonl: another name keeps other settings apart, as metric 'loss NAME SET'
out_dir = ''             # for items and results.jsonl; '' = the checkpoint's folder and its run's, or out/MODEL
device = 'auto'          # auto | cpu | cuda | cuda:N
dtype = 'auto'           # auto = bf16 on GPUs that have it, else fp32
_choices = {'dtype': ('auto', 'float32', 'bfloat16', 'float64')}


@torch.inference_mode()
def row_losses(llama, token_rows, device, ids, finish):
    """finish(i, {"loss": sum over the targets of row i in nats, "targets": how many}) for each i of ids."""
    for i in ids:
        tokens, targets, docs = stack([token_rows[i]], device)
        total = llama(tokens, targets, docs if token_rows.doc_mask else None, reduction="sum")[1].item()
        finish(i, {"loss": total, "targets": int((targets != IGNORE).sum())})


def values_of_rows(records):
    """A value a row: their mean is the loss a target over all rows, their spread that of this ratio (linearised)."""
    if not (targets := sum(record["targets"] for record in records)):
        raise ValueError("data: nothing in these rows is to be learned")
    mean = sum(record["loss"] for record in records) / targets
    return [mean + (record["loss"] - mean * record["targets"]) * len(records) / targets for record in records]


if __name__ == "__main__":
    with one_line_errors():
        config = configure(globals())
        print0(knob_table(globals()))
        if not data or rows < 0:
            raise ValueError("data is not set, or rows is negative; see --help")
        sets = held_out(data, seq_len, doc_mask)
        device = start_ranks(device)
        subject = load_for_eval(model, adapter, device, pick_dtype(dtype, device), tokenizer, out_dir)
        for label, token_rows in sets.items():
            if token_rows.meta["tokenizer_sha256"] != subject.tokenizer.sha256:
                raise ValueError(f"{label}: its tokens were made by {token_rows.meta['tokenizer_name']}, which is not the "
                                 f"tokenizer of {subject.run} ({subject.tokenizer.name})")
            if token_rows.seq_len > subject.model.config.max_position_embeddings:
                raise ValueError(f"{label}: rows of {token_rows.seq_len} tokens are longer than the model's "
                                 f"max_position_embeddings={subject.model.config.max_position_embeddings}")
        for label, token_rows in sets.items():
            started, chosen = time.perf_counter(), evenly_spaced(len(token_rows), rows)
            settings = {"set": token_rows.sha256, "seq_len": token_rows.seq_len, "doc_mask": doc_mask}
            records = evaluate(subject, f"{name}_{label}", chosen, settings,
                               partial(row_losses, subject.model, token_rows, device),
                               lambda record: record["loss"] / max(record["targets"], 1))
            metric = f"loss {label}" if name == "loss" else f"loss {name} {label}"
            write_result(subject, metric, values_of_rows(records.values()), {**config, **settings},
                         time.perf_counter() - started)
