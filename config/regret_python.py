r"""
For paper/study.py: regret_docs.py with another target, Python source, read on as in continued pretraining.

    # config/study_base.py has the commands that make the base
    L=$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
    python prepare_data.py --tokenizer=out/study_base/shape --seq_len=256 --out_dir=data/python_docs --val_fraction=0.2 \
        --source=$L/asyncio,$L/email,$L/http,$L/importlib,$L/json,$L/logging,$L/multiprocessing,$L/unittest,$L/urllib,$L/xml
    python -m paper.study config/regret_python.py
    python -m paper.claims --runs='out/regret_python/[fr]*' --learning='loss target' --forgetting='loss source'
    python -m paper.laws --runs='out/regret_python/*'
    python -m paper.why --runs='out/regret_python/*' --out_dir=out/why_python

Full finetuning and the ranks alone: without adapters on a part of the modules, and without larger batches.
"""
_target = 'data/python_docs'
_held_out = _target
out_dir = out_dir or 'out/regret_python'
include('regret_docs.py')
runs = tuple(_run for _run in runs if '--eval_interval' in _run)
