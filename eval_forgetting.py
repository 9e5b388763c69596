"""
What a model has forgotten: HellaSwag, ARC-Challenge and WinoGrande (and MMLU), by the likelihood of each choice.

    python eval_forgetting.py --model=models/llama2-7b
    python eval_forgetting.py --model=models/llama2-7b --adapter=out/magicoder-r16/step_200
    torchrun --nproc_per_node=8 eval_forgetting.py --model=out/magicoder-full/step_200 --tasks=hellaswag,mmlu
    python eval_forgetting.py --model=models/llama2-7b --tasks=hellaswag --hellaswag=data/hellaswag_val.jsonl.gz --limit=100

Two ways to put an item to a model, both scored in one pass:
  gauntlet  MosaicML's (LLM Foundry 0.9.0), the paper's: shots drawn from the file itself; shots, question and choice are
            tokenized apart; right when the gold choice has the lowest mean loss a token. The forgetting number is the
            unweighted mean of the three accuracies.
  lm_eval   EleutherAI's lm-evaluation-harness (0.4.2): question and choice are tokenized as one text; `acc` takes the
            choice with the highest sum of log-probabilities, `acc_norm` divides it by the characters of the choice.
TASK_loss (not of MMLU), nats a token of the right choice as the gauntlet puts it, is finer than an accuracy.

A token that several sequences begin with is computed once: the choices of an item, its two ways, and MMLU's questions
after the same shots make one tree, whose tokens see their ancestors. A batch is a flat list of such tokens, without
padding, and the vocabulary's logits are made only where a choice is scored.
"""
import math
import random
import re
import time
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from configurator import configure, knob_table
from evaluation.evals import digest, evaluate, load_for_eval, read_items, score, start_ranks, write_result, write_score
from runtime import device_name, one_line_errors, pick_dtype, print0

# -----------------------------------------------------------------------------
model = ''               # model folder, or the checkpoint folder (out/RUN/step_N) of any run
adapter = ''             # PEFT folder, or the checkpoint folder of a LoRA run
tokenizer = ''           # tokenizer file or folder; '' = the base's folder
out_dir = ''             # where eval_NAME_TASK.jsonl and results.jsonl go; '' = with the checkpoint, or out/MODEL
name = 'forgetting'      # of the files with items; another one for other settings
tasks = ('hellaswag', 'arc_challenge', 'winogrande')  # and mmlu
limit = 0                # only the first so many items of each task; 0 = all
styles = ('gauntlet', 'lm_eval')
# data: original records or LLM Foundry's rows, as .jsonl, .json (.gz) or .parquet, here or on the hub
hellaswag = 'hf://datasets/Rowan/hellaswag/data/validation-00000-of-00001.parquet'
arc_challenge = 'hf://datasets/allenai/ai2_arc/ARC-Challenge/test-00000-of-00001.parquet'
winogrande = 'hf://datasets/allenai/winogrande/winogrande_xl/validation-00000-of-00001.parquet'
mmlu = 'hf://datasets/cais/mmlu/all/test-00000-of-00001.parquet'
# gauntlet; the shots are those of its versions 0.2 and 0.3 (0.1: 10, 10, 0, 10), the paper names none
hellaswag_shots = 0
arc_challenge_shots = 3
winogrande_shots = 5
mmlu_shots = 5
shot_seed = 1234
bos = True               # BOS in front, as Llama's tokenizers put it; False for those that put none (SmolLM2, GPT-2)
# lm_eval
lm_eval_shots = 0
lm_eval_shot_data = ''   # the file they come from (train split; MMLU: dev), of the one task in `tasks`
lm_eval_bos = False      # lm-eval 0.4.2 sends none unless told to
# both
max_seq_len = 0          # longer prompts lose their beginning, and are counted; 0 = the model's max_position_embeddings
# machine; changes rounding at most
batch_tokens = 4096      # distinct tokens in one pass
device = 'auto'          # auto | cpu | cuda | cuda:N
dtype = 'auto'           # auto = bf16 on GPUs that have it, else fp32
_choices = {'tasks': ('hellaswag', 'arc_challenge', 'winogrande', 'mmlu'), 'styles': ('gauntlet', 'lm_eval'),
            'dtype': ('auto', 'float32', 'bfloat16', 'float64')}

