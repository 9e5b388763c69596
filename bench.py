"""
Speed and memory against Hugging Face transformers + peft, in one process, runs of both in turn.

    python bench.py --model=models/smollm2-135m                # the real weights
    python bench.py                                            # random weights of SmolLM2-135M's shape
    python bench.py --parts=kernels                            # LoRA's products alone, at Llama-2's shapes, on a GPU
    python bench.py --model=models/smollm2-135m --parts=gsm8k,starts

Same weights, data, dtype and threads for both sides; each figure is the median over --repeats rounds. The peer gets
its fastest settings known to us: weights in `dtype` (no autocast), SDPA attention, fused AdamW; peft adapters as
peft makes them. Ours: full finetuning keeps fp32 master weights, as train.py does, and LoRA fp32 adapters.
"""
import gc
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from configurator import configure, knob_table
from eval_gsm8k import STOPS, build_prompt, draw_shots
from eval_humaneval import FIELDS, run_program
from evals import read_items
from lion import DecoupledLionW
from lora import apply_lora, choose_kernel, lora_matmul, milliseconds
from model import Llama, LlamaConfig
from runtime import device_name, one_line_errors, peak_memory, pick_device, versions
from sandbox import Sandbox
from tokenizer import load_tokenizer, text_stopper

# -----------------------------------------------------------------------------
model = ''               # model folder; '' = random weights of SmolLM2-135M's shape
parts = ('full', 'lora', 'greedy', 'samples')   # what to measure, of these four, kernels, gsm8k and starts
rows = 4                 # training: rows a step
seq_len = 512            # and tokens a row
lora_rank = 16
lora_dropout = 0.05
lora_kernel = 'auto'     # ours, training: auto | torch | triton
kernel_shapes = ('7b', '13b', '70b')   # kernels: Llama-2's, or tiny
kernel_ranks = (16, 64, 256)
kernel_rows = (8192,)    # tokens at once
prompts = 16             # greedy: prompts at once, of 32 to 96 tokens
samples = 50             # samples: of one prompt of 128 tokens, temperature 0.8, top_p 0.95
new_tokens = 64          # of each continuation
items = 16               # gsm8k: of the test set, 5 shots, greedy, at most 256 new tokens, the harness's stop strings
items_at_once = 16       # gsm8k: rows that ours generates at once
peer_at_once = 8         # gsm8k: and the peer, prompts of similar length padded on the left
gsm8k_test = 'hf://datasets/openai/gsm8k/main/test-00000-of-00001.parquet'
gsm8k_train = 'hf://datasets/openai/gsm8k/main/train-00000-of-00001.parquet'
programs = 1640          # starts: HumanEval's solutions in the sandbox, and as many bare starts of Python, one by one
humaneval = 'hf://datasets/openai/openai_humaneval/openai_humaneval/test-00000-of-00001.parquet'
repeats = 3              # rounds; the median counts
compile = True           # torch.compile of our blocks in training; the peer stays eager, compile_peer tries it
compile_peer = False
dtype = 'bfloat16'
device = 'auto'          # auto | cpu | cuda | cuda:N
side = 'both'            # both in turn | ours | peer: one alone, which is how peak memory is measured
out = ''                 # also write the results to this JSON file
_choices = {'parts': ('full', 'lora', 'greedy', 'samples', 'kernels', 'gsm8k', 'starts'), 'dtype': ('float32', 'bfloat16'),
            'kernel_shapes': ('7b', '13b', '70b', 'tiny'), 'lora_kernel': ('auto', 'torch', 'triton'),
            'side': ('both', 'ours', 'peer')}

SMOLLM2_135M = dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                    num_attention_heads=9, num_key_value_heads=3, head_dim=64, max_position_embeddings=8192,
                    rope_theta=100000.0, tie_word_embeddings=True)

SHAPES = {"7b": (4096, 4096, 11008), "13b": (5120, 5120, 13824), "70b": (8192, 1024, 28672), "tiny": (64, 32, 160)}


def peak_of(side, kind, folder):
    """Peak memory in GB of one side alone, in a process of its own that takes two rounds of `kind`."""
    others = {"parts", "side", "repeats", "out", "model", "kernel_shapes", "kernel_ranks", "kernel_rows"}
    knobs = {name: globals()[name] for name in config if name not in others}
    argv = [sys.executable, __file__, f"--model={folder}", f"--parts={kind}", f"--side={side}", "--repeats=1",
            *(f"--{name}={value}" for name, value in knobs.items())]
    lines = subprocess.run(argv, check=True, text=True, capture_output=True).stdout.splitlines()
    return json.loads(lines[-1])["peak_gb"]


