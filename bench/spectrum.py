"""
Seconds and errors of the routes to the singular values of a matrix, and what a 7B pair would take.

    A [n, n] --> SVD, fp64                 the exact values, to which the others are compared
             --> SVD, fp32
             --> eigenvalues of A^T A      fp64
             --> analysis/singular.py      fp64, half of A^T A, with a bound on the error

    python -m bench.spectrum --size=4096
"""
import time

import torch

from analysis.singular import singular_values
from configurator import configure
from runtime import device_name, one_line_errors, pick_device

# -----------------------------------------------------------------------------
size = 4096              # side of the matrix; a 7B model's are 4096 x 4096 and 4096 x 11008
device = 'auto'          # auto | cpu | cuda | cuda:N


ROUTES = ("svdvals, fp64", "svdvals, fp32", "eigvalsh(A^T A), fp64", "ours")


def timed_route(route, A):
    """Singular values by one of ROUTES, fp64 on the CPU, and seconds."""
    started = time.perf_counter()
    if route == "ours":
        values = singular_values(A)[0]
    elif route == "svdvals, fp32":
        values = torch.linalg.svdvals(A)
    elif route == "svdvals, fp64":
        values = torch.linalg.svdvals(A.double())
    else:
        A = A.double()
        values = torch.linalg.eigvalsh(A.T @ A).flip(0).clamp(min=0).sqrt()
    values = values.double().cpu()  # the copy waits for the device
    return values, time.perf_counter() - started


def time_routes(n, device):
    """Print seconds and errors for a matrix [n, n]; returns the seconds of ours."""
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(n, n, generator=generator).to(device)
    # the first route is the one that the others are compared to
    exact = None
    for route in ROUTES:
        values, seconds = timed_route(route, A)
        if exact is None:
            exact = values
        error = (values - exact).abs().max() / exact[0]
        print(f"{n} x {n}  {route:22} {seconds:8.2f} s   "
              f"differs from fp64 SVD by {error:.1e} of the largest", flush=True)
    return seconds


def time_model(n, seconds, device):
    """Print ours for a matrix of an MLP, and hours for a 7B model, from `seconds` for [n, n]."""
    rows = round(n * 11008 / 4096)
    generator = torch.Generator().manual_seed(0)
    of_mlp = timed_route("ours", torch.randn(rows, n, generator=generator).to(device))[1]
    print(f"{rows} x {n}  {'ours':22} {of_mlp:8.2f} s")
    # 32 blocks: 4 matrices of attention, 3 of the MLP; the work grows with the cube
    hours = 32 * (4 * seconds + 3 * of_mlp) * (4096 / n) ** 3 / 3600
    source = "" if n == 4096 else f" (from {n} by the cube)"
    print(f"a 7B model's 224 matrices on {device_name(device)}: {hours:.2f} h for one of W0, W, D, "
          f"{3 * hours:.2f} h for a pair, without vectors{source}")


# -----------------------------------------------------------------------------
if __name__ == "__main__":
    with one_line_errors():
        configure(globals())
        if size < 1:
            raise ValueError(f"size must be positive, found {size}")
        device = pick_device(device)
        seconds = time_routes(size, device)
        time_model(size, seconds, device)
