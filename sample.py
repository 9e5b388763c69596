r"""
Try a model: prompt in, text out, printed while it is generated.

    python sample.py --model=models/llama2-7b --prompt='Once upon a time'
    python sample.py --model=models/llama2-7b --adapter=out/gsm8k/step_200 --prompt='Q: ...\nA:'
    python sample.py --model=out/gsm8k-full/step_200 --temperature=0.8 --n=3 < prompt.txt

    'Once upon a time'  ->  [1, 403, 407, 261, 378]  ->  [432, 383, 286, ...]  ->  ', there was ...'
"""
import sys
import time

from configurator import configure
from evaluation.evals import begin_and_end, load_for_eval
from runtime import one_line_errors, pick_device, pick_dtype
from text.records import unescape
from text.tokenizer import StreamDecoder, text_stopper

# -----------------------------------------------------------------------------
model = ''               # folder of a model, a checkpoint, or an adapter that names its base
adapter = ''             # adapter folder to put on `model`
tokenizer = ''           # tokenizer file or folder; '' = the model's folder
prompt = ''              # text; \n, \t and \\ mean what they mean in templates; '' = standard input
bos = None               # whether BOS stands in front; None = as the tokenizer does it
max_new_tokens = 256
temperature = 0.0        # 0 = greedy
top_p = 1.0              # keep the likeliest tokens up to this share
n = 1                    # continuations of the prompt
seed = 1337
stop = ()                # texts that end a continuation, read like the prompt
device = 'auto'          # auto | cpu | cuda | cuda:N
dtype = 'auto'           # auto = bf16 on GPUs that have it, else fp32
_types = {'bos': bool}
_choices = {'dtype': ('auto', 'float32', 'bfloat16', 'float64')}


# -----------------------------------------------------------------------------
if __name__ == "__main__":
    with one_line_errors():
        configure(globals())

        # model and prompt
        device = pick_device(device)
        loaded = load_for_eval(model, adapter, device, pick_dtype(dtype, device), tokenizer)
        llama = loaded.model
        tok = loaded.tokenizer
        text = unescape(prompt) if prompt else sys.stdin.read()
        stop_texts = [unescape(end) for end in stop]
        # the error stream says how it begins and ends, the other has the text alone
        bos = tok.adds_bos if bos is None else bos
        ids = tok.encode(text, bos=bos)
        print(f"[{begin_and_end(tok, bos)}]", file=sys.stderr)

        # one continuation after the other, so that each can be read while it is generated
        count = 0
        started = time.perf_counter()
        for i in range(n):
            print(text, end="", flush=True)
            decoder = StreamDecoder(tok, ids)
            ended = text_stopper(tok, stop_texts, tok.stop_ids)
            tokens = llama.generate_tokens([ids], max_new_tokens, temperature, top_p,
                                           stop=ended, seed=seed + i, vocab_size=tok.vocab_size)
            for _, _, token, _ in tokens:
                count += 1
                if token not in tok.stop_ids:
                    print(decoder.push(token), end="", flush=True)
            print(decoder.finish())
            if i < n - 1:
                print()  # a blank line between continuations
        seconds = time.perf_counter() - started
        print(f"[{count} tokens, {count / seconds:.1f} a second]", file=sys.stderr)
