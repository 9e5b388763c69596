"""
Quickstart: the paper's comparison in small. In under ten minutes on two CPU cores it pretrains a tiny Llama on one
domain (the Python source that every installation carries), finetunes it on another (word problems in GSM8K's form) in
full and with LoRA, and tells what each learned and what it forgot.

    python quickstart.py
    python quickstart.py --lora_ranks=1,64            # two rows more: what is there already is not made again

Every step is a command of this codebase, printed before it runs: the same ones, with other folders, do the 7B study.
When it was stopped, the same command goes on where it stood.
"""
import json
import math
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tokenize
from itertools import islice
from pathlib import Path

import sentencepiece
from safetensors import safe_open

from configurator import configure
from runtime import one_line_errors

# -----------------------------------------------------------------------------
# where
data_dir = 'data/quickstart'
out_dir = 'out/quickstart'
# source domain: Python, and a few word problems without GSM8K's notation, for Llama had read such things as well
max_records = 0              # read at most so many documents of each; 0 = all
source_problems = 2000
# target domain
target_problems = 10000      # 5% of them are held out
# model and tokenizer, made from nothing
vocab_size = 1024
hidden_size = 128
intermediate_size = 384
layers = 4
heads = 4
kv_heads = 2
seq_len = 256
# pretraining, with AdamW
base_steps = 1000
base_batch = 8               # rows a step
base_learning_rate = 3e-3
# finetuning, with Lion as in the paper
steps = 600
batch = 2
full_learning_rate = 1e-4
gentle_learning_rate = 5e-5  # full finetuning once more, to compare LoRA with a run that learns as much as it
lora_learning_rate = 3e-4
lora_ranks = (16, 4)
eval_rows = 100              # held-out rows of each domain that a loss is the mean of

_free = {'data_dir', 'out_dir', 'lora_ranks'}  # may differ when the script is started again on the same folders


# ----------------------------------------------------------------------------- the two domains
def toy_math(count, seed):
    """Yield `count` word problems in GSM8K's form, {"question", "answer"}: 1 to 3 steps, each with its
    <<expression=value>>, then '#### value'. A pure function of (count, seed)."""
    rng = random.Random(seed)
    names = "Ava Ben Chloe Dan Ella Finn Grace Hugo Iris Jack Kira Leo Mia Noah".split()
    things = "apples marbles stickers shells books coins pencils cookies stamps buttons".split()
    events = {"+": ("{friend} gives {name} {b} more.", "{name} buys {b} more.", "In the garden {name} finds {b} more."),
              "-": ("{name} gives {b} of them to {friend}.", "{b} of them get lost.", "{name} sells {b} of them."),
              "*": ("A week later {name} has {b} times as many.", "A machine turns each of them into {b}."),
              "/": ("{name} makes {b} equal piles and keeps one.", "{name} keeps one of {b} equal shares.")}
    for _ in range(count):
        name, friend = rng.sample(names, 2)
        thing, total, answer = rng.choice(things), rng.randint(4, 60), []
        question = [f"{name} {rng.choice(['has', 'picks up', 'starts with'])} {total} {thing}."]
        for _ in range(rng.randint(1, 3)):
            divisors = [d for d in range(2, 10) if total % d == 0]
            op = rng.choice("++" + "--" * (total > 1) + "*" * (total <= 60) + "/" * bool(divisors))
            b = rng.choice({"+": range(2, 31), "-": range(1, total), "*": range(2, 5), "/": divisors}[op])
            value = {"+": total + b, "-": total - b, "*": total * b, "/": total // b}[op]
            question.append(rng.choice(events[op]).format(name=name, friend=friend, b=b))
            answer.append(f"{rng.choice(['That makes', 'Now there are', f'{name} then has'])} "
                          f"{total} {op} {b} = <<{total}{op}{b}={value}>>{value} {thing}.")
            total = value
        question.append(f"How many {thing} does {name} have {rng.choice(['now', 'in the end', 'after that'])}?")
        yield {"question": " ".join(question), "answer": "\n".join(answer + [f"#### {total}"])}


def pystdlib():
    """Yield the modules of the running Python's standard library, {"path", "text"}, by path; without tests, bundled
    applications, tables, and the one module that differs between machines."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "encodings", "pydoc_data"}
    for path in sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py")):
        if not left_out & {*path.split("/")} and "_sysconfigdata" not in path:
            with tokenize.open(root / path) as file:
                yield {"path": path, "text": file.read()}


def write_jsonl(path, records):
    """The path of a file of records, which it makes."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# ----------------------------------------------------------------------------- steps
def run(script, **knobs):
    """Print and run `python script --knob=value ...`; ends this script where that one fails."""
    argv = [os.path.relpath(Path(__file__).parent / script), *(f"--{name}={value}" for name, value in knobs.items())]
    print("\n$ python", shlex.join(argv), flush=True)
    process = subprocess.Popen([sys.executable, *argv])
    try:
        status = process.wait()
    except KeyboardInterrupt:  # the script got it too, and is saving a checkpoint
        status = process.wait() or 130
    if status:
        raise SystemExit(status)


def remember_knobs(folder, config):
    """Store what a folder is made with; ValueError if that was something else the last time."""
    path, kept = Path(folder, "quickstart.json"), {name: value for name, value in config.items() if name not in _free}
    before = json.loads(path.read_text()) if path.exists() else kept
    if changed := [f"{name}={before.get(name)}, not {kept[name]}" for name in kept if before.get(name) != kept[name]]:
        raise ValueError(f"{folder} was made with {', '.join(changed)}; delete it, or choose other folders")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(kept, indent=1))


