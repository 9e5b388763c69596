"""
For paper/study.py: why a method forgets. Measures the runs of regret.py that are watched, and finds them trained.

    python -m paper.study config/regret.py
    python -m paper.study config/why.py         # how far each has moved from the base; its intruders; half way back
    python -m paper.why --runs='out/regret/*'
"""
include('regret.py')

_watched_runs = []
for _run in runs:
    if _watched in _run:
        _watched_runs.append(_run)
runs = tuple(_watched_runs)
evals = _moved
spectrum = '--subspaces= --device=cpu'
