"""Knobs: the plain assignments at a script's head, changed by config files and --knob=value, and checked.

    python train.py config/math_cpt.py --lora_rank=64 --seed 2     # files run in order; the command line wins
    python train.py config/math_cpt.py --help                      # the knobs, and what this file changes

A script says `config = configure(globals())` below its head. Every name bound by then to an int, float, bool,
str, tuple or None is a knob, unless it starts with `_` or is a CONSTANT in capitals. Two optional dicts in the head say more:
    _types = {'resume': str}                         the type of a knob that is None, of the items of ()
    _choices = {'dtype': ('float32', 'bfloat16')}    the only values of a knob (of each item, if it is a tuple)
A config file is Python that sees the knobs, command line included, and assigns to them; its own helpers are
modules, functions, classes and names that start with `_`. Every mistake is one line on stderr and exit status 2.
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

WORDS = {bool: "True or False", int: "an int", float: "a finite float", str: "a str", tuple: "a tuple of "}
BOOLS = {"True": True, "true": True, "1": True, "False": False, "false": False, "0": False}
RANK0 = os.environ.get("RANK", "0") == "0"  # torchrun starts every rank with the same arguments; one speaks


class Knob(NamedTuple):
    default: object
    kind: type
    element: type  # of the items of a tuple
    choices: tuple


def configure(namespace, argv=None):
    """Apply the config files and --knob=value of `argv` (default sys.argv[1:]) to the knobs of a script's globals.

    Sets the knobs in `namespace`, and `_provenance` for knob_table; returns {knob: value} in the script's order.
    Raises SystemExit(2) after one line on stderr if anything is wrong, SystemExit(0) after printing the help.
    """
    knobs = find_knobs(namespace)
    files, given, help_asked = split_argv(sys.argv[1:] if argv is None else argv, knobs)
    config = {name: knob.default for name, knob in knobs.items()}
    steps = {name: [] for name in knobs}
    for path in files:
        for name, value in run_file(path, {**config, **given}, knobs).items():
            config[name] = value
            steps[name].append(path)
    for name, value in given.items():
        config[name] = value
        steps[name].append("command line")
    origins = {name: " -> ".join(steps[name]) if config[name] != knobs[name].default else "" for name in knobs}
    if help_asked:
        if RANK0:
            print(help_text(namespace, knobs, config, origins))
        raise SystemExit(0)
    namespace.update(config, _provenance=origins)
    return config


def knob_table(namespace):
    """The knobs as text: changed ones first, one a line, with a `*` and their origin; the others as a paragraph.

    Raises KeyError if configure() has not been called on `namespace`.
    """
    origins = namespace["_provenance"]
    # no-break spaces keep `name = value` in one piece while wrapping; repr() leaves none in a value
    pairs = {name: f"{name} = {namespace[name]!r}".replace(" ", "\xa0") for name in origins}
    width = min(60, max((len(pairs[name]) for name in pairs if origins[name]), default=0))
    lines = [f"* {pairs[name]:{width}}  {origins[name]}" for name in pairs if origins[name]]
    lines += textwrap.wrap(", ".join(pairs[name] for name in pairs if not origins[name]), 110, initial_indent="  ",
                           subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines).replace("\xa0", " ")


def fail(message):
    """Print the message as one line (rank 0 only) and exit with status 2."""
    if RANK0:
        print(f"{os.path.basename(sys.argv[0])}: error:", *message.splitlines(), file=sys.stderr)
    raise SystemExit(2)


def nearest(name, names):
    """The end of a message about a name that is not among `names`."""
    return "".join(f", nearest is {match}" for match in difflib.get_close_matches(name, names, n=1, cutoff=0))


def find_knobs(namespace):
    """{name: Knob} of a script's globals."""
    types, choices = namespace.get("_types", {}), namespace.get("_choices", {})
    knobs = {}
    for name, value in namespace.items():
        if not name.startswith("_") and not name.isupper() and (value is None or type(value) in WORDS):
            kind = types.get(name, str) if value is None else type(value)
            items = {type(item) for item in value or ()} if kind is tuple else set()
            element = (items.pop() if len(items) == 1 else float if items == {int, float} else
                       types.get(name, str) if value == () else str)
            knobs[name] = Knob(value, kind, element, choices.get(name, ()))
    for name in {**types, **choices}:
        if name not in knobs:
            fail(f"_types or _choices: {name}: no such knob{nearest(name, knobs)}")
    return knobs


def split_argv(argv, knobs):
    """The config files, {knob: value} and whether help is asked for, from a command line."""
    files, given, help_asked = [], {}, False
    args = iter(argv)
    for arg in args:
        if arg in ("-h", "--help"):
            help_asked = True
        elif not arg.startswith("--"):
            files.append(arg)
        else:
            name, equals, text = arg[2:].partition("=")
            if name not in knobs:
                fail(f"{arg}: no such knob{nearest(name, knobs)}")
            if not equals and (text := next(args, "--")).startswith("--"):
                fail(f"--{name}: found no value, expected {expected(knobs[name])}")
            if name in given:
                fail(f"--{name}={text}: found a second time, expected once")
            given[name] = check(read(text, knobs[name]), knobs[name], f"--{name}={text}")
    return files, given, help_asked


