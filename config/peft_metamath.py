r"""
For paper/study.py: PEFT's public comparison of methods, learning GSM8K from MetaMathQA and forgetting what is in Wikipedia.

    python prepare_data.py config/data/metamath_peft.py --tokenizer=models/llama3.2-3b --out_dir=data/metamath_peft
    python prepare_data.py --source=data/raw/finewiki_100.jsonl --kind=ift --template='' --response_field=text --packing=none \
        --seq_len=768 --add_eos=False --val_fraction=0 --tokenizer=models/llama3.2-3b --out_dir=data/wiki100
    python -m paper.study config/peft_metamath.py                                   # Llama-3.2-3B, on a GPU
    python -m paper.plot --runs='out/peft_metamath/*' --figures=peft --learning=gsm8k_strict_match --forgetting='loss wiki'

As there: 5,000 steps of 4 examples, AdamW, a cosine after a tenth of warmup, no worked examples, at most 300 new tokens; what was
forgotten is the rise of the mean loss a token on 100 articles, cut at 768 tokens. PEFT has one seed, this has three, so that
a difference has an interval. Its weight decay of 0.1 is multiplied by the rate, ours is not, so it is 0.1 of each rate.
data/raw/finewiki_100.jsonl holds the first 100 rows of HuggingFaceFW/finewiki's train split, {"text": ...}, as they stream.
"""
out_dir = out_dir or 'out/peft_metamath'
base = base or 'models/llama3.2-3b'
models = ('base',)
_targets = '--lora_targets=q_proj,v_proj'  # PEFT's for Llama
_methods = {
    'full': ('', 1e-5),
    'r32': (f'--lora_rank=32 --lora_alpha=64 {_targets}', 1e-4),
    'r64': (f'--lora_rank=64 --lora_alpha=128 {_targets}', 1e-4),
    'r64-rslora': (f'--lora_rank=64 --lora_alpha=64 --rslora=True {_targets}', 1e-4),
    'r10-mlp': ('--lora_rank=10 --lora_alpha=20 --lora_targets=mlp', 1e-4),
    'r32-dora': (f'--lora_rank=32 --lora_alpha=64 --dora=True {_targets}', 1e-4)}
_seeds = globals().get('_seeds', (1, 2, 3))
_runs = []
for _name, (_knobs, _rate) in _methods.items():
    for _seed in _seeds:
        _runs.append(f'{_name}-s{_seed} {_knobs} --learning_rate={_rate:g} --weight_decay={_rate / 10:g} --seed={_seed}')
runs = tuple(_runs)
train = train or ('--data=data/metamath_peft --optimizer=adamw --beta1=0.9 --beta2=0.999 --schedule=cosine --alpha_f=0 '
                  '--schedule_lag=False --lora_dropout=0 --global_batch=4 --microbatch=4 --max_steps=5000')
evals = evals or ('eval_gsm8k.py --harness=peft --shots=0 --max_new_tokens=300',
                  'eval_loss.py --data=wiki=data/wiki100 --rows=0')
spectrum = 'none'
plot = ("--figures=peft --learning=gsm8k_strict_match --forgetting='loss wiki' "
        "--labels='gsm8k_strict_match=accuracy on GSM8K,loss wiki=loss on Wikipedia'")
