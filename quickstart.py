r"""
Quickstart: the paper in miniature, in ten minutes on two CPU cores.

    python quickstart.py
    python quickstart.py --lora_ranks=1,4,16,64         # reuses what is there already

    Python source --> pretrain a tiny Llama --.--> full finetuning --.--> what each learned (loss
    word problems in GSM8K's form ------------+--> LoRA r=1, 4, 16 --'    on problems) and forgot

The source is Python's standard library. The paper's claims, over three seeds, in 80 core-minutes:

    for s in 1 2 3; do python quickstart.py --claims=True --seed=$s --out_dir=out/claims/$s; done
    python -m paper.claims --runs='out/claims/*/*' --learning='loss target' \
        --forgetting='loss source'

Every step is a command of this codebase, printed before it runs: the same ones, with other folders,
do the 7B study. OUT_DIR/runs.py is the list for paper/study.py. To resume, repeat the command.
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

from configurator import configure
from paper.changes import Change, spared
from paper.results import read_run
from runtime import ROOT, one_line_errors, script_words

# -----------------------------------------------------------------------------
# where
data_dir = 'data/quickstart'
out_dir = 'out/quickstart'
# source domain: Python, and some word problems without GSM8K's notation, as Llama has read such
source = ''                  # a folder of .txt and .rst files instead of Python's standard library
max_documents = 0            # read at most this many files; 0 = all. One in 20 is held out
source_problems = 2000
# target domain
target_problems = 9500
held_out_problems = 500
# model and tokenizer, from scratch
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
steps = (150, 450)           # durations, each a run with its own schedule; () = only the base
batch = 2                    # rows a step
# learning rates: the best of those in config/quickstart_rates.py by loss on the target
full_learning_rate = 4e-4
lora_learning_rate = 4e-3    # / sqrt(rank)
lora_ranks = (1, 4, 16)      # of a width of 128, as 32, 128 and 512 of Llama-2-7B's 4096
# what is measured
eval_rows = 100              # held-out rows of each domain, for the losses
choice_items = 400           # held-out lines of Python, each with its end and three others
solve_items = 100            # held-out word problems to solve
jobs = 0                     # finetuning runs at a time, each on one core; 0 = all cores
seed = 1337                  # of weights, rows and dropout, not of the data
claims = False               # also the runs that paper/claims.py needs; no lines are finished

# may differ when it is started again on the same folders
_free = {'data_dir', 'out_dir', 'lora_ranks', 'steps', 'claims', 'jobs'}
_of_runs = {'hidden_size', 'intermediate_size', 'layers', 'heads', 'kv_heads', 'base_steps',
            'base_batch', 'base_learning_rate', 'batch', 'full_learning_rate', 'eval_rows',
            'lora_learning_rate', 'solve_items', 'seed'}  # the data does not depend on them


# ----------------------------------------------------------------------------- the target domain
NAMES = "Ava Ben Chloe Dan Ella Finn Grace Hugo Iris Jack Kira Leo Mia Noah".split()
THINGS = "apples marbles stickers shells books coins pencils cookies stamps buttons".split()
EVENTS = {  # by operator
    "+": ("{friend} gives {name} {b} more.", "{name} buys {b} more.",
          "In the garden {name} finds {b} more."),
    "-": ("{name} gives {b} of them to {friend}.", "{b} of them get lost.",
          "{name} sells {b} of them."),
    "*": ("A week later {name} has {b} times as many.", "A machine turns each of them into {b}."),
    "/": ("{name} makes {b} equal piles and keeps one.", "{name} keeps one of {b} equal shares.")}


def toy_math(count, seed, largest=10, steps=2):
    """Yield `count` word problems in GSM8K's form, {"question", "answer"}.

    A pure function of its arguments: 1 to `steps` steps with numbers from 1 to `largest`, each
    with its <<expression=value>>, then '#### value'."""
    rng = random.Random(seed)
    for _ in range(count):
        name, friend = rng.sample(NAMES, 2)
        thing = rng.choice(THINGS)
        total = rng.randint(2, largest)
        begins = rng.choice(["has", "picks up", "starts with"])
        question = [f"{name} {begins} {total} {thing}."]
        answer = []
        for _ in range(rng.randint(1, steps)):
            op, b, value = toy_step(rng, total, largest)
            question.append(rng.choice(EVENTS[op]).format(name=name, friend=friend, b=b))
            answer.append(f"{total} {op} {b} = <<{total}{op}{b}={value}>>{value} {thing}")
            total = value
        question.append(f"How many {thing} does {name} have now?")
        answer.append(f"#### {total}")
        yield {"question": " ".join(question), "answer": "\n".join(answer)}


def toy_step(rng, total, largest):
    """Draw (operator, number, result) of a step that stays a whole number from 1 to `largest`."""
    most = largest // 2  # that is added or taken away
    numbers = {
        "+": range(1, min(most, largest - total) + 1),
        "-": range(1, min(most, total - 1) + 1),
        "*": range(2, min(3, largest // total) + 1),
        "/": [b for b in (2, 3) if total % b == 0]}
    op = rng.choice([op for op in numbers if numbers[op]])
    b = rng.choice(numbers[op])
    results = {"+": total + b, "-": total - b, "*": total * b, "/": total // b}
    return op, b, results[op]


# ----------------------------------------------------------------------------- the source domain
def pystdlib():
    """Yield the modules of the running Python's standard library, {"text"}, by path.

    Without tests, bundled applications, tables, and the module that differs between machines."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages",
                "encodings", "pydoc_data"}
    for path in sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py")):
        if left_out & set(path.split("/")) or "_sysconfigdata" in path:
            continue
        with tokenize.open(root / path) as file:
            yield {"text": file.read()}


