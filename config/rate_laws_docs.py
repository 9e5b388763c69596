"""
For paper/study.py: rate_laws.py at twice the width, on the base of study_base.py, which learns GSM8K.

    # config/study_base.py and config/regret_docs.py have the commands that make base and data
    python -m paper.study config/rate_laws_docs.py
    python -m paper.laws --runs='out/rate_laws_docs/*'

alpha = 32 at every rank is a part of regret_docs.py.
"""
include('swept_docs.py')

out_dir = out_dir or 'out/rate_laws_docs'
_full = 1e-4
_rules = {
    'fixed': lambda rank: (f'--lora_alpha={2 * rank}', 2e-3 / rank ** 0.5),
    'rslora': lambda rank: ('--lora_alpha=8 --rslora=True', 8e-4 / rank ** 0.2),
    'zero_a': lambda rank: (f'--lora_alpha={rank} --lora_init=zero_a', 2e-3 / rank ** 0.45)}
include('rate_laws.py')
