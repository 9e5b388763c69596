r"""
Sweeps of the learning rate: the best rate of a method, and whether it lies inside.

    loss |  \            /      The lowest loss of a seed and its neighbours on both sides make a
         |   x          x       parabola in log rate, whose vertex is the seed's best rate. Where
         |    `--x_.__-'        a lowest loss lies at an end of the sweep, the best may lie beyond,
         +-------|-.-------     and there is no best rate to speak of.
                 lowest  rate

paper/study.py adds rates until the best lies inside, paper/claims.py and paper/laws.py compare
methods at their best rates only.
"""
import math
import statistics
from typing import NamedTuple

import numpy as np

from paper.results import mean_of_seeds


class Best(NamedTuple):
    """The best rate of a seed, and its loss at the rate of the lowest mean loss of all seeds."""
    rate: float
    loss: float


def around_lowest(losses):
    """The rates left of, at and right of the lowest of {rate: loss}; None if it is at an end."""
    rates = sorted(losses)
    lowest = rates.index(min(rates, key=losses.get))
    if lowest in (0, len(rates) - 1):
        return None
    return rates[lowest - 1:lowest + 2]


def vertex_of(losses):
    """The rate at the vertex of {rate: loss}'s parabola; None if the lowest is at an end."""
    around = around_lowest(losses)
    if around is None:
        return None
    # log rates as distances from the lowest
    middle = around[1]
    x = [math.log(rate / middle) for rate in around]
    y = [losses[rate] for rate in around]
    curvature, slope, _ = map(float, np.polyfit(x, y, 2))
    if curvature <= 0:  # three equal losses
        return middle
    return middle * math.exp(-slope / (2 * curvature))


def bests_of_seeds(of_seeds):
    """[Best] of [{rate: loss}]; None where a lowest loss, or the lowest mean, is at an end.

    A rate is the vertex of a parabola. A loss is a measured one, as a parabola through a loss that
    diverged would reach below all of them."""
    means = mean_losses(of_seeds)
    if not means or around_lowest(means) is None:
        return None
    chosen = min(means, key=means.get)
    found = []
    for losses in of_seeds:
        rate = vertex_of(losses)
        if rate is None:
            return None
        found.append(Best(rate, losses[chosen]))
    return found


def swept(of_seeds):
    """Those of [{rate: loss}], one a seed, with several rates; a seed of one repeats what others
    have found."""
    return [losses for losses in of_seeds if len(losses) > 1]


def is_best(rate, of_seeds):
    """Whether a rate is what the sweeps of [{rate: loss}] found, and lies inside them; also where
    no seed was swept."""
    tried = swept(of_seeds)
    if not tried:
        return True
    means = mean_losses(tried)
    return bests_of_seeds(tried) is not None and rate == min(means, key=means.get)


def mean_losses(of_seeds):
    """{rate: mean loss} of [{rate: loss}], one a seed, of those rates that every seed has."""
    shared = set.intersection(*map(set, of_seeds))
    means = {}
    for rate in shared:
        means[rate] = statistics.fmean(losses[rate] for losses in of_seeds)
    return means


def next_rate(of_seeds):
    """The rate to try next in [{rate: loss}], one a seed: beyond an end where a lowest loss is.

    The lowest mean comes first, then the seeds in order; as far beyond as the end's neighbour is
    inside. None where all lie inside, or where a single rate is no sweep."""
    of_seeds = swept(of_seeds)
    if not of_seeds:
        return None
    for losses in swept([mean_losses(of_seeds), *of_seeds]):
        if around_lowest(losses) is None:
            rates = sorted(losses)
            lowest = min(rates, key=losses.get)
            neighbour = rates[1] if lowest == rates[0] else rates[-2]
            return float(f"{lowest * lowest / neighbour:.6g}")
    return None


def mean_factor(factors):
    """(geometric mean, factor that its 95% interval reaches up and down, or None), one a seed."""
    mean, half = mean_of_seeds([(math.log(factor), None) for factor in factors])
    return math.exp(mean), None if half is None else math.exp(half)


def factor_words(mean, factor):
    """'4.1e-4 (3.8e-4 to 4.4e-4)': what mean_factor returns, in words."""
    if factor is None:
        return f"{mean:.3g}"
    return f"{mean:.3g} ({mean / factor:.3g} to {mean * factor:.3g})"