FORGETTING = ("hellaswag", "arc_challenge", "winogrande")
DELIMITER = {"hellaswag": " ", "arc_challenge": "\nAnswer: ", "winogrande": " ", "mmlu": "\nAnswer: "}
LETTERS = "ABCD"
LOGITS = 2 ** 24         # numbers that one softmax over the vocabulary makes
WINDOW = 2048            # items whose prompts are held in memory at once


# ----------------------------------------------------------------------------- items
class Item(NamedTuple):
    """A question: one context and several continuations, or (WinoGrande) several contexts and one continuation."""
    contexts: tuple
    continuations: tuple
    gold: int
    subject: str = ""    # of MMLU

    @property
    def pairs(self):
        """(context, continuation) of each choice."""
        return [(c, e) for c in self.contexts for e in self.continuations]

    @property
    def choices(self):
        """What tells the choices apart."""
        return self.contexts if len(self.contexts) > 1 else self.continuations

    def chars(self, style):
        """Characters of each choice: lm-eval counts those of what tells them apart, else they are those scored."""
        return [len(text) for text in (self.choices if style == "lm_eval" else [e for _, e in self.pairs])]


def clean_hellaswag(text):
    """lm-eval's preprocessing: marks of WikiHow articles leave the text."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def to_item(task, record):
    """The Item of an original record, or of a row of LLM Foundry's files; an exception where it is not the task's."""
    if task == "winogrande" and "context_options" in record:
        item = Item(tuple(record["context_options"]), (record["continuation"].strip(),), record["gold"])
    elif task != "winogrande" and "query" in record:
        item = Item((record["query"].strip(),), tuple(record["choices"]), record["gold"], record.get("category", ""))
    elif task == "hellaswag":
        query = f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}"
        item = Item((clean_hellaswag(query),), tuple(map(clean_hellaswag, record["endings"])), int(record["label"]))
    elif task == "arc_challenge":
        choices = record["choices"]
        item = Item((f"Question: {record['question']}",), tuple(choices["text"]),
                    list(choices["label"]).index(record["answerKey"]))
    elif task == "winogrande":
        before, after = record["sentence"].split("_", 1)
        item = Item((before + record["option1"], before + record["option2"]), (after.strip(),),
                    ("1", "2").index(str(record["answer"])))
    else:
        lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, record["choices"], strict=True)]
        item = Item(("\n".join([record["question"].strip(), *lines]),), tuple(LETTERS), int(record["answer"]),
                    record["subject"])
    if not (all(isinstance(text, str) and text for text in item.contexts + item.continuations)
            and len(item.choices) > 1 and item.gold in range(len(item.choices))):
        raise ValueError(f"{len(item.choices)} choices, gold {item.gold!r}")
    return item


def load_items(task, source):
    """The Items of a file, one from each record. Raises ValueError naming the file and record, and as read_items."""
    items = []
    for number, record in enumerate(read_items(source, (), task), 1):
        try:
            items.append(to_item(task, record))
        except (KeyError, ValueError, TypeError, IndexError, AttributeError) as e:
            what = f"no {e}" if isinstance(e, KeyError) else e
            raise ValueError(f"{task}: {source}, record {number}: not an item of {task} ({what}); fields found: "
                             f'{", ".join(record) if isinstance(record, dict) else type(record).__name__}') from None
    return items


# ----------------------------------------------------------------------------- shots
def gauntlet_shots(items, shots, seed):
    """For each item its shots, drawn from the items of the same subject."""
    by_subject, drawn = {}, [None] * len(items)
    for i, item in enumerate(items):
        by_subject.setdefault(item.subject, []).append(i)
    for members in by_subject.values():
        for i, chosen in zip(members, draw(len(members), shots, seed)):
            drawn[i] = [items[members[j]] for j in chosen]
    return drawn


def draw(count, shots, seed):
    """For each of `count` items the indices of its shots, in LLM Foundry's order, which is that of a set of ints."""
    rng, drawn = random.Random(seed), []
    shots = min(count - 1, shots)
    for index in range(count):
        chosen = set(rng.sample(range(count), shots)) if shots else set()
        if index in chosen:
            chosen.remove(index)
            while len(chosen) < shots:
                other = rng.choice(range(count))
                chosen |= {other} - {index}
        drawn.append(list(chosen))
    return drawn


