"""
What every lesson begins with: the way to the project's modules, knobs, and a place for its figure.

    from start import read_knobs, show      # before model.py and the others can be imported
    rank = 4
    read_knobs(globals())                   # python lessons/3_lora.py --rank=8
    show(figure, out_dir, "3_lora")         # OUT_DIR/3_lora.png; in a notebook it is displayed, too

A lesson runs in the root of the repository, wherever it was started: a notebook starts in lessons/.
"""
import builtins
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.chdir(ROOT)

from configurator import configure  # noqa: E402 (the path comes first)
from paper.looks import STYLE, place_names, plt  # noqa: E402

plt.rcParams.update(STYLE)
BASE = "tests/golden/data/stories260k"  # a small real Llama that comes with the repository


def in_notebook():
    return hasattr(builtins, "__IPYTHON__")


def read_knobs(namespace):
    """Take --knob=value from the command line, as every stage does; in a notebook edit the cell."""
    if not in_notebook():
        configure(namespace)


def show(figure, out_dir, name):
    """Write a figure to OUT_DIR/NAME.png, with the names that wait at the ends of its lines."""
    path = Path(out_dir) / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    place_names(figure)
    figure.savefig(path, dpi=200, bbox_inches="tight", pad_inches=0.05)
    plt.close(figure)
    if in_notebook():
        from IPython.display import Image, display
        display(Image(path, width=700))
    print(f"The figure: {path}")
