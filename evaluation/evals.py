"""What the evaluations share: the model under evaluation, finished items, ranks, scores.

    device = start_ranks(device)                              # under torchrun, this rank's GPU
    subject = load_for_eval(model, adapter, device, dtype)    # base, adapter or checkpoint folder
    questions = read_items("gsm8k/test.jsonl", ("question", "answer"))

    items = open_items(subject, "gsm8k", range(len(questions)), settings)
    for i in items.todo:                                      # this rank's share of what is left
        items.finish(i, {"strict": ...})                      # on disk at once
    records = items.close()                                   # of all ranks, in order
    values = [record["strict"] for record in records.values()]
    write_result(subject, "gsm8k_strict", values, settings, seconds)    # evaluation/scores.py

Where results go, if the model is a checkpoint of train.py (else all into out/MODEL or out_dir):

    out/RUN/step_N/eval_gsm8k.jsonl             a line an item, in order
    out/RUN/step_N/eval_gsm8k.settings.json     what these items were made with
    out/RUN/step_N/eval_gsm8k.jsonl.part0, 1 .. while it runs: what each rank has finished
    out/RUN/results.jsonl                       a line a metric: value, error, what was judged how
    out/RUN/values.jsonl                        a line a metric: each item's value
"""
import atexit
import datetime
import hashlib
import json
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from tqdm import tqdm

from evaluation.against import base_of_full_run, interpolate
from evaluation.scores import json_lines, with_identity
from llama.adapter_config import is_adapter, named_base
from llama.generate import NotFinite
from llama.identity import bytes_of, rows_of
from lora import load_adapter, merge_lora
from model import Llama
from runtime import RANK, WORLD, join_ranks, pick_device, print0, read_object, write_whole
from text.records import Source, check_format, from_hub, parse, read_records
from text.tokenizer import Tokenizer, load_tokenizer
from training.checkpoint import checkpoints, read_state

UNTIL_CUT = "until cut"  # a BOS, but not in front of a prompt that was cut
WHOLE_NUMBERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of a weight


class Subject(NamedTuple):
    """The model under evaluation, and where its results go."""
    model: Llama
    tokenizer: Tokenizer
    run: str
    step: int        # 0: not trained here
    tokens: int      # seen in training, None if unknown
    epoch: float     # None if unknown
    folder: Path     # of eval_NAME.jsonl
    results: Path    # results.jsonl
    identity: dict   # what distinguishes it: folders, hash of weights, dtype, tokenizer


# ----------------------------------------------------------------------------- ranks
def start_ranks(device):
    """The torch.device of this rank; under torchrun it also joins the others.

    The group is gloo's on GPUs as well: only finished records travel. Its timeout is a week, since
    a fast rank waits for the slowest one."""
    device = join_ranks(pick_device(device), "gloo", timeout=datetime.timedelta(days=7))
    if WORLD > 1:
        atexit.register(dist.destroy_process_group)
    return device


def gather(value):
    """[the value of each rank], on every rank."""
    if WORLD == 1:
        return [value]
    values = [None] * WORLD
    dist.all_gather_object(values, value)
    return values


