"""
Stage 3, learning: GSM8K as lm-evaluation-harness 0.4.2 asks and judges it (task gsm8k, version 3.0).

    python eval_gsm8k.py --model=out/gsm8k-r16/step_200 --test_data=gsm8k/test.jsonl --train_data=gsm8k/train.jsonl
    python eval_gsm8k.py --model=models/llama2-7b --adapter=out/gsm8k-r16/step_200 --limit=200
    torchrun --nproc_per_node=8 eval_gsm8k.py --model=models/llama2-7b

Greedy answers after five worked examples. strict: the number after the first "#### "; flexible: the last number.
Every item, with prompt and output, is a line of eval_gsm8k.jsonl; the scores are lines of results.jsonl. Started
again after a kill, it goes on with the items that are missing; the answers do not depend on batch or number of GPUs.
"""
import random
import re
import time
from functools import partial

from configurator import configure, knob_table
from evaluation.evals import cut_left, digest, evaluate, load_for_eval, read_items, start_ranks, write_result
from runtime import one_line_errors, pick_dtype, print0
from text.tokenizer import text_stopper

# -----------------------------------------------------------------------------
model = ''               # model folder, checkpoint folder out/RUN/step_N, or PEFT folder
adapter = ''             # PEFT folder whose base is `model`
tokenizer = ''           # tokenizer file or folder; '' = the base's
test_data = 'hf://datasets/openai/gsm8k/main/test-00000-of-00001.parquet'
train_data = 'hf://datasets/openai/gsm8k/main/train-00000-of-00001.parquet'  # the worked examples come from here
shots = 5
shot_seed = 1234         # the harness's; its draws go on from item to item
bos = False              # the harness sends none; True = one, as Llama was trained
max_new_tokens = 256     # the harness's
limit = 0                # only the first so many items; 0 = all
batch_size = 64          # rows generated at once
name = 'gsm8k'           # items go to eval_NAME.jsonl: another name keeps items of other settings apart
out_dir = ''             # for items and results.jsonl; '' = the checkpoint's folder and its run's, or out/MODEL
device = 'auto'          # auto | cpu | cuda | cuda:N
dtype = 'auto'           # auto = bf16 on GPUs that have it, else fp32
_choices = {'dtype': ('auto', 'float32', 'bfloat16', 'float64')}

STOPS = ("Question:", "</s>", "<|im_end|>")
INVALID = "[invalid]"    # the harness's extraction where no number is found


# ----------------------------------------------------------------------------- prompts
def draw_shots(count, train_size, shots, seed=1234):
    """Rows of the train set for each of `count` test items, a list of lists. One stream of draws runs through
    the items in order, as in lm-eval's ContextSampler: item k needs those of items 0 to k-1."""
    rng = random.Random(seed)
    return [rng.sample(range(train_size), shots) for _ in range(count)]


def build_prompt(question, shots):
    """The harness's text: worked examples (records with question and answer), then the question."""
    worked = [f"Question: {shot['question']}\nAnswer: {shot['answer']}\n\n" for shot in shots]
    return "".join(worked) + f"Question: {question}\nAnswer:"


# ----------------------------------------------------------------------------- answers
def cut_at_stops(text):
    """The text before the first stop string."""
    for stop in STOPS:
        text = text.split(stop)[0]
    return text


def extract_strict(text):
    """The number after the first '#### ' that one follows, as written, or '[invalid]' (filter strict-match)."""
    found = re.search(r"#### (-?[0-9.,]+)", text)
    return found[1] if found else INVALID


def extract_flexible(text):
    """The last number, as written (with $ and separators), or '[invalid]' (filter flexible-extract)."""
    found = re.findall(r"-?[$0-9.,]{2,}|-?[0-9]+", text)
    return found[-1].strip() if found else INVALID


def normalise(answer):
    """What the harness compares: without commas, dollars, all up to the last '#### ', and one full stop at the end."""
    for ignored in (",", r"\$", r"(?s).*#### ", r"\.$"):
        answer = re.sub(ignored, "", answer)
    return answer.lower()


