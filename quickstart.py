r"""
Quickstart: the paper in small. In under ten minutes on two CPU cores it pretrains a tiny Llama on one domain (the Python
source that every installation carries), finetunes it on another (word problems in GSM8K's form) in full and with LoRA at
three ranks, for two durations, asks what each learned and forgot, and draws it as one picture.

    python quickstart.py
    python quickstart.py --lora_ranks=1,4,16,64            # what is there already is not made again
    for s in 1 2 3 4 5; do python quickstart.py --claims=True --seed=$s --out_dir=out/claims/$s; done; python -m paper.claims \
        --runs='out/claims/*/*' --learning='loss target' --forgetting='loss source'     # over an hour: each claim, with intervals

Every step is a command of this codebase, printed before it runs: the same ones, with other folders, do the 7B study. The
list of runs that it writes, OUT_DIR/runs.py, is what paper/study.py takes. When it was stopped, the same command goes on.
"""
import json
import os
import random
import re
import shlex
import subprocess
import sys
import sysconfig
import tokenize
from itertools import islice
from pathlib import Path

import sentencepiece

from paper.claims import Change, spared
from configurator import configure
from paper.results import read_run
from runtime import ROOT, one_line_errors, script_words

# -----------------------------------------------------------------------------
# where
data_dir = 'data/quickstart'
out_dir = 'out/quickstart'
# source domain: Python, and a few word problems without GSM8K's notation, for Llama had read such things as well
max_modules = 0              # read at most so many modules; 0 = all. One in 20 is held out
source_problems = 2000
# target domain
target_problems = 9500
held_out_problems = 500
# model and tokenizer, made from nothing
vocab_size = 1024
hidden_size = 128
intermediate_size = 384
layers = 4
heads = 4
kv_heads = 2
seq_len = 256
# pretraining, with AdamW
base_steps = 700
base_batch = 8               # rows a step
base_learning_rate = 3e-3
# finetuning, with Lion as in the paper
steps = (150, 450)           # durations, each a run with its own schedule
batch = 2
full_learning_rate = 4e-4    # best of those in config/quickstart_rates.py by loss on the target, as the paper chose its own
lora_learning_rate = 4e-3    # / sqrt(rank): likewise
lora_ranks = (1, 4, 16)      # of a width of 128, as 32, 128 and 512 of Llama-2-7B's 4096
# what is measured
eval_rows = 100              # held-out rows of each domain that a loss is the mean of
choice_items = 400           # lines of held-out Python, whose end is to be told from three others
solve_items = 100            # held-out word problems to solve
seed = 1337                  # of weights, rows and dropout, not of the data
claims = False               # in place of the evaluations: the further runs that paper/claims.py asks for
_free = {'data_dir', 'out_dir', 'lora_ranks', 'steps', 'claims'}  # may differ when it is started again on the same folders


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


