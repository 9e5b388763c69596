"""
Stage 3, learning: HumanEval as bigcode-evaluation-harness asks and cuts it, pass@k, and diversity of the samples.

    python eval_humaneval.py --model=out/code-r16/step_200 --data=HumanEval.jsonl.gz --allow_code_execution=True
    python eval_humaneval.py --model=models/llama2-7b --mode=passk         # samples only: eval_humaneval.jsonl
    python eval_humaneval.py --samples=out/code-r16/step_200/eval_humaneval.jsonl --allow_code_execution=True
    torchrun --nproc_per_node=8 eval_humaneval.py --model=models/llama2-7b

Two steps. The first writes n completions of each problem to eval_NAME.jsonl. The second runs them, which a model's
programs are only allowed to do with --allow_code_execution=True, and writes eval_NAME_run.jsonl and results.jsonl.
It takes other tools' samples as well: lines {"task_id", "completion"} (human-eval) or a list of lists of whole
programs (bigcode's generations.json). Both go on where a kill left them. What keeps the programs from doing harm, and
what does not, stands at the head of evaluation/sandbox.py.
"""
import json
import math
import os
import queue
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from configurator import configure, knob_table
from evaluation.evals import WORLD, cut_left, digest, evaluate, load_for_eval, place, read_items, start_ranks, write_result
from runtime import one_line_errors, pick_dtype, print0
from evaluation.sandbox import Sandbox
from text.tokenizer import text_stopper

# -----------------------------------------------------------------------------
model = ''               # model folder, checkpoint folder out/RUN/step_N, or PEFT folder
adapter = ''             # PEFT folder whose base is `model`
tokenizer = ''           # tokenizer file or folder; '' = the base's
data = 'hf://datasets/openai/openai_humaneval/openai_humaneval/test-00000-of-00001.parquet'
mode = 'pass1'           # the paper's protocols: pass1 = n 50, T 0.2, k 1 and 10 | passk = n 256, T 0.8, k 1 to 256
n_samples = 0            # a problem; 0 = the mode's (torchrun would take --n for its own)
temperature = -1.0       # 0 = greedy; -1 = the mode's
top_p = 0.95
k = (0,)                 # which pass@k; 0 = the mode's
seed = 0
bos = True               # as Llama's tokenizer adds it in the harness; False for models trained without
strip_prompt = True      # the harness's 'humaneval'; False = 'humaneval-unstripped'
max_length = 512         # tokens of prompt and completion together, as the harness counts
limit = 0                # only the first so many problems; 0 = all
batch_size = 64          # rows generated at once
# running the samples
allow_code_execution = False
samples = ''             # run this file of samples instead of generating them
timeout = 3.0            # seconds a program may take, the start of Python included
memory_mb = 2048         # address space of each process
sandbox = 'full'         # full = namespaces | process = limits only, where the kernel allows no more (see evaluation/sandbox.py)
workers = 0              # programs at once; 0 = CPU cores
# where
name = 'humaneval'       # samples go to eval_NAME.jsonl: another name keeps samples of other settings apart
out_dir = ''             # for items and results.jsonl; '' = the checkpoint's folder and its run's, or out/MODEL
device = 'auto'          # auto | cpu | cuda | cuda:N
dtype = 'auto'           # auto = bf16 on GPUs that have it, else fp32
_choices = {'dtype': ('auto', 'float32', 'bfloat16', 'float64'), 'mode': ('pass1', 'passk'), 'sandbox': ('full', 'process')}

MODES = {"pass1": {"n_samples": 50, "temperature": 0.2, "k": (1, 10)},
         "passk": {"n_samples": 256, "temperature": 0.8, "k": (1, 2, 4, 8, 16, 32, 64, 128, 256)}}
STOPS = ("\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif", "\n```", "<file_sep>")
FIELDS = ("task_id", "prompt", "entry_point", "test")


# ----------------------------------------------------------------------------- prompts and completions
def prompt_of(problem, strip=True):
    return problem["prompt"].strip() if strip else problem["prompt"]


def truncate_at_stop(text, stops=STOPS + ("</s>",)):
    """A completion up to the first stop word in it; the harness adds the tokenizer's EOS to its task's words."""
    return text[:min([at for stop in stops if (at := text.find(stop)) >= 0], default=len(text))]


