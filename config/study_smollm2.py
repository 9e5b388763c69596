r"""
For paper/study.py: the paper's comparison on a real model, at a size for two CPU cores: SmolLM2-135M, math IFT on GSM8K.

    for s in train test; do python prepare_data.py --kind=ift --source=data/raw/gsm8k/$s.jsonl --tokenizer=models/smollm2 \
        --template='Question: {question}\nAnswer:' --response_field=answer --response_prefix=' ' --val_fraction=0 \
        --out_dir=data/gsm8k_smollm2_$s; done
    python -m paper.study config/study_smollm2.py          # six hours of one core; --jobs=2 works on two runs at a time
    python -m paper.claims --runs='out/smollm2/*' --learning='loss gsm8k_test' --forgetting=hellaswag_loss
    python -m paper.claims --runs='out/smollm2/base,out/smollm2/*-75*' --learning='loss gsm8k_test' --forgetting=hellaswag_loss

data/raw/ holds what the original repositories have: gsm8k/train.jsonl and test.jsonl (openai/grade-school-math),
hellaswag_val.jsonl (rowanz/hellaswag), HumanEval.jsonl.gz (openai/human-eval). models/smollm2 is
HuggingFaceTB/SmolLM2-135M-Instruct; NOTES.md says where the weights came from that README's numbers are of.

A step is one row of 1,024 tokens: a small batch, as there are so few. The learning rates are the best of those that
were tried at 75 steps, r=64's between two of them (NOTES.md). config/study_smollm2_full.py has whole epochs and three
seeds, for a GPU; config/study_smollm2_code.py trains the same model on Python source.
"""
# what config/study_smollm2_code.py and study_smollm2_full.py, which run this file, have set stays
out_dir = out_dir or 'out/smollm2'
base = base or 'models/smollm2'
models = ('base',)
_methods = globals().get('_methods') or {
    'full': '--learning_rate=3e-5', 'r16': '--lora_rank=16 --learning_rate=6e-4',
    'r64': '--lora_rank=64 --learning_rate=2.5e-4', 'r256': '--lora_rank=256 --learning_rate=7.5e-5'}
_lengths = globals().get('_lengths') or {'75': '--max_steps=75', '225': '--max_steps=225'}
_seeds = globals().get('_seeds', (1, 2))  # more of 75 steps

_runs = []
for _end, _length in _lengths.items():
    for _name, _knobs in _methods.items():
        _runs.append(f'{_name}-{_end} {_knobs} {_length}')
for _seed in _seeds:
    for _name, _knobs in _methods.items():
        _runs.append(f'{_name}-75-s{_seed} {_knobs} --max_steps=75 --seed={_seed}')
runs = tuple(_runs)
train = train or ('--data=data/gsm8k_smollm2_train --global_batch=1 --microbatch=1 --compile=True --dtype=bfloat16 '
                  '--save_interval=75 --keep_last=1')
_loss = globals().get('_loss') or 'gsm8k_test=data/gsm8k_smollm2_test'
_limits = globals().get('_limits') or ('--limit=1000', '--limit=100', '--limit=10')
evals = (f'eval_loss.py --data={_loss} --dtype=bfloat16',
         'eval_forgetting.py --tasks=hellaswag --hellaswag=data/raw/hellaswag_val.jsonl --styles=gauntlet --bos=False '
         f'--dtype=bfloat16 {_limits[0]}',
         f'eval_gsm8k.py --test_data=data/raw/gsm8k/test.jsonl --shots=0 --batch_size=25 --dtype=bfloat16 {_limits[1]}',
         'eval_humaneval.py --data=data/raw/HumanEval.jsonl.gz --n_samples=10 --temperature=0.8 --bos=False --dtype=bfloat16 '
         f'--allow_code_execution=True {_limits[2]}')
_set = _loss.split('=')[0]
_words = globals().get('_words') or 'loss on new word problems'
plot = (f"--learning='loss {_set}' --forgetting=hellaswag_loss --x=step "
        f"--labels='loss {_set}={_words},hellaswag_loss=loss of right endings (HellaSwag)'")
