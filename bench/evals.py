"""
Speed of the evaluations: GSM8K against a loop around transformers' generate, the sandbox against
bare starts of Python.

    gsm8k     5 shots + question -> at most 256 greedy tokens, the harness's stop strings
              ours: rows join and leave a batch | peer: batches of similar length, padded
    starts    HumanEval's solutions in the sandbox | as many `python -c pass`, one by one

    python -m bench.evals --model=models/smollm2-135m
    python -m bench.evals --parts=starts

Both sides of each take turns in one process.
"""
import itertools
import statistics
import subprocess
import sys
from collections import defaultdict

import torch

from bench.sides import (clock, in_turn, left_padded, load_peer, print_machine, ratio_words,
                         write_results)
from configurator import configure, knob_table
from eval_gsm8k import STOPS, build_prompt, draw_shots
from eval_humaneval import FIELDS, run_program
from evaluation.evals import read_items
from evaluation.sandbox import Sandbox
from model import Llama
from runtime import one_line_errors, pick_device
from text.tokenizer import load_tokenizer, text_stopper

# -----------------------------------------------------------------------------
model = ''               # gsm8k: model folder
parts = ('gsm8k', 'starts')
items = 16               # gsm8k: of the test set
items_at_once = 16       # rows that ours generates at once
peer_at_once = 8         # and the peer
gsm8k_test = 'hf://datasets/openai/gsm8k/main/test-00000-of-00001.parquet'
gsm8k_train = 'hf://datasets/openai/gsm8k/main/train-00000-of-00001.parquet'
programs = 1640          # starts
humaneval = 'hf://datasets/openai/openai_humaneval/openai_humaneval/test-00000-of-00001.parquet'
repeats = 3              # rounds; the median counts
dtype = 'bfloat16'
device = 'auto'          # auto | cpu | cuda | cuda:N
out = ''                 # also write the results to this JSON file
_choices = {'parts': ('gsm8k', 'starts'), 'dtype': ('float32', 'bfloat16')}

SIDES = ("ours", "peer")
NEW_TOKENS = 256  # at most, the harness's


# ----------------------------------------------------------------------------- gsm8k
def gsm8k_prompts(tokenizer, gsm8k_test, gsm8k_train, items):
    """Ids of the first items' prompts, 5 shots each, the longest first as in lm-eval."""
    fields = ("question", "answer")
    test = read_items(gsm8k_test, fields, "gsm8k_test")[:items]
    train = read_items(gsm8k_train, fields, "gsm8k_train")
    prompts = []
    for item, rows in zip(test, draw_shots(len(test), len(train), 5)):
        shots = [train[row] for row in rows]
        prompts.append(tokenizer.encode(build_prompt(item["question"], shots)))
    return sorted(prompts, key=len, reverse=True)


def answer_prompts(side, llama, prompts, new_tokens, stop, at_once):
    """New ids of each prompt; the peer's may go on after the stop."""
    if side == "ours":
        answers = llama.generate(prompts, new_tokens, stop=stop, batch_size=at_once)
        return [ids for [ids] in answers]

    # the loop that lm-eval runs around transformers' generate
    answers = []
    for start in range(0, len(prompts), at_once):
        ids, mask = left_padded(prompts[start:start + at_once], llama.device)
        width = ids.shape[1]

        # a batch ends when all of its rows have
        def ended(ids, scores, **_):
            rows = [stop(row) for row in ids[:, width:].tolist()]
            return torch.tensor(rows, device=ids.device)

        made = llama.generate(ids, attention_mask=mask, max_new_tokens=new_tokens,
                              do_sample=False, pad_token_id=0, stopping_criteria=[ended])
        answers += made[:, width:].tolist()
    return answers


def cut_after_stop(ids, stop):
    """The ids up to the first stop."""
    for length in range(1, len(ids)):
        if stop(ids[:length]):
            return ids[:length]
    return ids


