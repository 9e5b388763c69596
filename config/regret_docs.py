r"""
For paper/study.py: as regret.py, of twice the width and with real text: the base of study_base.py, finetuned on GSM8K.

    # config/study_base.py has the commands that make the base; GSM8K is openai/grade-school-math's train.jsonl and test.jsonl
    for s in train test; do python prepare_data.py --kind=ift --source=data/raw/gsm8k/$s.jsonl --tokenizer=out/study_base/shape \
        --seq_len=256 --template='Question: {question}\nAnswer:' --response_field=answer --val_fraction=0 --out_dir=data/gsm8k_docs/$s
    done
    python -m paper.study config/regret_docs.py
    python -m paper.claims --runs='out/regret_docs/[fr]*' --learning='loss target' --forgetting='loss source'
    python -m paper.laws --runs='out/regret_docs/*'
    python -m paper.why --runs='out/regret_docs/*' --out_dir=out/why_docs

A row of 256 tokens is all that the base knows, and cuts the answer of every second problem.
"""
include('swept_docs.py')

out_dir = out_dir or 'out/regret_docs'
_length = '--schedule=constant --global_batch=2 --max_steps=200'
runs = _swept('full', f'{_length} --eval_interval=40', 1e-4)
for _rank in (16, 4, 64):
    runs += _swept(f'r{_rank}', f'{_length} --eval_interval=40 --lora_alpha=32 --lora_rank={_rank}', 5e-4)
# adapters on the MLP and on attention, of the same size
runs += _swept('r16-mlp', f'{_length} --lora_alpha=32 --lora_rank=16 --lora_targets=mlp', 5e-4)
runs += _swept('r27-attention', f'{_length} --lora_alpha=32 --lora_rank=27 --lora_targets=attention', 5e-4)
# five times the rows a step, the same rows in all
_large = '--schedule=constant --global_batch=10 --max_steps=40'
runs += _swept('b10-full', _large, 2e-4)
runs += _swept('b10-r16', f'{_large} --lora_alpha=32 --lora_rank=16', 1e-3)
evals = _moved
spectrum = '--subspaces= --device=cpu'