def lm_eval_shots_from(pool, items, shots, task):
    """For each item its shots out of `pool`, as lm-eval draws them: one stream; MMLU takes the first of the subject.

    Raises ValueError for a pool with too few."""
    spare = task in ("hellaswag", "winogrande")  # without a split for shots or tests lm-eval draws one more than it uses
    if task != "mmlu" and shots and shots + spare > len(pool):
        raise ValueError(f"lm_eval_shots={shots}: lm_eval_shot_data holds {len(pool)} items, expected {shots + spare}")
    rng, drawn = random.Random(1234), []
    for item in items:
        some = [shot for shot in pool if shot.subject == item.subject] if task == "mmlu" else \
            rng.sample(pool, shots + spare) if shots else []
        if len(some) < shots:
            raise ValueError(f"lm_eval_shots={shots}: lm_eval_shot_data holds {len(some)} of {item.subject}")
        drawn.append(some[:shots])
    return drawn


# ----------------------------------------------------------------------------- prompts
def gauntlet_sequences(item, shots, delimiter, tok, bos=True, max_len=1024):
    """[(ids, how many at their end are scored)] of an item's choices, and how many were cut on the left.

    Raises ValueError for a choice longer than max_len."""
    gold = lambda shot: shot.pairs[shot.gold]
    preamble = "\n".join(delimiter.join(gold(shot)) for shot in shots)
    front = [tok.bos_id] * bos + tok.encode(preamble)
    spaced = len(tok.encode(" a")) == 1  # a vocabulary of words that begin with their blank wants one before a choice
    schema = len(item.contexts) > 1
    sequences = []
    for context, choice in item.pairs:
        end = "" if schema and not shots else delimiter.rstrip() if schema else delimiter
        text = "\n" * bool(preamble) + context + end
        ids = front + tok.encode(text if schema else text.rstrip())
        choice = tok.encode(" " * (spaced and not choice.startswith(" ")) + choice)
        sequences.append((ids + choice, len(choice)))
    return cut(sequences, max_len)


def lm_eval_sequences(item, shots, delimiter, tok, bos=False, max_len=2048):
    """As gauntlet_sequences, for lm-eval's prompts; its limit is on what goes in, and the last id does not."""
    between = delimiter[:-1]  # lm-eval itself puts the blank before a choice
    front = "".join(f"{context}{between} {choice}\n\n" for context, choice in (shot.pairs[shot.gold] for shot in shots))
    if item.subject:  # one line end: of the two in its task file, lm-eval 0.4.2 loses one to jinja
        front = ("The following are multiple choice questions (with answers) about "
                 f"{item.subject.replace('_', ' ')}.\n{front}")
    sequences = []
    for context, choice in item.pairs:
        text = front + context + between
        ids = tok.encode(f"{text} {choice}")
        sequences.append(([tok.bos_id] * bos + ids, len(ids) - len(tok.encode(text.rstrip()))))
    return cut(sequences, max_len + 1)


def cut(sequences, most):
    """The sequences with at most `most` ids each, their ends, and how many were longer."""
    if any(scored >= most for _, scored in sequences):
        raise ValueError(f"max_seq_len: a choice of {max(n for _, n in sequences)} tokens leaves no room for a question")
    return [(ids[-most:], scored) for ids, scored in sequences], sum(len(ids) > most for ids, _ in sequences)


# ----------------------------------------------------------------------------- trees
class Tree(NamedTuple):
    """Sequences with each distinct beginning stored once: node i has token tokens[i] and stands after parents[i]."""
    tokens: list
    parents: list        # -1: first of a sequence
    paths: list          # of each sequence, its nodes in order


def make_tree(sequences, nodes=None):
    """The Tree of some lists of ids; `nodes` {(parent, token): node} is filled with it, after what it holds."""
    nodes, paths = {} if nodes is None else nodes, []
    for ids in sequences:
        path, node = [], -1
        for token in ids:
            node = nodes.setdefault((node, token), len(nodes))
            path.append(node)
        paths.append(path)
    return Tree([token for _, token in nodes], [parent for parent, _ in nodes], paths)