def folder_of_text(folder):
    """Yield the .txt and .rst files of a folder and those below, {"text"}, by path."""
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix in (".txt", ".rst"))
    if not paths:
        raise ValueError(f"source={folder}: no .txt or .rst file there")
    for path in paths:
        try:
            yield {"text": path.read_text(encoding="utf-8")}
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: {error}") from None


def lines_to_finish(texts, count, seed=3):
    """Yield multiple choice in LLM Foundry's form, {"query", "choices", "gold"}.

    The query is some lines of code up to a space inside the last one. Three of the four choices
    are ends of other lines."""
    rng = random.Random(seed)
    places = []  # (lines before, beginning, end) of lines with a blank near their middle
    for text in texts:
        lines = text.split("\n")
        for i, line in enumerate(lines):
            words = line.split(" ")
            middle = len(words) - max(1, len(words) // 2)
            begin = " ".join(words[:middle])
            end = " ".join(words[middle:])
            if i >= 4 and begin.strip() and 8 <= len(end) <= 40 and end == end.strip():
                places.append(("\n".join(lines[i - 4:i]), begin, end))

    rng.shuffle(places)
    ends = {end for _, _, end in places}
    for before, begin, end in places[:count]:
        others = rng.sample(sorted(ends - {end}), 3)
        gold = rng.randrange(4)
        choices = [*others[:gold], end, *others[gold:]]
        yield {"query": f"{before}\n{begin}", "choices": choices, "gold": gold}


# ----------------------------------------------------------------------------- steps
def run_script(script, *argv, **knobs):
    """Print and run `python script argv... --knob=value ...`; exits if it fails."""
    argv = [*map(str, argv), *(f"--{knob}={value}" for knob, value in knobs.items())]
    words = script_words(script)
    if words[0] != "-m":
        words = [os.path.relpath(words[0])]
    print("\n$ python", shlex.join([*words, *argv]), flush=True)
    process = subprocess.Popen([sys.executable, *words, *argv],
                               env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        status = process.wait()
    except KeyboardInterrupt:  # the script got it too, and is saving a checkpoint
        status = process.wait() or 130
    if status:
        raise SystemExit(status)


def remember_knobs(folder, config, free):
    """Store the knobs that a folder is made with, except those in `free`.

    ValueError if it was made with other ones the last time."""
    path = folder / "quickstart.json"
    kept = {name: value for name, value in config.items() if name not in free}
    text = json.dumps(kept, indent=1)
    kept = json.loads(text)  # as it will be read the next time
    before = json.loads(path.read_text()) if path.exists() else kept
    for name, value in kept.items():
        if before.get(name) != value:
            raise ValueError(f"{folder} was made with {name}={before.get(name)}, not {value}; "
                             "delete it, or choose other folders")
    folder.mkdir(parents=True, exist_ok=True)
    if before != kept or not path.exists():
        path.write_text(text)


def write_jsonl(path, records):
    with open(path, "w") as file:
        for record in records:
            file.write(json.dumps(record) + "\n")


def make_shape(folder, documents, shape):
    """What pretraining starts from: a tokenizer like Llama-2's but smaller, and a config.json."""
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for document in documents:
        lines += document["text"].split("\n")
    pieces = shape["vocab_size"]
    try:
        with open(folder / "tokenizer.model", "wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines[::4]), model_writer=file, vocab_size=pieces,
                model_type="bpe", byte_fallback=True, split_digits=True,
                allow_whitespace_only_pieces=True, normalization_rule_name="identity",
                remove_extra_whitespaces=False, minloglevel=2)
    except RuntimeError as error:
        raise ValueError(f"vocab_size={pieces}: {error}") from None
    (folder / "config.json").write_text(json.dumps(shape, indent=1))  # last: now it is complete
    print(f"\n{folder}: config.json, and a tokenizer.model of {pieces} pieces, trained on the "
          "source domain")


def write_records(data, documents, source_problems, target_problems, held_out_problems,
                  choice_items):
    """Write the records of both domains: for training, held out, and for evaluation."""
    # source: documents, one in 20 held out, and problems that are solved without GSM8K's notation
    training = [document for i, document in enumerate(documents) if i % 20]
    held_out = documents[::20]
    for record in toy_math(source_problems, seed=2):
        answer = re.sub(r"<<.*?>>|\n####.*", "", record["answer"])
        training.append({"text": f"{record['question']} {answer}"})
    write_jsonl(data / "source_train.jsonl", training)
    write_jsonl(data / "source_test.jsonl", held_out)
    texts = [document["text"] for document in held_out]
    write_jsonl(data / "choices.jsonl", lines_to_finish(texts, choice_items))
    # target: no held-out problem is trained on
    learned = list(toy_math(target_problems, seed=1))
    known = {record["question"] for record in learned}
    new = (record for record in toy_math(2 * held_out_problems, seed=3)
           if record["question"] not in known)
    write_jsonl(data / "problems_train.jsonl", learned)
    write_jsonl(data / "problems_test.jsonl", islice(new, held_out_problems))


def prepare(folder, **knobs):
    """Make a token folder, unless it is there."""
    if not (folder / "meta.json").exists():
        run_script("prepare_data.py", out_dir=folder, val_fraction=0, **knobs)


def prepare_all(data, tokenizer, seq_len):
    """The token folders of both domains, to train on and held out."""
    common = {"tokenizer": tokenizer, "seq_len": seq_len}
    prepare(data / "pretrain", source=data / "source_train.jsonl", **common)
    prepare(data / "source", source=data / "source_test.jsonl", **common)
    for folder, name in (("target", "train"), ("target_test", "test")):
        prepare(data / folder, source=data / f"problems_{name}.jsonl", **common, kind="ift",
                template="Question: {question}\\nAnswer:", response_field="answer")


def pretrain(folder, steps, **knobs):
    """The base's last checkpoint; trained, or resumed from the newest one, if it is not there."""
    last = folder / f"step_{steps}"
    if not last.exists():
        run_script("train.py", out_dir=folder, max_steps=steps, log_interval=50, save_interval=200,
                   keep_last=1, auto_resume=True, **knobs)
    if not last.exists():
        raise SystemExit(f"\n{folder} was stopped; run the same command again to resume")
    return last


# ----------------------------------------------------------------------------- the study
def watched_sets(data):
    """What is watched while training: held-out tokens of both domains."""
    return f"source={data / 'source'},target={data / 'target_test'}"


def finetuning_runs(steps, lora_ranks, full_learning_rate, lora_learning_rate, claims):
    """['NAME --knob=value ...'] of every duration and method, as paper/study.py takes them.

    claims: with the paper's regularisers (figure 4) and target modules (figure 7)."""
    rates = {rank: f"{lora_learning_rate / rank ** 0.5:.3g}" for rank in lora_ranks}
    methods = [("full", full_learning_rate, "")]  # (name, learning rate, more knobs)
    for rank, rate in rates.items():
        methods.append((f"r{rank}", rate, f"--lora_rank={rank}"))
    if claims:
        methods.append(("full-decay", full_learning_rate, "--weight_decay=1e-4"))
        methods.append(("full-dropout", full_learning_rate, "--attention_dropout=0.1"))
        most = lora_ranks[-1]
        for modules in ("mlp", "attention"):
            knobs = f"--lora_rank={most} --lora_targets={modules}"
            methods.append((f"r{most}-{modules}", rates[most], knobs))
    runs = []
    for n in steps:
        for name, rate, knobs in methods:
            runs.append(f"{name}-{n} --max_steps={n} --learning_rate={rate} {knobs}".strip())
    return runs


def training_words(data, batch, eval_rows, seed):
    """The knobs of train.py that all runs share."""
    return (f"--data={data / 'target'} --val_data={watched_sets(data)} --optimizer=lionw "
            f"--global_batch={batch} --microbatch={batch} --eval_rows={eval_rows} "
            f"--log_interval=50 --save_interval=200 --keep_last=1 --device=cpu --seed={seed}")


def evaluations(data, seq_len, solve_items):
    """The evaluations of every run: problems solved, and lines of Python finished."""
    return [f"eval_gsm8k.py --test_data={data / 'problems_test.jsonl'} "
            f"--train_data={data / 'problems_train.jsonl'} --shots=0 --bos=True "
            f"--max_new_tokens={seq_len // 2} --limit={solve_items} --device=cpu",
            "eval_forgetting.py --tasks=hellaswag --styles=gauntlet "
            f"--hellaswag={data / 'choices.jsonl'} --device=cpu"]


def study_file(out_dir, base, runs, train, evals):
    """The text of a config file for paper/study.py."""
    runs = "".join(f"    {text!r},\n" for text in runs)
    evals = "".join(f"    {text!r},\n" for text in evals)
    return f'''"""For paper/study.py: written by quickstart.py."""
out_dir = {str(out_dir)!r}
base = {str(base)!r}
models = ('base',)
runs = (
{runs})
train = {train!r}
evals = (
{evals})
spectrum = '--subspaces= --device=cpu'
plot = ("--figures=story --learning='loss target' --forgetting='loss source' --x=step "
        "--labels='loss target=loss on new word problems,loss source=loss on held-out Python'")
'''


# ----------------------------------------------------------------------------- results
def last_values(folder):
    """{metric: value} at the last step of a run or a base, its held-out losses as 'loss NAME'."""
    run = read_run(folder)
    last = max(run.places, default=0)
    return {metric: steps[last][0] for metric, steps in run.metrics.items() if last in steps}


def print_table(out, steps, lora_ranks):
    """Print a row for the base and each run; returns {name: (learned, forgot)} in nats a token."""
    start = last_values(out / "pretraining") | last_values(out / "base")
    rows = {"base": start}
    for n in steps:
        for name in ("full", *(f"r{rank}" for rank in lora_ranks)):
            rows[f"{name}-{n}"] = last_values(out / f"{name}-{n}")
    print(f"\n{'':10}{'target loss':>12}{'learned':>9}{'solved':>8}"
          f"{'source loss':>13}{'forgot':>8}{'lines finished':>16}")
    changes = {}
    for name, values in rows.items():
        learned = start["loss target"] - values["loss target"]
        forgot = values["loss source"] - start["loss source"]
        changes[name] = learned, forgot
        cells = ("", "") if name == "base" else (f"{learned:.3f}", f"{forgot:.3f}")
        print(f"{name:10}{values['loss target']:12.3f}{cells[0]:>9}"
              f"{values['gsm8k_strict_match']:8.1%}{values['loss source']:13.3f}{cells[1]:>8}"
              f"{values['hellaswag']:16.1%}")
    return changes


def compare_methods(verb, full, loras):
    """A sentence on how much LoRA, {rank: nats}, 'learned' or 'forgot' next to full."""
    parts = [f"full {full:.3f}"]
    for rank, change in loras.items():
        part = f"LoRA r={rank} {change:.3f}"
        if full > 0:
            part += f" ({change / full:.0%})"
        parts.append(part)

    less = [f"r={rank}" for rank, change in loras.items() if change < full]
    if len(less) == len(loras):
        verdict = f"LoRA {verb} less than full finetuning, as in the paper"
    elif less:
        verdict = f"LoRA {verb} less than full finetuning only at {', '.join(less)}"
    else:
        infinitive = {"learned": "learn", "forgot": "forget"}[verb]
        verdict = (f"LoRA did not {infinitive} less than full finetuning in this run, unlike the "
                   "paper")
    by_rank = [loras[rank] for rank in sorted(loras)]
    if len(by_rank) > 1:
        in_order = by_rank == sorted(by_rank)
        verdict += ", and less at lower ranks" if in_order else ", but not in order of rank"
    return f"{verb.capitalize()} (nats a token): {', '.join(parts)}. {verdict}."


def compare_at_equal_learning(full, loras):
    """Say what full finetuning had forgotten when it had learned as much as each LoRA run.

    full [(learned, forgot)] by duration, loras {rank: (learned, forgot)}. Between durations, and
    before the first, a straight line is drawn."""
    curve = [(Change(learned), Change(forgot)) for learned, forgot in full]
    sentences = []
    for rank, (learned, forgot) in loras.items():
        more = spared([curve], (Change(learned), Change(forgot)))
        if more is None:
            sentences.append(f"r={rank} learned {learned:.3f}, more than full finetuning ever did")
            continue
        expected = forgot + more[0]
        verdict = "less" if forgot < expected else "not less"
        sentences.append(f"r={rank} learned {learned:.3f} and forgot {forgot:.3f}, where full "
                         f"finetuning with equal learning forgot about {expected:.3f}: {verdict}")
    return "At equal learning: " + "; ".join(sentences) + "."


def print_comparisons(changes, steps, lora_ranks):
    """Say in words what the table of {name: (learned, forgot)} shows, at the longest duration."""
    longest = max(steps)
    full = changes[f"full-{longest}"]
    loras = {rank: changes[f"r{rank}-{longest}"] for rank in lora_ranks}
    for column, verb in enumerate(("learned", "forgot")):
        of_loras = {rank: change[column] for rank, change in loras.items()}
        print("\n" + compare_methods(verb, full[column], of_loras))
    print("\n" + compare_at_equal_learning([changes[f"full-{n}"] for n in steps], loras))


# ----------------------------------------------------------------------------- the whole
if __name__ == "__main__":
    with one_line_errors():
        config = configure(globals())
        if not lora_ranks or min((*lora_ranks, *steps)) < 1:
            raise ValueError("lora_ranks and steps: expected numbers from 1 up, such as 4,16; "
                             f"found {lora_ranks} and {steps}")
        documents = folder_of_text(source) if source else pystdlib()
        documents = list(islice(documents, max_documents or None))
        data = Path(data_dir)
        out = Path(out_dir)
        remember_knobs(data, config, free=_free | _of_runs)
        remember_knobs(out, config, free=_free)

        # 1: a model without weights, the tokens of both domains, questions about the source
        shape = {"architectures": ["LlamaForCausalLM"], "model_type": "llama",
                 "vocab_size": vocab_size, "hidden_size": hidden_size,
                 "intermediate_size": intermediate_size, "num_hidden_layers": layers,
                 "num_attention_heads": heads, "num_key_value_heads": kv_heads,
                 "max_position_embeddings": seq_len, "rms_norm_eps": 1e-5,
                 "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2}
        make_shape(out / "shape", documents, shape)
        write_records(data, documents, source_problems, target_problems, held_out_problems,
                      choice_items)
        prepare_all(data, tokenizer=out / "shape", seq_len=seq_len)

        # 2: the base
        base = pretrain(out / "pretraining", base_steps, base=out / "shape", scratch=True,
                        data=data / "pretrain", val_data=watched_sets(data), eval_rows=eval_rows,
                        global_batch=base_batch, microbatch=base_batch, optimizer="adamw",
                        learning_rate=base_learning_rate, seed=seed, device="cpu")

        if not steps:
            raise SystemExit

        # 3: finetuning, evaluations, spectra, the picture
        runs = finetuning_runs(steps, lora_ranks, full_learning_rate, lora_learning_rate, claims)
        train = training_words(data, batch, eval_rows, seed)
        evals = evaluations(data, seq_len, solve_items)
        if claims:
            evals = evals[:1]  # problems solved
        (out / "runs.py").write_text(study_file(out_dir, base, runs, train, evals))
        run_script("paper/study.py", out / "runs.py", jobs=jobs)
        if claims:
            raise SystemExit

        # 4: the results
        changes = print_table(out, steps, lora_ranks)
        print_comparisons(changes, steps, lora_ranks)
        sample = os.path.relpath(ROOT / "sample.py")
        adapter = out / f"r{lora_ranks[-1]}-{max(steps)}/step_{max(steps)}"
        print(f"\nThe figure: {out / 'figures/story.png'}. Read what the models write:\n"
              f"$ python {sample} --model={base} --adapter={adapter} "
              f"--max_new_tokens={seq_len // 2} --prompt='Question: Ava has 3 books. Ben gives "
              "Ava 5 more. How many books does Ava have now?\\nAnswer:'")
