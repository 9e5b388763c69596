"""
For paper/study.py: how the best learning rate moves with the rank, by what multiplies B A (muA: Chen, Villar, Hayou 2026).

    make quickstart
    python -m paper.study config/rate_laws.py
    python -m paper.laws --runs='out/rate_laws/*'

With A random and B zero, the best rate should go as rank ** -1/2 where the scale is fixed (alpha = 2 r), ** -1/4 where it is
alpha / sqrt(r) (rslora), and not move where it is alpha / r; with A zero and B random and scale 1 it should not move and be
full finetuning's. Lion's steps are signs, as in the theory.
"""
include('swept.py')

out_dir = out_dir or 'out/rate_laws'
_length = '--schedule=constant --global_batch=2 --max_steps=100'
# a rule's knobs at a rank, and the rate in the middle of its sweep
_rules = globals().get('_rules') or {
    'fixed': lambda rank: (f'--lora_alpha={2 * rank}', 3e-3 / rank ** 0.5),
    'alpha32': lambda rank: ('--lora_alpha=32', 6e-4),
    'rslora': lambda rank: ('--lora_alpha=8 --rslora=True', 1.5e-3 / rank ** 0.25),
    'zero_a': lambda rank: (f'--lora_alpha={rank} --lora_init=zero_a', 4e-4)}
runs = _swept('full', _length, globals().get('_full', 2e-4))
for _rule in _rules:
    for _rank in (1, 4, 16, 64):
        _knobs, _middle = _rules[_rule](_rank)
        runs += _swept(f'r{_rank}-{_rule}', f'{_length} --lora_rank={_rank} {_knobs}', _middle)
