r"""
Stage 3: what a model has forgotten of HellaSwag, ARC-Challenge and WinoGrande (and MMLU).

    python eval_forgetting.py --model=models/llama2-7b
    python eval_forgetting.py --model=models/llama2-7b --adapter=out/magicoder-r16/step_200
    torchrun --nproc_per_node=8 eval_forgetting.py --model=out/magicoder-full/step_200
    python eval_forgetting.py --model=DIR --tasks=hellaswag --hellaswag=FILE --limit=100

Each choice is appended to its question and scored by its likelihood under the model:

                   BOS shots  question: A man sits on a roof. He |
      choice 0                                                   | is ripping tiles.  -1.2 a token
      choice 1                                                   | plays the piano.   -2.9
                                                   right if the best choice is the gold one

Two styles write this down and pick the best choice, both scored in one pass:
  gauntlet  MosaicML's (LLM Foundry 0.9.0), the paper's: shots drawn from the file itself; shots,
            question and choice are tokenized separately; the best has the highest mean
            log-probability per token (lowest perplexity).
  lm_eval   EleutherAI's lm-evaluation-harness (knob harness): question and choice are one text;
            `acc` takes the highest sum of log-probabilities, `acc_norm` divides it by the
            characters of the choice.

The metric `forgetting` is the unweighted mean of the gauntlet's accuracy on the three tasks.
TASK_loss (not for MMLU), the gauntlet's nats per token of the gold choice, is finer than accuracy.
As in those tools, gauntlet prompts start with BOS if the tokenizer adds it, and lm_eval's do not
(0.4.13 does as the tokenizer, too: --harness=0.4.13); knob bos sets it for both. A prompt that is
too long (knob max_seq_len) is cut from the left, BOS included; the number of such items is printed,
and their records have it as `cut`.
Prefixes that sequences share are computed once: see evaluation/trees.py.
"""
import math
import re
import time
from typing import Callable, NamedTuple

from configurator import configure, knob_table
from evaluation.choices import gauntlet_sequences, lm_eval_sequences
from evaluation.evals import (bos_of_harness, digest, find_model, load_for_eval, open_items,
                              read_items, shown, start_ranks)
from evaluation.scores import write_mean, write_result
from evaluation.shots import gauntlet_shots, lm_eval_shots_from, lm_eval_shots_of_subject
from evaluation.trees import batches, bundle, score_sequences
from runtime import device_name, one_line_errors, pick_dtype, print0

# -----------------------------------------------------------------------------
model = ''               # model folder, or the checkpoint folder (out/RUN/step_N) of any run
adapter = ''             # PEFT folder, or the checkpoint folder of a LoRA run
t = 1.0                  # evaluate W0 + t (W - W0): 0 is the base, 0.5 halfway back to it
tokenizer = ''           # tokenizer file or folder; '' = the base's folder
out_dir = ''             # for items and results; '' = the checkpoint's folder, or out/MODEL
name = 'forgetting'      # items go to eval_NAME_TASK.jsonl: another name for other settings, which
                         # stands before the metrics too
tasks = ('hellaswag', 'arc_challenge', 'winogrande')  # and mmlu
limit = 0                # only this many questions of each task, from the first; 0 = all
styles = ('gauntlet', 'lm_eval')
# data: original records or LLM Foundry's rows, as .jsonl, .json (.gz) or .parquet, or on the hub
hellaswag = 'hf://datasets/Rowan/hellaswag/data/validation-00000-of-00001.parquet'
arc_challenge = 'hf://datasets/allenai/ai2_arc/ARC-Challenge/test-00000-of-00001.parquet'
winogrande = 'hf://datasets/allenai/winogrande/winogrande_xl/validation-00000-of-00001.parquet'
mmlu = 'hf://datasets/cais/mmlu/all/test-00000-of-00001.parquet'
# gauntlet; shots as in its versions 0.2 and 0.3 (0.1: 10, 10, 0, 10), the paper names none
hellaswag_shots = 0
arc_challenge_shots = 3
winogrande_shots = 5
mmlu_shots = 5
shot_seed = 1234
# lm_eval
harness = '0.4.2'        # its version: 0.4.2 adds no BOS, 0.4.13 as the tokenizer does
lm_eval_shots = 0
lm_eval_shot_data = ''   # where they come from (train split; MMLU: dev), of the one task in `tasks`
# both
bos = None               # None = as the tokenizer in the gauntlet, as `harness` in lm_eval
max_seq_len = 0          # longer prompts lose their beginning; 0 = what the model can read
# machine; changes rounding at most
batch_tokens = 4096      # distinct tokens in one pass
device = 'auto'          # auto | cpu | cuda | cuda:N
dtype = 'auto'           # auto = bf16 on GPUs that have it, else fp32
_types = {'bos': bool}
_choices = {'tasks': ('hellaswag', 'arc_challenge', 'winogrande', 'mmlu'),
            'styles': ('gauntlet', 'lm_eval'), 'harness': ('0.4.2', '0.4.13'),
            'dtype': ('auto', 'float32', 'bfloat16', 'float64')}

