"""Knobs: plain assignments at the top of a script, overridden by config files and --knob=value.

    train.py               config/math_cpt.py                            command line     the run
    lora_rank = 0                                                        --lora_rank=64   64
    learning_rate = 1e-4   learning_rate = 4e-5 if lora_rank else 1e-5                    4e-5

    python train.py config/math_cpt.py --lora_rank=64    # files run in order; the command line wins
    python train.py config/math_cpt.py --help            # the knobs, and what this file changes

A script calls `config = configure(globals())` below its head. Every name bound by then to an int,
float, bool, str, tuple or None is a knob, unless it starts with `_` or is a CONSTANT in capitals.
Two optional dicts in the head say more:
    _types = {'resume': str}                        type of a knob that is None, of the items of ()
    _choices = {'dtype': ('float32', 'bfloat16')}   the only values of a knob, or of a tuple's items

A config file is Python that sees the knobs, with the command line's values, and assigns to them.
Assigning to a knob that the command line sets has no effect, not even on the lines below. Its
helpers are modules, functions, classes and names that start with `_`. include('shared.py') runs
another file at that point, as if its lines were in this one; later assignments win.
Every mistake is one line on stderr and exit status 2.
"""
import ast
import difflib
import inspect
import math
import os
import sys
import textwrap
import traceback
from collections import UserDict
from pathlib import Path
from typing import NamedTuple

WORDS = {bool: "True or False", int: "an int", float: "a finite float", str: "a str",
         tuple: "a tuple of "}
BOOLS = {"True": True, "true": True, "1": True, "False": False, "false": False, "0": False}
RANK0 = os.environ.get("RANK", "0") == "0"  # torchrun's; one rank prints, as all get the same


class Knob(NamedTuple):
    default: object
    kind: type
    element: type  # of the items of a tuple
    choices: tuple


def configure(namespace, argv=None):
    """Apply the config files and --knob=value of argv (default sys.argv[1:]) to a script's globals.

    Sets the knobs in `namespace`, and `_provenance` for knob_table; returns {knob: value} in the
    script's order. Raises SystemExit(2) after one line on stderr if anything is wrong,
    SystemExit(0) after printing the help."""
    knobs = find_knobs(namespace)
    files, given, help_asked = split_argv(sys.argv[1:] if argv is None else argv, knobs)
    config = {name: knob.default for name, knob in knobs.items()}
    origins = {name: [] for name in knobs}

    # files in order, each of which sees the command line's values; then the command line wins
    for path in files:
        for name, (value, places) in run_file(path, config, given, knobs).items():
            config[name] = value
            origins[name] += places
    for name, value in given.items():
        config[name] = value
        origins[name].append("command line")

    # where each knob that differs from its default comes from: a.py -> b.py -> command line
    provenance = {}
    for name, knob in knobs.items():
        is_changed = config[name] != knob.default
        provenance[name] = " -> ".join(origins[name]) if is_changed else ""
    if help_asked:
        if RANK0:
            print(help_text(namespace, knobs, config, provenance))
        raise SystemExit(0)
    namespace.update(config, _provenance=provenance)
    return config


def default_values(namespace):
    """{knob: default} of a script's globals; call it before configure() changes them."""
    return {name: knob.default for name, knob in find_knobs(namespace).items()}


def knob_table(namespace):
    """The knobs as text: changed ones first, with `*` and origin; the others as a paragraph.

    Raises KeyError if configure() has not been called on `namespace`."""
    provenance = namespace["_provenance"]
    changed, unchanged = {}, []
    for name, origin in provenance.items():
        # no-break spaces, which repr() leaves in no value, keep `name = value` in one piece
        pair = f"{name} = {namespace[name]!r}".replace(" ", "\xa0")
        if origin:
            changed[name] = pair
        else:
            unchanged.append(pair)
    width = min(60, max(map(len, changed.values()), default=0))
    lines = [f"* {pair:{width}}  {provenance[name]}" for name, pair in changed.items()]
    lines += textwrap.wrap(", ".join(unchanged), 110, initial_indent="  ", subsequent_indent="  ",
                           break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines).replace("\xa0", " ")


def fail(message):
    """Print the message as one line (rank 0 only) and exit with status 2."""
    if RANK0:
        print(f"{os.path.basename(sys.argv[0])}: error:", *message.splitlines(), file=sys.stderr)
    raise SystemExit(2)


