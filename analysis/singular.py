"""Singular values of a large matrix in fp64, with a bound on their error.

      A [m, n]       lower half of G = A^T A [n, n]      eigenvalues of G
    +--------+            +
    |        |            | \\
    |        |   ----->   |   \\            ----->         s_1^2 >= s_2^2 >= ... >= s_n^2
    |        |            +-----+
    +--------+

The roots are A's singular values. This takes a quarter of the time of an SVD, but small values
lose half of their digits. The bound on the error says whether that matters; then it is SVD.
"""
import torch

UNIT = 2.0 ** -53  # rounding of fp64


def singular_values(A, method="auto", tolerance=1e-6, fractions=()):
    """Singular values of A [m, n], fp64, descending, on the CPU; bound on their error; method.

    method 'gram' takes the roots of the eigenvalues of A^T A, 'svd' an SVD. 'auto' takes 'gram'
    where its bound is at most `tolerance` times the largest value and no effective rank at one of
    `fractions` could change by it, else 'svd'. Raises ValueError for NaN or infinity."""
    A = A.double()
    if not A.isfinite().all():
        raise ValueError("holds NaN or infinity")
    scale = A.abs().max().item()
    if scale == 0:
        zeros = torch.zeros(min(A.shape), dtype=torch.float64)
        return zeros, 0.0, "zero"

    # the squares of a very small change would lose digits
    A = A / scale
    if method != "svd":
        values, errors, eigenvalue_error = gram_singular_values(A)
        accurate = errors.max() <= tolerance * values[0]
        certain = ranks_are_certain(values, eigenvalue_error, fractions)
        if method == "gram" or (accurate and certain):
            return values * scale, errors.max().item() * scale, "gram"
    # the slow way, good to the rounding of fp64
    values = torch.linalg.svdvals(A).cpu()
    error = max(A.shape) * UNIT * values[0].item()
    return values * scale, error * scale, "svd"


def gram_singular_values(A):
    """Roots of the eigenvalues of A^T A, descending, and what gram_errors says of them."""
    G = gram(A)
    eigenvalues = torch.linalg.eigvalsh(G)
    values = eigenvalues.flip(0).clamp(min=0).sqrt().cpu()
    errors, eigenvalue_error = gram_errors(values, A, G)
    return values, errors, eigenvalue_error


def tall(A):
    """A, or A^T for a wide A, which has the same singular values."""
    if A.shape[0] < A.shape[1]:
        return A.T
    return A


def gram(A, block=1024):
    """Lower triangle of A^T A, or of A A^T for a wide A, in A's dtype: [n, n], n the small side.

    eigvalsh reads no more than this; blocks of columns spare nearly half of the products."""
    A = tall(A)
    n = A.shape[1]
    G = A.new_zeros(n, n)
    for start in range(0, n, block):
        end = start + block
        G[start:, start:end] = A[:, start:].T @ A[:, start:end]
    return G


def gram_errors(values, A, G, probes=16):
    """Bound on the error of each value, the root of an eigenvalue of G, and of the eigenvalues.

    G is A's Gram matrix in fp64. Its rounding is measured: the mean square of |(A^T A - G) v|
    over Gaussian v is the squared Frobenius norm of the difference; with 16 of them, 4 times the
    estimate is too small with probability 1e-7 even if the difference has rank one. The eigenvalue
    solver is allowed 8 sqrt(n) units of the largest eigenvalue (Weyl; Higham and Mary 2019 on why
    sqrt)."""
    A = tall(A)
    n = len(G)
    generator = torch.Generator().manual_seed(0)
    V = torch.randn(n, probes, generator=generator, dtype=A.dtype)
    V = V.to(A.device)
    # G V, with the upper half of G taken from its lower half
    difference = A.T @ (A @ V) - G.tril() @ V - G.tril(-1).T @ V
    rounding = 4 * difference.norm() / probes ** 0.5
    solver = 8 * UNIT * n ** 0.5 * values.square().max()
    eigenvalue_error = rounding.cpu() + solver
    # a root turns an error h of the eigenvalue s^2 into at most h / s, and at most sqrt(h)
    errors = torch.minimum(eigenvalue_error / values, eigenvalue_error.sqrt())
    return errors, eigenvalue_error


def ranks_are_certain(values, eigenvalue_error, fractions):
    """Whether the errors are too small to change the effective rank at any of `fractions`."""
    # share of the squares that the first k values hold, and how far it can be off
    total = values.square().sum()
    shares = values.square().cumsum(0) / total
    share_error = len(values) * eigenvalue_error / total
    for fraction in fractions:
        if (shares - fraction).abs().min() <= share_error:
            return False
    return True


def lora_singular_values(A, B, scale):
    """Singular values of scale B A for A [r, in], B [out, r]: fp64, descending, min(r, in, out).

    The product is not formed: with B = Q R and A^T = P S it is Q (R S^T) P^T, where Q and P have
    orthonormal columns, so the small R S^T has the same singular values."""
    # only R and S are needed, not Q and P
    R = torch.linalg.qr(B.double(), mode="r").R
    S = torch.linalg.qr(A.double().T, mode="r").R
    return abs(scale) * torch.linalg.svdvals(R @ S.T).cpu()