FORGETTING = ("hellaswag", "arc_challenge", "winogrande")  # `forgetting` is their mean
LETTERS = "ABCD"
WINDOW = 2048            # questions whose prompts are held in memory at once


# ----------------------------------------------------------------------------- tasks
# To add a task: a knob for its data and one for its shots (NAME, NAME_shots) and its name in
# _choices above; a function from its record to a Question, and a line of TASKS below.
class Question(NamedTuple):
    """One context and several continuations, or several contexts and one (WinoGrande)."""
    contexts: tuple
    continuations: tuple
    gold: int
    subject: str = ""    # of MMLU

    @property
    def pairs(self):
        """(context, continuation) of each choice."""
        return [(context, end) for context in self.contexts for end in self.continuations]

    @property
    def choices(self):
        """What distinguishes the choices."""
        return self.contexts if len(self.contexts) > 1 else self.continuations

    def chars(self, style):
        """Characters of each choice: lm-eval counts what differs, else it is what is scored."""
        if style == "lm_eval":
            return [len(text) for text in self.choices]
        return [len(end) for _, end in self.pairs]


def foundry_question(row):
    """From a row of LLM Foundry's files, for tasks with one context."""
    contexts = (row["query"].strip(),)
    return Question(contexts, listed(row["choices"]), row["gold"], row.get("category", ""))


def listed(texts):
    """A list of texts as a tuple; ValueError if it is not a list."""
    # a single text would become a tuple of its letters
    if not isinstance(texts, list):
        raise ValueError(f"{shown(texts)} is no list of texts")
    return tuple(texts)


def hellaswag_question(record):
    if "query" in record:
        return foundry_question(record)
    context = record["activity_label"] + ": " + record["ctx_a"]
    context = clean_hellaswag(context + " " + record["ctx_b"].capitalize())
    endings = [clean_hellaswag(text) for text in listed(record["endings"])]
    return Question((context,), tuple(endings), int(record["label"]))


