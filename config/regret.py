"""
For paper/study.py: "LoRA Without Regret" (Schulman et al. 2025) in small: alpha = 32 at every rank, a constant rate.

    make quickstart
    python -m paper.study config/regret.py
    python -m paper.laws --runs='out/regret/*'

Ranks: does a rank follow full finetuning's curve until its capacity is used up? The model is 128 wide, so r=64 is half of
it. Batches: 2, 10 and 50 rows a step, of the same 400 rows. Modules: adapters on attention and on the MLP, r=27 and r=16,
of the same size.
"""
include('swept.py')

out_dir = out_dir or 'out/regret'
_lora = '--schedule=constant --lora_alpha=32 --lora_rank='
# ranks, watched while they train
_watched = '--global_batch=2 --max_steps=200 --eval_interval=40'
runs = _swept('full', f'--schedule=constant {_watched}', 2e-4)
for _rank in (1, 4, 16, 64):
    runs += _swept(f'r{_rank}', f'{_lora}{_rank} {_watched}', 1e-3)
# modules
runs += _swept('r16-mlp', f'{_lora}16 --lora_targets=mlp --global_batch=2 --max_steps=200', 1e-3)
runs += _swept('r27-attention', f'{_lora}27 --lora_targets=attention --global_batch=2 --max_steps=200', 1e-3)
# batches
for _batch, _steps, _rate in ((10, 40, 4e-4), (50, 8, 1e-3)):
    _length = f'--global_batch={_batch} --max_steps={_steps}'
    runs += _swept(f'full-b{_batch}', f'--schedule=constant {_length}', _rate)
    runs += _swept(f'r16-b{_batch}', f'{_lora}16 {_length}', 5 * _rate)
