"""
Stage 4: why. Singular values of the weights before (W0) and after (W) finetuning and of the change D = W - W0, how many
of them make up 90% of its squares, what a random matrix would give, and whether W keeps the leading directions of W0.

    python spectrum.py --tuned=out/gsm8k-full                          # every checkpoint of a run, against its base
    python spectrum.py --base=models/llama2-7b --tuned=out/a/step_100,out/b/step_100 --out=out/a-and-b.json
    python spectrum.py --noise=1000 --out=out/noise.json               # the noise experiment of the paper's figure S8
    python spectrum.py --time_routes=4096                              # how long a 7B pair would take here

A checkpoint is a model folder or a PEFT adapter folder. Tensors are read one by one: a few matrices in fp64 are all the
memory this takes. Finished matrices are kept in OUT.part; the same command goes on where it was stopped.
paper/plot.py draws OUT.
"""
import hashlib
import json
import math
import time
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from training.checkpoint import checkpoints as checkpoints_of
from training.checkpoint import read_state
from configurator import configure
from lora import fingerprint_of, is_adapter, open_adapter_weights, read_adapter_config, resolve_targets
from llama.weights import PROJECTIONS, compare_names, open_weights
from model import LlamaConfig
from runtime import device_name, one_line_errors, peak_memory, pick_device, versions, write_whole

# -----------------------------------------------------------------------------
base = ''                # model folder of W0; '' = the one the checkpoints name
tuned = ()               # checkpoints, or a run folder for all of its checkpoints
out = ''                 # JSON file; '' = RUN/spectrum.json, if all checkpoints are of one run
modules = 'all'          # all | attention | mlp | names with commas, of q k v o gate up down _proj
layers = ()              # numbers of blocks; none = all
fractions = (0.5, 0.9, 0.99)   # effective rank: singular values that hold these shares of the sum of squares
subspaces = (1, 4, 16, 64)     # overlap of so many leading directions of W0 and W; none spares the vectors
method = 'auto'          # gram: eigenvalues of A^T A in fp64 | svd: in fp64 | auto: gram where it is accurate enough
tolerance = 1e-6         # auto: largest error of a singular value, as a share of the largest
device = 'auto'          # auto | cpu | cuda | cuda:N
noise = 0                # instead of checkpoints: Gaussian matrices of this size, and noise added to one
time_routes = 0          # instead: time the routes to the singular values of a matrix of this size
seed = 1337              # of the noise experiment
_choices = {'method': ('auto', 'gram', 'svd')}

UNIT = 2.0 ** -53  # rounding of fp64


# ----------------------------------------------------------------------------- singular values
def effective_rank(singular_values, fraction=0.9):
    """Least number of singular values that hold `fraction` of the sum of squares; 0 if all are zero.

    The paper's figure 6, which says "variance explained": reference values follow from squares.
    Raises ValueError for values that are negative or not finite, or a fraction outside (0, 1]."""
    values = np.sort(np.asarray(singular_values, dtype=np.float64))[::-1]
    squares = values ** 2
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1], found {fraction}")
    if not np.isfinite(values).all() or (values < 0).any():
        raise ValueError("singular values must be finite and not negative")
    running = squares.cumsum()
    return int((running < fraction * running[-1]).sum()) + 1 if squares.any() else 0


def gram(A, block=1024):
    """Lower triangle of A^T A, or of A A^T for a wide A, in A's dtype: [n, n] with n the small side.

    By blocks of columns, since eigvalsh reads no more than this: nearly half of the products are spared."""
    A = A if A.shape[0] >= A.shape[1] else A.T
    G = A.new_zeros(A.shape[1], A.shape[1])
    for i in range(0, len(G), block):
        G[i:, i:i + block] = A[:, i:].T @ A[:, i:i + block]
    return G