def bench_gsm8k(model, gsm8k_test, gsm8k_train, items, at_once, repeats, dtype, device):
    """Answer GSM8K's first items by both sides in turn; print and return items a second of both.

    at_once: {side: rows at once}."""
    tokenizer = load_tokenizer(model)
    prompts = gsm8k_prompts(tokenizer, gsm8k_test, gsm8k_train, items)
    stop = text_stopper(tokenizer, STOPS, {tokenizer.eos_id})
    models = {"ours": Llama.from_pretrained(model, dtype, device).eval(),
              "peer": load_peer(model, dtype, device).eval()}

    # a short round to warm up
    short = [prompts[-1][:64]] * 2
    for side in SIDES:
        answer_prompts(side, models[side], short, 3, stop, at_once[side])

    # all prompts, in turn
    seconds = defaultdict(list)
    answers = {}
    for side in in_turn(SIDES, repeats):
        started = clock(device)
        answers[side] = answer_prompts(side, models[side], prompts, NEW_TOKENS, stop, at_once[side])
        seconds[side].append(clock(device) - started)
    answers["peer"] = [cut_after_stop(ids, stop) for ids in answers["peer"]]

    # items a second, and how many answers are the same
    result = {}
    words = []
    for side in SIDES:
        lengths = [len(ids) for ids in answers[side]]
        speed = len(prompts) / statistics.median(seconds[side])
        result[side] = {"items_per_s": speed, "seconds": seconds[side], "new_tokens": lengths}
        words.append(f"{side} {speed:.3f} items/s, {sum(lengths)} new tokens")
    same = sum(ours == peer for ours, peer in zip(answers["ours"], answers["peer"]))
    print(f"gsm8k    {'   '.join(words)}   {same} of {len(prompts)} answers equal   "
          f"{ratio_words(seconds['ours'], seconds['peer'])}", flush=True)
    return result


# ----------------------------------------------------------------------------- starts
def run_sandboxed(solutions, box):
    """Run HumanEval's solutions in the sandbox; raises RuntimeError where one does not pass."""
    failed = []
    for problem in solutions:
        program = "\n" + problem["canonical_solution"]
        if not run_program(problem, program, box=box)["passed"]:
            failed.append(problem["task_id"])
    if failed:
        raise RuntimeError(f"{len(failed)} solutions did not pass: {failed[:5]}")


def run_bare(count):
    """Start Python `count` times."""
    for _ in range(count):
        subprocess.run([sys.executable, "-I", "-B", "-c", "pass"], check=True)


def bench_starts(humaneval, programs, repeats, device):
    """Run solutions sandboxed and Python bare, in turn; print and return the seconds of each."""
    # as many as asked for, from the first again when they run out
    problems = read_items(humaneval, (*FIELDS, "canonical_solution"), "humaneval")
    solutions = list(itertools.islice(itertools.cycle(problems), programs))
    seconds = defaultdict(list)
    with Sandbox() as box:
        for name in in_turn(("sandboxed", "bare"), repeats):
            started = clock(device)
            if name == "sandboxed":
                run_sandboxed(solutions, box)
            else:
                run_bare(programs)
            seconds[name].append(clock(device) - started)
    sandboxed = statistics.median(seconds["sandboxed"])
    bare = statistics.median(seconds["bare"])
    print(f"starts   {programs} programs: sandboxed {sandboxed:.1f} s, bare {bare:.1f} s   "
          f"{sandboxed / bare:.2f} times as long", flush=True)
    return seconds


# -----------------------------------------------------------------------------
if __name__ == "__main__":
    with one_line_errors():
        config = configure(globals())
        print(knob_table(globals()))
        if "gsm8k" in parts and not model:
            raise ValueError("model: expected a model folder for parts=gsm8k; "
                             "--parts=starts needs none")
        device = pick_device(device)
        print_machine(device)

        # one part after the other, written as they come
        results = {}
        for part in parts:
            if part == "gsm8k":
                at_once = {"ours": items_at_once, "peer": peer_at_once}
                results[part] = bench_gsm8k(model, gsm8k_test, gsm8k_train, items, at_once,
                                            repeats, getattr(torch, dtype), device)
            else:
                results[part] = bench_starts(humaneval, programs, repeats, device)
            write_results(out, config, device, results)