def clean_hellaswag(text):
    """lm-eval's preprocessing: remove WikiHow's markup."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def arc_question(record):
    if "query" in record:
        return foundry_question(record)
    context = "Question: " + record["question"]
    # choices are named A to D, or 1 to 4
    texts = listed(record["choices"]["text"])
    labels = list(record["choices"]["label"])
    gold = labels.index(record["answerKey"])
    return Question((context,), texts, gold)


def winogrande_question(record):
    """The contexts are the sentence with either name in the blank; the rest is the continuation."""
    if "context_options" in record:  # a row of LLM Foundry's
        contexts = listed(record["context_options"])
        return Question(contexts, (record["continuation"].strip(),), record["gold"])
    # the blank of a record of its own is an underscore
    before, after = record["sentence"].split("_", 1)
    contexts = (before + record["option1"], before + record["option2"])
    gold = ("1", "2").index(str(record["answer"]))
    return Question(contexts, (after.strip(),), gold)


def mmlu_question(record):
    if "query" in record:
        return foundry_question(record)
    # the choices are part of the question; what is scored is their letter
    lines = [record["question"].strip()]
    for letter, choice in zip(LETTERS, listed(record["choices"]), strict=True):
        lines.append(f"{letter}. {choice}")
    context = "\n".join(lines)
    return Question((context,), tuple(LETTERS), int(record["answer"]), record["subject"])


class Task(NamedTuple):
    question: Callable         # a record of the data -> Question
    label: str                 # the record's field that says which choice is right
    delimiter: str             # between context and continuation
    acc_norm: bool = False     # lm-eval reports it for this task
    spare_shot: bool = False   # lm-eval draws one more than it uses (no split for tests or shots)
    by_subject: bool = False   # shots are of the subject; the accuracy is the mean over subjects


TASKS = {
    "hellaswag": Task(hellaswag_question, "label", " ", acc_norm=True, spare_shot=True),
    "arc_challenge": Task(arc_question, "answerKey", "\nAnswer: ", acc_norm=True),
    "winogrande": Task(winogrande_question, "answer", " ", spare_shot=True),
    "mmlu": Task(mmlu_question, "answer", "\nAnswer: ", by_subject=True),
}


def load_questions(task, source):
    """The Questions of a file, one of each record. Raises ValueError naming the file and record."""
    questions = []
    for number, record in enumerate(read_items(source, (), task), 1):
        try:
            # any other content raises one of these errors
            check_label(record, TASKS[task].label)
            question = TASKS[task].question(record)
            check_question(question)
        except (KeyError, ValueError, TypeError, IndexError, AttributeError) as e:
            problem = f"no {e}" if isinstance(e, KeyError) else e
            fields = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise ValueError(f"{task}: {source}, record {number}: not an item of {task} "
                             f"({problem}); fields found: {fields}") from None
        questions.append(question)
    return questions


def check_label(record, field):
    """Raises ValueError if the right choice is not given, as in the test splits of contests."""
    # a row of LLM Foundry's has a field of its own
    if "gold" in record:
        field = "gold"
    if field in record and record[field] in ("", None, -1, "-1"):
        raise ValueError(f"{field} is {record[field]!r}: this split has no labels, take the one "
                         "for validation")


def check_question(question):
    """Raises ValueError for an empty text, a single choice, or a gold that is none of them."""
    # all texts are there
    texts = question.contexts + question.continuations
    has_texts = all(isinstance(text, str) and text for text in texts)
    # gold is the index of a choice; True and 1.0 are not
    count = len(question.choices)
    has_gold = type(question.gold) is int and question.gold in range(count)
    if not isinstance(question.subject, str):
        raise ValueError(f"subject {shown(question.subject)}, expected text")
    if not has_texts or count < 2 or not has_gold:
        raise ValueError(f"{count} choices, gold {question.gold!r}")


# ----------------------------------------------------------------------------- shots
def draw_shots_of_styles(styles, task, questions, shots, shot_seed, pool, lm_eval_count):
    """{style: for each question its shots}; the gauntlet's come from the questions themselves."""
    drawn = {}
    for style in styles:
        if style == "gauntlet":
            drawn[style] = gauntlet_shots(questions, shots, shot_seed)
        elif task.by_subject:
            drawn[style] = lm_eval_shots_of_subject(pool, questions, lm_eval_count)
        else:
            drawn[style] = lm_eval_shots_from(pool, questions, lm_eval_count, task.spare_shot)
    return drawn


# ----------------------------------------------------------------------------- judgement
class Exam(NamedTuple):
    """A task's questions and how they are asked. Dicts have an entry for each style."""
    questions: list
    delimiter: str
    shots: dict          # of each style, for each question its shots
    bos: dict            # whether BOS stands in front
    max_len: int

    def put(self, i, style, tok):
        """(sequences, how many were cut) of question i, or ([], None)."""
        make = gauntlet_sequences if style == "gauntlet" else lm_eval_sequences
        return make(self.questions[i], self.shots[style][i], self.delimiter, tok, self.bos[style],
                    self.max_len)


def judge_questions(llama, tok, exam, ids, batch_tokens):
    """Yield (i, record) of the questions i of `ids`, as they are done."""
    for start in range(0, len(ids), WINDOW):
        # the sequences of each question: its styles, one behind the other
        cut = {}
        questions = []
        for i in ids[start:start + WINDOW]:
            sequences = []
            for style in exam.shots:
                of_style, cut[i, style] = exam.put(i, style, tok)
                sequences += of_style
            if sequences:
                questions.append((i, sequences))
            else:
                yield from records_of_tree(exam, [(i, [])], iter(()), cut)
        # questions that share a prefix become one tree; a pass through the model takes several
        for batch in batches(bundle(questions, batch_tokens), batch_tokens):
            groups = []
            for tree in batch:
                groups.append([sequence for _, sequences in tree.members for sequence in sequences])
            for tree, logprobs in zip(batch, score_sequences(llama, groups)):
                yield from records_of_tree(exam, tree.members, iter(logprobs), cut)