# ----------------------------------------------------------------------------- model
def load_for_eval(model, adapter="", device=torch.device("cpu"), dtype=torch.float32, tokenizer="",
                  out_dir="", t=1.0):
    """The Subject of a model folder, a checkpoint folder out/RUN/step_N, or an adapter.

    An adapter stands in `adapter` and its base in `model`; or it stands in `model` alone, and its
    config names the base. It is merged in fp32, then rounded once to `dtype`.
    t: evaluate W0 + t (W - W0) instead, with W0 the base's weights; its results go to the folder
    t_T in the checkpoint's.
    Raises ValueError or FileNotFoundError for any other folder, and as its readers do."""
    judged, base, adapter = find_model(model, adapter)
    tok = load_tokenizer(tokenizer or base)

    # the weights; an adapter is merged in fp32 at least
    is_changed = bool(adapter) or t != 1
    load_dtype = torch.promote_types(dtype, torch.float32) if is_changed else dtype
    llama = Llama.from_pretrained(base, load_dtype, device)
    if adapter:
        merge_lora(load_adapter(llama, adapter))
    if t != 1:
        interpolate(llama, base if adapter else base_of_full_run(judged), t)
    if is_changed:
        llama = llama.to(dtype)
        llama.compute_dtype = dtype
    check_vocabulary(tok, llama.config.vocab_size)
    # on the error stream: what sample.py prints is the text alone
    if RANK == 0:
        for line in tok.notes:
            print(line, file=sys.stderr)

    # what it is, and where its results belong
    identity = {"model": str(base), "adapter": str(adapter), "weights": hash_of(llama),
                "dtype": str(dtype).removeprefix("torch."), "tokenizer": tok.sha256}
    subject = place(judged, out_dir or Path("out") / judged.resolve().name, bool(out_dir))
    if t != 1:
        identity["t"] = t
        if not out_dir:
            folder = subject.folder / f"t_{t:g}"
            subject = subject._replace(folder=folder, results=folder / "results.jsonl")
    llama = llama.eval().requires_grad_(False)
    return subject._replace(model=llama, tokenizer=tok, identity=identity)


def hash_of(llama):
    """A sha256 that identifies a model, as it is evaluated, by its shape and all its weights.

    For each weight it takes the sum of its bits as integers, which any change moves and a GPU
    computes fast, and some rows, which tell apart weights with their rows in another order."""
    digest = hashlib.sha256(repr(llama.config).encode())
    for p in llama.parameters():
        bits = p.detach().view(WHOLE_NUMBERS[p.itemsize])
        digest.update(str(bits.sum(dtype=torch.int64).item()).encode())
        digest.update(bytes_of(rows_of(bits).cpu()))
    return digest.hexdigest()


def find_model(model, adapter=""):
    """(folder that is judged, base, adapter or "") of the knobs of these names; reads no weights.

    Scripts call it before they fetch data, so that a mistyped folder is named at once. Raises
    ValueError as load_for_eval does."""
    if not (model or adapter):
        raise ValueError("model is not set; see --help")
    # an adapter in `model` alone
    if not adapter and is_adapter(model):
        adapter = model
        model = ""
    judged = Path(adapter or model)
    base = model or base_named_by(adapter)
    check_folders(judged, base, adapter)
    return judged, base, adapter


def check_folders(judged, base, adapter):
    """Raises ValueError where `judged` or its base is no finished model or adapter folder."""
    if judged.name.endswith(".tmp"):
        raise ValueError(f"{judged} is a checkpoint that was never finished")
    # runs, or a run without a step: the user has to choose
    runs = sorted(path.parent.name for path in judged.glob("*/log.jsonl"))
    if runs and not ((judged / "config.json").exists() or is_adapter(judged)):
        raise ValueError(f"{judged} holds runs; give a checkpoint of one of them: "
                         f"{', '.join(runs[:8])}")
    steps = sorted(path.name for path in judged.glob("step_*") if path.name[5:].isdigit())
    if steps:
        raise ValueError(f"{judged} is a run; give one of its checkpoints: {', '.join(steps)}")
    if is_adapter(base):
        raise ValueError(f"model: {base} is an adapter, expected the base of {adapter}")
    # a folder that is not there may be a step that was never saved
    for folder in (judged, Path(base)):
        if not folder.is_dir():
            message = f"{folder}: no such folder"
            beside = ", ".join(path.name for _, path in checkpoints(folder.parent))
            if beside:
                message += f"; beside it are {beside}"
            raise ValueError(message)


