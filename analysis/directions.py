"""Leading directions of a matrix, and how finetuning moved them.

    W0 = s_1 u_1 v_1^T + s_2 u_2 v_2^T + ...     reads v_i from the input, writes u_i to the output

                                 leading 2    overlap with W0's leading 2    entered
    W0                           u_1 u_2
    W that keeps them            u_1 u_2      1                              0
    W with a new one, an
    "intruder", as its second    u_1 x        1/2                            1
    chance, u in n dimensions                 2 / n
"""
import math
from collections import defaultdict

import torch


def leading_vectors(A, sizes, values, accuracy=1e-2):
    """U [m, K], V [n, K] of the K = max(sizes) largest singular values of A, fp64; {k: bound}.

    All eigenvectors take ten times as long as all eigenvalues. So a block Krylov space of A^T A
    grows (Golub and Underwood 1977) until the leading k directions are good to `accuracy` for each
    k of `sizes`, or the space is a quarter as large as A. `values` are A's singular values, the
    bounds are those of leading_in."""
    if A.shape[0] < A.shape[1]:
        V, U, sines = leading_vectors(A.T, sizes, values, accuracy)
        return U, V, sines
    n = A.shape[1]
    most = max(sizes)
    width = most + 8  # some more than wanted converge sooner

    # start with random directions, or with all of a small matrix, which is as quick
    if n <= 1024 or n < 8 * most:
        basis = torch.eye(n, dtype=A.dtype, device=A.device)
    else:
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(n, width, generator=generator, dtype=A.dtype).to(A.device)
        basis = torch.linalg.qr(start).Q
    mapped = A @ basis

    tried = 0
    while True:
        # solve in the space when it has grown by a quarter
        last = 4 * basis.shape[1] >= n
        if last or basis.shape[1] >= 1.25 * tried:
            tried = basis.shape[1]
            U, V, sines = leading_in(A, basis, mapped, sizes, values)
            if last or max(sines.values()) <= accuracy:
                return U, V, sines
        # add A^T A times the newest directions, made orthogonal twice because of cancellation
        block = A.T @ mapped[:, -width:]
        for _ in range(2):
            block = torch.linalg.qr(block - basis @ (basis.T @ block)).Q
        basis = torch.cat([basis, block], 1)
        mapped = torch.cat([mapped, A @ block], 1)


def leading_in(A, basis, mapped, sizes, values):
    """The best U, V that the space `basis` holds (mapped = A basis), and {k: bound on their error}.

    The bound is on the norm of the sines of the angles to the exact leading k directions:
    |residual| / gap (Davis and Kahan). It is large where these are ill defined, because value k + 1
    is nearly as large as value k."""
    n = A.shape[1]
    most = max(sizes)
    # the largest eigenvalues of A^T A in the space
    squares, vectors = torch.linalg.eigh(mapped.T @ mapped)
    squares = squares[-most:].flip(0).clamp(min=0)
    vectors = vectors[:, -most:].flip(1)
    V = basis @ vectors
    AV = mapped @ vectors
    U = torch.linalg.qr(AV).Q
    # A^T A V and A A^T U less what they would be for exact vectors
    V_residual = A.T @ AV - V * squares
    U_residual = A @ (A.T @ U) - U * squares

    sines = {}
    for k in sizes:
        if k == n:
            sines[k] = 0.0
            continue
        V_error = V_residual[:, :k].norm().item()
        U_error = U_residual[:, :k].norm().item()
        residual = max(V_error, U_error)
        gap = (squares[k - 1] - values[k] ** 2).item()
        sines[k] = residual / gap if gap > 0 else math.inf
    return U, V, sines


def compare_directions(leading, W, values, D, sizes):
    """How W, of singular values `values`, and its change D lie to the leading directions of W0.

    `leading` are W0's U, V and bounds. For each k of `sizes`, outputs (U) and inputs (V) apart:
    overlap_out, _in: share of the leading k directions of W that lie in those of W0, which is
        |U0_k^T U_k|^2 / k (phi of Hu et al. 2021, section 7.2); overlap_error bounds its error
    random_out, _in: what two random spaces have on average
    change_out, _in: share of |D|^2 that is written to, or read from, the leading k of W0
    entered: how many of the leading k outputs of W lie less than half in the leading K of W0, K the
        largest of `sizes`: they were not among those."""
    U0, V0, sines0 = leading
    U, V, sines = leading_vectors(W, sizes, values)
    # squared cosines between the directions of W0 (rows) and of W (columns)
    cosines_out = (U0.T @ U).square()
    cosines_in = (V0.T @ V).square()
    inside = cosines_out.sum(0)
    # squares of D along each direction of W0
    total = D.square().sum().item() or 1.0  # without a change all shares are 0
    written = (U0.T @ D).square().sum(1)
    read = (D @ V0).square().sum(0)

    found = defaultdict(dict)
    for k in sizes:
        key = str(k)
        found["overlap_out"][key] = overlap(cosines_out, k)
        found["overlap_in"][key] = overlap(cosines_in, k)
        # projectors P, P0 and P', P0' near them: |tr(P0 P) - tr(P0' P')| is at most
        # sqrt(2 k) (|P0 - P0'| + |P - P'|), and |P - P'| = sqrt(2) |sines|
        error = 2 * (sines0[k] + sines[k]) / k ** 0.5
        found["overlap_error"][key] = min(1.0, error)
        found["change_out"][key] = written[:k].sum().item() / total
        found["change_in"][key] = read[:k].sum().item() / total
        found["entered"][key] = int((inside[:k] < 0.5).sum())
        found["random_out"][key] = k / len(U)
        found["random_in"][key] = k / len(V)
    return found


def overlap(cosines, k):
    """Share that two leading spaces of k directions have in common, by the squared cosines."""
    return (cosines[:k, :k].sum() / k).item()