def training_step(module, loss_of, optimizer):
    """A function that runs one step on a batch and returns nothing; the loss is read, as any loop does."""
    def step(tokens, targets):
        loss = loss_of(module, tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in module.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
    return step


def ours(folder, kind):
    """Our model for `kind`, and its loss."""
    llama = Llama.from_pretrained(folder, torch.float32 if kind == "full" else getattr(torch, dtype), device)
    llama.compute_dtype = getattr(torch, dtype)
    if kind == "lora":
        apply_lora(llama, lora_rank, 2 * lora_rank, lora_dropout)
        for line in choose_kernel(llama, lora_kernel, rows * seq_len, getattr(torch, dtype), device, compile):
            print(line)
    if compile and kind in ("full", "lora"):
        for block in llama.layers:
            block.compile()
    return llama


def peer(folder, kind):
    """transformers' model for `kind`, with peft's adapters for LoRA."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    llama = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="sdpa").to(device)
    if kind == "lora":
        llama = get_peft_model(llama, LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, lora_dropout=lora_dropout,
                                                 target_modules="all-linear", task_type="CAUSAL_LM"))
    if compile_peer and kind in ("full", "lora"):
        llama.compile()
    return llama


def training_rounds(folder, kind, sides):
    """Seconds of each round of a training step, {side: [...]}, after two steps to warm up."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 49000, (rows, seq_len), generator=generator).to(device)
    targets = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -100)], 1)
    steps = {}
    for name in sides:
        module = (ours if name == "ours" else peer)(folder, kind).train()
        trained = [p for p in module.parameters() if p.requires_grad]
        if name == "ours":
            steps[name] = training_step(module, lambda m, x, y: m(x, y)[1], DecoupledLionW(trained, lr=1e-5))
        else:
            steps[name] = training_step(module, lambda m, x, y: m(input_ids=x, labels=x).loss,
                                        torch.optim.AdamW(trained, lr=1e-5, fused=True))
        steps[name](tokens, targets)
        steps[name](tokens, targets)
    return alternate({name: lambda step=step: step(tokens, targets) for name, step in steps.items()})


def generation_rounds(folder, kind, sides):
    """Seconds of each round of generating, {side: [...]}; both make exactly new_tokens a row."""
    generator = torch.Generator().manual_seed(0)
    lengths = [128] if kind == "samples" else torch.randint(32, 97, (prompts,), generator=generator).tolist()
    texts = [torch.randint(3, 49000, (n,), generator=generator).tolist() for n in lengths]
    how = dict(n=samples, temperature=0.8, top_p=0.95) if kind == "samples" else {}
    hf = (dict(do_sample=True, temperature=0.8, top_p=0.95, top_k=0, num_return_sequences=samples)
          if kind == "samples" else dict(do_sample=False))
    ids, mask = left_padded(texts)
    runs = {}
    for name in sides:
        module = (ours if name == "ours" else peer)(folder, kind).eval()
        if name == "ours":
            runs[name] = lambda module=module: module.generate(texts, new_tokens, **how)
        else:
            runs[name] = lambda module=module: module.generate(
                ids, attention_mask=mask, max_new_tokens=new_tokens, min_new_tokens=new_tokens, pad_token_id=0, **hf)
        runs[name]()
    return alternate(runs)


def peft_matmul(x, W, A, B, spans, scale, p):
    """What peft computes for a group, eagerly: a linear, a dropout and two small linears for each projection."""
    parts = zip(W.split([end - start for start, end in spans]), A.split(B.shape[1]), B.split([e - s for s, e in spans]))
    return torch.cat([F.linear(x, w) + F.linear(F.linear(F.dropout(x, p), a), b) * scale for w, a, b in parts], -1)


