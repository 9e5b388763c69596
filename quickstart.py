"""
Quickstart: the paper's comparison in small. In ten minutes on two CPU cores it pretrains a tiny Llama on one domain
(the Python source that every installation carries), finetunes it on another (word problems in GSM8K's form) in full
and with LoRA, and tells what each learned and what it forgot.

    python quickstart.py
    python quickstart.py --lora_ranks=64              # one more row: what is there already is not made again

Every step is a command of this codebase, printed before it runs: the same ones, with other folders, do the 7B study.
A run that was stopped goes on where it stood when the script is started again.
"""
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import sentencepiece
from safetensors import safe_open

from configurator import configure
from prepare_data import pystdlib
from runtime import one_line_errors

# -----------------------------------------------------------------------------
# where
data_dir = 'data/quickstart'
out_dir = 'out/quickstart'
# the tokenizer and the model, made from nothing
vocab_size = 1024
hidden_size = 128
intermediate_size = 384
layers = 4
heads = 4
kv_heads = 2
seq_len = 256
# pretraining on the source domain
base_steps = 1000
base_learning_rate = 3e-3
# finetuning on the target domain
toy_records = 10000          # word problems to make; 5% are held out
finetune_steps = 150
full_learning_rate = 1e-3
lora_learning_rate = 5e-3
lora_ranks = (4, 16)
# all of them
batch = 8                    # rows a step
eval_rows = 200              # rows of each held-out set that a loss is the mean of

_free = {'data_dir', 'out_dir', 'lora_ranks'}  # may differ when the script is started again on the same folders
_here = Path(__file__).parent


# ----------------------------------------------------------------------------- steps
def run(script, **knobs):
    """Print and run `python script --knob=value ...`; ends this script where that one fails or is stopped."""
    argv = [os.path.relpath(_here / script), *(f"--{name}={value}" for name, value in knobs.items())]
    print("\n$ python", shlex.join(argv), flush=True)
    process = subprocess.Popen([sys.executable, *argv])
    try:
        status = process.wait()
    except KeyboardInterrupt:  # the script got it too, and may be saving a checkpoint
        status = process.wait() or 130
    if status:
        raise SystemExit(status)


def remember_knobs(folder, config):
    """Store what the folder is made with; ValueError if that was something else the last time."""
    path, kept = Path(folder) / "quickstart.json", {k: v for k, v in config.items() if k not in _free}
    before = json.loads(path.read_text()) if path.exists() else kept
    if changed := [k for k in kept if before.get(k) != kept[k]]:
        raise ValueError(f"{folder} was made with " + ", ".join(f"{k}={before.get(k)}, not {kept[k]}" for k in changed) +
                         "; delete it, or choose another data_dir and out_dir")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(kept, indent=1))


def make_shape(folder):
    """Write the folder that pretraining starts from: a tokenizer as Llama-2's, only smaller, and a config.json."""
    print(f"\n{folder}: a tokenizer of {vocab_size} pieces, trained on the source domain, and the model's shape")
    folder.mkdir(parents=True, exist_ok=True)
    lines = [line for record in pystdlib() for line in record["text"].split("\n") if line.strip()]
    with open(folder / "tokenizer.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines[::4]), model_writer=file, vocab_size=vocab_size, model_type="bpe",
            byte_fallback=True, split_digits=True, allow_whitespace_only_pieces=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2)
    shape = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab_size,
             "hidden_size": hidden_size, "intermediate_size": intermediate_size, "num_hidden_layers": layers,
             "num_attention_heads": heads, "num_key_value_heads": kv_heads, "max_position_embeddings": seq_len,
             "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(shape, indent=1))  # last: with it the folder is complete


def prepare(folder, **knobs):
    """Make a token folder, if it is not there."""
    if not (folder / "meta.json").exists():
        run("prepare_data.py", out_dir=folder, seq_len=seq_len, **knobs)


def train(folder, steps, **knobs):
    """Train, unless that is done; returns the folder of the last checkpoint."""
    last = folder / f"step_{steps}"
    if not last.exists():
        if any(folder.glob("step_*/state/state.json")):
            knobs["resume"] = True
        elif folder.exists():
            shutil.rmtree(folder)  # it was killed before its first checkpoint
        run("train.py", out_dir=folder, max_steps=steps, global_batch=batch, microbatch=batch, eval_rows=eval_rows,
            log_interval=25, save_interval=250, keep_last=1, optimizer="adamw", **knobs)
    if not last.exists():
        raise SystemExit(f"\nstopped; `python quickstart.py` goes on from the newest checkpoint of {folder}")
    return last


# ----------------------------------------------------------------------------- results
def read_log(folder):
    """Losses before and after, and seconds spent in training steps, from a run's log.jsonl."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    losses = [line["val"] for line in lines if "val" in line]
    steps = [(0, 0), *((line["step"], line["seconds"]) for line in lines if "seconds" in line)]
    seconds = sum(mean * (step - before) for (before, _), (step, mean) in zip(steps, steps[1:]))
    return {"before": losses[0], "after": losses[-1], "seconds": seconds}


def count_parameters(folder):
    """Numbers in the safetensors of a checkpoint: of a model all weights, of an adapter those of LoRA."""
    count = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())
    return count


def table(rows):
    """Rows (name, result of read_log, trainable parameters) as text; the first one is pretraining."""
    lines = [f"{'':14}{'target loss':>18}{'learned':>9}{'source loss':>18}{'forgot':>9}{'trainable':>12}{'seconds':>9}"]
    for name, result, count in rows:
        change = {}
        for domain in ("target", "source"):
            before, after = result["before"].get(domain), result["after"].get(domain)
            change[domain] = f"{before:9.3f} -> {after:5.3f}" if result is not rows[0][1] else f"{after:18.3f}"
        lines.append(name)
    return "\n".join(lines)