def gram_errors(values, A, G, probes=16):
    """Bound on the error of each singular value that is the root of an eigenvalue of G, A's Gram matrix in fp64.

    G's own rounding is measured: the mean square of |(A^T A - G) v| over Gaussian v is the squared Frobenius norm, and 16 of
    them, times 4, fall short of it with probability 1e-7 even if the difference has rank one. The eigenvalue solver is
    allowed 8 sqrt(n) units of the largest eigenvalue (Weyl; Higham and Mary 2019 on why sqrt). A root turns an error h of
    the eigenvalue into at most h / s, and at most sqrt(h)."""
    A = A if A.shape[0] >= A.shape[1] else A.T
    V = torch.randn(len(G), probes, generator=torch.Generator().manual_seed(0), dtype=A.dtype).to(A.device)
    difference = A.T @ (A @ V) - G.tril() @ V - G.tril(-1).T @ V
    h = (4 * difference.norm() / probes ** 0.5).cpu() + 8 * UNIT * len(G) ** 0.5 * values.square().max()
    return torch.minimum(h / values, h.sqrt()), h  # 0 / 0 where all is zero: minimum passes NaN on


def singular_values(A, method="auto", tolerance=1e-6, fractions=()):
    """(singular values of A [m, n], fp64, descending, on the CPU; bound on their error; method that was used).

    'auto' is the Gram route where its bound stays below tolerance times the largest value and no share of squares is
    so near to one of `fractions` that the effective rank could be another; else it is SVD."""
    A = A.double()
    if not A.isfinite().all():
        raise ValueError("holds NaN or infinity")
    scale = A.abs().max().item()
    if scale == 0:
        return torch.zeros(min(A.shape), dtype=torch.float64), 0.0, "zero"
    A = A / scale  # the squares of a very small change would lose digits
    if method != "svd":
        values = torch.linalg.eigvalsh(G := gram(A)).flip(0).clamp(min=0).sqrt().cpu()
        errors, h = gram_errors(values, A, G)
        share = values.square().cumsum(0) / values.square().sum()
        near = min((float((share - f).abs().min()) for f in fractions), default=math.inf)
        if method == "gram" or errors.max() <= tolerance * values[0] and near > len(values) * h / values.square().sum():
            return values * scale, errors.max().item() * scale, "gram"
    values = torch.linalg.svdvals(A).cpu()
    return values * scale, max(A.shape) * UNIT * values[0].item() * scale, "svd"


def lora_singular_values(A, B, scale):
    """Singular values, fp64, descending, of scale B A for A [r, in], B [out, r]: min(r, in, out) of them, the product
    is never formed. B = Q R and A^T = P S make it Q (R S^T) P^T, and Q, P have orthonormal columns."""
    R = torch.linalg.qr(B.double(), mode="r").R
    S = torch.linalg.qr(A.double().T, mode="r").R
    return abs(scale) * torch.linalg.svdvals(R @ S.T).cpu()


# ----------------------------------------------------------------------------- what chance would give
@lru_cache
def random_singular_values(m, n, points=200_000):
    """Singular values that a Gaussian [m, n] of Frobenius norm 1 tends to, descending: numpy [min(m, n)].

    Marchenko and Pastur's law with ratio g = small / large side, in the angle t of x = 1 + g - 2 sqrt(g) cos t:
    eigenvalues of the Gram matrix have density 2 sin^2 t / (pi x), t from 0 to pi."""
    small, large = sorted((m, n))
    g = small / large
    t = (np.arange(points) + 0.5) * np.pi / points
    x = 1 + g - 2 * g ** 0.5 * np.cos(t)
    below = np.cumsum(2 * np.sin(t) ** 2 / x)
    values = np.interp((np.arange(small) + 0.5) / small, below / below[-1], x)[::-1] ** 0.5
    return values / np.linalg.norm(values)


def random_edge(m, n):
    """Largest singular value of a Gaussian [m, n] of Frobenius norm 1, for large sides: sqrt(1/m) + sqrt(1/n)."""
    return m ** -0.5 + n ** -0.5


@lru_cache
def random_lora_singular_values(m, n, rank):
    """Singular values of B A for Gaussian A [rank, n], B [m, rank], of Frobenius norm 1: one draw, as numpy."""
    generator = torch.Generator().manual_seed(0)
    A, B = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((rank, n), (m, rank)))
    values = lora_singular_values(A, B, 1.0).numpy()
    return values / np.linalg.norm(values)


def describe(values, error, method, shape, fractions, lora_rank=None):
    """What is stored of one matrix: its spectrum, and beside it what a random matrix of its shape and norm has."""
    norm = values.square().sum().sqrt().item()
    chance = random_singular_values(*shape) if lora_rank is None else random_lora_singular_values(*shape, lora_rank)
    above = values > norm * random_edge(*shape)
    return {"norm": norm, "effective_rank": {str(f): effective_rank(values, f) for f in fractions},
            "random_rank": {str(f): effective_rank(chance, f) for f in fractions},
            "above_random": int(above.sum()), "above_random_share": (values[above].norm() / norm).item() ** 2 if norm else 0.0,
            "error": error, "method": method, "singular_values": [float(f"{v:.9g}") for v in values.tolist()]}