class FileNames(UserDict):
    """The names of a running config file (`data`), and where each was last assigned (`places`)."""

    def __init__(self, path, seen):
        self.path, self.places, self.data = path, {}, {**seen, "__file__": path}

    def __setitem__(self, name, value):
        frame = sys._getframe(1)
        while frame.f_code.co_filename != self.path:  # the file may exec() another
            frame = frame.f_back
        self.places[name] = f"{self.path}:{frame.f_lineno}"
        self.data[name] = value


def run_file(path, seen, knobs):
    """Run a config file that sees the values `seen`; returns {knob: value} of what it assigned."""
    names = FileNames(path, seen)
    try:
        source = Path(path).read_bytes()
    except OSError as error:
        likely = [*map(str, Path(path).parent.glob("*.py")), *(f"--{name}" for name in knobs)]
        fail(f"config file {path}: {error.strerror}{nearest(path, likely)}")
    try:
        exec(compile(source, path, "exec"), names.data, names)
    except Exception as error:
        inside = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        line = inside[-1] if inside else getattr(error, "lineno", None) or 1  # bad syntax leaves no frame
        fail(f"{path}:{line}: {type(error).__name__}: {error}")
    assigned = {}
    for name, value in names.data.items():
        place = f"{names.places.get(name, path)}: {name} = {value!r}"  # globals()[name] = value leaves no line
        if name in knobs and (name in names.places or value is not seen[name]):
            assigned[name] = check(value, knobs[name], place)
        if name not in knobs and not (name.startswith("_") or inspect.ismodule(value) or callable(value)):
            fail(f"{place}: no such knob{nearest(name, knobs)}; a helper would be _{name}")
    return assigned


def read(text, knob):
    """What `text` on the command line spells for a knob; text that spells nothing stays, for check() to refuse."""
    if text == "None" and knob.default is None:
        return None
    if knob.kind is tuple:
        item = knob._replace(default=(), kind=knob.element)
        parts = [part.strip() for part in text.split(",")] if text else []
        return tuple(read(part, item) if part else None for part in parts)  # an empty item is a slip
    if knob.kind is bool:
        return BOOLS.get(text, text)
    for number in (int, float) if knob.kind in (int, float) else ():  # int first: it keeps every digit
        try:
            return number(text)
        except ValueError:
            pass
    return text


def check(value, knob, place):
    """`value` in the knob's type; a message that begins with `place` and exit status 2 where it does not fit."""
    if value is None and knob.default is None:
        return None
    try:
        value = as_kind(value, knob.kind, knob.element)
        if not knob.choices or all(item in knob.choices for item in (value if knob.kind is tuple else [value])):
            return value
    except (TypeError, OverflowError):
        pass
    fail(f"{place}: expected {expected(knob)}")


def as_kind(value, kind, element=None):
    """`value` as `kind`: int becomes float, an integral float int, a list tuple; raises TypeError for all else."""
    if kind is tuple and isinstance(value, (list, tuple)):
        return tuple(as_kind(item, element) for item in value)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is float and number and math.isfinite(value):  # OverflowError for an int beyond all floats
        return float(value)
    if kind is int and number and value % 1 == 0:
        return int(value)
    if kind in (bool, str) and type(value) is kind:
        return value
    raise TypeError


def expected(knob):
    """What a knob takes, in words."""
    words = WORDS[knob.kind] + (knob.element.__name__ if knob.kind is tuple else "")
    words += f" out of {', '.join(map(repr, knob.choices))}" if knob.choices else ""
    return words + (" or None" if knob.default is None else "")


def help_text(namespace, knobs, config, origins):
    """The script's docstring and its knobs, remarks and headings as in its source, with choices and changes beside."""
    source = Path(namespace["__file__"]).read_text(encoding="utf-8")
    lines, rows, end = source.split("\n"), [(namespace.get("__doc__") or "").strip(), ""], 0
    for node in ast.parse(source).body:
        name = getattr(getattr(node, "target", None) or getattr(node, "targets", [None])[0], "id", None)
        if name in knobs:
            rows += [("  " + line).rstrip() for line in lines[end:node.lineno - 1]]  # headings
            rows += [("* " if origins[name] else "  ") + line for line in lines[node.lineno - 1:node.end_lineno]]
            if knobs[name].choices:
                rows[-1] += f"  [{' | '.join(map(repr, knobs[name].choices))}]"
            if origins[name]:
                rows[-1] += f"  [{knobs[name].default!r} -> {config[name]!r}, {origins[name]}]"
        end = node.end_lineno
    return "\n".join(rows).lstrip("\n")
