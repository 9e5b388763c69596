"""
What both continued pretrainings of the paper share; math_cpt.py and code_cpt.py run this file at their end.
"""
from pathlib import Path as _Path

base = base or 'models/Llama-2-7b-hf'
out_dir = out_dir or f'out/{_Path(__file__).stem}_' + (f'r{lora_rank}' if lora_rank else 'full')
doc_mask = False             # documents of a window see each other
seq_len = 4096
global_batch = 192
microbatch = 2               # the paper's is 6; the gradient is the same, and so nothing has to be computed twice
max_tokens = max_tokens or (0.0 if max_steps else 20e9)
schedule = 'inv_sqrt'        # a trapezoid: warmup, flat, linear to 0 over the last fifth
warmup_steps = 1000
alpha_f_decay = 1.0
save_interval = 500
compile = True