def bundle(items, batch_tokens):
    """[[neighbouring (id, sequences)], size of their tree]: an item joins the last tree if that spares a third of its own."""
    bundles, nodes = [], {}
    for item in items:
        inputs = [ids[:-1] for ids, _ in item[1]]
        alone, before = len(make_tree(inputs).tokens), len(nodes)
        make_tree(inputs, nodes)
        spared = alone - (len(nodes) - before)
        if not bundles or 3 * spared < alone or len(nodes) > batch_tokens:
            bundles.append([[], 0])
            nodes = {}
            make_tree(inputs, nodes)
        bundles[-1][0].append(item)
        bundles[-1][1] = len(nodes)
    return bundles


class TreeAttention:
    """What the model takes for a cache of keys: each node of some trees is a sequence of one token, and sees its ancestors.

    Each tree is a row of one masked attention: padding is made there and nowhere else."""
    decoding = True

    def __init__(self, trees, device):
        width = max(len(tree.tokens) for tree in trees)
        seen = np.zeros((len(trees), width, width), bool)
        seen[:, range(width), range(width)] = True  # padding sees itself, so that no row of a softmax is empty
        depth = []
        for row, tree in zip(seen, trees):
            for node, parent in enumerate(tree.parents):
                if parent >= 0:
                    row[node] |= row[parent]
            depth.append(row[:len(tree.tokens)].sum(1) - 1)
        self.seen = torch.from_numpy(seen)[:, None].to(device)
        self.depth = torch.from_numpy(np.concatenate(depth)).to(device)
        self.place = torch.cat([i * width + torch.arange(len(t.tokens)) for i, t in enumerate(trees)]).to(device)

    def attend(self, layer, q, k, v):
        """q [nodes, 1, H, hd], k and v [nodes, 1, KV, hd] -> as q."""
        rows, _, width, _ = self.seen.shape
        if q.is_cuda:  # the kernels that take a mask there want a key for each query
            k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
        padded = [x.new_zeros(rows * width, *x.shape[2:]).index_copy_(0, self.place, x[:, 0])
                  .view(rows, width, *x.shape[2:]).transpose(1, 2) for x in (q, k, v)]
        out = F.scaled_dot_product_attention(*padded, attn_mask=self.seen, enable_gqa=k.shape[2] < q.shape[2])
        return out.transpose(1, 2).flatten(0, 1)[self.place][:, None]


