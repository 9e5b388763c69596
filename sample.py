"""
Try a model: prompt in, text out, as it is generated.

    python sample.py --model=models/llama2-7b --prompt='Once upon a time'
    python sample.py --model=models/llama2-7b --adapter=out/gsm8k-r16/step_200 --prompt='Question: ...\\nAnswer:'
    python sample.py --model=out/gsm8k-full/step_200 --temperature=0.8 --n=3 < prompt.txt
"""
import json
import sys
import time
from pathlib import Path

import torch

from configurator import configure
from lora import load_adapter, merge_lora
from model import Llama
from runtime import one_line_errors, pick_device, pick_dtype
from tokenizer import StreamDecoder, load_tokenizer, text_stopper

# -----------------------------------------------------------------------------
model = ''               # model folder, or the checkpoint folder (out/RUN/step_N) of a full finetuning run
adapter = ''             # PEFT folder, or the checkpoint folder of a LoRA run
tokenizer = ''           # tokenizer file or folder; '' = the model's folder
prompt = ''              # text, with \n for a new line; '' = standard input
bos = True               # put the beginning-of-sequence token in front
max_new_tokens = 256
temperature = 0.0        # 0 = greedy
top_p = 1.0              # keep the likeliest tokens up to this share
n = 1                    # continuations of the prompt
seed = 1337
stop = ()                # texts that end a continuation
device = 'auto'          # auto | cpu | cuda | cuda:N
dtype = 'auto'           # auto = bf16 on GPUs that have it, else fp32
_choices = {'dtype': ('auto', 'float32', 'bfloat16', 'float64')}


def load_model(folder, adapter="", device="cpu", dtype=torch.float32):
    """A model ready for generation, its adapter merged in fp32 and rounded once. Raises as model and lora do."""
    if adapter:
        loaded = merge_lora(load_adapter(Llama.from_pretrained(folder, torch.float32, device), adapter)).to(dtype)
        loaded.compute_dtype = dtype
    else:
        loaded = Llama.from_pretrained(folder, dtype, device)
    return loaded.eval()


# -----------------------------------------------------------------------------
if __name__ == "__main__":
    with one_line_errors():
        configure(globals())
        if not model:
            raise ValueError("model is not set; see --help")
        if not adapter and (Path(model) / "adapter_config.json").is_file():
            base = json.loads((Path(model) / "adapter_config.json").read_text()).get("base_model_name_or_path")
            raise ValueError(f"{model} is an adapter; say --model={base or 'BASE'} --adapter={model}")
        device = pick_device(device)
        tok = load_tokenizer(tokenizer or model)
        text = prompt.replace("\\n", "\n") if prompt else sys.stdin.read()
        ids = tok.encode(text, bos=bos and tok.bos_id is not None)
        llama = load_model(model, adapter, device, pick_dtype(dtype, device))
        decoders = [StreamDecoder(tok, ids) for _ in range(n)]
        started, count = time.perf_counter(), 0
        for i, decoder in enumerate(decoders):
            print(text, end="", flush=True)
            # one after the other, so that each can be read as it comes
            ended = text_stopper(tok, stop, {tok.eos_id})
            out = llama.generate([ids], max_new_tokens, temperature, top_p, stop=ended, seed=seed + i,
                                 on_token=lambda p, s, token: token == tok.eos_id or
                                 print(decoder.push(token), end="", flush=True))
            print(decoder.finish(), end="\n\n" if i < n - 1 else "\n")
            count += len(out[0][0])
        seconds = time.perf_counter() - started
        print(f"[{count} tokens, {count / seconds:.1f} a second]", file=sys.stderr)