def rounding_share(W, D):
    """Share of |D|^2 that storing W in its 16-bit dtype makes by rounding alone, its errors taken as uniform; else 0."""
    if W.element_size() > 2 or not D.any():
        return 0.0
    step = torch.ldexp(torch.full_like(D, torch.finfo(W.dtype).eps), torch.frexp(W.double()).exponent - 1)
    changed = (D != 0) & (W != 0)  # where the change was rounded to nothing, D is zero and holds no noise
    return min(1.0, ((step * changed).square().sum() / 12 / D.square().sum()).item())


# ----------------------------------------------------------------------------- leading directions
def leading_vectors(A, sizes, values, accuracy=1e-2, seed=0):
    """(U [m, K], V [n, K], {k: bound}) of the K = max(sizes) largest singular values of A in fp64, descending.

    All eigenvectors take ten times as long as all eigenvalues: block Krylov spaces of A^T A grow (Golub and Underwood
    1977) until each wanted space is good to `accuracy`, or a quarter as large as A. The bound is on the norm of the sines of
    the angles to the exact space: |residual| / gap (Davis and Kahan), which knows `values`, A's singular values; it is
    large where a space is ill defined because the next singular value is nearly as large as its last."""
    A, wide = (A.T, True) if A.shape[0] < A.shape[1] else (A, False)
    n, K = A.shape[1], max(sizes)
    small = n <= 1024 or n < 8 * K  # then the whole space is as quick
    start = torch.randn(n, K + 8, generator=torch.Generator().manual_seed(seed), dtype=A.dtype).to(A.device)
    basis = torch.eye(n, dtype=A.dtype, device=A.device) if small else torch.linalg.qr(start).Q
    mapped, tried = A @ basis, 0
    while True:
        width = basis.shape[1]
        if small or width >= 1.25 * tried or 4 * width >= n:
            theta, S = torch.linalg.eigh(mapped.T @ mapped)
            theta, S, tried = theta[-K:].flip(0).clamp(min=0), S[:, -K:].flip(1), width
            V, U = basis @ S, torch.linalg.qr(mapped @ S).Q
            of_V, of_U = A.T @ (mapped @ S) - V * theta, A @ (A.T @ U) - U * theta
            sines = {}
            for k in sizes:
                far = max(of_V[:, :k].norm().item(), of_U[:, :k].norm().item())
                gap = (theta[k - 1] - (values[k] ** 2 if k < n else 0.0)).item()
                sines[k] = 0.0 if k == n else far / gap if gap > 0 else math.inf
            if small or max(sines.values()) <= accuracy or 4 * width >= n:
                return (V, U, sines) if wide else (U, V, sines)
        block = A.T @ mapped[:, -K - 8:]
        for _ in range(2):  # twice, against cancellation
            block = torch.linalg.qr(block - basis @ (basis.T @ block)).Q
        basis, mapped = torch.cat([basis, block], 1), torch.cat([mapped, A @ block], 1)


def overlap(before, after, sizes):
    """{k: |X_k^T Y_k|_F^2 / k}, 1 for equal spaces, for the leading k columns of X, Y [n, K], orthonormal.

    The LoRA paper's phi (Hu et al. 2021, section 7.2); two random spaces have k / n on average."""
    product = (before.T @ after).square()
    return {str(k): (product[:k, :k].sum() / k).item() for k in sizes}


