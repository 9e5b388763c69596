"""
For paper/study.py: learning rates of the quickstart's model, by which its own were chosen.

    make quickstart
    python -m paper.study config/quickstart_rates.py        # 14 runs of a minute on one CPU core

Each method's best rate is that of the lowest loss on new word problems, as in the paper (its figure S1).
"""
_data = 'data/quickstart'
out_dir = out_dir or 'out/quickstart_rates'
base = base or 'out/quickstart/pretraining/step_700'

_rates = {'full': (5e-5, 1e-4, 2e-4, 4e-4, 8e-4), 'r16': (5e-4, 1e-3, 2e-3), 'r4': (1e-3, 2e-3, 4e-3), 'r1': (2e-3, 4e-3, 8e-3)}
_runs = []
for _name in _rates:
    _rank = 0 if _name == 'full' else _name[1:]
    for _rate in _rates[_name]:
        _runs.append(f'{_name}-{_rate:g} --lora_rank={_rank} --learning_rate={_rate:g}')
runs = tuple(_runs)
train = (f'--data={_data}/target --val_data=source={_data}/source,target={_data}/target_test --optimizer=lionw '
         '--max_steps=450 --global_batch=2 --microbatch=2 --eval_rows=100 --log_interval=50 --keep_last=1 --device=cpu')
spectrum = 'none'
plot = ("--figures=learning_rates --learning='loss target' --forgetting='loss source' --x=step "
        "--labels='loss target=loss on new word problems,loss source=loss on held-out Python'")