def nearest(name, names):
    """The end of an error about a name that is not among `names`: the closest, if any is close."""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    akin = []  # lr is learning_rate, batch_size global_batch
    for other in names:
        is_short = len(name) > 1 and name == "".join(word[:1] for word in other.split("_"))
        if is_short or set(name.split("_")) & set(other.split("_")):
            akin.append(other)
    return f", nearest is {' or '.join(near or akin[:2])}" if near or akin else ""


# ----------------------------------------------------------------------------- the script's head
def find_knobs(namespace):
    """{name: Knob} of a script's globals."""
    types = namespace.get("_types", {})
    choices = namespace.get("_choices", {})
    knobs = {}
    for name, value in namespace.items():
        if name.startswith("_") or name.isupper():
            continue
        if value is None:
            kind = types.get(name, str)
        elif type(value) in WORDS:
            kind = type(value)
        else:
            continue
        element = element_of(value, types.get(name, str)) if kind is tuple else str
        knobs[name] = Knob(value, kind, element, choices.get(name, ()))
    # a mistake in the script itself
    for name in (*types, *choices):
        if name not in knobs:
            fail(f"_types or _choices: {name}: no such knob{nearest(name, knobs)}")
    return knobs


def element_of(items, type_if_empty):
    """Type of a tuple knob's items, inferred from its default; str if they are mixed."""
    if items == ():
        return type_if_empty
    kinds = {type(item) for item in items or ()}
    if kinds == {int, float}:
        return float
    return kinds.pop() if len(kinds) == 1 else str


# ----------------------------------------------------------------------------- the command line
def split_argv(argv, knobs):
    """A command line -> (config files, {knob: value}, whether help was asked for)."""
    files, given, help_asked = [], {}, False
    args = iter(argv)
    for arg in args:
        if arg in ("-h", "--help"):
            help_asked = True
            continue
        if not arg.startswith("--"):
            files.append(arg)
            continue
        # --name=text or --name text
        name, equals, text = arg[2:].partition("=")
        if name not in knobs:
            fail(f"{arg}: no such knob{nearest(name, knobs) or '; --help lists them'}")
        if not equals:
            text = next(args, "--")
            if text.startswith("--"):
                fail(f"--{name}: found no value, expected {expected(knobs[name])}")
        if name in given:
            fail(f"--{name}={text}: given twice, expected once")
        given[name] = check(read(text, knobs[name]), knobs[name], f"--{name}={text}")
    return files, given, help_asked


def read(text, knob):
    """Parse a command-line value; text that does not parse is returned for check() to refuse."""
    if text == "None" and knob.default is None:
        return None
    if knob.kind is tuple:
        # comma-separated items; text with an empty item is left as it is
        parts = [part.strip() for part in text.split(",")] if text else []
        item = Knob((), knob.element, None, ())
        return tuple(read(part, item) for part in parts) if all(parts) else text
    if knob.kind is bool:
        return BOOLS.get(text, text)
    if knob.kind in (int, float):
        for number in (int, float):  # int first: it keeps every digit
            try:
                return number(text)
            except ValueError:
                pass
    return text


# ----------------------------------------------------------------------------- config files
class FileNames(UserDict):
    """The names of a running config file (`data`), and where each was assigned (`places`)."""

    def __init__(self, path, seen, given):
        self.files = [path]  # this one, and those that it includes
        self.places = {}  # {name: [(file, line), ...]}
        self.given = given
        self.overruled = {}  # {knob of the command line: value in the files}
        self.data = {**seen, "__file__": path, "include": self.include}

    def __setitem__(self, name, value):
        # the line that assigns: the innermost frame that is in one of the config files
        frame = sys._getframe(1)
        while frame.f_code.co_filename not in self.files:
            frame = frame.f_back
        place = (frame.f_code.co_filename, frame.f_lineno)
        self.places.setdefault(name, []).append(place)
        # a knob set on the command line keeps that value for the lines below
        values = self.overruled if name in self.given else self.data
        values[name] = value

    def run(self, path, source):
        exec(compile(source, path, "exec"), self.data, self)

    def include(self, name):
        """Run the file `name` here; it is beside the config file, or in a folder above it."""
        beside = Path(self.files[0]).parent
        for folder in (beside, *beside.absolute().parents):
            path = folder / name
            if path.is_file():
                self.files.append(str(path))
                return self.run(str(path), path.read_bytes())
        raise FileNotFoundError(f"include({name!r}): no such file beside this one or above it")