def sample_problems(problems, subject, ids, finish):
    """n_samples completions of each of problems[i], i in ids; random numbers belong to (seed, problem, sample)."""
    tok, context = subject.tokenizer, subject.model.config.max_position_embeddings
    eos = [text for text, i in tok.special_ids.items() if i == tok.eos_id]
    stops, most = STOPS + tuple(eos), min(max_length, context)
    ended, prompts = text_stopper(tok, stops, {tok.eos_id}), {}
    for i in ids:
        tokens = tok.encode(prompt_of(problems[i], strip_prompt), bos=bos)
        # one that fills the whole length is cut from the left so that a quarter is left for the answer
        prompts[i] = cut_left(tokens, most - most // 4, tok.bos_id) if len(tokens) >= most else (tokens, 0)
    if cut := [cut for _, cut in prompts.values() if cut]:
        print0(f"WARNING: {len(cut)} prompts were cut from the left, by up to {max(cut)} tokens, to {most - most // 4}")

    tokens = [prompts[i][0] for i in ids]
    answers = subject.model.generate_each(tokens, [most - len(prompt) for prompt in tokens], temperature, top_p, n_samples, ended,
                                          seed=[seed * 1000 + i for i in ids], batch_size=batch_size)
    for p, new in answers:
        i = ids[p]
        tokens, cut = prompts[i]
        start = len(tok.decode(tokens))  # decoded together, or sentencepiece would drop a leading blank
        texts = [tok.decode(tokens + ids)[start:] for ids in new]
        finish(i, {"task_id": problems[i]["task_id"], "completions": [truncate_at_stop(text, stops) for text in texts],
                   "prompt_tokens": len(tokens), "cut": cut, "new_tokens": [len(ids) for ids in new],
                   "truncated": [int(len(ids) == most - len(tokens) and not ended(ids)) for ids in new]})


# ----------------------------------------------------------------------------- samples and verdicts
def read_samples(path, problems, strip=True):
    """{index of problem: its completions} of a file made here, by human-eval's format, or by bigcode's.

    Raises ValueError for a problem that is unknown or has no samples."""
    index, found = {problem["task_id"]: i for i, problem in enumerate(problems)}, defaultdict(list)
    try:
        text = Path(path).read_text()
        if text.lstrip().startswith("[["):
            for i, programs in enumerate(json.loads(text)):
                prompt = prompt_of(problems[i], strip)
                if wrong := [program for program in programs if not program.startswith(prompt)]:
                    raise ValueError(f"{path}: a program of {problems[i]['task_id']} does not begin with its prompt, but "
                                     f"with {wrong[0][:40]!r}")
                found[i] = [program[len(prompt):] for program in programs]
        else:
            for line in filter(str.strip, text.split("\n")):
                sample = json.loads(line)
                texts = sample["completions"] if "completions" in sample else [sample["completion"]]
                found[index[sample["task_id"]]] += texts
    except (KeyError, IndexError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{path}: expected lines with task_id and completion of {len(problems)} problems ({e!r})") from None
    return dict(sorted(found.items()))


def check_samples(path, found, problems, ks, strip):
    """Refuse samples that leave problems out or are too few for a k; raises ValueError."""
    if missing := [problem["task_id"] for i, problem in enumerate(problems) if not found.get(i)]:
        raise ValueError(f"{path}: no samples of {len(missing)} of {len(problems)} problems: {', '.join(missing[:5])}"
                         f"{', ...' if len(missing) > 5 else ''}")
    few = min(found, key=lambda i: len(found[i]))
    if max(ks) > len(found[few]):
        raise ValueError(f"k={max(ks)} is more than the {len(found[few])} samples of {problems[few]['task_id']} in {path}")
    texts = [text for completions in found.values() for text in completions if text.strip()]
    if strip and texts and not any(text.split("\n")[0].strip() == "" for text in texts):
        print0("WARNING: no completion begins on a new line: if they continue the unstripped prompt, say --strip_prompt=False")


def pass_at_k(n, c, k):
    """Probability that k of n samples, c of them right, hold a right one: 1 - C(n-c, k) / C(n, k) (human-eval's)."""
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {n} samples, {c} of them right, is not defined")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def run_program(problem, completion, timeout=3.0, box=None, strip=True):
    """{"task_id", "passed", "result"} of prompt + completion under the problem's test; result as human-eval's, 'passed',
    'timed out' or 'failed: why'. `box`: a running Sandbox; without one a program has its own."""
    if box is None:
        with Sandbox(timeout) as box:
            return run_program(problem, completion, timeout, box, strip)
    passed, result = box.run(prompt_of(problem, strip) + completion + "\n", problem["test"], problem["entry_point"])
    return {"task_id": problem["task_id"], "passed": passed, "result": result}


def run_samples(problems, programs, ids, finish):
    """Run programs[i] = (index of its problem, completion) for i in ids, `workers` at once, each in its own sandbox."""
    boxes = queue.SimpleQueue()
    count = min(len(ids), workers or len(os.sched_getaffinity(0)) // min(WORLD, int(os.environ.get("LOCAL_WORLD_SIZE", 1))) or 1)
    for _ in range(count):
        boxes.put(Sandbox(timeout, sandbox, memory_mb))

    def verdict(i):
        box = boxes.get()
        try:
            problem, completion = programs[i]
            return i, {**run_program(problems[problem], completion, timeout, box, strip_prompt), "completion": completion}
        finally:
            boxes.put(box)

    try:
        with ThreadPoolExecutor(count) as pool:
            for i, record in pool.map(verdict, ids):
                finish(i, record)
    finally:
        for _ in range(count):
            boxes.get().close()


def scores(found, records, ks):
    """{metric: one value a problem}; records in the order of `found`'s completions."""
    values, records = defaultdict(list), iter(records)
    for completions in found.values():
        verdicts = [(text, next(records)["passed"]) for text in completions]
        c = sum(passed for _, passed in verdicts)
        for k in ks:
            values[f"pass@{k}"].append(pass_at_k(len(verdicts), c, k))
        values["unique"].append(len({text for text, _ in verdicts}))
        for which in (True, False):
            values["unique_passed" if which else "unique_failed"].append(len({t for t, p in verdicts if p == which}))
    return values


# ----------------------------------------------------------------------------- the run
if __name__ == "__main__":
    with one_line_errors():
        config = configure(globals())
        config["n_samples"] = n_samples = n_samples or MODES[mode]["n_samples"]
        config["temperature"] = temperature = MODES[mode]["temperature"] if temperature < 0 else temperature
        asked = 0 not in k
        config["k"] = k = k if asked else tuple(value for value in MODES[mode]["k"] if samples or value <= n_samples)
        print0(knob_table(globals()))
        if not k or min(k) < 1 or not samples and max(k) > n_samples:
            raise ValueError(f"k={','.join(map(str, k))}: expected numbers from 1 to n_samples={n_samples}")
        if n_samples > 1 and temperature == 0 and not samples:
            raise ValueError(f"temperature=0 gives {n_samples} times the same sample; say --n_samples=1")
        if samples and not allow_code_execution:
            raise ValueError("samples: running them needs --allow_code_execution=True; read evaluation/sandbox.py on what that means")
        every = read_items(data, FIELDS)
        problems = every[:limit or None]
        device, started = start_ranks(device), time.perf_counter()
        settings = {"strip_prompt": strip_prompt, "data": digest([[p[field] for field in FIELDS] for p in problems])}

        if samples:
            path = Path(samples)
            if not path.is_file():
                raise FileNotFoundError(f"samples: {path}: no such file")
            made = path.with_suffix(".settings.json")  # beside samples that were made here
            subject = place(path.parent, out_dir or path.parent, bool(out_dir))._replace(identity={
                **(json.loads(made.read_text()) if made.is_file() else {}), "samples": str(path)})
            name = path.stem.removeprefix("eval_")
            found = {i: texts for i, texts in read_samples(path, every, strip_prompt).items() if i < len(problems)}
            if not asked:
                config["k"] = k = tuple(value for value in k if value <= min(map(len, found.values()), default=1))
        else:
            subject = load_for_eval(model, adapter, device, pick_dtype(dtype, device), tokenizer, out_dir)
            print0(f"{len(problems)} problems, {n_samples} samples each, T={temperature}, top_p={top_p}, " +
                   (f"BOS (id {subject.tokenizer.bos_id}) in front" if bos else "no BOS in front"))
            drawn = {"n_samples": n_samples, "temperature": temperature, "top_p": top_p, "seed": seed, "bos": bos,
                     "max_length": max_length, "strip_prompt": strip_prompt}
            records = evaluate(subject, name, range(len(problems)), drawn, partial(sample_problems, problems, subject))
            found = {i: record["completions"] for i, record in records.items()}
            cut_short = [sum(record["truncated"]) / n_samples for record in records.values()]
            write_result(subject, f"{name}_truncated", cut_short, {**config, **settings}, time.perf_counter() - started)

        check_samples(samples or f"eval_{name}.jsonl", found, problems, k, strip_prompt and bool(samples))
        programs = [(i, text) for i, texts in found.items() for text in texts]
        if allow_code_execution:
            print0(f"running {len(programs)} programs")
            judged = {"timeout": timeout, "memory_mb": memory_mb, "sandbox": sandbox, "strip_prompt": strip_prompt}
            verdicts = evaluate(subject, f"{name}_run", range(len(programs)), judged, partial(run_samples, problems, programs),
                                lambda record: record["passed"])
            if other := [i for i, (_, text) in enumerate(programs) if verdicts[i]["completion"] != text]:
                raise ValueError(f"{subject.folder}/eval_{name}_run.jsonl: item {other[0]} is of another sample; delete the "
                                 f"file to run them again")
            for metric, values in scores(found, verdicts.values(), k).items():
                write_result(subject, f"{name}_{metric}", values, {**config, **settings}, time.perf_counter() - started)
        else:
            print0("the samples are not run: that needs --allow_code_execution=True; read evaluation/sandbox.py on what it means")
