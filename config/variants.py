"""
For paper/study.py: "Learning Rate Matters" (arXiv 2602.04998) in small: variants of LoRA, each at its best learning rate.

    make quickstart
    python -m paper.study config/variants.py
    python -m paper.laws --runs='out/variants/*'

The paper says that LoRA's variants, once tuned, score within one or two percent of LoRA. Here: rslora, LoRA+, DoRA, PiSSA, and
zero A (A zero, B random), at r=16 and alpha = 32, with a constant rate, for as many steps as in regret.py, with six seeds.
"""
include('swept.py')

out_dir = out_dir or 'out/variants'
_lora = '--schedule=constant --global_batch=2 --max_steps=200 --lora_rank=16 --lora_alpha=32'
# the knobs of each, and the rate in the middle of its sweep
_variants = {
    'lora': ('', 1e-3),
    'rslora': ('--rslora=True', 5e-4),
    'plus': ('--lora_plus=16', 2.5e-4),
    'dora': ('--dora=True', 1e-3),
    'pissa': ('--lora_init=pissa', 5e-4),
    'zero_a': ('--lora_init=zero_a', 1e-3)}
runs = ()
for _name, (_knobs, _rate) in _variants.items():
    runs += _swept(_name, f'{_lora} {_knobs}', _rate, range(1, 7))