def make_shape(folder):
    """What pretraining starts from: a tokenizer as Llama-2's, only smaller, and a config.json, but no weights."""
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    lines = [line for record in islice(pystdlib(), max_records or None) for line in record["text"].split("\n")]
    try:
        with open(folder / "tokenizer.model", "wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines[::4]), model_writer=file, vocab_size=vocab_size, model_type="bpe",
                byte_fallback=True, split_digits=True, allow_whitespace_only_pieces=True,
                normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2)
    except RuntimeError as error:
        raise ValueError(f"vocab_size={vocab_size}: {error}") from None
    shape = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab_size,
             "hidden_size": hidden_size, "intermediate_size": intermediate_size, "num_hidden_layers": layers,
             "num_attention_heads": heads, "num_key_value_heads": kv_heads, "max_position_embeddings": seq_len,
             "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(shape, indent=1))  # last: with it the folder is complete
    print(f"\n{folder}: config.json, and a tokenizer.model of {vocab_size} pieces, trained on the source domain")


def prepare(folder, **knobs):
    """Make a token folder, unless it is there."""
    if not (folder / "meta.json").exists():
        run("prepare_data.py", out_dir=folder, seq_len=seq_len, **knobs)


def train(folder, max_steps, **knobs):
    """Train, unless that is done, or go on from the newest checkpoint; returns the last one."""
    last = folder / f"step_{max_steps}"
    if not last.exists():
        if any(folder.glob("step_*/state/state.json")):
            knobs["resume"] = True
        elif folder.exists():
            shutil.rmtree(folder)  # killed before its first checkpoint
        run("train.py", out_dir=folder, max_steps=max_steps, eval_rows=eval_rows, log_interval=50, save_interval=200,
            keep_last=1, **knobs)
    if not last.exists():
        raise SystemExit(f"\n{folder} was stopped; the same command goes on from its newest checkpoint")
    return last


