"""
The paper's eight durations of continued pretraining, 0.25B to 20B tokens: a trunk, and branches that cool down from it.
Goes after the file of the run, which says everything else:

    run="torchrun --nproc_per_node=8 train.py config/math_cpt.py config/cpt_durations.py"
    $run --max_tokens=20e9 --out_dir=out/math_cpt/20B                                             # the trunk, first
    for n in 1 2 4 8 16; do $run --max_tokens=${n}e9 --out_dir=out/math_cpt/${n}B; done           # its branches

The trunk is the 20B run: a constant rate, and a cooldown to 0 over its last 20%. It keeps the steps at which the shorter
runs begin to cool down; each of them goes on from there with the trunk's weights, momenta and data position.

0.25B and 0.5B tokens end inside the warmup of 1,000 steps (0.79B tokens). In the published schedule warmup goes before
cooldown, so these two never cool down and there is nothing to branch: they are the trunk's steps 318 and 636, kept under
those names. How the authors handled them is not known.
"""
from pathlib import Path as _Path

_durations = (1e9, 2e9, 4e9, 8e9, 16e9)  # those that branch


def _steps(tokens):
    return round(tokens / (global_batch * seq_len))


def _cooldown(tokens):
    return round(0.2 * _steps(tokens))


assert seq_len, "cpt_durations.py goes after the file of a run: train.py config/math_cpt.py config/cpt_durations.py"
schedule = 'inv_sqrt'
warmup_steps = 1000
cooldown_steps = _cooldown(max_tokens)
if max_tokens == 20e9:
    checkpoint_at = (0.25e9, 0.5e9, *(_steps(n) - _cooldown(n) for n in _durations))
else:
    assert max_tokens in _durations, f"max_tokens={max_tokens:g} is none of the paper's durations that branch"
    if not resume:
        resume_from = str(_Path(out_dir).parent / "20B" / f"step_{_steps(max_tokens) - cooldown_steps}")