def lines_to_finish(texts, count, seed=3):
    """Yield multiple choice in LLM Foundry's form, {"query", "choices", "gold"}: some lines of code up to a blank inside
    the last one, and four ways to go on from there, of which three are ends of lines elsewhere."""
    rng = random.Random(seed)
    places = []  # (lines before, beginning, end) of lines with a blank near their middle
    for text in texts:
        lines = text.split("\n")
        for i, line in enumerate(lines):
            words = line.split(" ")
            middle = len(words) - max(1, len(words) // 2)
            begin, end = " ".join(words[:middle]), " ".join(words[middle:])
            if i >= 4 and begin.strip() and 8 <= len(end) <= 40 and end == end.strip():
                places.append(("\n".join(lines[i - 4:i]), begin, end))
    rng.shuffle(places)
    for before, begin, end in places[:count]:
        others = rng.sample(sorted({e for _, _, e in places} - {end}), 3)
        gold = rng.randrange(4)
        yield {"query": f"{before}\n{begin}", "choices": others[:gold] + [end] + others[gold:], "gold": gold}


def write_jsonl(path, records):
    """The path of a file of records, which it makes."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# ----------------------------------------------------------------------------- steps
def run(script, *argv, **knobs):
    """Print and run `python script argv... --knob=value ...`; ends this script where that one fails."""
    argv = [*map(str, argv), *(f"--{k}={v}" for k, v in knobs.items())]
    words = script_words(script)
    if words[0] != "-m":
        words = [os.path.relpath(words[0])]
    print("\n$ python", shlex.join([*words, *argv]), flush=True)
    process = subprocess.Popen([sys.executable, *words, *argv], env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        status = process.wait()
    except KeyboardInterrupt:  # the script got it too, and is saving a checkpoint
        status = process.wait() or 130
    if status:
        raise SystemExit(status)


def remember_knobs(folder, config, free):
    """Store what a folder is made with, but for the knobs in `free`; ValueError if that was something else the last time."""
    path, kept = Path(folder, "quickstart.json"), {name: value for name, value in config.items() if name not in free}
    kept = json.loads(json.dumps(kept))
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
    lines = [line for record in islice(pystdlib(), max_modules or None) for line in record["text"].split("\n")]
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
        run("prepare_data.py", out_dir=folder, seq_len=seq_len, val_fraction=0, **knobs)


def pretrain(folder, **knobs):
    """The base, made unless it is there, or gone on with from its newest checkpoint."""
    last = folder / f"step_{base_steps}"
    if not last.exists():
        run("train.py", out_dir=folder, max_steps=base_steps, eval_rows=eval_rows, log_interval=50, save_interval=200,
            keep_last=1, auto_resume=True, **knobs)
    if not last.exists():
        raise SystemExit(f"\n{folder} was stopped; the same command goes on from its newest checkpoint")
    return last


# ----------------------------------------------------------------------------- the study
def both(data):
    """What is watched while training: held-out tokens of both domains."""
    return f"source={data / 'source'},target={data / 'target_test'}"


def list_of_runs(base, data):
    """The text of a config file for paper/study.py."""
    rate_of, most = (lambda rank: f"{lora_learning_rate / rank ** 0.5:.3g}"), lora_ranks[-1]
    kinds = [("full", full_learning_rate, "")] + [(f"r{rank}", rate_of(rank), f" --lora_rank={rank}") for rank in lora_ranks]
    if claims:  # the paper's regularisers (figure 4) and target modules (figure 7)
        kinds += [("full-decay", full_learning_rate, " --weight_decay=1e-4"),
                  ("full-dropout", full_learning_rate, " --attention_dropout=0.1"),
                  *((f"r{most}-{modules}", rate_of(most), f" --lora_rank={most} --lora_targets={modules}")
                    for modules in ("mlp", "attention"))]
    runs = [f"{name}-{n} --max_steps={n} --learning_rate={rate}{lora}" for n in steps for name, rate, lora in kinds]
    train = (f"--data={data / 'target'} --val_data={both(data)} --optimizer=lionw "
             f"--global_batch={batch} --microbatch={batch} --eval_rows={eval_rows} --log_interval=50 --save_interval=200 "
             f"--keep_last=1 --device=cpu --seed={seed}")
    evals = [] if claims else [
             f"eval_gsm8k.py --test_data={data / 'problems_test.jsonl'} --train_data={data / 'problems_train.jsonl'} --shots=0 "
             f"--bos=True --max_new_tokens={seq_len // 2} --limit={solve_items} --device=cpu",
             f"eval_forgetting.py --tasks=hellaswag --styles=gauntlet --hellaswag={data / 'choices.jsonl'} --device=cpu"]
    listed = "".join(f"    {text!r},\n" for text in runs)
    return (f'"""For paper/study.py: written by quickstart.py."""\nout_dir = {out_dir!r}\nbase = {str(base)!r}\nmodels = (\'base\',)\n'
            f"runs = (\n{listed})\ntrain = {train!r}\nevals = (\n" + "".join(f"    {text!r},\n" for text in evals) + ")\n"
            "spectrum = '--subspaces= --device=cpu'\n"
            "plot = (\"--figures=story --learning='loss target' --forgetting='loss source' --x=step \"\n"
            "        \"--labels='loss target=loss on new word problems,loss source=loss on held-out Python'\")\n")


def last_values(folder):
    """{metric: value} at the last step of a run or a base, its held-out losses as 'loss NAME'."""
    found = read_run(folder)
    return {metric: steps[max(found.places)][0] for metric, steps in found.metrics.items() if max(found.places) in steps}


# ----------------------------------------------------------------------------- results
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


def compare_at_equal_learning(full, loras):
    """Sentences about what full finetuning forgot by the time it had learned as much as each LoRA run.

    full: [(learned, forgot)] by duration; between durations, and before the first, a straight line is drawn."""
    sentences, known = [], lambda pair: tuple(map(Change, pair))
    for rank, (learned, forgot) in loras.items():
        if (more := spared(map(known, full), known((learned, forgot)))) is None:
            sentences.append(f"r={rank} learned {learned:.3f}, more than full finetuning ever did")
            continue
        expected = forgot + more[0]
        sentences.append(f"r={rank} learned {learned:.3f} and forgot {forgot:.3f}, where full finetuning of that learning forgot "
                         f"about {expected:.3f}: {'less' if forgot < expected else 'not less'}")
    return "At equal learning: " + "; ".join(sentences) + "."


# ----------------------------------------------------------------------------- the whole
if __name__ == "__main__":
    with one_line_errors():
        config = configure(globals())
        if not lora_ranks or min(lora_ranks) < 1 or not steps or min(steps) < 1:
            raise ValueError(f"lora_ranks and steps: expected numbers from 1 up, such as 4,16; found {lora_ranks} and {steps}")
        data, out = Path(data_dir), Path(out_dir)
        for folder, free in ((data, _free | {"seed"}), (out, _free)):
            remember_knobs(folder, config, free)

        # 1: a model without weights, the tokens of both domains, questions about the source
        shape = out / "shape"
        make_shape(shape)
        modules = list(islice(pystdlib(), max_modules or None))
        held_out = write_jsonl(data / "python_test.jsonl", modules[::20])
        write_jsonl(data / "python_train.jsonl", (module for i, module in enumerate(modules) if i % 20))
        write_jsonl(data / "solved.jsonl", ({"text": record["question"] + " " + re.sub(r"<<.*?>>|\n####.*", "", record["answer"])}
                                            for record in toy_math(source_problems, seed=2)))
        write_jsonl(data / "problems_train.jsonl", toy_math(target_problems, seed=1))
        write_jsonl(data / "problems_test.jsonl", toy_math(held_out_problems, seed=3))
        write_jsonl(data / "choices.jsonl", lines_to_finish([module["text"] for module in modules[::20]], choice_items))
        prepare(data / "pretrain", source=f"{data / 'python_train.jsonl'},{data / 'solved.jsonl'}", tokenizer=shape)
        prepare(data / "source", source=held_out, tokenizer=shape)
        for folder, name in (("target", "train"), ("target_test", "test")):
            prepare(data / folder, source=data / f"problems_{name}.jsonl", tokenizer=shape, kind="ift",
                    template="Question: {question}\\nAnswer:", response_field="answer")

        # 2: the base
        base = pretrain(out / "pretraining", base=shape, scratch=True, data=data / "pretrain", val_data=both(data),
                        global_batch=base_batch, microbatch=base_batch, optimizer="adamw", learning_rate=base_learning_rate,
                        seed=seed, device="cpu")

        # 3: finetuning, evaluations, spectra, the picture
        (out / "runs.py").write_text(list_of_runs(base, data))
        run("paper/study.py", out / "runs.py")
        if claims:
            raise SystemExit

        # 4: what came of it
        start = last_values(out / "pretraining") | last_values(out / "base")
        names = ["base", *(f"{name}-{n}" for n in steps for name in ("full", *(f"r{rank}" for rank in lora_ranks)))]
        print(f"\n{'':10}{'target loss':>12}{'learned':>9}{'solved':>8}{'source loss':>13}{'forgot':>8}{'lines finished':>16}")
        change = {}
        for name in names:
            values = start if name == "base" else last_values(out / name)
            learned, forgot = start["loss target"] - values["loss target"], values["loss source"] - start["loss source"]
            change[name] = learned, forgot
            learned, forgot = ("", "") if name == "base" else (f"{learned:.3f}", f"{forgot:.3f}")
            print(f"{name:10}{values['loss target']:12.3f}{learned:>9}{values['gsm8k_strict_match']:8.1%}"
                  f"{values['loss source']:13.3f}{forgot:>8}{values['hellaswag']:16.1%}")
        longest = max(steps)
        for verb, column in (("learned", 0), ("forgot", 1)):
            print("\n" + compare(verb, change[f"full-{longest}"][column],
                                 {rank: change[f"r{rank}-{longest}"][column] for rank in lora_ranks}))
        print("\n" + compare_at_equal_learning([change[f"full-{n}"] for n in steps],
                                               {rank: change[f"r{rank}-{longest}"] for rank in lora_ranks}))
        print(f"\nThe picture: {out / 'figures/story.png'}. Read what they write:\n$ python "
              f"{os.path.relpath(Path(__file__).parent / 'sample.py')} --model={base} "
              f"--adapter={out / f'r{lora_ranks[-1]}-{longest}' / f'step_{longest}'} --max_new_tokens={seq_len // 2} "
              "--prompt='Question: Ava has 12 books. Ben gives Ava 5 more. How many books does Ava have now?\\nAnswer:'")