def kernel_times(name, N, K, spans, rank, T):
    """One line of the kernel table: times of a group's forward and backward by variant, and errors without dropout.

    Errors are the largest of y, dx, dA, dB against float64, by norm, for at most 512 rows."""
    generator, how = torch.Generator(device).manual_seed(0), dict(device=device, dtype=getattr(torch, dtype))
    draw = lambda *shape: torch.randn(shape, generator=generator, device=device)
    x, W, dy = draw(T, K).to(**how), (draw(N, K) / K ** 0.5).to(**how), draw(T, N).to(**how)
    A, B = draw(len(spans) * rank, K) / K ** 0.5, draw(N, rank) / rank ** 0.5  # fp32, except peft's, its fastest
    seeds = torch.zeros(len(spans), 2, dtype=torch.int32)
    if name == "peft":
        A, B = A.to(**how), B.to(**how)

    def forward(x, W, A, B, p):
        if name == "plain":
            return x @ W.T
        return peft_matmul(x, W, A, B, spans, 2.0, p) if name == "peft" else low_rank(name, x, W, A, B, spans, 2.0, p, seeds)

    def gradients(x, W, A, B, dy, p, compute):
        wanted = [t.detach().requires_grad_() for t in (x, A, B)][:1 if name == "plain" else 3]
        y = compute(*wanted[:1], W, *(wanted[1:] or (A, B)), p)
        return [y, *torch.autograd.grad(y, wanted, dy)]

    cuda = torch.device(device).type == "cuda"
    torch.compiler.reset()
    low_rank = torch.compile(lora_matmul, dynamic=False) if compile and cuda and name == "torch" else lora_matmul
    timed = milliseconds if cuda else lambda run: 1e3 * statistics.median(alternate({0: run})[0])
    with torch.no_grad():
        ms = timed(lambda: forward(x, W, A, B, lora_dropout))
    both = timed(lambda: gradients(x, W, A, B, dy, lora_dropout, forward))
    few = [t[:512] for t in (x, dy)]
    got = gradients(few[0], W, A, B, few[1], 0.0, forward)
    exact = [t.double() for t in (few[0], W, A, B, few[1])]
    want = gradients(*exact, 0.0, (lambda x, W, A, B, p: x @ W.T) if name == "plain" else
                     lambda x, W, A, B, p: peft_matmul(x, W, A, B, spans, 2.0, p))
    flops, moved = 2 * T * N * K, (T * K + N * K + T * N) * x.itemsize
    small = 0 if name == "plain" else 2 * T * rank * (len(spans) * K + N)
    return {"variant": name, "N": N, "K": K, "rank": rank, "tokens": T, "forward_ms": ms, "backward_ms": both - ms,
            "tflops": (2 * flops + 3 * small) / both / 1e9, "gb_per_s": 2 * moved / both / 1e6,
            "error": max(((g.double() - w).norm() / w.norm()).item() for g, w in zip(got, want))}


def kernel_table(_):
    """Times of LoRA's products for each group of the shapes; the floor is 'plain', the two products with W alone.

    GB/s counts x, W and y once in each direction; TFLOP/s the true number of operations."""
    cuda = torch.device(device).type == "cuda"
    if not cuda and set(kernel_shapes) != {"tiny"}:
        raise ValueError(f"parts=kernels: shapes {','.join(kernel_shapes)} need a GPU; --kernel_shapes=tiny runs on a CPU")
    names, table = ["plain", "peft", "torch"], []
    try:
        import lora_kernels
        lora_kernels.check(getattr(torch, dtype), torch.device(device))
        names += ["fused", "added"]
    except (ImportError, ValueError) as e:
        print(f"without fused and added: {e}")
    if not cuda:
        print("kernels on a CPU: their times say nothing of a GPU" + ", they run in an interpreter" * ("fused" in names))
    for shape, T, rank in itertools.product(kernel_shapes, kernel_rows, kernel_ranks):
        d, kv, ff = SHAPES[shape]
        for group, sizes, K in (("qkv", (d, kv, kv), d), ("o", (d,), d), ("gate_up", (ff, ff), d), ("down", (d,), ff)):
            spans = tuple((end - n, end) for n, end in zip(sizes, itertools.accumulate(sizes)))
            for name in names:
                found = kernel_times(name, sum(sizes), K, spans, rank, T)
                total = found["forward_ms"] + found["backward_ms"]
                floor = total if name == "plain" else floor
                print(f"{shape:4} {group:7} tokens {T:5} r={rank:<3} {name:5}  forward {found['forward_ms']:8.3f} ms  backward "
                      f"{found['backward_ms']:8.3f} ms  {total / floor - 1:+7.1%} of plain  {found['tflops']:6.1f} TFLOP/s  "
                      f"{found['gb_per_s']:6.0f} GB/s  error {found['error']:.1e}", flush=True)
                table.append({"shape": shape, "group": group, **found})
    return table


def left_padded(texts):
    """input_ids and attention_mask of some prompts, as transformers wants them."""
    width = max(map(len, texts))
    padded = lambda rows: torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
    return padded(texts), padded([[1] * len(text) for text in texts])


