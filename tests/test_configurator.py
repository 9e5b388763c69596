"""configurator.py: precedence, types, choices, every mistake as one line and status 2, help and table."""
import json
import re
import shutil
import sys

import pytest
from conftest import ROOT, run_stage
from hypothesis import given, settings
from hypothesis import strategies as st

import train
from configurator import configure, knob_table

SCRIPT = '''"""Train a thing.

Second paragraph."""
import os
from math import sqrt
from configurator import configure, knob_table

# ---- the model
base = 'data/llama'      # folder of the base model
lora_rank = 16           # 0 is full finetuning
dtype = 'float32'        # of the forward pass
# ---- the optimizer
learning_rate = 2e-4     # peak
betas = (0.9, 0.99)      # momenta
max_iters: int = 60 * 10 # steps
compile = False
resume = None            # a folder to go on from

_types = {'resume': str}
_choices = {'dtype': ('float32', 'bfloat16')}
_hidden = 3

# not a heading: no knob follows

def loss():
    learning_rate = 3    # not a knob
    return learning_rate

if __name__ == '__main__':
    config = configure(globals())
    assert all(globals()[name] == value for name, value in config.items())
    print('RESULT', config)
    print(knob_table(globals()))
'''
DEFAULTS = dict(base="data/llama", lora_rank=16, dtype="float32", learning_rate=2e-4, betas=(0.9, 0.99),
                max_iters=600, compile=False, resume=None)


