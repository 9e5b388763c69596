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
runs = _swept('full', _length, 2e-4)
for _rank in (1, 4, 16, 64):
    _lora = f'{_length} --lora_rank={_rank}'
    runs += _swept(f'r{_rank}-fixed', f'{_lora} --lora_alpha={2 * _rank}', 4e-3 / _rank ** 0.5)
    runs += _swept(f'r{_rank}-alpha32', f'{_lora} --lora_alpha=32', 1e-3)
    runs += _swept(f'r{_rank}-rslora', f'{_lora} --lora_alpha=8 --rslora=True', 2e-3 / _rank ** 0.25)
    runs += _swept(f'r{_rank}-zero_a', f'{_lora} --lora_alpha={_rank} --lora_init=zero_a', 4e-4)
