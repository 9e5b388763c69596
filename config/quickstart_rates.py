"""
For paper/study.py: learning rates of the quickstart's model, by which its own were chosen; after make quickstart.

    python -m paper.study config/quickstart_rates.py        # 20 runs of less than a minute on two CPU cores

Each method's best rate is that of the lowest loss on new word problems, as in the paper (its figure S1).
"""
_data = 'data/quickstart'
out_dir = out_dir or 'out/quickstart_rates'
base = base or 'out/quickstart/pretraining/step_700'
_full, _lora = (3e-5, 1e-4, 2e-4, 4e-4, 1e-3), (1e-4, 3e-4, 1e-3, 2e-3, 4e-3)
runs = tuple(f'{"r" if _rank else "full"}{_rank or ""}-{_rate:g} --lora_rank={_rank} --learning_rate={_rate:g}'
             for _rank in (0, 1, 4, 16) for _rate in (_lora if _rank else _full))
train = (f'--data={_data}/target --val_data=source={_data}/source,target={_data}/target_test --optimizer=lionw --max_steps=450 '
         '--global_batch=2 --microbatch=2 --eval_rows=100 --log_interval=50 --keep_last=1 --device=cpu')
spectrum = 'none'
plot = ("--figures=learning_rates --learning='loss target' --forgetting='loss source' --x=step "
        "--labels='loss target=loss on new word problems,loss source=loss on held-out Python'")