def namespace():
    """Globals of a script, in process."""
    return dict(DEFAULTS, _types={"resume": str}, _choices={"dtype": ("float32", "bfloat16")}, _hidden=3,
                re=re, len=len)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Run in an empty folder; here(name, text) writes a file there and returns its name."""
    monkeypatch.chdir(tmp_path)

    def write(name, text):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        return name
    return write


@pytest.fixture
def refused(capsys):
    """refused(*argv): the one line on stderr with which configure() ends with status 2, leaving the globals alone."""
    def call(*argv, space=None):
        space = namespace() if space is None else space
        before = dict(space)
        with pytest.raises(SystemExit) as stop:
            configure(space, list(argv))
        out, err = capsys.readouterr()
        assert stop.value.code == 2 and out == "" and space == before
        assert re.fullmatch(r"[^\n]+: error: [^\n]+\n", err), err
        return err.split(": error: ", 1)[1].rstrip("\n")
    return call


def test_no_arguments_gives_the_defaults_in_the_scripts_order():
    space = namespace()
    config = configure(space, [])
    assert list(config.items()) == list(DEFAULTS.items())
    assert {name: space[name] for name in DEFAULTS} == DEFAULTS


def test_only_plain_public_values_are_knobs():
    space = {"a": 1, "_b": 2, "__name__": "x", "mod": re, "function": len, "Class": dict, "items": [1], "table": {},
             "named_tuple": sys.version_info}
    assert configure(space, []) == {"a": 1}


def test_argv_defaults_to_the_command_line(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "--lora_rank=4"])
    assert configure(namespace())["lora_rank"] == 4


@pytest.mark.parametrize("argv, name, value", [
    (["--lora_rank=64"], "lora_rank", 64),
    (["--lora_rank", "64"], "lora_rank", 64),
    (["--lora_rank", "-1"], "lora_rank", -1),
    (["--max_iters=1e3"], "max_iters", 1000),
    (["--max_iters=1_000"], "max_iters", 1000),
    (["--max_iters=12345678901234567891"], "max_iters", 12345678901234567891),
    (["--learning_rate=1"], "learning_rate", 1.0),
    (["--learning_rate=1e-3"], "learning_rate", 1e-3),
    (["--base=1"], "base", "1"),
    (["--base=a=b"], "base", "a=b"),
    (["--base", "a=b"], "base", "a=b"),
    (["--base=--x"], "base", "--x"),
    (["--base="], "base", ""),
    (["--base=None"], "base", "None"),
    (["--base=x.py"], "base", "x.py"),
    (["--compile=True"], "compile", True), (["--compile=true"], "compile", True), (["--compile", "1"], "compile", True),
    (["--compile=False"], "compile", False), (["--compile=false"], "compile", False),
    (["--compile", "0"], "compile", False),
    (["--betas=0.8,1"], "betas", (0.8, 1.0)),
    (["--betas=0.5"], "betas", (0.5,)),
    (["--betas= .1, .2"], "betas", (0.1, 0.2)),
    (["--betas="], "betas", ()),
    (["--resume=out/x"], "resume", "out/x"),
    (["--resume=None"], "resume", None),
    (["--dtype=bfloat16"], "dtype", "bfloat16"),
])
def test_good_values_on_the_command_line(argv, name, value):
    space = namespace()
    config = configure(space, argv)
    assert config == {**DEFAULTS, name: value} and space[name] == value
    assert type(config[name]) is type(value)
    if isinstance(value, tuple):
        assert all(type(item) is float for item in config[name])


@pytest.mark.parametrize("argv, line", [
    (["--max_iters=1.5"], "--max_iters=1.5: expected an int"),
    (["--max_iters=True"], "--max_iters=True: expected an int"),
    (["--max_iters=None"], "--max_iters=None: expected an int"),
    (["--max_iters="], "--max_iters=: expected an int"),
    (["--max_iters=nan"], "--max_iters=nan: expected an int"),
    (["--max_iters=inf"], "--max_iters=inf: expected an int"),
    (["--max_iters", "ten"], "--max_iters=ten: expected an int"),
    (["--learning_rate=nan"], "--learning_rate=nan: expected a finite float"),
    (["--learning_rate=-inf"], "--learning_rate=-inf: expected a finite float"),
    (["--learning_rate=1e999"], "--learning_rate=1e999: expected a finite float"),
    (["--learning_rate=1" + "0" * 400], "--learning_rate=1" + "0" * 400 + ": expected a finite float"),
    (["--learning_rate=True"], "--learning_rate=True: expected a finite float"),
    (["--learning_rate=fast"], "--learning_rate=fast: expected a finite float"),
    (["--compile=yes"], "--compile=yes: expected True or False"),
    (["--compile=2"], "--compile=2: expected True or False"),
    (["--compile", "x.py"], "--compile=x.py: expected True or False"),
    (["--betas=0.9,x"], "--betas=0.9,x: expected a tuple of float"),
    (["--betas=0.9,,1"], "--betas=0.9,,1: expected a tuple of float"),
    (["--betas=0.9,nan"], "--betas=0.9,nan: expected a tuple of float"),
    (["--dtype=float8"], "--dtype=float8: expected a str out of 'float32', 'bfloat16'"),
    (["--compile"], "--compile: found no value, expected True or False"),
    (["--resume"], "--resume: found no value, expected a str or None"),
    (["--max_iters", "--compile=1"], "--max_iters: found no value, expected an int"),
    (["--base=a", "--base", "b"], "--base=b: given twice, expected once"),
    (["--base=a", "--base=a"], "--base=a: given twice, expected once"),
    (["--learnin_rate=1"], "--learnin_rate=1: no such knob, nearest is learning_rate"),
    (["--learning-rate=1"], "--learning-rate=1: no such knob, nearest is learning_rate"),
    (["--max_iter", "3"], "--max_iter: no such knob, nearest is max_iters"),
    (["--base\n=1"], "--base =1: no such knob, nearest is base"),
])
def test_bad_values_on_the_command_line(refused, argv, line):
    assert refused(*argv) == line


@pytest.mark.parametrize("argv", [["--_hidden=4"], ["--re=1"], ["--len=1"], ["--=1"], ["--"], ["--_types=x"]])
def test_what_is_no_knob_cannot_be_set(refused, argv):
    assert "no such knob" in refused(*argv)


@pytest.mark.parametrize("name, nearest", [("lr", "lora_rank or learning_rate"), ("iters", "max_iters"), ("learning", "learning_rate"),
                                           ("bf16", ""), ("r", "")])
def test_a_knob_under_another_tools_name(refused, name, nearest):
    """By initials, by a word in common, or not at all: a name that is merely the least unlike misleads."""
    hint = f", nearest is {nearest}" if nearest else "; --help lists them"
    assert refused(f"--{name}=1") == f"--{name}=1: no such knob{hint}"


def test_a_script_without_knobs_refuses_all(refused):
    assert refused("--x=1", space={}) == "--x=1: no such knob; --help lists them"


def test_argument_without_dashes_is_a_file(refused, here):
    assert refused("learning_rate=1").startswith("config file learning_rate=1: No such file")
    assert refused("learning_rate=1").endswith("nearest is --learning_rate")
    here("config/math_cpt.py", "")
    assert refused("config/mth_cpt.py") == \
        "config file config/mth_cpt.py: No such file or directory, nearest is config/math_cpt.py"
    assert "Is a directory" in refused("config")


def test_tuple_items_follow_the_default():
    space = {"ints": (1, 2), "names": (), "mixed": ("a", 1), "numbers": (1, 0.5), "flags": (True,)}
    argv = ["--ints=3,4", "--names=q, k", "--mixed=b,2", "--numbers=2,3", "--flags=0,true"]
    assert repr(configure(space, argv)) == repr(
        {"ints": (3, 4), "names": ("q", "k"), "mixed": ("b", "2"), "numbers": (2.0, 3.0), "flags": (False, True)})


def test_tuple_of_str_refuses_an_empty_item(refused):
    assert refused("--names=q,", space={"names": ("a",)}) == "--names=q,: expected a tuple of str"


def test_types_of_knobs_that_are_none(refused):
    def space():
        return {"untyped": None, "seed": None, "rate": None, "names": None,
                "_types": {"seed": int, "rate": float, "names": tuple}}
    config = configure(space(), ["--untyped=3", "--seed=3", "--rate=3", "--names=a,b"])
    assert repr(config) == repr({"untyped": "3", "seed": 3, "rate": 3.0, "names": ("a", "b")})
    assert configure(space(), ["--names=None", "--seed=None"])["names"] is None
    assert refused("--seed=x", space=space()) == "--seed=x: expected an int or None"


def test_items_of_an_empty_tuple_have_the_type_that_is_named():
    space = lambda: {"at": (), "names": (), "_types": {"at": float}}
    assert configure(space(), ["--at=500,0.25e9", "--names=500"]) == {"at": (500.0, 0.25e9), "names": ("500",)}


def test_choices_of_other_types(refused):
    def space():
        return {"bits": 8, "targets": ("q",), "mode": None, "_choices":
                {"bits": (4, 8), "targets": ("q", "k"), "mode": ("a", "b")}}
    assert configure(space(), ["--bits=4", "--targets=k,q", "--mode=b"])["targets"] == ("k", "q")
    assert configure(space(), ["--mode=None", "--targets="])["mode"] is None
    assert refused("--bits=5", space=space()) == "--bits=5: expected an int out of 4, 8"
    assert refused("--targets=q,v", space=space()) == "--targets=q,v: expected a tuple of str out of 'q', 'k'"
    assert refused("--mode=c", space=space()) == "--mode=c: expected a str out of 'a', 'b' or None"


def test_a_mistyped_key_of_choices_or_types_is_refused(refused):
    line = "_types or _choices: dtyp: no such knob, nearest is dtype"
    assert refused(space=dict(DEFAULTS, _choices={"dtyp": ("float32",)})) == line
    assert refused(space=dict(DEFAULTS, _types={"dtyp": str})) == line


def test_file_sees_the_command_line_and_the_command_line_wins(here):
    here("a.py", "learning_rate = 4e-5 if lora_rank else 1e-5\nmax_iters = lora_rank + 1\nlora_rank = 99\n")
    assert configure(namespace(), ["a.py"])["learning_rate"] == 4e-5
    config = configure(namespace(), ["a.py", "--lora_rank=0"])
    assert (config["learning_rate"], config["max_iters"], config["lora_rank"]) == (1e-5, 1, 0)
    assert configure(namespace(), ["--lora_rank=0", "a.py", "--max_iters=7"])["max_iters"] == 7


def test_what_follows_from_a_knob_follows_from_the_command_line(here):
    """Also where the file sets that knob itself, before the line that depends on it, or in a file that it includes."""
    here("rank.py", "lora_rank = 16\n")
    for first in ("lora_rank = 16\n", "include('rank.py')\n"):
        here("a.py", first + "learning_rate = 2e-4 if lora_rank else 1e-5\nbase = f'r{lora_rank}'\n")
        assert configure(namespace(), ["a.py"])["learning_rate"] == 2e-4
        config = configure(namespace(), ["a.py", "--lora_rank=0"])
        assert (config["lora_rank"], config["learning_rate"], config["base"]) == (0, 1e-5, "r0")


def test_a_file_may_assign_by_globals_beside_the_command_line(here):
    here("a.py", "globals()['lora_rank'] = 16\n")
    assert configure(namespace(), ["a.py", "--lora_rank=4"])["lora_rank"] == 4


def test_what_a_file_says_of_a_knob_is_checked_beside_the_command_line(here, refused):
    here("a.py", "lora_rank = 'x'\n")
    assert refused("a.py", "--lora_rank=4").startswith("a.py:1: lora_rank = 'x'")


def test_files_run_in_order_each_in_a_fresh_namespace(here):
    here("a.py", "_secret = 1\nmax_iters = 10\nlora_rank = 2\n")
    here("b.py", "assert '_secret' not in globals() and '_types' not in globals()\nmax_iters = max_iters * 2\n")
    space = namespace()
    config = configure(space, ["a.py", "--base=x", "b.py"])
    assert (config["max_iters"], config["lora_rank"], config["base"]) == (20, 2, "x")
    assert "_secret" not in space


def test_helpers_in_a_file_are_free(here):
    here("base.py", "lora_rank = 5\n")
    here("a.py", "import math, os.path as path\nfrom pathlib import Path\nfrom math import sqrt\n"
                 "class Table: rows = 3\ndef twice(x):\n    local = x\n    return sum(local for _ in range(_two))\n"
                 "_two = 2\n[x for x in 'abc']\nexec((Path(__file__).parent / 'base.py').read_text())\n"
                 "max_iters = twice(int(sqrt(16))) + Table.rows\n")
    config = configure(namespace(), ["a.py"])
    assert (config["max_iters"], config["lora_rank"]) == (11, 5)


def test_star_import_from_another_config(here, tmp_path, monkeypatch, refused):
    monkeypatch.syspath_prepend(tmp_path)
    here("star_base.py", "lora_rank = 5\n")
    here("star_bad.py", "lora_rnk = 5\n")
    here("a.py", "\nfrom star_base import *\n")
    here("b.py", "\nfrom star_bad import *\n")
    assert configure(namespace(), ["a.py"])["lora_rank"] == 5
    assert refused("b.py").startswith("b.py:2: lora_rnk = 5: no such knob, nearest is lora_rank")


def test_values_set_behind_the_files_back_still_count(here, refused):
    here("a.py", "def _set():\n    global lora_rank\n    lora_rank = 3\n_set()\nglobals().update(max_iters=4)\n")
    config = configure(namespace(), ["a.py"])
    assert (config["lora_rank"], config["max_iters"]) == (3, 4)
    here("b.py", "globals().update(lora_rnk=4)\n")
    assert refused("b.py").startswith("b.py: lora_rnk = 4: no such knob, nearest is lora_rank")


@pytest.mark.parametrize("text, name, value", [
    ("max_iters = 1e3", "max_iters", 1000),
    ("max_iters = 2**70", "max_iters", 2**70),
    ("learning_rate = 1", "learning_rate", 1.0),
    ("learning_rate: float = 1e-3", "learning_rate", 1e-3),
    ("betas = [0, 1]", "betas", (0.0, 1.0)),
    ("betas = ()", "betas", ()),
    ("compile = True", "compile", True),
    ("resume = 'None'", "resume", "None"),
    ("resume = None", "resume", None),
    ("base = 'ü=1'", "base", "ü=1"),
])
def test_good_values_in_a_file(here, text, name, value):
    config = configure(namespace(), [here("a.py", text)])
    assert config == {**DEFAULTS, name: value} and type(config[name]) is type(value)
    if isinstance(value, tuple):
        assert all(type(item) is float for item in config[name])


@pytest.mark.parametrize("text, line", [
    ("learnin_rate = 1e-3", "x.py:1: learnin_rate = 0.001: no such knob, nearest is learning_rate; "
                            "a helper would be _learnin_rate"),
    ("# remark\n\nfrom math import pi", "x.py:3: pi = 3.14"),
    ("for i in range(3):\n    pass", "x.py:1: i = 2: no such knob"),
    ("if lora_rank:\n    lr = 1\nelse:\n    lr = 2", "x.py:2: lr = 1: no such knob"),
    ("rows = {'a':\n  1}", "x.py:1: rows = {'a': 1}: no such knob"),
    ("exec('\\n\\nlr = 1')", "x.py:1: lr = 1: no such knob"),
    ("\nmax_iters = '600'", "x.py:2: max_iters = '600': expected an int"),
    ("max_iters = 1.5", "x.py:1: max_iters = 1.5: expected an int"),
    ("max_iters = True", "x.py:1: max_iters = True: expected an int"),
    ("max_iters = None", "x.py:1: max_iters = None: expected an int"),
    ("max_iters = float('inf')", "x.py:1: max_iters = inf: expected an int"),
    ("learning_rate = True", "x.py:1: learning_rate = True: expected a finite float"),
    ("learning_rate = '1e-3'", "x.py:1: learning_rate = '1e-3': expected a finite float"),
    ("learning_rate = float('nan')", "x.py:1: learning_rate = nan: expected a finite float"),
    ("learning_rate = 10**400", "x.py:1: learning_rate = 1000"),
    ("if lora_rank:\n    learning_rate = 'x'\nelse:\n    learning_rate = 1", "x.py:2: learning_rate = 'x': expected"),
    ("learning_rate = 'x'\nlearning_rate = 'y'", "x.py:2: learning_rate = 'y': expected a finite float"),
    ("compile = 1", "x.py:1: compile = 1: expected True or False"),
    ("compile = 'True'", "x.py:1: compile = 'True': expected True or False"),
    ("base = 1", "x.py:1: base = 1: expected a str"),
    ("base = None", "x.py:1: base = None: expected a str"),
    ("betas = '0.9,0.99'", "x.py:1: betas = '0.9,0.99': expected a tuple of float"),
    ("betas = 0.9", "x.py:1: betas = 0.9: expected a tuple of float"),
    ("betas = (0.9, '1')", "x.py:1: betas = (0.9, '1'): expected a tuple of float"),
    ("betas = ((0.9,),)", "x.py:1: betas = ((0.9,),): expected a tuple of float"),
    ("dtype = 'float8'", "x.py:1: dtype = 'float8': expected a str out of 'float32', 'bfloat16'"),
    ("resume = 3", "x.py:1: resume = 3: expected a str or None"),
    ("def lora_rank():\n    pass", "x.py:1: lora_rank = <function lora_rank"),
    ("\nimport math as compile", "x.py:2: compile = <module 'math'"),
    ("x = 1\ny = (", "x.py:2: SyntaxError: '(' was never closed"),
    ("x = \0", "x.py:1: "),
    ("_n = 0\nmax_iters = 1 // _n", "x.py:2: ZeroDivisionError: integer division or modulo by zero"),
    ("_a = 1\n\ndef _f():\n    raise ValueError('one\\ntwo')\n_f()", "x.py:4: ValueError: one two"),
    ("import json\njson.loads('{')", "x.py:2: JSONDecodeError: Expecting"),
    ("open('missing.txt')", "x.py:1: FileNotFoundError: "),
    ("import no_such_module", "x.py:1: ModuleNotFoundError: "),
    ("assert lora_rank == 3, 'rank'", "x.py:1: AssertionError: rank"),
    ("max_iters = lora_rnk", "x.py:1: NameError: name 'lora_rnk' is not defined"),
])
def test_bad_config_files(refused, here, text, line):
    assert refused(here("x.py", text)).startswith(line)


def test_file_that_is_not_utf8(refused, here, tmp_path):
    (tmp_path / "x.py").write_bytes(b"base = '\xff'\n")
    assert "x.py:1: SyntaxError: " in refused("x.py")


def test_bad_value_in_a_file_is_refused_even_if_the_command_line_wins(refused, here):
    assert refused(here("x.py", "max_iters = 'many'"), "--max_iters=3").startswith("x.py:1: max_iters = 'many'")


scalars = st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.booleans(), st.text())
items = st.text(st.characters(blacklist_characters=",", blacklist_categories=["Cs"]), min_size=1).filter(
    lambda text: text == text.strip())


@settings(deadline=None)
@given(scalars, st.booleans())
def test_any_scalar_round_trips_through_the_command_line(value, apart):
    other = {int: 7, float: 7.0, bool: True, str: "x"}[type(value)]
    apart = apart and not str(value).startswith("--")  # such a text needs the `=`
    config = configure({"knob": other}, ["--knob", str(value)] if apart else [f"--knob={value}"])
    assert repr(config["knob"]) == repr(value)


@settings(deadline=None)
@given(st.one_of(st.lists(st.integers()), st.lists(st.floats(allow_nan=False, allow_infinity=False)),
                 st.lists(st.booleans()), st.lists(items)))
def test_any_tuple_round_trips_through_the_command_line(values):
    config = configure({"knob": tuple(values[:1])}, ["--knob=" + ",".join(map(str, values))])
    assert repr(config["knob"]) == repr(tuple(values))


@settings(deadline=None)
@given(st.one_of(scalars, st.lists(scalars)))
def test_a_file_never_changes_the_type_of_a_knob(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "x.py"
    path.write_text(f"knob = {value!r}", encoding="utf-8")
    for default in (7, 7.5, True, "x", (0.5,)):
        try:
            config = configure({"knob": default}, [str(path)])
        except SystemExit as stop:
            assert stop.code == 2
            assert type(value) is not type(default)
        else:
            assert type(config["knob"]) is type(default)
            assert config["knob"] == (tuple(map(float, value)) if isinstance(value, list) else type(default)(value))


def table(here, *argv):
    space = namespace()
    configure(space, list(argv))
    return knob_table(space).split("\n")


def test_table_tells_where_changed_knobs_came_from(here):
    here("a.py", "max_iters = 10\nlora_rank = 2\nbase = 'a b'\ncompile = False\n")
    here("b.py", "max_iters = 20\n")
    assert table(here, "a.py", "b.py", "--lora_rank=8", "--learning_rate=1", "--dtype=float32") == [
        "* base = 'a b'         a.py",
        "* lora_rank = 8        a.py -> command line",
        "* learning_rate = 1.0  command line",
        "* max_iters = 20       a.py -> b.py",
        "  dtype = 'float32', betas = (0.9, 0.99), compile = False, resume = None",
    ]


def test_table_without_changes_is_a_paragraph_and_names_every_knob(here):
    lines = table(here)
    assert not any("*" in line for line in lines)
    space = {f"a_rather_long_knob_name_{i}": f"a value-{i}" for i in range(50)}
    knobs = configure(space, [])
    text = knob_table(space)
    assert len(text.split("\n")) <= 25 and max(map(len, text.split("\n"))) <= 110
    assert all(f"{name} = {value!r}" in text for name, value in knobs.items())  # none is torn by the wrapping


def test_table_back_at_its_default_is_not_marked_and_shows_later_values(here):
    here("a.py", "lora_rank = 2\n")
    space = namespace()
    configure(space, ["a.py", "--lora_rank=16"])
    space["base"] = "resolved"
    assert "*" not in knob_table(space) and "lora_rank = 16" in knob_table(space)
    assert "base = 'resolved'" in knob_table(space)


def test_table_names_both_when_file_and_command_line_agree(here):
    assert table(here, here("a.py", "lora_rank = 8\n"), "--lora_rank=8")[0] == "* lora_rank = 8  a.py -> command line"


def test_table_needs_configure():
    with pytest.raises(KeyError):
        knob_table(namespace())


def test_script_as_a_user_runs_it(here, tmp_path):
    here("train.py", SCRIPT)
    here("x.py", "learning_rate = 4e-5 if lora_rank else 1e-5\n")
    done = run_stage("train.py", "x.py", "--lora_rank=0", "--compile", "True", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    expected = {**DEFAULTS, "lora_rank": 0, "learning_rate": 1e-5, "compile": True}
    assert done.stdout == f"RESULT {expected}\n" + """\