def check_vocabulary(tok, rows):
    """Raises ValueError for a tokenizer with ids of text that a model of so many rows lacks."""
    # special tokens (an added pad) are in no text, and work until one is asked for
    above = range(rows, tok.vocab_size)
    if not all(tok.is_silent(i) for i in above):
        raise ValueError(f"tokenizer has {tok.vocab_size:,} ids, the model {rows:,}: not its own")
    if above:
        names = [name for name, i in tok.special_ids.items() if i >= rows]
        tok.notes.append(f"the model has no row for {', '.join(names)} of its tokenizer")


def base_named_by(adapter):
    """The base that an adapter folder names; raises ValueError when that is no folder here."""
    if not is_adapter(adapter):
        raise ValueError(f"adapter: {adapter} holds no adapter_config.json")
    base = named_base(adapter)
    if not base or not Path(base).is_dir():
        raise ValueError(f"{adapter} names the base {base!r}, no folder here; "
                         f"say --model=BASE --adapter={adapter}")
    return base


def place(judged, elsewhere, always=False):
    """A Subject without a model, with the run, step and folders of its results.

    These are a checkpoint's own folder and its run's; or both are `elsewhere`, if `judged` is no
    checkpoint of train.py or if `always`."""
    trained = read_state(judged)
    step = trained.get("step", 0)
    run = judged.resolve().parent.name if trained else judged.resolve().name
    folder = results = Path(elsewhere)
    if trained and not always:
        folder = judged
        results = judged.parent
    epoch = epoch_of(judged.parent / "log.jsonl", step)
    return Subject(None, None, run, step, trained.get("tokens"), epoch, folder,
                   results / "results.jsonl", {})


def epoch_of(log, step):
    """Epochs done at a step by train.py's log.jsonl, to which steps are proportional; or None."""
    if not step:
        return None
    # the first line with an epoch will do; the last one may still be being written
    for record in json_lines(log):
        if record.get("epoch"):
            return record["epoch"] / record["step"] * step
    return None


# ----------------------------------------------------------------------------- data
def read_items(source, fields, knob="data"):
    """The records of a .jsonl, .json (these also .gz) or .parquet file, here or on the hub: dicts.

    fields: names that each record has, or {name: type of its value}; knob: the one that held the
    path. Raises FileNotFoundError, or ValueError naming the first record that is otherwise."""
    if source.startswith("hf://"):
        sources = from_hub(source, knob)
    elif Path(source).is_file():
        check_format(source, knob)
        sources = [Source(source, source)]
    else:
        raise FileNotFoundError(f"{knob}: {source}: no such file; expected .parquet, .json, "
                                f".jsonl (.gz) or hf://datasets/OWNER/NAME/FILE")
    # a record that cannot be read or lacks a field is named by its file and number
    items = []
    for part in sources:
        for number, raw, _ in read_records(part):
            try:
                record = parse(raw)
            except ValueError as e:
                raise ValueError(f"{part.name}, record {number}: {e}") from None
            found = list(record) if isinstance(record, dict) else [type(record).__name__]
            missing = [field for field in fields if field not in found]
            if missing:
                raise ValueError(f"{part.name}, record {number}: expected {', '.join(fields)}; "
                                 f"found {', '.join(found)}, without {', '.join(missing)}")
            if isinstance(fields, dict):
                check_types(record, fields, f"{part.name}, record {number}")
            items.append(record)
    return items


def check_types(record, types, where):
    """Raises ValueError for the first value that is not of its type."""
    for field, kind in types.items():
        if not isinstance(record[field], kind):
            expected = "text" if kind is str else kind.__name__
            raise ValueError(f"{where}: {field} is {shown(record[field])}, expected {expected}")


def shown(value):
    """A value in an error message, not longer than a line."""
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def cut_left(ids, most, bos_id=None):
    """(the last `most` ids, how many were cut); a BOS in front stays in front."""
    cut = max(0, len(ids) - most)
    if cut and ids[0] == bos_id:
        return [bos_id] + ids[cut + 1:], cut
    return ids[cut:], cut


