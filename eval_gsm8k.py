r"""Stage 3, learning: GSM8K prompted and scored as in lm-evaluation-harness 0.4.2 (task 3.0).

    python eval_gsm8k.py --model=out/gsm8k-r16/step_200
    python eval_gsm8k.py --model=models/llama2-7b --adapter=out/gsm8k-r16/step_200 --limit=200
    torchrun --nproc_per_node=8 eval_gsm8k.py --model=models/llama2-7b

    Question: Natalia sold ...\nAnswer: ... #### 72      five worked examples of the train set
    Question: Janet's ducks ...\nAnswer:                 the item
    -> " She sells 9 * 2 = $18.\n#### 18\n\nQuestion: "   greedy, up to the first stop string
       strict: 18, the number after the first "#### "; flexible: 18, the last number

A prompt too long for the model is cut from the left and counted (metric gsm8k_cut); BOS stays (not
in lm-eval 0.4.13: --harness=0.4.13). Run again after a kill, it does only the missing items. Batch
size and number of GPUs do not change the answers.
"""
import random
import re
import time
from operator import itemgetter
from typing import NamedTuple

from configurator import configure, knob_table
from evaluation import peft_comparison
from evaluation.evals import (begin_and_end, bos_of_harness, cut_left, digest, find_model,
                              generate_items, load_for_eval, open_items, read_items, start_ranks,
                              warn_of_cuts, with_eos_spelled, without_eos)
from evaluation.scores import write_result
from runtime import one_line_errors, pick_dtype, print0
from text.tokenizer import text_stopper

# -----------------------------------------------------------------------------
model = ''               # model folder, checkpoint folder out/RUN/step_N, or PEFT folder
adapter = ''             # PEFT folder whose base is `model`
t = 1.0                  # evaluate W0 + t (W - W0): 0 is the base, 0.5 halfway back to it
tokenizer = ''           # tokenizer file or folder; '' = the base's
test_data = 'hf://datasets/openai/gsm8k/main/test-00000-of-00001.parquet'
train_data = 'hf://datasets/openai/gsm8k/main/train-00000-of-00001.parquet'  # of worked examples
shots = 5
shot_seed = 1234         # the harness's; one random stream for all items
harness = '0.4.2'        # lm-eval version: 0.4.2 adds no BOS; 0.4.13 as the tokenizer, unless cut
                         # | peft: as PEFT's comparison of methods (evaluation/peft_comparison.py)
bos = None               # None = as the harness; True = one, as Llama was trained
max_new_tokens = 256     # the harness's
limit = 0                # only this many items, from the first; 0 = all
batch_size = 64          # rows generated at once
name = 'gsm8k'           # items go to eval_NAME.jsonl: another name for other settings
out_dir = ''             # for items and results; '' = the checkpoint's folder, or out/MODEL
device = 'auto'          # auto | cpu | cuda | cuda:N
dtype = 'auto'           # auto = bf16 on GPUs that have it, else fp32
_types = {'bos': bool}
_choices = {'dtype': ('auto', 'float32', 'bfloat16', 'float64'),
            'harness': ('0.4.2', '0.4.13', 'peft')}

STOPS = ("Question:", "</s>", "<|im_end|>")
INVALID = "[invalid]"    # where no number is found


# ----------------------------------------------------------------------------- questions
def read_questions(path, knob):
    """GSM8K's records, dicts with question and answer; raises ValueError for other data."""
    records = read_items(path, {"question": str, "answer": str}, knob)
    for number, record in enumerate(records, 1):
        if "#### " not in record["answer"]:
            raise ValueError(f"{path}, record {number}: its answer has no '#### ', not GSM8K's")
    return records


def draw_shots(count, train_size, shots, seed=1234):
    """The train rows to show before each of `count` test items, a list of lists, from one random
    stream over the items in order, as in lm-eval's ContextSampler."""
    rng = random.Random(seed)
    return [rng.sample(range(train_size), shots) for _ in range(count)]


def build_prompt(question, shots, harness="0.4.2"):
    """The harness's text: worked examples (records with question and answer), then the question."""
    if harness == "peft":
        return peft_comparison.PROMPT.format(question=question)
    worked = [f"Question: {shot['question']}\nAnswer: {shot['answer']}\n\n" for shot in shots]
    return "".join(worked) + f"Question: {question}\nAnswer:"


class Prompt(NamedTuple):
    text: str
    tokens: list
    cut: int             # tokens cut from its beginning


def make_prompts(questions, train, drawn, tok, bos, room, harness="0.4.2"):
    """A Prompt for each question, of at most `room` tokens; drawn: its rows of `train`."""
    prompts = []
    for question, rows in zip(questions, drawn):
        text = build_prompt(question["question"], [train[row] for row in rows], harness)
        tokens = tok.encode(text, bos=bos)
        # a BOS stays in front of what is left
        tokens, cut = cut_left(tokens, room, tok.bos_id if bos is True else None)
        prompts.append(Prompt(text, tokens, cut))
    return prompts


def print_prompts(prompts, shots, bos, tok):
    lengths = [len(prompt.tokens) for prompt in prompts]
    print0(f"the first prompt:\n{prompts[0].text}\n")
    print0(f"{len(prompts)} items, {shots} shots, "
           f"prompts of {min(lengths)} to {max(lengths)} tokens, {begin_and_end(tok, bos)}")
    warn_of_cuts([prompt.cut for prompt in prompts], max(lengths))