def compare_directions(leading, W, values, D, sizes):
    """How W, of singular values `values`, and its change D lie to the leading directions (U0, V0, bounds) of W0; for
    each k of `sizes`, with chance beside.

    overlap_*: share of the leading k directions of W that lie in those of W0, outputs (U) and inputs (V), and a bound on
    its error. change_*: share of |D|^2 written to, and read from, the leading k of W0. entered: how many of the
    leading k of W have less than half of their length^2, on the outputs' side, in the leading K of W0, K the largest of
    `sizes`: they were not among those."""
    (U0, V0, sines0), (U, V, sines) = leading, leading_vectors(W, sizes, values)
    total = D.square().sum().item()
    inside = (U0.T @ U).square().sum(0)
    written, read = (U0.T @ D).square().sum(1), (D @ V0).square().sum(0)
    share = lambda parts, k: parts[:k].sum().item() / total if total else 0.0
    # |tr(P0 P) - tr(P0' P')| <= sqrt(2 k) (|P0 - P0'|_F + |P - P'|_F), and |P - P'|_F = sqrt(2) |sines|
    errors = {str(k): min(1.0, 2 * (sines0[k] + sines[k]) / k ** 0.5) for k in sizes}
    return {"overlap_out": overlap(U0, U, sizes), "overlap_in": overlap(V0, V, sizes), "overlap_error": errors,
            "change_out": {str(k): share(written, k) for k in sizes}, "change_in": {str(k): share(read, k) for k in sizes},
            "entered": {str(k): int((inside[:k] < 0.5).sum()) for k in sizes},
            "random_out": {str(k): k / len(U) for k in sizes}, "random_in": {str(k): k / len(V) for k in sizes}}


# ----------------------------------------------------------------------------- folders
class Checkpoint(NamedTuple):
    """An opened model or adapter folder."""
    folder: Path
    where: dict          # tensor name -> open file
    rank: int            # of its adapters; None for a model
    scale: float         # alpha / rank
    chosen: object       # (layer, module) -> is there anything?
    identity: str        # tells its weights from others

    def read(self, name, device):
        return self.where[name].get_tensor(name).to(device)


def path_of(layer, module):
    return f"model.layers.{layer}.{'self_attn' if module in PROJECTIONS[:4] else 'mlp'}.{module}"


def open_model(folder, config):
    """A Checkpoint of a model folder, its projections checked against the config; raises as open_weights, ValueError."""
    shapes, where = open_weights(folder)
    expected = {f"{path_of(layer, module)}.weight": shape for module, shape in config.projection_shapes.items()
                for layer in range(config.num_hidden_layers)}
    found = {name: shape for name, shape in shapes.items() if name.split(".")[-2] in PROJECTIONS}
    if problems := compare_names(expected, found):
        raise ValueError(f"{folder}: its projections do not fit the base's config.json: {problems}")
    get = lambda name: where[name].get_tensor(name)
    embedding = "model.embed_tokens.weight" if "model.embed_tokens.weight" in where else "lm_head.weight"
    qkv = torch.cat([get(f"{path_of(0, module)}.weight") for module in PROJECTIONS[:3]])
    known_by = fingerprint_of(get("model.norm.weight"), where[embedding].get_slice(embedding), qkv)
    return Checkpoint(Path(folder), where, None, 1.0, lambda layer, module: True, known_by)


def open_adapter(folder, config, base_identity):
    """A Checkpoint of a PEFT folder for a base; raises as read_adapter_config, or ValueError if it does not fit."""
    rank, alpha, _, rslora, chosen = read_adapter_config(folder)
    expected = {}
    for layer in range(config.num_hidden_layers):
        for module, (rows, columns) in config.projection_shapes.items():
            if chosen(layer, module):
                expected[f"base_model.model.{path_of(layer, module)}.lora_A.weight"] = (rank, columns)
                expected[f"base_model.model.{path_of(layer, module)}.lora_B.weight"] = (rows, rank)
    where = open_adapter_weights(folder, expected, lambda: base_identity)
    digest = hashlib.sha256((Path(folder) / "adapter_model.safetensors").read_bytes()).hexdigest()
    return Checkpoint(Path(folder), where, rank, alpha / (rank ** 0.5 if rslora else rank), chosen, digest)


def find_checkpoints(folders):
    """The checkpoint folders among `folders`, run folders replaced by all their complete checkpoints in order of steps.

    Raises ValueError for none, FileNotFoundError for a folder that is not there."""
    found = []
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise FileNotFoundError(f"tuned: {folder}: no such folder")
        found += [path for _, path in checkpoints_of(folder)] or [folder]
    if not found:
        raise ValueError("tuned is not set; see --help")
    if twice := [str(p) for p in found if found.count(p) > 1]:
        raise ValueError(f"tuned: {twice[0]} is named twice")
    return found


