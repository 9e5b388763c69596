"""Files of a long analysis: what OUT was made with, and OUT.part, from which a killed run goes on.

    {"made_with": {"base": ..., "fractions": [0.5, 0.9]}}            OUT.part's first line
    [{"layer": 0, "module": "q_proj", "matrix": "W0", ...}, ...]     then one for each projection
"""
import json

from runtime import write_whole
from training.checkpoint import read_state


def default_out(folders):
    """RUN/spectrum.json; raises ValueError when the checkpoints are not those of one run."""
    advice = f"say where to write, as in --out={folders[0] / 'spectrum.json'}"
    runs = {folder.parent for folder in folders}
    if len(runs) > 1:
        raise ValueError(f"tuned names several runs; {advice}")
    if not read_state(folders[0]):
        raise ValueError(f"tuned: {folders[0]} is no run and no checkpoint of train.py; {advice}")
    return folders[0].parent / "spectrum.json"


def check_made_with(path, made_with):
    """Raise ValueError when OUT or OUT.part was made with something else, or is not whole."""
    advice = "delete it or choose another --out"
    try:
        before = dict(json.loads(path.read_text().split("\n")[0])["made_with"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{path}: not written by this script, or cut short; {advice}") from None
    other = [key for key in made_with if before.get(key) != made_with[key]]
    if other:
        raise ValueError(f"{path} was made with other {', '.join(other)}; {advice}")


def resume_from(part, made_with):
    """{(layer, module): records} that OUT.part holds; begins the file when there is none.

    Its first line is {"made_with": ...}, each other one holds the records of one projection."""
    lines = []
    if part.is_file() and part.stat().st_size:
        check_made_with(part, made_with)
        lines = part.read_text().split("\n")[1:-1]  # after the last newline: what a kill cut short
    part.parent.mkdir(parents=True, exist_ok=True)
    # written again without the torn line
    first = json.dumps({"made_with": made_with})
    write_whole(part, "\n".join([first, *lines]) + "\n")
    done = {}
    for line in lines:
        try:
            records = json.loads(line)
            done[records[0]["layer"], records[0]["module"]] = records
        except (ValueError, KeyError, TypeError, IndexError, RecursionError):
            raise ValueError(f"{part}: a line of it is damaged; delete it") from None
    return done