def gsm8k(folder):
    """Answer GSM8K's first items, ours and by a loop around transformers' generate, in turn; prints and returns both."""
    tok, fields = load_tokenizer(folder), ("question", "answer")
    test, train = read_items(gsm8k_test, fields, "gsm8k_test")[:items], read_items(gsm8k_train, fields, "gsm8k_train")
    shots = [[train[i] for i in rows] for rows in draw_shots(len(test), len(train), 5)]
    texts = sorted([tok.encode(build_prompt(q["question"], s)) for q, s in zip(test, shots)], key=len, reverse=True)
    stop, made = text_stopper(tok, STOPS, {tok.eos_id}), {}
    mine, theirs = ours(folder, "gsm8k").eval(), peer(folder, "gsm8k").eval()

    def by_ours(texts=texts, new=256):
        made["ours"] = [ids for [ids] in mine.generate(texts, new, stop=stop, batch_size=items_at_once)]

    def by_peer(texts=texts, new=256):
        made["peer"] = []
        for start in range(0, len(texts), peer_at_once):  # longest first, as in lm-evaluation-harness
            ids, mask = left_padded(texts[start:start + peer_at_once])
            width = ids.shape[1]
            ended = lambda ids, scores, width=width, **_: torch.tensor(
                [stop(row) for row in ids[:, width:].tolist()], device=device)
            made["peer"] += theirs.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0,
                                            stopping_criteria=[ended])[:, width:].tolist()

    runs = {"ours": by_ours, "peer": by_peer}
    for run in runs.values():
        run([texts[-1][:64]] * 2, 3)
    seconds = alternate(runs)
    made["peer"] = [row[:next((n for n in range(1, len(row)) if stop(row[:n])), len(row))] for row in made["peer"]]
    result = {name: {"items_per_s": len(texts) / statistics.median(times), "seconds": times,
                     "new_tokens": [len(ids) for ids in made[name]]} for name, times in seconds.items()}
    same = sum(a == b for a, b in zip(*made.values()))
    print(f"gsm8k    ours {result['ours']['items_per_s']:.3f} items/s, {sum(result['ours']['new_tokens'])} new tokens   peer "
          f"{result['peer']['items_per_s']:.3f} items/s, {sum(result['peer']['new_tokens'])} new tokens   {same} of {len(texts)} "
          f"answers equal   {result['ours']['items_per_s'] / result['peer']['items_per_s']:.2f}x", flush=True)
    return result


def starts(_):
    """Run HumanEval's solutions in the sandbox and Python bare, in turn; prints and returns the seconds of each."""
    solutions = read_items(humaneval, (*FIELDS, "canonical_solution"), "humaneval")
    some = list(itertools.islice(itertools.cycle(solutions), programs))
    with Sandbox() as box:
        def sandboxed():
            failed = [p["task_id"] for p in some if not run_program(p, "\n" + p["canonical_solution"], box=box)["passed"]]
            if failed:
                raise RuntimeError(f"{len(failed)} solutions did not pass: {failed[:5]}")

        bare = lambda: [subprocess.run([sys.executable, "-I", "-B", "-c", "pass"], check=True) for _ in some]
        seconds = alternate({"sandboxed": sandboxed, "bare": bare})
    median = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"starts   {programs} programs: sandboxed {median['sandboxed']:.1f} s, bare {median['bare']:.1f} s   "
          f"{median['sandboxed'] / median['bare']:.2f} times as long", flush=True)
    return seconds


def alternate(runs):
    """Seconds of `repeats` rounds of every run, in turn, so that a slow moment of the machine hits all."""
    seconds = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if torch.device(device).type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - started)
    return seconds


# -----------------------------------------------------------------------------
if __name__ == "__main__":
    with one_line_errors(), tempfile.TemporaryDirectory() as _scratch:
        config = configure(globals())
        if side == "both":
            print(knob_table(globals()))
        device = pick_device(device)
        if not model and set(parts) != {"kernels"}:
            Llama(LlamaConfig(**SMOLLM2_135M)).init_weights().save_pretrained(_scratch)
        folder = model or _scratch
        sides = ("ours", "peer") if side == "both" else (side,)
        if side == "both":
            print(f"{device_name(device)}, {versions()}")
        results = {}
        for kind in parts:
            if own := {"kernels": kernel_table, "gsm8k": gsm8k, "starts": starts}.get(kind):
                results[kind] = own(folder)
                continue
            training = kind in ("full", "lora")
            seconds = (training_rounds if training else generation_rounds)(folder, kind, sides)
            count = rows * seq_len if training else new_tokens * (samples if kind == "samples" else prompts)
            results[kind] = {name: {"tok_per_s": count / statistics.median(times), "seconds": times}
                             for name, times in seconds.items()}
            gc.collect()
            if side != "both":
                continue
            for name in sides:
                results[kind][name]["peak_gb"] = peak_of(name, kind, folder)
            mine, theirs = results[kind]["ours"], results[kind]["peer"]
            print(f"{kind:8} ours {mine['tok_per_s']:8.1f} tok/s {mine['peak_gb']:5.2f} GB   peer {theirs['tok_per_s']:8.1f} "
                  f"tok/s {theirs['peak_gb']:5.2f} GB   {mine['tok_per_s'] / theirs['tok_per_s']:.2f}x", flush=True)
        if side == "both" and {"full", "lora"} <= results.keys():
            print("LoRA against full, both ours: "
                  f"{results['lora']['ours']['tok_per_s'] / results['full']['ours']['tok_per_s']:.2f}x")
        if side != "both":
            print(json.dumps({"peak_gb": peak_memory(device)}))
        if out:
            Path(out).write_text(json.dumps({"config": {**config, "device": str(device)}, "device": device_name(device),
                                             "versions": versions(), "results": results}, indent=1))