def base_of(folders):
    """The base that the checkpoints name; raises ValueError when they name none, or several, or no folder here."""
    named = set()
    for folder in folders:
        if is_adapter(folder):
            named.add(json.loads((folder / "adapter_config.json").read_text()).get("base_model_name_or_path") or "")
        else:
            named.add(read_state(folder).get("config", {}).get("base", ""))
    if len(named) != 1 or not Path(name := named.pop()).is_dir() or not name:
        raise ValueError("base is not set, and the checkpoints do not all name the same folder; see --help")
    return name


# ----------------------------------------------------------------------------- the spectra of one matrix
def analyse(before, checkpoints, layer, module, subspaces, device, **how):
    """Records of one projection: W0, then W and D of every checkpoint. `how`: fractions, method, tolerance.

    Raises ValueError naming the folder and matrix that holds NaN or infinity."""
    path = path_of(layer, module)
    W0 = before.read(f"{path}.weight", device).double()
    shape, fractions = tuple(W0.shape), how["fractions"]
    sizes = [k for k in subspaces if k <= min(shape)]

    def record(matrix, checkpoint, values, lora_rank=None, **more):
        return {"layer": layer, "module": module, "shape": shape, "checkpoint": checkpoint, "matrix": matrix,
                **describe(*values, shape, fractions, lora_rank), **more}

    def spectrum(A, folder):
        try:
            return singular_values(A, **how)
        except ValueError as e:
            raise ValueError(f"{folder}: {path} {e}") from None

    of_W0 = spectrum(W0, before.folder)
    records = [record("W0", None, of_W0)]
    leading = leading_vectors(W0, sizes, of_W0[0]) if sizes else None
    for i, after in enumerate(checkpoints):
        if not after.chosen(layer, module):
            continue
        if after.rank is None:
            stored = after.read(f"{path}.weight", device)
            W = stored.double()
            D = W - W0
            change = record("D", i, spectrum(D, after.folder), rounding_share=rounding_share(stored, D))
        else:
            A, B = (after.read(f"base_model.model.{path}.lora_{x}.weight", device).double() for x in "AB")
            if not (A.isfinite().all() and B.isfinite().all()):
                raise ValueError(f"{after.folder}: {path} holds NaN or infinity")
            D = after.scale * (B @ A)
            W = W0 + D
            values = lora_singular_values(A, B, after.scale)
            error = max(shape) * UNIT * values[0].item()
            change = record("D", i, (values, error, "lora"), after.rank, rounding_share=0.0)
        of_W = spectrum(W, after.folder)
        directions = compare_directions(leading, W, of_W[0], D, sizes) if sizes else {}
        records += [record("W", i, of_W, **directions), change]
    return records


def cost_of(shape, checkpoints, with_vectors):
    """Work of analyse in arbitrary units, for the time that is left: products, and the eigenvalue solver."""
    small, large = sorted(shape)
    once = large * small ** 2 + 2 * small ** 3
    return (1 + 2 * checkpoints) * once + (1 + checkpoints) * with_vectors * once