@torch.inference_mode()
def score_sequences(llama, groups):
    """Log-probabilities of the ends of sequences: groups of lists of (ids, scored) -> the same of lists of floats.

    Each group is one tree; all of them are one pass. A value is the fp32 (or better) log-softmax of the model's logits."""
    trees = [make_tree([ids[:-1] for ids, _ in group]) for group in groups]
    starts = np.cumsum([0] + [len(tree.tokens) for tree in trees])
    attention = TreeAttention(trees, llama.device)
    tokens = torch.tensor([token for tree in trees for token in tree.tokens], device=llama.device)
    hidden = llama.hidden(tokens[:, None], cache=attention, start=attention.depth)[:, 0]
    nodes, targets, counts = [], [], []
    for start, tree, group in zip(starts, trees, groups):
        for path, (ids, scored) in zip(tree.paths, group):
            nodes += [start + node for node in path[-scored:]]
            targets += ids[-scored:]
            counts.append(scored)
    nodes, which = torch.tensor(nodes).unique(return_inverse=True)  # choices that differ in one token share its logits
    targets, values = torch.tensor(targets), torch.empty(len(targets), dtype=torch.float64)
    rows = max(1, LOGITS // llama.config.vocab_size)
    for first in range(0, len(nodes), rows):
        logits = llama.head(hidden[nodes[first:first + rows].to(llama.device)])
        logp = torch.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
        here = ((which >= first) & (which < first + rows)).nonzero()[:, 0]
        values[here] = logp[which[here] - first, targets[here]].double().cpu()
    ends = iter(values.split(counts))
    return [[next(ends).tolist() for _ in group] for group in groups]


# ----------------------------------------------------------------------------- judgement
def judge(logprobs, chars):
    """One style's part of an item's record, from the log-probabilities of each choice's tokens and its characters."""
    sums, tokens = [math.fsum(values) for values in logprobs], [len(values) for values in logprobs]
    best = lambda values: max(range(len(values)), key=values.__getitem__)  # the first of equals, as both tools
    return {"per_token": best([s / n for s, n in zip(sums, tokens)]), "sum": best(sums),
            "per_char": best([s / n for s, n in zip(sums, chars)]), "logprobs": sums, "tokens": tokens}


def is_right(record):
    """Whether the gauntlet's choice is right, or lm-eval's `acc` where only that was asked for."""
    style, kind = ("gauntlet", "per_token") if "gauntlet" in record else ("lm_eval", "sum")
    return int(record[style][kind] == record["gold"])


def judging(llama, items, prompts, styles, batch_tokens):
    """A function work(ids, finish) that calls finish(id, record) for each item, as evals.evaluate wants it.

    prompts(id, style) is (sequences, how many were cut)."""
    def work(ids, finish):
        for start in range(0, len(ids), WINDOW):
            made = {i: {style: prompts(i, style) for style in styles} for i in ids[start:start + WINDOW]}
            asked = [(i, [s for sequences, _ in made[i].values() for s in sequences]) for i in made]
            waiting = sorted(bundle(asked, batch_tokens), key=lambda group: group[1])
            while waiting:  # the longest first: if memory does not suffice, it fails at once
                batch, size = [], waiting[-1][1]
                while waiting and (not batch or (len(batch) + 1) * size <= batch_tokens):
                    batch.append(waiting.pop()[0])
                scored = score_sequences(llama, [[s for _, sequences in group for s in sequences] for group in batch])
                for group, logprobs in zip(batch, scored):
                    values = iter(logprobs)
                    for i, _ in group:
                        finish(i, {"subject": items[i].subject, "gold": items[i].gold} | {
                            style: judge([next(values) for _ in sequences], items[i].chars(style)) | {"cut": longer}
                            for style, (sequences, longer) in made[i].items()})
    return work


def write_mean(subject, metric, groups, settings, seconds):
    """As evals.write_result, for the unweighted mean of the means of some lists; its interval is +- 1.96 errors. An item's
    value is such that their mean and its error are these."""
    scores = [score(values) for values in groups]
    mean, stderr = sum(s[0] for s in scores) / len(scores), math.sqrt(sum(s[1] ** 2 for s in scores)) / len(scores)
    n = sum(map(len, groups))
    values = [mean + (v - s[0]) * n / len(groups) / len(group) for s, group in zip(scores, groups) for v in group]
    write_score(subject, metric, (mean, stderr, mean - 1.96 * stderr, mean + 1.96 * stderr), values, settings, seconds)


# ----------------------------------------------------------------------------- the run
def check_knobs(knobs):
    """Raises ValueError for knobs that do not go together."""
    for knob in ("tasks", "styles"):
        if not knobs[knob]:
            raise ValueError(f"{knob} is empty; expected some of {', '.join(_choices[knob])}")
    least = {"limit": 0, "max_seq_len": 0, "batch_tokens": 1} | {knob: 0 for knob in knobs if knob.endswith("_shots")}
    for knob, value in least.items():
        if knobs[knob] < value:
            raise ValueError(f"{knob}={knobs[knob]}: expected {value} or more")
    if knobs["lm_eval_shots"] and (not knobs["lm_eval_shot_data"] or len(knobs["tasks"]) > 1):
        raise ValueError("lm_eval_shots needs lm_eval_shot_data, the file they come from, and one task in tasks")
    if knobs["lm_eval_shots"] and knobs["lm_eval_shot_data"] == knobs[knobs["tasks"][0]]:
        raise ValueError(f"lm_eval_shot_data={knobs['lm_eval_shot_data']} is the data of {knobs['tasks'][0]} itself")


def write_task(subject, task, records, settings, seconds):
    """Print and store the accuracies of a task's records; returns the gauntlet's right and wrong, or None."""
    hits = {(style, kind): [int(record[style][kind] == record["gold"]) for record in records]
            for style in settings["styles"] for kind in ("per_token", "sum", "per_char")}
    for style in settings["styles"]:
        if count := sum(record[style]["cut"] > 0 for record in records):
            print0(f"{task}, {style}: {count} of {len(records)} items lost their beginning to "
                   f"max_seq_len={settings['max_seq_len']}")
    right = hits.get(("gauntlet", "per_token"))
    if right and task == "mmlu":  # a task for each subject
        by_subject = {}
        for record, hit in zip(records, right):
            by_subject.setdefault(record["subject"], []).append(hit)
        write_mean(subject, task, list(by_subject.values()), settings, seconds)
    elif right:
        write_result(subject, task, right, settings, seconds)
        said = [(r["gauntlet"]["logprobs"][r["gold"]], r["gauntlet"]["tokens"][r["gold"]]) for r in records]
        write_result(subject, f"{task}_loss", [-logprob / tokens for logprob, tokens in said], settings, seconds)
    if "lm_eval" in settings["styles"]:
        write_result(subject, f"{task}_acc", hits["lm_eval", "sum"], settings, seconds)
        if task in ("hellaswag", "arc_challenge"):  # lm-eval has no acc_norm of the others
            write_result(subject, f"{task}_acc_norm", hits["lm_eval", "per_char"], settings, seconds)
    return right


if __name__ == "__main__":
    with one_line_errors():
        config = configure(globals())
        check_knobs(config)
        print0(knob_table(globals()))
        items = {task: load_items(task, config[task]) for task in tasks}
        pool = load_items(tasks[0], lm_eval_shot_data) if lm_eval_shots else []
        device = start_ranks(device)
        subject = load_for_eval(model, adapter, device, pick_dtype(dtype, device), tokenizer, out_dir)
        llama, tok, max_len = subject.model, subject.tokenizer, max_seq_len or subject.model.config.max_position_embeddings
        if max_len > llama.config.max_position_embeddings:
            raise ValueError(f"max_seq_len={max_len}: the model reads {llama.config.max_position_embeddings} tokens at most")
        if tok.bos_id is None and (bos or lm_eval_bos):
            raise ValueError(f"bos: this tokenizer has none ({tok.name}); say --bos=False --lm_eval_bos=False")
        print0(f"{subject.run} step {subject.step}, {subject.identity['dtype']}, {device_name(device)}, {tok.name}; "
               f"gauntlet's prompts {'begin with' if bos else 'have no'} BOS, lm_eval's {'do too' * lm_eval_bos or 'none'}")
        knobs = {key: value for key, value in config.items() if key not in subject.identity}
        right, began = {}, time.perf_counter()
        for task in tasks:
            started, shots = time.perf_counter(), config[f"{task}_shots"]
            drawn = {"gauntlet": gauntlet_shots(items[task], shots, shot_seed),
                     "lm_eval": lm_eval_shots_from(pool, items[task], lm_eval_shots, task)}
            of_task = {"task": task, "items": digest(items[task]), "styles": styles, "shots": shots, "shot_seed": shot_seed,
                       "bos": bos, "lm_eval_shots": lm_eval_shots, "lm_eval_shots_from": digest(pool),
                       "lm_eval_bos": lm_eval_bos, "max_seq_len": max_len}

            def prompts(i, style, task=task, drawn=drawn):
                make = gauntlet_sequences if style == "gauntlet" else lm_eval_sequences
                return make(items[task][i], drawn[style][i], DELIMITER[task], tok,
                            bos if style == "gauntlet" else lm_eval_bos, max_len)

            for style in styles:
                ids, scored = prompts(0, style)[0][items[task][0].gold]
                print0(f"{task}, {style}: ...{tok.decode(ids[:-scored])[-100:]!r} -> {tok.decode(ids[-scored:])!r}")
            count = min(limit or len(items[task]), len(items[task]))
            records = evaluate(subject, f"{name}_{task}", range(count), of_task,
                               judging(llama, items[task], prompts, styles, batch_tokens), is_right)
            right[task] = write_task(subject, task, list(records.values()), {**knobs, **of_task},
                                     time.perf_counter() - started)
        if all(right.get(task) for task in FORGETTING):
            write_mean(subject, "forgetting", [right[task] for task in FORGETTING], knobs, time.perf_counter() - began)
        else:
            print0(f"no forgetting number: that is the mean of {', '.join(FORGETTING)} in the gauntlet's style")