def records_of_tree(exam, members, logprobs, cut):
    """Yield (i, record) of a tree's questions; each takes its part of the log-probabilities."""
    for i, _ in members:
        question = exam.questions[i]
        record = {"subject": question.subject, "gold": question.gold}
        for style in exam.shots:
            if cut[i, style] is None:
                record[style] = {"refused": "a choice has no token of its own"}
                continue
            of_choices = [next(logprobs) for _ in question.pairs]
            verdict = judge_choices(of_choices, question.chars(style))
            record[style] = {**verdict, "cut": cut[i, style]}
        yield i, record


def judge_choices(logprobs, chars):
    """One style's part of a record; logprobs: of each choice's tokens, chars: its characters."""
    sums = [math.fsum(values) for values in logprobs]
    tokens = [len(values) for values in logprobs]
    per_token = [total / count for total, count in zip(sums, tokens)]
    per_char = [total / count for total, count in zip(sums, chars)]
    return {"per_token": first_best(per_token), "sum": first_best(sums),
            "per_char": first_best(per_char), "logprobs": sums, "tokens": tokens}


def first_best(values):
    """The index of the highest value, the first on ties, as in both tools."""
    return values.index(max(values))


def is_right(record, style, kind):
    return int(record[style].get(kind) == record["gold"])


def running_score(record):
    """The gauntlet's accuracy, or lm-eval's `acc` where only that was asked for."""
    if "gauntlet" in record:
        return is_right(record, "gauntlet", "per_token")
    return is_right(record, "lm_eval", "sum")


# ----------------------------------------------------------------------------- scores
def metric_of(metric, name):
    """A metric's name in results.jsonl: prefixed with `name`, unless that is the default."""
    return metric if name == "forgetting" else f"{name}_{metric}"


def write_task(subject, task, records, settings, seconds):
    """Print and store a task's metrics; returns the gauntlet's 0/1 scores, [] without it."""
    metric = metric_of(task, settings["name"])
    judged = {}
    for style in settings["styles"]:
        judged[style] = judged_records(task, style, records, settings["max_seq_len"])
    # the gauntlet's
    right = []
    if judged.get("gauntlet"):
        right = [is_right(record, "gauntlet", "per_token") for record in judged["gauntlet"]]
        if TASKS[task].by_subject:
            by_subject = {}
            for record, hit in zip(judged["gauntlet"], right):
                by_subject.setdefault(record["subject"], []).append(hit)
            write_mean(subject, metric, list(by_subject.values()), settings, seconds)
        else:
            write_result(subject, metric, right, settings, seconds)
            losses = [gold_loss(record) for record in judged["gauntlet"]]
            write_result(subject, f"{metric}_loss", losses, settings, seconds)
    # lm-eval's
    if judged.get("lm_eval"):
        acc = [is_right(record, "lm_eval", "sum") for record in judged["lm_eval"]]
        write_result(subject, f"{metric}_acc", acc, settings, seconds)
        if TASKS[task].acc_norm:
            acc_norm = [is_right(record, "lm_eval", "per_char") for record in judged["lm_eval"]]
            write_result(subject, f"{metric}_acc_norm", acc_norm, settings, seconds)
    return right


def judged_records(task, style, records, max_seq_len):
    """The records that have a verdict in a style; prints how many have none, or were cut."""
    judged = [record for record in records if "refused" not in record[style]]
    if len(judged) < len(records):
        print0(f"WARNING: {task}, {style}: {len(records) - len(judged)} of {len(records)} items "
               "are left out: a token that reaches over the end of the context leaves a choice "
               "without one of its own")
    cut = sum(record[style]["cut"] > 0 for record in judged)
    if cut:
        print0(f"{task}, {style}: {cut} of {len(records)} items lost their beginning to "
               f"max_seq_len={max_seq_len}")
    return judged


def gold_loss(record):
    """Nats a token of the gold choice."""
    gold = record["gold"]
    return -record["gauntlet"]["logprobs"][gold] / record["gauntlet"]["tokens"][gold]


def write_forgetting(subject, right, settings, seconds):
    """The forgetting number of a run; right: {task: the gauntlet's 0/1 scores}."""
    missing = [task for task in FORGETTING if not right.get(task)]
    if missing:
        print0(f"no forgetting number: that is the mean of {', '.join(FORGETTING)} in the "
               "gauntlet's style")
        return
    metric = metric_of("forgetting", settings["name"])
    write_mean(subject, metric, [right[task] for task in FORGETTING], settings, seconds)