# ----------------------------------------------------------------------------- files
def check_made_with(path, header):
    """Raises ValueError when the file at `path` (OUT or OUT.part) was made from something else, or is not whole."""
    try:
        before = json.loads(path.read_text().split("\n")[0])["made_with"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: not written by this script, or cut short; delete it or choose another --out") from None
    if other := [k for k in header if before.get(k) != header[k]]:
        raise ValueError(f"{path} was made with other {', '.join(other)}; delete it or choose another --out")


def resume_from(part, header):
    """{(layer, module): records} that OUT.part holds, which is begun if it is not there; raises as check_made_with."""
    lines = []
    if part.is_file() and part.stat().st_size:
        check_made_with(part, header)
        lines = part.read_text().split("\n")[1:-1]  # behind the last new line: what a kill tore
    part.parent.mkdir(parents=True, exist_ok=True)
    write_whole(part, "".join(line + "\n" for line in [json.dumps({"made_with": header}), *lines]))
    return {(records[0]["layer"], records[0]["module"]): records for records in map(json.loads, lines)}


def summary(records, checkpoints, fraction):
    """The table printed at the end: means over layers, a line for each checkpoint and module."""
    f = str(fraction)
    mean = lambda name, rows: sum(name(r) for r in rows) / len(rows)
    lines = [f"least rank that holds {fraction:.0%} of the squares, mean over layers; random: a Gaussian of the same shape and "
             f"norm (LoRA: of the same rank)", f"{'':24} {'module':10} {'shape':>13} {'W0':>7} {'W':>7} {'D':>7} {'random':>7}  "
             f"{'D above random edge':>20}"]
    for i, checkpoint in enumerate(checkpoints):
        for module in PROJECTIONS:
            rows = [r for r in records if r["module"] == module]
            D, W = ([r for r in rows if r["checkpoint"] == i and r["matrix"] == m] for m in "DW")
            W0 = [r for r in rows if r["matrix"] == "W0"]
            if not D:
                continue
            rank = lambda r: r["effective_rank"][f]
            lines.append(f"{'/'.join(checkpoint.folder.parts[-2:])[-24:]:24} {module:10} {'x'.join(map(str, D[0]['shape'])):>13} "
                         f"{mean(rank, W0):7.1f} {mean(rank, W):7.1f} {mean(rank, D):7.1f} "
                         f"{D[0]['random_rank'][f]:7}  {mean(lambda r: r['above_random'], D):6.1f} hold "
                         f"{mean(lambda r: r['above_random_share'], D):7.1%}")
    if noisy := {r["checkpoint"] for r in records if r.get("rounding_share", 0) > 0.1}:
        lines.append("note: rounding to 16 bits alone makes more than 10% of the change in " +
                     ", ".join(str(checkpoints[i].folder) for i in sorted(noisy)))
    return "\n".join(lines)


# ----------------------------------------------------------------------------- experiments
def noise_experiment(n, seed, fractions, device="cpu"):
    """Figure S8: spectra of Gaussian A [n, n], 0.1 B and A + 0.1 B, and the mean change of A's by c B, c from 1e-6 to 1.

    Weak unstructured noise has as high a rank as anything: a high rank of D alone does not prove structure."""
    generator = torch.Generator().manual_seed(seed)
    A, B = (torch.randn(n, n, generator=generator, dtype=torch.float64).to(device) for _ in range(2))
    of_A = singular_values(A)
    three = {"A": of_A, "0.1 B": singular_values(0.1 * B), "A + 0.1 B": singular_values(A + 0.1 * B)}
    differences = []
    for exponent in tqdm(np.linspace(-6, 0, 13), desc="noise"):
        changed = singular_values(A + 10.0 ** exponent * B)[0]
        differences.append({"log10_c": float(exponent), "mean_difference": (changed - of_A[0]).abs().mean().item()})
    return {"spectra": {name: describe(*values, (n, n), fractions) for name, values in three.items()},
            "differences": differences}


def compare_routes(n, device):
    """Print seconds and errors of the routes to the singular values of a matrix [n, n], and what a 7B pair would take."""
    generator = torch.Generator().manual_seed(0)
    ours = lambda A: singular_values(A)[0]
    routes = {"svdvals, fp64": lambda A: torch.linalg.svdvals(A.double()), "svdvals, fp32": torch.linalg.svdvals,
              "eigvalsh(A^T A), fp64": lambda A: torch.linalg.eigvalsh(A.double().T @ A.double()).flip(0).clamp(min=0).sqrt(),
              "ours": ours}

    def timed(route, A):
        started = time.perf_counter()
        values = route(A).double().cpu()  # the copy waits for the device
        return values, time.perf_counter() - started

    square, exact = torch.randn(n, n, generator=generator).to(device), None
    for name, route in routes.items():
        values, seconds = timed(route, square)
        exact = values if exact is None else exact
        print(f"{n} x {n}  {name:22} {seconds:8.2f} s   differs from fp64 SVD by {(values - exact).abs().max() / exact[0]:.1e} "
              f"of the largest", flush=True)
    rows = round(n * 11008 / 4096)
    of_mlp = timed(ours, torch.randn(rows, n, generator=generator).to(device))[1]
    hours = (128 * seconds + 96 * of_mlp) * (4096 / n) ** 3 / 3600
    print(f"{rows} x {n}  {'ours':22} {of_mlp:8.2f} s\na 7B model's 224 matrices on {device_name(device)}: {hours:.2f} h for one "
          f"of W0, W, D, {3 * hours:.2f} h for a pair, without vectors" + ("" if n == 4096 else f" (from {n} by the cube)"))


# ----------------------------------------------------------------------------- the run
if __name__ == "__main__":
    with one_line_errors():
        config = configure(globals())
        device = pick_device(device)
        if not fractions or any(not 0 < f < 1 for f in fractions):
            raise ValueError(f"fractions must be in (0, 1), found {fractions}")
        if any(k < 1 for k in subspaces) or tolerance <= 0 or min(noise, time_routes) < 0:
            raise ValueError("subspaces and tolerance must be positive, noise and time_routes not negative")
        if time_routes:
            compare_routes(time_routes, device)
            raise SystemExit(0)
        about = {"settings": config, "device": device_name(device), "versions": versions()}
        if noise:
            if not out:
                raise ValueError("out is not set; see --help")
            Path(out).parent.mkdir(parents=True, exist_ok=True)
            write_whole(out, json.dumps({"kind": "noise", **about, **noise_experiment(noise, seed, fractions, device)}))
            print(f"wrote {out}")
            raise SystemExit(0)

        folders = find_checkpoints(tuned)
        runs = {folder.parent for folder in folders}
        if not out and (len(runs) > 1 or not read_state(folders[0])):
            raise ValueError(("tuned names several runs" if len(runs) > 1 else f"tuned: {folders[0]} is no run and no checkpoint of "
                              "train.py") + "; say where to write with --out=FILE.json")
        path = Path(out or folders[0].parent / "spectrum.json")
        base = base or base_of(folders)
        shape = LlamaConfig.from_json(base)
        names = resolve_targets(modules)
        blocks = [int(x) if str(x).isdigit() else -1 for x in layers] or list(range(shape.num_hidden_layers))
        if not set(blocks) <= set(range(shape.num_hidden_layers)):
            raise ValueError(f"layers: found {', '.join(map(str, layers))}; {base} has 0 to {shape.num_hidden_layers - 1}")
        before = open_model(base, shape)
        checkpoints = [open_adapter(f, shape, before.identity) if is_adapter(f) else open_model(f, shape) for f in folders]
        about["made_with"] = header = json.loads(json.dumps({
            "base": before.identity, "checkpoints": [[c.folder.name, c.identity] for c in checkpoints], "modules": names,
            "layers": blocks, "fractions": fractions, "subspaces": subspaces, "method": method, "tolerance": tolerance}))
        part = Path(f"{path}.part")
        share = 0.9 if 0.9 in fractions else fractions[0]
        if path.is_file():
            check_made_with(path, header)
            print(summary(json.loads(path.read_text())["matrices"], checkpoints, share))
            print(f"{path} is complete already")
            raise SystemExit(0)
        done = resume_from(part, header)
        todo = [(layer, module) for layer in blocks for module in names]
        cost = {key: cost_of(shape.projection_shapes[key[1]], len(checkpoints), bool(subspaces)) for key in todo}
        started = time.perf_counter()
        with tqdm(total=sum(cost.values()), initial=sum(cost[key] for key in todo if key in done), smoothing=0.05,
                  bar_format="{percentage:3.0f}%|{bar:30}| {elapsed}<{remaining}{postfix}") as bar, \
                open(part, "a") as file, torch.inference_mode():
            for layer, module in todo:
                if (layer, module) in done:
                    continue
                bar.set_postfix_str(f"block {layer} {module}")
                done[layer, module] = analyse(before, checkpoints, layer, module, subspaces, device, fractions=fractions,
                                              method=method, tolerance=tolerance)
                file.write(json.dumps(done[layer, module]) + "\n")
                file.flush()
                bar.update(cost[layer, module])
        records = [record for key in todo for record in done[key]]
        states = [read_state(folder) for folder in folders]
        write_whole(path, json.dumps({**about, "kind": "spectrum", "base": str(base), "checkpoints": [
            {"folder": str(c.folder), "step": s.get("step"), "tokens": s.get("tokens"), "lora_rank": c.rank}
            for c, s in zip(checkpoints, states)], "matrices": records}))
        part.unlink()
        print(summary(records, checkpoints, share))
        worst = max(r["error"] / (max(r["singular_values"]) or 1) for r in records)
        print(f"wrote {path}: {len(records)} spectra in {time.perf_counter() - started:.0f} s, {device_name(device)}, peak "
              f"memory {peak_memory(device):.2f} GB; singular values are good to {worst:.0e} of the largest of their matrix")
