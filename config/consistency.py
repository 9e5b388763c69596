"""
For paper/study.py: does finetuning forget less with the optimizer that pretrained the base (arXiv 2605.06654, May 2026)?

    make quickstart
    python train.py config/consistency_base.py                  # the same base, pretrained with Lion
    python -m paper.study config/consistency.py                 # finetunes the base of AdamW ...
    python -m paper.study config/consistency.py --base=out/lion_base/step_700 --out_dir=out/consistency/lion    # ... and Lion's
    python -m paper.laws --runs='out/consistency/*/*'

Each base is finetuned with both optimizers, in full and with LoRA, alpha = 2 r.
"""
include('swept.py')

out_dir = out_dir or 'out/consistency/adamw'
_length = '--global_batch=2 --max_steps=100'
runs = ()
for _optimizer, _full, _lora in (('lionw', 2e-4, 1e-3), ('adamw', 1e-3, 5e-3)):
    _knobs = f'{_length} --optimizer={_optimizer}'
    runs += _swept(f'full-{_optimizer}', _knobs, _full)
    runs += _swept(f'r16-{_optimizer}', f'{_knobs} --lora_rank=16', _lora)
