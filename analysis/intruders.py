"""Intruder dimensions: leading directions of the tuned W that no direction of W0 resembles.

    W0 = s_1 u_1 v_1^T + s_2 u_2 v_2^T + ...     W = W0 + D = s'_1 u'_1 v'_1^T + ...

    u'_j      largest |cosine| with any u_i of W0
    u'_1      .99      is u_1, a little turned
    u'_2      .12      an intruder: below eps, and about what a random direction has
    u'_3      .97      is u_2

Shuttleworth et al. 2024 (arXiv 2410.21228, NeurIPS 2025) count them: outputs (u) alone, the k
leading ones of W against all of W0, eps = 0.5. The count is that of peft 0.21.2's
reduce_intruder_dimension (peft/tuners/lora/intruders.py), but in fp64.
"""
import torch

from analysis.chance import random_cosine
from analysis.directions import leading_vectors


def left_vectors(W0):
    """All left singular vectors of W0 [m, n], fp64: [m, min(m, n)]."""
    return torch.linalg.svd(W0.double(), full_matrices=False).U


def largest_cosines(left, U):
    """The largest |cosine| of each column of U [m, k] with a column of `left` [m, .]."""
    return (U.T @ left).abs().amax(1)


def intruders(W0, W, k=10, eps=0.5, left=None, values=None):
    """The intruders among the k leading left singular vectors of W; both [m, n].

    left, values: left_vectors(W0) and the singular values of W, if they are there already; with
    values, large matrices need no whole SVD of W. Returns
    intruders: how many of the k have no |cosine| of eps or more with a vector of W0
    max_cosines: the largest |cosine| of each of the k (fewer, if W has fewer), in W's order
    random_cosine: the largest that a random direction has (median), so eps should be well above.
    Raises ValueError for k below 1 or eps outside (0, 1]."""
    check_intruder_knobs(k, eps)
    if left is None:
        left = left_vectors(W0)
    # the leading vectors of W
    k = min(k, *W.shape)
    if values is None:
        U = torch.linalg.svd(W.double(), full_matrices=False).U[:, :k]
    else:
        U, _, _ = leading_vectors(W.double(), (k,), values, accuracy=1e-3)
    cosines = largest_cosines(left, U)
    count = int((cosines < eps).sum())
    rounded = [round(cosine, 6) for cosine in cosines.tolist()]
    return {"intruders": count, "max_cosines": rounded, "random_cosine": random_cosine(*left.shape)}


def check_intruder_knobs(k, eps):
    if k < 1 or not 0 < eps <= 1:
        raise ValueError(f"intruders are counted among the k >= 1 leading directions, by a cosine "
                         f"0 < eps <= 1; found {k}, {eps}")


def softened(W0, W, share, k=10, eps=0.5):
    """W with its intruders scaled by `share`, W + (share - 1) sum of s_j u_j v_j^T, fp64, and how
    many they were. Both [m, n]; the sum is over the intruders of W, as `intruders` counts them.

    Section 6 of arXiv 2410.21228, where the share is lambda; peft's mitigation_lambda."""
    check_intruder_knobs(k, eps)
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    cosines = largest_cosines(left_vectors(W0), U[:, :k])
    found = (cosines < eps).nonzero().squeeze(1)
    part = (U[:, found] * S[found]) @ Vh[found]
    return W.double() + (share - 1) * part, len(found)