# ----------------------------------------------------------------------------- results
def read_log(folder):
    """{domain: (loss before, loss after)}, and the seconds spent in training steps, from a run's log.jsonl."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    losses = [line["val"] for line in lines if "val" in line]
    trained = [line for line in lines if "seconds" in line]  # each the mean over the steps since the one before
    steps = [line["step"] - before["step"] for before, line in zip([{"step": 0}, *trained], trained)]
    seconds = sum(line["seconds"] * n for line, n in zip(trained, steps))
    return {name: (losses[0][name], losses[-1][name]) for name in losses[0]}, seconds


def count_parameters(folder):
    """Numbers in the weights of a checkpoint: those of the model, or those of its adapter."""
    count = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())
    return count


def compare(verb, full, loras):
    """One sentence about the changes of loss, {rank: nats}, of LoRA beside that of full finetuning."""
    shares = ", ".join(f"LoRA r={rank} {change:.3f}" + (f" ({change / full:.0%})" if full > 0 else "")
                       for rank, change in loras.items())
    less = [f"r={rank}" for rank, change in loras.items() if change < full]
    verdict = (f"LoRA {verb} less than full finetuning, as in the paper" if len(less) == len(loras) else
               f"LoRA {verb} less than full finetuning only at {', '.join(less)}" if less else
               f"LoRA did not {verb.replace('learned', 'learn').replace('forgot', 'forget')} less than full finetuning "
               "in this run, unlike the paper")
    by_rank = [loras[rank] for rank in sorted(loras)]
    if len(by_rank) > 1:
        verdict += ", and the less the lower its rank" if by_rank == sorted(by_rank) else "; not in the order of rank"
    return f"{verb.capitalize()} (nats a token): full {full:.3f}, {shares}. {verdict}."


def compare_at_equal_learning(learned, forgot):
    """One sentence about the LoRA run that learned most nearly as much as the gentle full one; both {run: nats}."""
    loras = [name for name in learned if name.startswith("lora")]
    near = min(loras, key=lambda name: abs(learned[name] - learned["gentle"]))
    text = (f"At equal learning: full at the gentle learning rate learned {learned['gentle']:.3f} and forgot "
            f"{forgot['gentle']:.3f}; nearest is {near}, which learned {learned[near]:.3f} and forgot {forgot[near]:.3f}. ")
    if abs(learned[near] - learned["gentle"]) > 0.05 * abs(learned["gentle"]):
        return text + "They learned too unequally to be compared."
    return text + ("So low rank kept more of the source than a smaller learning rate did." if forgot[near] < forgot["gentle"]
                   else "So a smaller learning rate kept as much of the source as low rank did, or more.")


# ----------------------------------------------------------------------------- the whole
if __name__ == "__main__":
    with one_line_errors():
        config = configure(globals())
        if not lora_ranks or min(lora_ranks) < 1:
            raise ValueError(f"lora_ranks: expected ranks from 1 up, such as 16,4; found {lora_ranks}")
        data, out = Path(data_dir), Path(out_dir)
        for folder in (data, out):
            remember_knobs(folder, config)

        # 1: a model without weights, and the tokens of both domains
        shape = out / "shape"
        make_shape(shape)
        python = write_jsonl(data / "python.jsonl", islice(pystdlib(), max_records or None))
        problems = write_jsonl(data / "problems.jsonl", (
            {"text": record["question"] + " " + re.sub(r"<<.*?>>|\n####.*", "", record["answer"])}
            for record in toy_math(source_problems, seed=2)))
        target = write_jsonl(data / "target.jsonl", toy_math(target_problems, seed=1))
        prepare(data / "source", source=python, tokenizer=shape)
        prepare(data / "pretrain", source=f"{python},{problems}", tokenizer=shape, max_records=max_records)
        prepare(data / "target", source=target, tokenizer=shape, kind="ift",
                template="Question: {question}\\nAnswer:", response_field="answer")

        # 2: the base
        both = f"source={data / 'source'},target={data / 'target'}"
        base = train(out / "base", base_steps, base=shape, scratch=True, data=data / "pretrain", val_data=both,
                     global_batch=base_batch, microbatch=base_batch, optimizer="adamw",
                     learning_rate=base_learning_rate)

        # 3: finetuning, with everything but the learning rate and LoRA the same
        runs = {"base": base}
        kinds = [("full", full_learning_rate, {}), ("gentle", gentle_learning_rate, {}),
                 *((f"lora-r{rank}", lora_learning_rate, {"lora_rank": rank}) for rank in lora_ranks)]
        for name, rate, knobs in kinds:
            runs[name] = train(out / name, steps, base=base, data=data / "target", val_data=both, global_batch=batch,
                               microbatch=batch, optimizer="lionw", learning_rate=rate, **knobs)

        # 4: what came of it
        print(f"\nHeld-out loss, nats a token, before -> after:\n{'':10}{'target':>16}{'learned':>9}{'source':>19}"
              f"{'forgot':>8}{'trained':>11}{'seconds':>9}")
        learned, forgot = {}, {}
        for name, last in runs.items():
            losses, seconds = read_log(last.parent)
            (target, target_after), (source, source_after) = losses["target"], losses["source"]
            learned[name], forgot[name] = target - target_after, source_after - source
            changes = ("", "") if name == "base" else (f"{learned[name]:.3f}", f"{forgot[name]:.3f}")
            print(f"{name:10}{target:7.3f} -> {target_after:5.3f}{changes[0]:>9}{source:10.3f} -> {source_after:5.3f}"
                  f"{changes[1]:>8}{count_parameters(last):11,}{seconds:9.0f}")
        for verb, changes in (("learned", learned), ("forgot", forgot)):
            print("\n" + compare(verb, changes["full"], {rank: changes[f"lora-r{rank}"] for rank in lora_ranks}))
        print("\n" + compare_at_equal_learning(learned, forgot))
        prompt = "Question: Ava has 12 books. Ben gives Ava 5 more. How many books does Ava have now?\\nAnswer:"
        print(f"\nRead what they write:\n$ python {os.path.relpath(Path(__file__).parent / 'sample.py')} --model={base} "
              f"--adapter={runs[name]} --max_new_tokens={seq_len // 2} --prompt='{prompt}'")
