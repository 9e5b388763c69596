"""
For paper/study.py: config/study_smollm2.py in whole epochs of GSM8K, with three seeds, regularised full finetuning, and attention
or MLP alone; for a GPU (a week on two CPU cores, by calculation; not run yet).

    python -m paper.study config/study_smollm2_full.py
    python -m paper.claims --runs='out/smollm2_full/*' --learning=gsm8k_strict_match --forgetting=hellaswag
"""
out_dir = out_dir or 'out/smollm2_full'
_plain = {'full': '--learning_rate=1e-5', 'r16': '--lora_rank=16 --learning_rate=2e-4',
          'r64': '--lora_rank=64 --learning_rate=1e-4', 'r256': '--lora_rank=256 --learning_rate=5e-5',
          'full-wd': '--learning_rate=1e-5 --weight_decay=1e-4', 'full-dropout': '--learning_rate=1e-5 --attention_dropout=0.1',
          'r16-attention': '--lora_rank=16 --learning_rate=2e-4 --lora_targets=attention',
          'r16-mlp': '--lora_rank=16 --learning_rate=2e-4 --lora_targets=mlp'}
_methods = {}
for _seed in (1, 2, 3):
    for _name, _knobs in _plain.items():
        _methods[f'{_name}-s{_seed}'] = f'{_knobs} --seed={_seed}'
_lengths = {f'{_n}ep': f'--max_epochs={_n}' for _n in (1, 2, 4)}
_limits = ('', '', '')
_seeds = ()
train = train or ('--data=data/gsm8k_smollm2_train --global_batch=8 --microbatch=8 --compile=True --save_interval=100 '
                  '--keep_last=1')
include('study_smollm2.py')
