"""What chance alone gives: the singular values of random matrices, and of rounding.

    A high effective rank proves nothing by itself. 90% of the squares of a Gaussian matrix take
    4096 x 4096     2089 of 4096 singular values
    4096 x 11008    2917 of 4096
    LoRA, r = 16      15 of 16      (B A of Gaussian A [16, 4096] and B [4096, 16])

    Nor does a small cosine: the largest of a random direction with 4096 orthogonal ones is .06.
"""
from functools import lru_cache

import numpy as np
import torch

from analysis.singular import lora_singular_values


@lru_cache
def random_singular_values(m, n, points=200_000):
    """Singular values that a Gaussian [m, n] of Frobenius norm 1 tends to, descending, in numpy.

    Marchenko and Pastur's law with ratio g = small / large side, in the angle t of
    x = 1 + g - 2 sqrt(g) cos t: eigenvalues of the Gram matrix have density 2 sin^2 t / (pi x)."""
    small, large = sorted((m, n))
    g = small / large
    # the share of eigenvalues below x(t), summed over a grid of angles
    t = (np.arange(points) + 0.5) * np.pi / points
    x = 1 + g - 2 * g ** 0.5 * np.cos(t)
    density = 2 * np.sin(t) ** 2 / x
    below = np.cumsum(density)
    below = below / below[-1]
    # eigenvalue i lies where that share is (i + 1/2) / small
    shares = (np.arange(small) + 0.5) / small
    eigenvalues = np.interp(shares, below, x)
    values = eigenvalues[::-1] ** 0.5
    return values / np.linalg.norm(values)


def random_edge(m, n):
    """Largest singular value of a Gaussian [m, n] of Frobenius norm 1, for large sides."""
    return m ** -0.5 + n ** -0.5


@lru_cache
def random_lora_singular_values(m, n, rank):
    """As random_singular_values for B A, Gaussian A [rank, n] and B [m, rank], from one draw."""
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(rank, n, generator=generator, dtype=torch.float64)
    B = torch.randn(m, rank, generator=generator, dtype=torch.float64)
    values = lora_singular_values(A, B, 1.0).numpy()
    return values / np.linalg.norm(values)


def random_cosine(dimensions, vectors):
    """Largest |cosine| of a random direction with so many orthonormal vectors: its median.

    Each cosine is N(0, 1 / dimensions) in many dimensions, and nearly independent of the others:
    all are below c with probability erf(c sqrt(dimensions / 2)) ** vectors, here 1/2."""
    each = torch.tensor(0.5 ** (1 / vectors), dtype=torch.float64)
    return (torch.erfinv(each) * (2 / dimensions) ** 0.5).item()


def rounding_share(W, D):
    """Share of |D|^2 that rounding W to its 16-bit dtype makes, errors taken as uniform; else 0."""
    if W.element_size() > 2 or not D.any():
        return 0.0
    # the distance between numbers of the dtype around each weight
    exponent = torch.frexp(W.double()).exponent - 1
    step = torch.ldexp(torch.full_like(D, torch.finfo(W.dtype).eps), exponent)
    # where the change was rounded to nothing, D is zero and holds no noise
    changed = (D != 0) & (W != 0)
    # a uniform error within one step has the variance step^2 / 12
    noise = (step * changed).square().sum() / 12
    return min(1.0, (noise / D.square().sum()).item())