* lora_rank = 0          command line
* learning_rate = 1e-05  x.py
* compile = True         command line
  base = 'data/llama', dtype = 'float32', betas = (0.9, 0.99), max_iters = 600, resume = None
"""


@pytest.mark.parametrize("argv, end", [
    (["--learnin_rate=1"], "nearest is learning_rate"), (["x.py"], "nearest is .*"), (["xx.py"], "directory, nearest is x.py"),
    (["gone.py"], "gone.py: No such file or directory"), (["-learning_rate=1"], "expected --knob=value or a config file")])
def test_script_ends_with_one_line_and_status_2(here, tmp_path, argv, end):
    here("sub/train.py", SCRIPT)
    here("x.py", "lr = 1\n")
    done = run_stage("sub/train.py", *argv, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(rf"train\.py: error: .*{end}\n", done.stderr), done.stderr


def test_only_rank_0_speaks(here, tmp_path):
    here("train.py", SCRIPT)
    for rank, speaks in ((0, True), (1, False)):
        done = run_stage("train.py", "--learnin_rate=1", cwd=tmp_path, RANK=rank)
        assert done.returncode == 2 and bool(done.stderr) == speaks and done.stdout == ""
        done = run_stage("train.py", "--help", cwd=tmp_path, RANK=rank)
        assert done.returncode == 0 and bool(done.stdout) == speaks and done.stderr == ""


def test_import_has_no_side_effects(here, tmp_path):
    here("train.py", SCRIPT)
    here("other.py", "import sys\nsys.argv = ['x', '--nonsense=1']\nimport train\nassert train.lora_rank == 16\n")
    done = run_stage("other.py", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("ask", ["--help", "-h"])
def test_help_shows_the_knob_block(here, tmp_path, ask):
    here("train.py", SCRIPT)
    done = run_stage("train.py", ask, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout == """Train a thing.

