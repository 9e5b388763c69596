"""
The knobs that the paper's two continued pretrainings share; math_cpt.py and code_cpt.py include this file first.
"""
from pathlib import Path

base = base or 'models/Llama-2-7b-hf'
doc_mask = False             # documents of a window see each other
seq_len = 4096
global_batch = 192
microbatch = 2               # the paper's is 6; the gradient is the same, and this needs no activation checkpointing
schedule = 'inv_sqrt'        # a trapezoid: warmup, flat, linear to 0 over the last fifth
warmup_steps = 1000
alpha_f_decay = 1.0
save_interval = 500
compile = True


def _run_name():
    """math_cpt_full, math_cpt_r256: the file that includes this one, and the method."""
    return f'{Path(__file__).stem}_' + (f'r{lora_rank}' if lora_rank else 'full')