# ----------------------------------------------------------------------------- answers
def cut_at_stops(text, stops=STOPS):
    """The text before the first stop string."""
    for stop in stops:
        text = text.split(stop)[0]
    return text


def extract_strict(text):
    """The number after the first '#### ' that has one, as written, or '[invalid]'."""
    found = re.search(r"#### (-?[0-9.,]+)", text)
    return found[1] if found else INVALID


def extract_flexible(text):
    """The last number, as written (with $ and separators), or '[invalid]'."""
    found = re.findall(r"-?[$0-9.,]{2,}|-?[0-9]+", text)
    return found[-1].strip() if found else INVALID


def normalise(answer):
    """What the harness compares: without commas, dollars, text up to '#### ' or a final period."""
    # the harness's expressions, in its order
    for ignored in (",", r"\$", r"(?s).*#### ", r"\.$"):
        answer = re.sub(ignored, "", answer)
    return answer.lower()


def judge_answer(output, answer, stops=STOPS, harness="0.4.2"):
    """Scores of an output against GSM8K's answer, as fields of the item's record."""
    # after the first stop string the model may go on to ask and answer its own questions
    output = cut_at_stops(output, stops)
    strict = extract_strict(output)
    flexible = extract_flexible(output)
    gold = normalise(answer)
    strict_match = normalise(strict) == gold
    if harness == "peft":
        strict = peft_comparison.extract_answer(output) or INVALID
        strict_match = peft_comparison.is_right(output, answer)
    return {"output": output, "gold": answer.split("#### ")[-1],
            "strict": strict, "flexible": flexible, "strict_match": int(strict_match),
            "flexible_match": int(normalise(flexible) == gold)}


def answer_questions(items, subject, prompts, questions, max_new_tokens, batch_size,
                     harness="0.4.2"):
    """Generate, score and save the answers missing from `items`; returns all records."""
    tok = subject.tokenizer
    stops = () if harness == "peft" else with_eos_spelled(STOPS, tok)
    stop = text_stopper(tok, stops, tok.stop_ids)
    # longest first, so that the prompts in a batch have similar lengths
    todo = sorted(items.todo, key=lambda i: -len(prompts[i].tokens))
    tokens = [prompts[i].tokens for i in todo]
    answers = generate_items(subject, todo, tokens, max_new_tokens, stop=stop,
                             batch_size=batch_size)
    for i, samples in answers:
        new = samples[0]
        # an answer ends with EOS or a stop string, unless the limit cut it short
        ended = stop(new)
        output = tok.decode(without_eos(tok, new))
        verdict = judge_answer(output, questions[i]["answer"], stops, harness)
        items.finish(i, {"prompt": prompts[i].text, **verdict,
                         "prompt_tokens": len(prompts[i].tokens), "cut": prompts[i].cut,
                         "new_tokens": len(new), "truncated": int(not ended)})
    return items.close()


if __name__ == "__main__":
    with one_line_errors():
        config = configure(globals())
        print0(knob_table(globals()))
        if min(max_new_tokens, batch_size) < 1 or min(shots, limit) < 0:
            raise ValueError("max_new_tokens, batch_size: at least 1; shots, limit: at least 0")
        if harness == "peft" and shots:
            raise ValueError(f"shots={shots}: harness='peft' has no worked examples; say --shots=0")
        find_model(model, adapter)
        # the questions and their worked examples, drawn for all so that the limit changes none
        questions = read_questions(test_data, "test_data")
        train = read_questions(train_data, "train_data") if shots else []
        if shots > len(train):
            raise ValueError(f"shots={shots}, but {train_data} has only {len(train)} records")
        data = digest([questions, train])
        drawn = draw_shots(len(questions), len(train), shots, shot_seed)
        questions = questions[:limit or None]

        # the model and its prompts
        device = start_ranks(device)
        dtype = pick_dtype(dtype, device)
        subject = load_for_eval(model, adapter, device, dtype, tokenizer, out_dir, t)
        bos = bos_of_harness(harness, bos, subject.tokenizer)
        context = subject.model.config.max_position_embeddings
        room = context - max_new_tokens
        if room < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} leaves no room for a prompt in the "
                             f"model's context of {context}")
        prompts = make_prompts(questions, train, drawn, subject.tokenizer, bos, room, harness)
        print_prompts(prompts, shots, bos, subject.tokenizer)

        # the answers and their scores
        started = time.perf_counter()
        settings = {"shots": shots, "shot_seed": shot_seed, "bos": bos,
                    "max_new_tokens": max_new_tokens, "data": data}
        if harness == "peft":
            settings["harness"] = harness
        items = open_items(subject, name, range(len(prompts)), settings, itemgetter("strict_match"))
        records = answer_questions(items, subject, prompts, questions, max_new_tokens, batch_size,
                                   harness)
        seconds = time.perf_counter() - started
        for metric in ("strict_match", "flexible_match", "truncated", "cut"):
            values = [min(1, record[metric]) for record in records.values()]
            write_result(subject, f"{name}_{metric}", values, {**config, **settings}, seconds)
