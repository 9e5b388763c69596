"""
Speed of the evaluations: GSM8K against a loop around transformers' generate, the sandbox against bare starts of Python.

    python -m bench.evals --model=models/smollm2-135m
    python -m bench.evals --parts=starts

Both sides of each take turns in one process.
"""
import itertools
import json
import statistics
import subprocess
import sys

import torch

from bench.train import alternate, left_padded
from configurator import configure, knob_table
from eval_gsm8k import STOPS, build_prompt, draw_shots
from eval_humaneval import FIELDS, run_program
from evaluation.evals import read_items
from model import Llama
from runtime import device_name, one_line_errors, pick_device, versions, write_whole
from evaluation.sandbox import Sandbox
from text.tokenizer import load_tokenizer, text_stopper

# -----------------------------------------------------------------------------
model = ''               # gsm8k: model folder
parts = ('gsm8k', 'starts')
items = 16               # gsm8k: of the test set, 5 shots, greedy, at most 256 new tokens, the harness's stop strings
items_at_once = 16       # rows that ours generates at once
peer_at_once = 8         # and the peer, prompts of similar length padded on the left
gsm8k_test = 'hf://datasets/openai/gsm8k/main/test-00000-of-00001.parquet'
gsm8k_train = 'hf://datasets/openai/gsm8k/main/train-00000-of-00001.parquet'
programs = 1640          # starts: HumanEval's solutions in the sandbox, and as many bare starts of Python, one by one
humaneval = 'hf://datasets/openai/openai_humaneval/openai_humaneval/test-00000-of-00001.parquet'
repeats = 3              # rounds; the median counts
dtype = 'bfloat16'
device = 'auto'          # auto | cpu | cuda | cuda:N
out = ''                 # also write the results to this JSON file
_choices = {'parts': ('gsm8k', 'starts'), 'dtype': ('float32', 'bfloat16')}


def gsm8k():
    """Answer GSM8K's first items, ours and by a loop around transformers' generate, in turn; prints and returns both."""
    tok, fields = load_tokenizer(model), ("question", "answer")
    test, train = read_items(gsm8k_test, fields, "gsm8k_test")[:items], read_items(gsm8k_train, fields, "gsm8k_train")
    shots = [[train[i] for i in rows] for rows in draw_shots(len(test), len(train), 5)]
    texts = sorted([tok.encode(build_prompt(q["question"], s)) for q, s in zip(test, shots)], key=len, reverse=True)
    stop, made = text_stopper(tok, STOPS, {tok.eos_id}), {}
    from transformers import AutoModelForCausalLM
    mine, peer = Llama.from_pretrained(model, getattr(torch, dtype), device).eval(), AutoModelForCausalLM.from_pretrained(
        model, dtype=getattr(torch, dtype), attn_implementation="sdpa").to(device).eval()

    def by_ours(texts=texts, new=256):
        made["ours"] = [ids for [ids] in mine.generate(texts, new, stop=stop, batch_size=items_at_once)]

    def by_peer(texts=texts, new=256):
        made["peer"] = []
        for start in range(0, len(texts), peer_at_once):  # longest first, as in lm-evaluation-harness
            ids, mask = left_padded(texts[start:start + peer_at_once], device)
            width = ids.shape[1]
            ended = lambda ids, scores, width=width, **_: torch.tensor(
                [stop(row) for row in ids[:, width:].tolist()], device=device)
            made["peer"] += peer.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0,
                                            stopping_criteria=[ended])[:, width:].tolist()

    runs = {"ours": by_ours, "peer": by_peer}
    for run in runs.values():
        run([texts[-1][:64]] * 2, 3)
    seconds = alternate(runs, repeats, device)
    made["peer"] = [row[:next((n for n in range(1, len(row)) if stop(row[:n])), len(row))] for row in made["peer"]]
    result = {name: {"items_per_s": len(texts) / statistics.median(times), "seconds": times,
                     "new_tokens": [len(ids) for ids in made[name]]} for name, times in seconds.items()}
    same = sum(a == b for a, b in zip(*made.values()))
    print(f"gsm8k    ours {result['ours']['items_per_s']:.3f} items/s, {sum(result['ours']['new_tokens'])} new tokens   peer "
          f"{result['peer']['items_per_s']:.3f} items/s, {sum(result['peer']['new_tokens'])} new tokens   {same} of {len(texts)} "
          f"answers equal   {result['ours']['items_per_s'] / result['peer']['items_per_s']:.2f}x", flush=True)
    return result


def starts():
    """Run HumanEval's solutions in the sandbox and Python bare, in turn; prints and returns the seconds of each."""
    solutions = read_items(humaneval, (*FIELDS, "canonical_solution"), "humaneval")
    some = list(itertools.islice(itertools.cycle(solutions), programs))
    with Sandbox() as box:
        def sandboxed():
            failed = [p["task_id"] for p in some if not run_program(p, "\n" + p["canonical_solution"], box=box)["passed"]]
            if failed:
                raise RuntimeError(f"{len(failed)} solutions did not pass: {failed[:5]}")

        bare = lambda: [subprocess.run([sys.executable, "-I", "-B", "-c", "pass"], check=True) for _ in some]
        seconds = alternate({"sandboxed": sandboxed, "bare": bare}, repeats, device)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"starts   {programs} programs: sandboxed {median['sandboxed']:.1f} s, bare {median['bare']:.1f} s   "
          f"{median['sandboxed'] / median['bare']:.2f} times as long", flush=True)
    return seconds


# -----------------------------------------------------------------------------
if __name__ == "__main__":
    with one_line_errors():
        config = configure(globals())
        print(knob_table(globals()))
        if "gsm8k" in parts and not model:
            raise ValueError("model: expected a model folder for parts=gsm8k; --parts=starts needs none")
        device, results = pick_device(device), {}
        print(f"{device_name(device)}, {versions()}")
        for kind in parts:
            results[kind] = {"gsm8k": gsm8k, "starts": starts}[kind]()
            if out:
                write_whole(out, json.dumps({"config": {**config, "device": str(device)}, "device": device_name(device),
                                             "versions": versions(), "results": results}, indent=1))
