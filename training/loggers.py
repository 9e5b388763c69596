"""
What a run says of itself: config.json, log.jsonl, and the same in Weights & Biases or TensorBoard.

    log = start_files(knobs, config, -1)             # a new run; else the step to resume from
    log.append({"step": 5, "loss": 2.1, ...})        # everywhere: loss, lr, tok_per_s, ...
    log.append({"step": 5, "val": {"code": 1.9}})    # val/code, but in log.jsonl as it stands

A resumed run continues in the same run of Weights & Biases (its id is in out_dir/wandb_id), and in
the same folder of TensorBoard, which drops the steps that are done again. Weights & Biases cannot
drop steps: it shows these twice, by the step in the record.
"""
import atexit
import json
from functools import partial
from pathlib import Path

from runtime import RANK, append_jsonl, versions, write_whole
from training.checkpoint import start_log


def check_loggers(knobs):
    """Raise ValueError for a logger whose package is not installed."""
    if knobs.wandb:
        try:
            from wandb import init  # noqa: F401
        except ImportError as e:
            raise ValueError(f"wandb={knobs.wandb}: pip install wandb first ({e})") from None
    if knobs.tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter  # noqa: F401
        except ImportError as e:
            raise ValueError(f"tensorboard={knobs.tensorboard}: pip install tensorboard first "
                             f"({e})") from None


class RunLog:
    """log.jsonl, and functions that take each record's (step, {name: number})."""

    def __init__(self, path, writers):
        self.path = path
        self.writers = writers

    def append(self, record):
        """Log one record, an object with a step."""
        append_jsonl(self.path, record)
        for write in self.writers:
            write(record["step"], numbers_of(record))


def start_files(knobs, config, last_step):
    """Write out_dir/config.json, and open the RunLog from the step after `last_step`, -1 = anew.

    Ranks other than 0 get one that writes nothing. knobs: train.py's as attributes; config: as a
    dict. Raises ValueError where Weights & Biases cannot start, such as without an API key."""
    # rank 0 alone writes
    folder = Path(knobs.out_dir)
    log = RunLog(folder / "log.jsonl", [])
    if RANK:
        return log
    # without the steps that will be done again
    start_log(log.path, last_step)
    text = json.dumps({"config": config, "versions": versions()}, indent=1)
    write_whole(folder / "config.json", text)
    # where people look
    if knobs.wandb:
        log.writers.append(wandb_writer(knobs, last_step, config))
    if knobs.tensorboard:
        log.writers.append(tensorboard_writer(knobs, last_step))
    return log


def numbers_of(record):
    """{name: number} of a record; a validation's are val/NAME, a list is its length."""
    if "val" in record:
        return {f"val/{name}": loss for name, loss in record["val"].items()}
    numbers = {}
    for name, value in record.items():
        if isinstance(value, list):
            numbers[name] = len(value)
        elif name != "step" and isinstance(value, (int, float)):
            numbers[name] = value
    return numbers


def wandb_writer(knobs, last_step, config):
    """Start or go on with the run whose id is in out_dir/wandb_id."""
    import wandb
    # a new run has an id of its own, also where a deleted one left its file
    id_file = Path(knobs.out_dir) / "wandb_id"
    goes_on = last_step >= 0 and id_file.is_file()
    run_id = id_file.read_text().strip() if goes_on else None
    try:
        run = wandb.init(project=knobs.wandb, name=Path(knobs.out_dir).resolve().name, id=run_id,
                         dir=knobs.out_dir, config=config, resume="allow")
    except wandb.errors.Error as e:
        raise ValueError(f"wandb={knobs.wandb}: {e}") from None
    write_whole(id_file, run.id + "\n")
    # by our own step, since theirs cannot go back to where a run resumes
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return partial(write_to_wandb, run)


def write_to_wandb(run, step, numbers):
    run.log({"step": step, **numbers})


def tensorboard_writer(knobs, last_step):
    """Write into a folder of tensorboard's, named as out_dir is."""
    from torch.utils.tensorboard import SummaryWriter
    folder = Path(knobs.tensorboard) / Path(knobs.out_dir).resolve().name
    # what is there of later steps, of a run that was killed, is done again
    writer = SummaryWriter(folder, purge_step=last_step + 1)
    atexit.register(writer.close)
    return partial(write_to_tensorboard, writer)


def write_to_tensorboard(writer, step, numbers):
    for name, number in numbers.items():
        writer.add_scalar(name, number, step)
    writer.flush()  # it survives a kill
