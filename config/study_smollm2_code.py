r"""
For paper/study.py: config/study_smollm2.py's shape with continued pretraining on code, packages of Python's standard library.

    L=$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
    python prepare_data.py --tokenizer=models/smollm2 --out_dir=data/stdlib_smollm2 --val_fraction=0.2 \
        --source=$L/asyncio,$L/email,$L/http,$L/importlib,$L/json,$L/logging,$L/multiprocessing,$L/unittest,$L/urllib,$L/xml
    python -m paper.study config/study_smollm2_code.py
    python -m paper.claims --runs='out/smollm2_code/*' --learning='loss stdlib' --forgetting=hellaswag_loss

Learned is the loss on modules that were held out, by a hash of their text, and HumanEval; 75 steps of 1,024 tokens are a
ninth of an epoch. The learning rates are those of config/study_smollm2.py, not tuned again.
"""
out_dir = out_dir or 'out/smollm2_code'
_lengths = {'75': '--max_steps=75'}
_seeds = ()
_loss = 'stdlib=data/stdlib_smollm2'
_words = 'loss on held-out modules'
train = train or ('--data=data/stdlib_smollm2 --global_batch=1 --microbatch=1 --compile=True --dtype=bfloat16 '
                  '--eval_rows=4 --save_interval=75 --keep_last=1')
include('study_smollm2.py')
evals = tuple(_text for _text in evals if 'gsm8k' not in _text)