# ----------------------------------------------------------------------------- the run
def check_tasks_and_shots(knobs):
    """Raises ValueError for knobs that do not go together."""
    for knob in ("tasks", "styles"):
        if not knobs[knob]:
            raise ValueError(f"{knob} is empty; expected some of {', '.join(_choices[knob])}")
    least = {"limit": 0, "max_seq_len": 0, "batch_tokens": 1, "lm_eval_shots": 0}
    least.update({f"{task}_shots": 0 for task in TASKS})
    for knob, value in least.items():
        if knobs[knob] < value:
            raise ValueError(f"{knob}={knobs[knob]}: expected {value} or more")
    if knobs["lm_eval_shots"]:
        source = knobs["lm_eval_shot_data"]
        if not source or len(knobs["tasks"]) > 1:
            raise ValueError("lm_eval_shots needs lm_eval_shot_data, the file they come from, "
                             "and one task in tasks")
        task = knobs["tasks"][0]
        if source == knobs[task]:
            raise ValueError(f"lm_eval_shot_data={source} is the data of {task} itself")


def print_first_prompts(task, exam, tok):
    for style in exam.shots:
        sequences, _ = exam.put(0, style, tok)
        if not sequences:
            continue
        ids, scored = sequences[exam.questions[0].gold]
        end = tok.decode(ids[:-scored])[-100:]
        print0(f"{task}, {style}: ...{end!r} -> {tok.decode(ids[-scored:])!r}")


if __name__ == "__main__":
    with one_line_errors():
        config = configure(globals())
        check_tasks_and_shots(config)
        print0(knob_table(globals()))
        find_model(model, adapter)
        questions = {task: load_questions(task, config[task]) for task in tasks}
        pool = load_questions(tasks[0], lm_eval_shot_data) if lm_eval_shots else []

        # the model
        device = start_ranks(device)
        dtype = pick_dtype(dtype, device)
        subject = load_for_eval(model, adapter, device, dtype, tokenizer, out_dir, t)
        tok = subject.tokenizer
        context = subject.model.config.max_position_embeddings
        max_len = max_seq_len or context
        if max_len > context:
            raise ValueError(f"max_seq_len={max_len}: the model reads {context} tokens at most")
        if tok.bos_id is None and bos:
            raise ValueError(f"bos: this tokenizer has none ({tok.name}); say --bos=False")
        has_bos = {"gauntlet": tok.adds_bos if bos is None else bos,
                   "lm_eval": bool(bos_of_harness(harness, bos, tok))}
        if any(has_bos.values()) and tok.bos_id >= subject.model.config.vocab_size:
            raise ValueError(f"bos: the model has no row for BOS (id {tok.bos_id})")
        print0(f"{subject.run} step {subject.step}, {subject.identity['dtype']}, "
               f"{device_name(device)}, {tok.name}; BOS in front: gauntlet {has_bos['gauntlet']}, "
               f"lm_eval {has_bos['lm_eval']}")

        # its answers, task by task
        right = {}
        began = time.perf_counter()
        for task in tasks:
            started = time.perf_counter()
            of_task = questions[task]
            shots = config[f"{task}_shots"]
            # what is asked, and how
            drawn = draw_shots_of_styles(styles, TASKS[task], of_task, shots, shot_seed, pool,
                                         lm_eval_shots)
            exam = Exam(of_task, TASKS[task].delimiter, drawn, has_bos, max_len)
            print_first_prompts(task, exam, tok)
            settings = {"task": task, "items": digest(of_task), "styles": styles,
                        "shots": shots, "shot_seed": shot_seed, "bos": has_bos["gauntlet"],
                        "lm_eval_shots": lm_eval_shots, "lm_eval_shots_from": digest(pool),
                        "lm_eval_bos": has_bos["lm_eval"], "max_seq_len": max_len}
            # the answers
            ids = range(len(of_task))[:limit or None]
            items = open_items(subject, f"{name}_{task}", ids, settings, running_score)
            for i, record in judge_questions(subject.model, tok, exam, items.todo, batch_tokens):
                items.finish(i, record)
            # the scores
            records = list(items.close().values())
            seconds = time.perf_counter() - started
            right[task] = write_task(subject, task, records, {**config, **settings}, seconds)
        write_forgetting(subject, right, config, time.perf_counter() - began)
