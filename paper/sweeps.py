r"""
Sweeps of the learning rate: the best rate of a method, and whether it lies inside.

    loss |  \            /      The lowest of the measured losses and its neighbours on both sides
         |   x          x       make a parabola in log rate, whose vertex is the best rate. Where
         |    `--x_.__-'        the lowest lies at an end of the sweep, the best may lie beyond it,
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
    """The vertex of a sweep's parabola."""
    rate: float
    loss: float


def around_lowest(losses):
    """The rates left of, at and right of the lowest of {rate: loss}; None if it is at an end."""
    rates = sorted(losses)
    lowest = rates.index(min(rates, key=losses.get))
    if lowest in (0, len(rates) - 1):
        return None
    return rates[lowest - 1:lowest + 2]


def vertex_of(losses, around):
    """The Best of {rate: loss} by the parabola through three rates; None if not among them."""
    # log rates as distances from the middle one, where the parabola then has its last coefficient
    middle = around[1]
    x = [math.log(rate / middle) for rate in around]
    y = [losses[rate] for rate in around]
    curvature, slope, at_middle = map(float, np.polyfit(x, y, 2))
    if curvature <= 0:
        return None
    vertex = -slope / (2 * curvature)
    if not x[0] < vertex < x[2]:
        return None
    return Best(middle * math.exp(vertex), at_middle + slope * vertex / 2)


def bests_of_seeds(of_seeds):
    """[Best] of [{rate: loss}], each by the three rates around the lowest mean loss.

    None where that mean is lowest at an end of the sweep, or a seed's best is not among them."""
    around = around_lowest(mean_losses(of_seeds))
    if around is None:
        return None
    found = [vertex_of(losses, around) for losses in of_seeds]
    return None if None in found else found


def mean_losses(of_seeds):
    """{rate: mean loss} of [{rate: loss}], one a seed, of those rates that every seed has."""
    shared = set.intersection(*map(set, of_seeds))
    means = {}
    for rate in shared:
        means[rate] = statistics.fmean(losses[rate] for losses in of_seeds)
    return means


def next_rate(losses):
    """The rate to try next: beyond that end of {rate: loss} where the lowest is, as far again.

    None where the lowest lies inside, or where a single rate is no sweep."""
    if len(losses) < 2 or around_lowest(losses):
        return None
    rates = sorted(losses)
    lowest = min(rates, key=losses.get)
    neighbour = rates[1] if lowest == rates[0] else rates[-2]
    return float(f"{lowest * lowest / neighbour:.6g}")


def mean_factor(factors):
    """(geometric mean, factor that its 95% interval reaches up and down, or None), one a seed."""
    mean, half = mean_of_seeds([(math.log(factor), None) for factor in factors])
    return math.exp(mean), None if half is None else math.exp(half)


def factor_words(mean, factor):
    """'4.1e-4 (3.8e-4 to 4.4e-4)': what mean_factor returns, in words."""
    if factor is None:
        return f"{mean:.3g}"
    return f"{mean:.3g} ({mean / factor:.3g} to {mean * factor:.3g})"
