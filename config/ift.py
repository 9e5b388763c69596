"""
What the three instruction finetunings of the paper share; math_ift.py, code_ift.py and tulu_ift.py run this file at their end.
"""
from pathlib import Path as _Path

base = base or 'models/Llama-2-7b-hf'
_name = _Path(__file__).stem + (f'_r{lora_rank}' if lora_rank else '_full') + (f'_{max_epochs:g}ep' if max_epochs else '')
out_dir = out_dir or f'out/{_name}'
weight_decay = 0.0
doc_mask = False             # packed examples see each other
loss_norm = 'paper'          # mean of the means of microbatches, so microbatch is part of the result
activation_checkpointing = 'block'
schedule = 'cosine'          # to 1% of the peak, a tenth of the run as warmup
save_interval = 100
compile = True
