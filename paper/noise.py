"""
The noise experiment of the paper's figure S8: what weak unstructured noise does to a spectrum.

    A             Gaussian [n, n]    |####################    rank at 90% of the squares: 0.51 n
    0.1 B         as A, weaker       |####################    the same
    A + 0.1 B                        |####################    the same

    A + c B, c from 1e-6 to 1: how far the singular values move, on average

Noise has as high a rank as anything: a high rank of W - W0 alone does not prove structure.

    python -m paper.noise --size=1000 --out=out/noise.json
    python -m paper.plot --spectra=out/noise.json
"""
import json
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from analysis.singular import singular_values
from configurator import configure
from runtime import device_name, one_line_errors, pick_device, versions, write_whole
from spectrum import describe

# -----------------------------------------------------------------------------
size = 1000              # side of the matrices
out = ''                 # JSON file
fractions = (0.5, 0.9, 0.99)   # effective rank: of the values that hold this share of the squares
seed = 1337
device = 'auto'          # auto | cpu | cuda | cuda:N


def noise_experiment(size, seed, fractions, device):
    """Spectra of Gaussian A [size, size], 0.1 B and A + 0.1 B; the mean change of A's by c B."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(size, size, generator=generator, dtype=torch.float64).to(device)
    B = torch.randn(size, size, generator=generator, dtype=torch.float64).to(device)

    # three spectra
    spectra = {}
    for name, matrix in (("A", A), ("0.1 B", 0.1 * B), ("A + 0.1 B", A + 0.1 * B)):
        spectra[name] = describe(*singular_values(matrix), (size, size), fractions)

    # noise of growing size
    before = singular_values(A)[0]
    differences = []
    for exponent in tqdm(np.linspace(-6, 0, 13), desc="noise"):
        after = singular_values(A + 10.0 ** exponent * B)[0]
        difference = (after - before).abs().mean().item()
        differences.append({"log10_c": float(exponent), "mean_difference": difference})
    return {"spectra": spectra, "differences": differences}


# -----------------------------------------------------------------------------
if __name__ == "__main__":
    with one_line_errors():
        config = configure(globals())
        device = pick_device(device)
        if not out:
            raise ValueError("out is not set; see --help")
        if size < 1:
            raise ValueError(f"size must be positive, found {size}")
        if not fractions or min(fractions) <= 0 or max(fractions) >= 1:
            raise ValueError(f"fractions must be in (0, 1), found {fractions}")

        found = noise_experiment(size, seed, fractions, device)
        result = {"kind": "noise", "settings": config, "device": device_name(device),
                  "versions": versions(), **found}
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, json.dumps(result))
        print(f"wrote {out}")