def judge(output, answer):
    """The part of an item's record that says how right an output is; `answer` is the data set's, with its '#### '."""
    output = cut_at_stops(output)
    strict, flexible = extract_strict(output), extract_flexible(output)
    return {"output": output, "gold": answer.split("#### ")[-1], "strict": strict, "flexible": flexible,
            "strict_match": int(normalise(strict) == normalise(answer)),
            "flexible_match": int(normalise(flexible) == normalise(answer))}


# ----------------------------------------------------------------------------- the run
def answer_items(prompts, questions, subject, ids, finish):
    """Generate and judge the answers to prompts[i] for i in ids; prompts are (text, token ids, tokens cut)."""
    tok = subject.tokenizer
    stop = text_stopper(tok, STOPS, {tok.eos_id})
    ids = sorted(ids, key=lambda i: -len(prompts[i][1]))  # rows of a batch read no more keys than its longest

    answers = subject.model.generate_each([prompts[i][1] for i in ids], max_new_tokens, stop=stop, batch_size=batch_size)
    for k, (new,) in answers:
        i = ids[k]
        text, tokens, cut = prompts[i]
        ended = new[-1] == tok.eos_id or stop(new)
        finish(i, {"prompt": text, **judge(tok.decode(new), questions[i]["answer"]), "prompt_tokens": len(tokens),
                   "cut": cut, "new_tokens": len(new), "truncated": int(not ended)})


if __name__ == "__main__":
    with one_line_errors():
        config = configure(globals())
        print0(knob_table(globals()))
        if min(max_new_tokens, batch_size) < 1 or min(shots, limit) < 0:
            raise ValueError("max_new_tokens and batch_size must be at least 1, shots and limit not negative")
        questions = read_items(test_data, ("question", "answer"), "test_data")
        train = read_items(train_data, ("question", "answer"), "train_data") if shots else []
        if shots > len(train):
            raise ValueError(f"shots={shots}, but {train_data} has only {len(train)} records")
        if bad := [i for i, q in enumerate(questions + train) if "#### " not in q["answer"]]:
            where, i = (test_data, bad[0]) if bad[0] < len(questions) else (train_data, bad[0] - len(questions))
            raise ValueError(f"{where}, record {i + 1}: its answer has no '#### ', so this is not GSM8K")
        data = digest([questions, train])
        drawn = draw_shots(len(questions), len(train), shots, shot_seed)
        questions = questions[:limit or None]
        device = start_ranks(device)
        subject = load_for_eval(model, adapter, device, pick_dtype(dtype, device), tokenizer, out_dir)

        tok, room = subject.tokenizer, subject.model.config.max_position_embeddings - max_new_tokens
        if room < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} leaves no room for a prompt in the model's context of "
                             f"{subject.model.config.max_position_embeddings}")
        prompts = []
        for question, rows in zip(questions, drawn):
            text = build_prompt(question["question"], [train[row] for row in rows])
            prompts.append((text, *cut_left(tok.encode(text, bos=bos), room, tok.bos_id if bos else None)))
            if bos and prompts[-1][1].count(tok.bos_id) != 1:
                raise ValueError(f"item {len(prompts) - 1}: {prompts[-1][1].count(tok.bos_id)} BOS, expected 1")
        lengths = [len(tokens) for _, tokens, _ in prompts]
        print0(f"the first prompt:\n{prompts[0][0]}\n")
        print0(f"{len(prompts)} items, {shots} shots, prompts of {min(lengths)} to {max(lengths)} tokens, " +
               (f"BOS (id {tok.bos_id}) in front" if bos else "no BOS in front, as the harness"))
        if cut := [cut for _, _, cut in prompts if cut]:
            print0(f"WARNING: {len(cut)} prompts were cut from the left, by up to {max(cut)} tokens, to {room}")

        started = time.perf_counter()
        settings = {"shots": shots, "shot_seed": shot_seed, "bos": bos, "max_new_tokens": max_new_tokens, "data": data}
        records = evaluate(subject, name, range(len(prompts)), settings, partial(answer_items, prompts, questions, subject),
                           lambda record: record["strict_match"]).values()
        seconds = time.perf_counter() - started
        settings = {**config, **settings}
        for metric in ("strict_match", "flexible_match", "truncated", "cut"):
            values = [min(1, record[metric]) for record in records]
            write_result(subject, f"{name}_{metric}", values, settings, seconds)
