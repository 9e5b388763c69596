"""
What the studies of learning rates share; regret.py, rate_laws.py, consistency.py and variants.py include this file first.

They finetune the quickstart's base, which `make quickstart` leaves, or that of study_base.py: each method at several learning
rates and seeds, and study.py adds further rates where the best of them lies at an end.
"""
_data = globals().get('_data', 'data/quickstart')
_target = globals().get('_target', f'{_data}/target')
_held_out = globals().get('_held_out', f'{_data}/target_test')
base = base or 'out/quickstart/pretraining/step_700'

spectrum = 'none'
plot = 'none'
sweep = 'loss target'
# for evals: how far a run has moved from the base, and half way back
_eval = f'eval_loss.py --data=source={_data}/source,target={_held_out} --rows=50 --device=cpu'
_moved = (f'{_eval} --against={base}', f'{_eval} --t=0.5 --name=half')
train = (f'--data={_target} --val_data=source={_data}/source,target={_held_out} --eval_rows=50 --log_interval=50 '
         '--keep_last=1 --device=cpu --microbatch=2 --lora_dropout=0')


def _swept(name, knobs, middle, seeds=(1, 2, 3)):
    """The runs of a method, 'NAME-RATE-sSEED --knobs': at three learning rates a factor of 2 apart, with each seed."""
    found = []
    for rate in (middle / 2, middle, 2 * middle):
        for seed in seeds:
            found.append(f'{name}-{rate:g}-s{seed} {knobs} --learning_rate={rate:g} --seed={seed}')
    return tuple(found)