def run_file(path, config, given, knobs):
    """Run a config file, which sees `config` overridden by the command line's `given`; returns
    {knob: (value, files that assigned it)}."""
    try:
        source = Path(path).read_bytes()
    except OSError as error:
        if path.startswith("-"):
            fail(f"{path}: expected --knob=value or a config file")
        likely = [*map(str, Path(path).parent.glob("*.py")), *(f"--{name}" for name in knobs)]
        fail(f"config file {path}: {error.strerror}{nearest(path, likely)}")
    seen = {**config, **given}
    names = FileNames(path, seen, given)
    try:
        names.run(path, source)
    except Exception as error:
        # the innermost line in a config file; a SyntaxError leaves no frame
        place = f"{path}:{getattr(error, 'lineno', None) or 1}"
        for frame in traceback.extract_tb(error.__traceback__):
            if frame.filename in names.files:
                place = f"{frame.filename}:{frame.lineno}"
        fail(f"{place}: {type(error).__name__}: {error}")

    # what it assigned must be knobs or helpers
    assigned = {}
    for name, value in names.data.items():
        places = names.places.get(name, [])  # globals()[name] = value leaves none
        place = "{}:{}".format(*places[-1]) if places else path
        if name in knobs:
            was_assigned = bool(places) or value is not seen[name]
            if was_assigned:
                value = names.overruled.get(name, value)
                value = check(value, knobs[name], f"{place}: {name} = {value!r}")
                files = dict.fromkeys(file for file, _ in places)
                assigned[name] = (value, list(files) or [path])
        elif not (name.startswith("_") or inspect.ismodule(value) or callable(value)):
            hint = f"no such knob{nearest(name, knobs)}; a helper would be _{name}"
            fail(f"{place}: {name} = {value!r}: {hint}")
    return assigned


# ----------------------------------------------------------------------------- values
def check(value, knob, place):
    """`value` converted to the knob's type; else fail with a message that starts with `place`."""
    if value is None and knob.default is None:
        return None
    try:
        value = as_kind(value, knob.kind, knob.element)
        items = value if knob.kind is tuple else (value,)
        if not knob.choices or set(items) <= set(knob.choices):
            return value
    except (TypeError, OverflowError):
        pass
    fail(f"{place}: expected {expected(knob)}")


def as_kind(value, kind, element=None):
    """`value` as `kind`: int becomes float, an integral float int, a list tuple; else TypeError."""
    if kind is tuple and isinstance(value, (list, tuple)):
        return tuple(as_kind(item, element) for item in value)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is float and is_number and math.isfinite(value):  # OverflowError beyond all floats
        return float(value)
    if kind is int and is_number and value % 1 == 0:
        return int(value)
    if kind in (bool, str) and type(value) is kind:
        return value
    raise TypeError


def expected(knob):
    """What a knob takes, in words."""
    words = WORDS[knob.kind]
    if knob.kind is tuple:
        words += knob.element.__name__
    if knob.choices:
        words += " out of " + ", ".join(map(repr, knob.choices))
    if knob.default is None:
        words += " or None"
    return words


# ----------------------------------------------------------------------------- help
def help_text(namespace, knobs, config, provenance):
    """The script's docstring and knobs as in its source, with choices and changes beside them."""
    source = Path(namespace["__file__"]).read_text(encoding="utf-8")
    lines = source.split("\n")
    rows = [(namespace.get("__doc__") or "").strip(), ""]
    end = 0  # of the last statement: comments between it and a knob are headings
    for node in ast.parse(source).body:
        name = assigned_name(node)
        if name in knobs:
            # headings, then the knob's own lines with a mark if it is changed
            rows += [f"  {line}".rstrip() for line in lines[end:node.lineno - 1]]
            mark = "* " if provenance[name] else "  "
            rows += [mark + line for line in lines[node.lineno - 1:node.end_lineno]]
            if knobs[name].choices:
                rows[-1] += f"  [{' | '.join(map(repr, knobs[name].choices))}]"
            if provenance[name]:
                change = f"{knobs[name].default!r} -> {config[name]!r}"
                rows[-1] += f"  [{change}, {provenance[name]}]"
        end = node.end_lineno
    return "\n".join(rows).lstrip("\n")


def assigned_name(statement):
    """`x` of the statements `x = 1` and `x: int = 1`; None for every other one."""
    targets = getattr(statement, "targets", [getattr(statement, "target", None)])
    return getattr(targets[0], "id", None)