def bos_of_harness(harness, bos, tok):
    """What lm-eval puts before a prompt: False no BOS, True one that stays, UNTIL_CUT one that a
    prompt loses with its beginning. harness: its version; bos: None = as that version has it."""
    if harness == "0.4.2":
        return bool(bos)
    puts_one = tok.adds_bos if bos is None else bos
    return UNTIL_CUT if puts_one else False


def warn_of_cuts(cuts, most):
    """Say how many prompts cut_left made shorter, to `most` tokens."""
    cuts = [cut for cut in cuts if cut]
    if cuts:
        print0(f"WARNING: {len(cuts)} prompts were cut from the left, by up to {max(cuts)} tokens, "
               f"to {most}")


def digest(records):
    """A hash of what the records say, whatever file they came in."""
    text = json.dumps(records, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ----------------------------------------------------------------------------- generation
def generate_items(subject, ids, prompts, max_new_tokens, **drawing):
    """Yield (i, its n lists of new ids) for the items `ids`, which have these prompts.

    Only ids that the tokenizer has are drawn; drawing: other arguments of Llama.generate_each.
    Raises ValueError naming model and item where logits are not finite."""
    # rows that no token has would end the decoding
    answers = subject.model.generate_each(prompts, max_new_tokens,
                                          vocab_size=subject.tokenizer.vocab_size, **drawing)
    try:
        for index, rows in answers:
            yield ids[index], rows
    except NotFinite as e:
        raise ValueError(f"{judged_name(subject)}, item {ids[e.prompt]}: the logits for new token "
                         f"{e.position} are NaN or infinite") from None


def without_eos(tok, new):
    """New ids without the one that ended them."""
    return new[:-1] if new and new[-1] in tok.stop_ids else new


def with_eos_spelled(stops, tok):
    """Stop strings and the name of EOS: lm-eval also cuts where a model spells it as text."""
    for name, i in tok.special_ids.items():
        if i == tok.eos_id and name not in stops:
            return (*stops, name)
    return stops


def judged_name(subject):
    """The folder of what is judged, for messages; the run's name where there is no model."""
    return subject.identity.get("adapter") or subject.identity.get("model") or subject.run


def begin_and_end(tok, bos):
    """What stands before a prompt and which ids end a row, in words."""
    front = f"BOS (id {tok.bos_id}) in front" if bos else "no BOS in front"
    if bos == UNTIL_CUT:
        front += " where a prompt is whole"
    # an added token that is not special has its name as text
    names = {i: name for name, i in tok.special_ids.items()}
    ends = [f"{names.get(i) or tok.decode([i])} (id {i})" for i in sorted(tok.stop_ids)]
    return f"{front}; EOS: {', '.join(ends) or 'none'}"


# ----------------------------------------------------------------------------- items
class Items:
    """The items of one evaluation, made by open_items. todo: the ids that this rank has to do."""

    def __init__(self, judged, path, ids, todo, done, score_of):
        self.judged = judged      # the name of the model, for messages
        self.path = path
        self.ids = ids
        self.todo = todo
        self.done = done          # {id: record} of earlier starts, all ranks'
        self.new = {}             # {id: record} of this start and rank
        self.part = open(f"{path}.part{RANK}", "a")
        # the bar shows the mean of the scores so far
        self.score_of = score_of
        self.scores = []
        if score_of:
            self.scores = [score_of(done[i]) for i in ids if i in done]
        name = path.stem.removeprefix("eval_")
        hidden = None if RANK == 0 else True  # None: hidden where there is no terminal
        self.bar = tqdm(total=len(todo), desc=name, disable=hidden, smoothing=0.05)

    def finish(self, i, record):
        """Keep the record (a dict) of item i; it survives a kill.

        Raises ValueError for a record with NaN or infinity."""
        # json would write NaN, which no other reader takes
        try:
            line = json.dumps({"id": i, **record}, allow_nan=False)
        except ValueError:
            raise ValueError(f"{self.judged}, item {i} of {self.path.name}: its loss or logits are "
                             "NaN or infinite") from None
        self.new[i] = record
        self.part.write(line + "\n")
        self.part.flush()
        if self.score_of:
            self.scores.append(self.score_of(record))
            mean = sum(self.scores) / len(self.scores)
            self.bar.set_postfix_str(f"score {mean:.4f}", refresh=False)
        self.bar.update()

    def close(self):
        """{id: record} of all ids in order, on every rank; rank 0 writes them as one file."""
        self.part.close()
        self.bar.close()
        # every rank learns all records, so that all can score them
        records = dict(self.done)
        for new in gather(self.new):
            records.update(new)
        missing = [i for i in self.ids if i not in records]
        if missing:
            raise RuntimeError(f"{self.path}: items {missing[:5]} were not evaluated")
        # the parts go only when the whole is there
        if RANK == 0:
            write_records(self.path, records)
            for part in self.path.parent.glob(f"{self.path.name}.part*"):
                part.unlink()
            print0(f"{len(self.ids)} items -> {self.path}")
        return {i: records[i] for i in self.ids}


def open_items(subject, name, ids, settings, score_of=None):
    """The Items `ids` (ints) of FOLDER/eval_NAME.jsonl; what is done already is not done again.

    score_of(record) is the number whose mean the progress bar shows.
    Raises ValueError when the folder holds items of this name made with other settings."""
    path = subject.folder / f"eval_{name}.jsonl"
    done = {}
    if RANK == 0:
        keep_settings(path, with_identity(subject, settings))
        # what earlier starts finished, on whatever number of ranks, goes into one part
        parts = sorted(path.parent.glob(f"{path.name}.part*"))
        for part in [path, *parts]:
            done.update(read_done(part, score_of))
        write_records(f"{path}.part0", done)
        for part in path.parent.glob(f"{path.name}.part[1-9]*"):
            part.unlink()
    done = gather(done)[0]

    # the rest is dealt out like cards
    left = [i for i in ids if i not in done]
    if len(left) < len(ids):
        print0(f"{path}: {len(ids) - len(left)} of {len(ids)} items are there already")
    return Items(judged_name(subject), path, ids, left[RANK::WORLD], done, score_of)


def keep_settings(path, settings):
    """Write eval_NAME.settings.json; raises ValueError when it is there and differs."""
    kept = path.with_suffix(".settings.json")
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_whole(kept, json.dumps(settings, indent=1))
        return
    # each setting that differs is named
    before = read_object(kept)
    changes = []
    for key in {**before, **settings}:
        if before.get(key) != settings.get(key):
            changes.append(f"{key}={before.get(key)!r}, not {settings.get(key)!r}")
    if changes:
        raise ValueError(f"{path} was made with {', '.join(changes)}; choose another --name or "
                         f"--out_dir, or delete it and its parts and settings")


def write_records(path, records):
    lines = [json.dumps({"id": i, **records[i]}) + "\n" for i in sorted(records)]
    write_whole(path, "".join(lines))


def read_done(path, score_of=None):
    """{id: record} of a file of items, without a last line that a kill tore.

    Raises ValueError for a line that is no record, or of which score_of makes no number."""
    if not path.is_file():
        return {}
    # what stands behind the last line end is torn, or nothing
    whole_lines = path.read_text().split("\n")[:-1]
    done = {}
    for number, line in enumerate(whole_lines, 1):
        try:
            record = json.loads(line)
            done[int(record.pop("id"))] = record
            # beyond this their squares are no numbers
            if score_of is not None and not abs(float(score_of(record))) < 1e100:
                raise ValueError(f"its score is {score_of(record)}")
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError,
                RecursionError) as e:
            raise ValueError(f"{path}:{number}: no item of this evaluation ({e!r}); delete the "
                             "file, or its damaged lines") from None
    return done
