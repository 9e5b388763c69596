"""
For study.py: the paper's comparison at a size that fits anywhere. SmolLM2-135M, math IFT on GSM8K's 7,473 problems.

    python prepare_data.py --kind=ift --source=gsm8k/train.jsonl --tokenizer=models/smollm2 --out_dir=data/gsm8k_smollm2 \\
        --template='Question: {question}\\nAnswer:' --response_field=answer --response_prefix=' ' --val_fraction=0
    (the same with test.jsonl and --out_dir=data/gsm8k_smollm2_test)
    python study.py config/study_smollm2.py
    python claims.py --runs='out/smollm2/*' --learning='loss gsm8k_test' --forgetting=hellaswag

1.45M tokens an epoch: an hour on two CPU cores, a minute on a GPU; 18 runs, seven epochs of each of six methods. Every method has
its own learning rate, about 10x full's for LoRA as in the paper. Loss on GSM8K test is the finest measure of what is
learned at this size, GSM8K's accuracy and HellaSwag beside it.
"""
out_dir = out_dir or 'out/smollm2'
base = base or 'models/smollm2'
models = ('base',)
_rates = {'full': '--learning_rate=1e-5', 'r16': '--lora_rank=16 --learning_rate=2e-4',
          'r64': '--lora_rank=64 --learning_rate=1e-4',
          'r256': '--lora_rank=256 --learning_rate=5e-5', 'full-wd': '--learning_rate=1e-5 --weight_decay=1e-4',
          'full-dropout': '--learning_rate=1e-5 --attention_dropout=0.1'}
runs = tuple(f'{_name}-{_epochs}ep {_knobs} --max_epochs={_epochs}' for _epochs in (1, 2, 4) for _name, _knobs in _rates.items())
train = ('--data=data/gsm8k_smollm2 --val_data=gsm8k_test=data/gsm8k_smollm2_test --global_batch=8 --microbatch=4 '
         '--compile=True --dtype=bfloat16 --eval_interval=50 --save_interval=50 --keep_last=1')
evals = ('eval_gsm8k.py --dtype=bfloat16', 'eval_forgetting.py --bos=False --dtype=bfloat16')
plot = "--learning='loss gsm8k_test'"
