r"""
For paper/study.py: PEFT's comparison (config/peft_metamath.py) in miniature: SmolLM2-135M learns GSM8K, on two CPU cores.

    # 100 articles of Wikipedia from the gensim package; paper/wiki_articles.py says how to install it apart
    .venv-gensim/bin/python paper/wiki_articles.py data/raw/wiki_100.jsonl
    python prepare_data.py --kind=ift --source=data/raw/gsm8k/train.jsonl --tokenizer=models/smollm2 --seq_len=768 \
        --template='Question: {question} Think step by step.\nAnswer:' --response_field=answer --response_prefix=' ' \
        --train_on_prompt=True --val_fraction=0.01 --out_dir=data/gsm8k_peft
    python prepare_data.py --source=data/raw/wiki_100.jsonl --kind=ift --template='' --response_field=text --packing=none \
        --seq_len=768 --add_eos=False --val_fraction=0 --tokenizer=models/smollm2 --out_dir=data/wiki100
    python -m paper.study config/peft_smollm2.py --jobs=2

A row of 768 tokens holds about four problems of GSM8K, as many as a step of PEFT's, so a step here is one row, with hardly any
padding; 200 steps instead of 5,000. Each method has PEFT's learning rate and, since the run is so short, also ten times that.
config/study_smollm2.py says what data/raw/gsm8k and models/smollm2 are.
"""
out_dir = out_dir or 'out/peft_smollm2'
base = base or 'models/smollm2'
train = train or ('--data=data/gsm8k_peft --optimizer=adamw --beta1=0.9 --beta2=0.999 --schedule=cosine --alpha_f=0 '
                  '--schedule_lag=False --lora_dropout=0 --global_batch=1 --microbatch=1 --max_steps=200 --compile=True '
                  '--dtype=bfloat16 --device=cpu')
evals = evals or ('eval_loss.py --data=wiki=data/wiki100,gsm8k=data/gsm8k_peft --rows=0 --dtype=bfloat16 --device=cpu',
                  'eval_gsm8k.py --harness=peft --shots=0 --max_new_tokens=300 --limit=200 --test_data=data/raw/gsm8k/test.jsonl '
                  '--dtype=bfloat16 --device=cpu')
include('peft_metamath.py')

_chosen = ('full', 'r32', 'r64-rslora', 'r10-mlp')
_runs = []
for _name in _chosen:
    _knobs, _rate = _methods[_name]
    for _faster in (1, 10):
        _runs.append(f'{_name}-{_faster}x {_knobs} --learning_rate={_faster * _rate:g} --weight_decay={_faster * _rate / 10:g}')
runs = tuple(_runs)
