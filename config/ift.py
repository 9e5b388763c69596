"""
The knobs that the paper's instruction finetunings share; math_ift.py, code_ift.py and tulu_ift.py include this file first.
"""
from pathlib import Path

base = base or 'models/Llama-2-7b-hf'
weight_decay = 0.0
doc_mask = False             # packed examples see each other
loss_norm = 'paper'          # mean of the means of microbatches, so microbatch is part of the result
activation_checkpointing = 'block'
schedule = 'cosine'          # to 1% of the peak, a tenth of the run as warmup
save_interval = 100
compile = True


def _run_name():
    """math_ift_full_4ep, math_ift_r256_2ep: the file that includes this one, the method, the epochs."""
    method = f'r{lora_rank}' if lora_rank else 'full'
    epochs = f'_{max_epochs:g}ep' if max_epochs else ''
    return f'{Path(__file__).stem}_{method}{epochs}'