Second paragraph.


  # ---- the model
  base = 'data/llama'      # folder of the base model
  lora_rank = 16           # 0 is full finetuning
  dtype = 'float32'        # of the forward pass  ['float32' | 'bfloat16']
  # ---- the optimizer
  learning_rate = 2e-4     # peak
  betas = (0.9, 0.99)      # momenta
  max_iters: int = 60 * 10 # steps
  compile = False
  resume = None            # a folder to go on from
"""


def test_help_marks_what_files_and_arguments_change(here, tmp_path):
    here("train.py", SCRIPT)
    here("x.py", "learning_rate = 4e-5\ndtype = 'bfloat16'\n")
    done = run_stage("train.py", "x.py", "--help", "--learning_rate", "1", "--resume=out", cwd=tmp_path)
    assert done.returncode == 0
    assert [line for line in done.stdout.split("\n") if line.startswith("*")] == [
        "* dtype = 'float32'        # of the forward pass  ['float32' | 'bfloat16']  ['float32' -> 'bfloat16', x.py]",
        "* learning_rate = 2e-4     # peak  [0.0002 -> 1.0, x.py -> command line]",
        "* resume = None            # a folder to go on from  [None -> 'out', command line]"]


def test_help_beside_a_mistake_tells_the_mistake(here, tmp_path):
    here("train.py", SCRIPT)
    assert run_stage("train.py", "--help", "--learnin_rate=1", cwd=tmp_path).returncode == 2


def test_help_of_statements_over_several_lines(here, capsys):
    here("train.py", "import os\n\nbetas = (\n    0.9,  # first\n    0.99,\n)  # momenta\n")
    space = {"betas": (0.9, 0.99), "__file__": "train.py", "__doc__": None}
    with pytest.raises(SystemExit) as stop:
        configure(space, ["-h", "--betas=1"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == ("* betas = (\n*     0.9,  # first\n*     0.99,\n"
                                       "* )  # momenta  [(0.9, 0.99) -> (1.0,), command line]\n")


# ----------------------------------------------------------------------------- the runs of the paper in config/
PAPER_RUNS = {"math_cpt": "cpt", "code_cpt": "cpt", "math_ift": "ift", "code_ift": "ift", "tulu_ift": "ift"}
EDITS = {"global_batch": 96, "microbatch": 3, "seq_len": 2048, "schedule": "constant", "compile": False, "save_interval": 7,
         "weight_decay": 0.5, "base": "models/mine", "doc_mask": True, "loss_norm": "token", "activation_checkpointing": "none"}


def edited(tmp_path, name, lines, before):
    """A copy of config/ in which `lines` stand in NAME.py before the line `before` (a text in it, or a number)."""
    shutil.copytree(ROOT / "config", tmp_path / "config", dirs_exist_ok=True)
    path = tmp_path / "config" / f"{name}.py"
    text = path.read_text().splitlines()
    if isinstance(before, str):
        before, = (i for i, line in enumerate(text) if before in line)
    text[before:before] = lines
    path.write_text("\n".join(text) + "\n")
    space = dict(vars(train))
    return configure(space, [str(path)]), space["_provenance"]


@pytest.mark.parametrize("where", ["above the last line", "at the end"])
@pytest.mark.parametrize("name", PAPER_RUNS)
def test_what_stands_in_the_file_that_a_user_edits_wins(tmp_path, name, where):
    lines = [f"{knob} = {value!r}" for knob, value in EDITS.items()]
    config, _ = edited(tmp_path, name, lines, -1 if where == "above the last line" else 10 ** 6)
    assert {knob: config[knob] for knob in EDITS} == EDITS


@pytest.mark.parametrize("name", PAPER_RUNS)
def test_origin_of_a_knob_is_the_file_in_which_it_stands(tmp_path, name):
    config, origins = edited(tmp_path, name, ["seq_len = 2048"], -1)
    own, shared = str(tmp_path / f"config/{name}.py"), str(tmp_path / f"config/{PAPER_RUNS[name]}.py")
    assert origins["doc_mask"] == shared and origins["data"] == own
    assert origins["seq_len"].endswith(own)
    assert origins["out_dir"] == own


@pytest.mark.parametrize("name", PAPER_RUNS)
def test_what_follows_from_other_knobs_is_right_after_an_edit(tmp_path, name):
    before = "learning_rate ="
    epochs = "_4ep" if name in ("math_ift", "code_ift") else "_6ep" if name == "tulu_ift" else ""
    plain, _ = edited(tmp_path, name, [], before)
    assert plain["out_dir"] == f"out/{name}_full{epochs}"
    config, _ = edited(tmp_path, name, ["lora_rank = 64", "max_steps = 50"], before)
    assert config["out_dir"] == f"out/{name}_r64" and config["max_steps"] == 50
    assert config["max_tokens"] == config["max_epochs"] == 0
    assert config["learning_rate"] >= plain["learning_rate"]
    # a copy under a name of its own, in a folder below
    (tmp_path / "config/mine").mkdir()
    shutil.copy(ROOT / f"config/{name}.py", tmp_path / "config/mine/try_1.py")
    copied = configure(dict(vars(train)), [str(tmp_path / "config/mine/try_1.py")])
    assert copied == {**plain, "out_dir": f"out/try_1_full{epochs}"}


def test_checkpoints_of_packed_epochs_are_after_two_and_four(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for train_split in ({"rows": 19200}, {"rows": 6 * 19200, "epochs": 6}):
        (tmp_path / "data/meta.json").write_text(json.dumps({"splits": {"train": train_split}}))
        config = configure(dict(vars(train)), [str(ROOT / "config/tulu_ift.py"), "--data=data"])
        assert config["checkpoint_at"] == (200, 400) and config["max_epochs"] == 6


def test_an_included_file_that_is_not_there_or_is_wrong(here, refused):
    here("a.py", "\ninclude('gone.py')\n")
    assert refused("a.py").startswith("a.py:2: FileNotFoundError: include('gone.py')")
    here("b.py", "include('shared.py')\n")
    here("shared.py", "\nlora_rnk = 3\n")
    assert refused("b.py").startswith("shared.py:2: lora_rnk = 3: no such knob, nearest is lora_rank")
    here("shared.py", "\n\nassert lora_rank == 3, 'rank'\n")
    assert refused("b.py") == "shared.py:3: AssertionError: rank"
