"""sandbox.py: a hundred programs that want to pass without solving anything, or to do harm; none does, nothing is left."""
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from evaluation.sandbox import Sandbox
from evaluation.warden import BOOT

TEST = """
def check(candidate):
    assert candidate(1) == 2 and len([candidate(1)]) == 1
    assert abs(candidate(5) - 6) < 1e-6 and all(x == y for x, y in zip([candidate(2)], [3], strict=True))
    assert sorted([candidate(3), 4]) == [4, 4] and isinstance(candidate(9), int) and max(candidate(1), 0) == min(2, 9) == 2
    done = True
"""
WRONG, RIGHT = "def f(x):\n    return None\n", "def f(x):\n    return x + 1\n"
IN = "def f(x):\n    "  # the trick is inside the function
TIMEOUT = 1.2   # for programs that never end
PATIENCE = 30   # for programs that must pass, however busy the machine is


def hunt(find):
    """A program that looks for 16 secret bytes by `find`, an expression over candidates, and reports them."""
    return WRONG + f"import os, sys\nfound = [v for v in {find} if type(v) is bytes and len(v) == 16]\n" \
                   "for v in found:\n    os.write(3, v)\n    os._exit(0)\n"


# programs that must not pass; {victim} is a folder anyone may write to, {port} one where the test listens, {pid} the test
HOSTILE = {
    # ends that look like success
    **{f"ends by {code}": WRONG + "import os, sys, signal, ctypes\n" + code for code in (
        "sys.exit(0)", "sys.exit()", "os._exit(0)", "raise SystemExit", "raise SystemExit(0)", "exit(0)", "quit()",
        "os.execv('/bin/true', ['true'])", "ctypes.CDLL(None).exit(0)", "ctypes.CDLL(None)._exit(0)",
        "os.kill(os.getpid(), 9)", "os.kill(os.getpid(), 15)", "os.abort()", "os.kill(os.getpid(), signal.SIGSTOP)",
        "ctypes.string_at(0)", "sys.setrecursionlimit(10**9)\ndef g(n): return g(n + 1) + 1\ng(0)",
        "sys.excepthook = lambda *a: os._exit(0)", "import atexit; atexit.register(os._exit, 0)",
        "import threading, time\nthreading.Thread(target=lambda: (time.sleep(.05), os._exit(0))).start()\ntime.sleep(1)",
        "signal.signal(14, lambda *a: os._exit(0)); signal.setitimer(0, .05); signal.pause()",
        "class D:\n    def __del__(self): os._exit(0)\nd = D()\ndel d")},
    **{f"in the function: {code}": IN + code for code in (
        "import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit(0)", "raise KeyboardInterrupt",
        "raise GeneratorExit", "import os; os.execv('/bin/true', ['true'])", "raise BaseException", "yield 2",
        "import os\n    if os.fork():\n        os._exit(0)\n    return x + 1",
        "import os\n    pid = os.fork()\n    if pid:\n        os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
        "    return x + 1",  # the child solves it, the parent repeats its status
        "import os\n    for guess in range(20):\n        if os.fork() == 0:\n            return guess\n    os._exit(0)",
        "import os\n    return 2 if os.fork() else os._exit(0)")},
    # printed verdicts
    "prints verdicts": WRONG + "print('passed', 'PASS', '[true, \"passed\"]', flush=True)",
    "writes on all files": WRONG + "import os\nfor fd in range(64):\n    try: os.write(fd, b'[true, \"passed\"]\\n')\n"
                                   "    except OSError: pass\nos._exit(0)",
    "guesses the secret": WRONG + "import os\nos.write(3, os.urandom(16))\nos._exit(0)",
    "guesses nothing": WRONG + "import os\nos.write(3, b'')\nos._exit(0)",
    "guesses for ever": WRONG + "import os\nwhile True: os.write(3, os.urandom(16))",
    "verdict for the warden": WRONG + "import os\nfor pid in (1, os.getppid()):\n    for fd in range(16):\n        try:\n"
                              "            open(f'/proc/{{pid}}/fd/{{fd}}', 'w').write('[true, \"passed\"]\\n')\n"
                              "        except OSError: pass\nos._exit(0)",
    # builtins and asserts
    **{f"patches {code}": WRONG + f"import builtins, sys, os\n{code}" for code in (
        "builtins.exec = lambda *a: None", "builtins.compile = lambda *a: (lambda: 0).__code__",
        "builtins.AssertionError = type('Quiet', (Exception,), {{}})", "builtins.__import__ = lambda *a: None",
        "__builtins__ = {{}}", "os.getpid = lambda: 0", "os.write = lambda *a: 16", "sys.exit = os._exit",
        "def check(candidate): return True", "__debug__1 = False", "import types; f = types.SimpleNamespace()",
        "import __main__; __main__.boot = None; vars(__main__).clear()")},
    "patched abs, all, sorted": "import builtins\nbuiltins.abs = lambda x: 0\nbuiltins.all = lambda x: True\n"
                                "builtins.sorted = lambda x: [4, 4]\nf = lambda x: 2\n",
    "patched in the call": "def f(x):\n    import builtins\n    builtins.abs = lambda x: 0\n    builtins.all = lambda x: True\n"
                           "    builtins.sorted = lambda x: [4, 4]\n    return 2\n",
    "own abs, all, len, sorted, isinstance":
        "def abs(x): return 0\ndef all(x): return True\ndef sorted(x): return [4, 4]\nf = lambda x: 2\n",
    "jumps over the asserts": "import sys\ndef jump(frame, event, arg):\n"
                              "    if frame.f_code.co_name == 'check' and event == 'line':\n"
                              "        frame.f_lineno = frame.f_code.co_firstlineno + 4\n    return jump\n"
                              "sys.settrace(jump)\n" + WRONG,
    "swallows the test in a string": WRONG + 'x = """',
    "opens a block around the test": WRONG + "import contextlib\nwith contextlib.suppress(BaseException):",
    "ends in try": WRONG + "try:",
    "goes on behind a backslash": WRONG + "x = \\",
    "right once": "calls = []\ndef f(x):\n    calls.append(x)\n    return x + 1 if len(calls) < 3 else None\n",
    "does not parse": "def f(x): return ((1\n", "has no function": "del_ = 1\n", "deletes the function": RIGHT + "del f\n",
    "is empty": "", "null byte": WRONG + "\0",
    # the secret
    "arguments": hunt("[a.encode() for a in sys.argv] + open('/proc/self/cmdline', 'rb').read().split(b'\\0')"),
    "environment": hunt("[*os.environb.values(), *open('/proc/self/environ', 'rb').read().split(b'\\0')]"),
    "frames": hunt("[v for i in range(9) for fr in [sys._getframe(0)] for _ in range(i) for fr in [fr.f_back or fr] "
                   "for m in (fr.f_locals, fr.f_globals) for v in [*m.values(), *(m.get('secret') or ())]]"),
    "constants": hunt("[c for fr in [sys._getframe(1)] for c in fr.f_code.co_consts]"),
    "main": hunt("[v for m in list(sys.modules.values()) for v in vars(m).values()]"),
    "objects": hunt("__import__('gc').get_objects()"),
    "referents": hunt("__import__('gc').get_referents(sys._getframe(1))"),
    "files": hunt("[os.pread(fd, 16, at) for fd in range(9) for at in (0, 16) if os.path.isfile('/proc/self/fd/%d' % fd)]"),
    "input": hunt("[os.read(0, 16), sys.stdin.buffer.read(16)]"),
    "memory of the parent": hunt("[open(f'/proc/{{os.getppid()}}/mem', 'rb').read(16)]"),
    "memory of the first process": hunt("[open('/proc/1/mem', 'rb').read(16)]"),
    "environment of the parent": hunt("open(f'/proc/{{os.getppid()}}/environ', 'rb').read().split(b'\\0')"),
    "memory of the test": hunt("[open('/proc/{pid}/mem', 'rb').read(16)]"),
    "profile": "import sys\nsys.setprofile(lambda *a: None)\n" + WRONG,
    "other threads' frames": hunt("[v for fr in sys._current_frames().values() for v in fr.f_locals.values()]"),
    # never ends
    **{f"loops: {code}": WRONG + "import os, sys, time, signal\n" + code for code in (
        "while True: pass", "while True: print('x' * 9999)", "while True: sys.stderr.write('x' * 9999)", "time.sleep(60)",
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass", "9 ** 9 ** 9",
        "for s in range(1, 32):\n    try: signal.signal(s, signal.SIG_IGN)\n    except OSError: pass\nwhile True: pass",
        "signal.pthread_sigmask(0, range(1, 65))\nwhile True: pass", "import threading; threading.Lock().acquire() and "
        "threading.Event().wait()", "os.mkfifo('p'); open('p')", "open('/dev/zero').read()",
        "import re; re.match('(a+)+b', 'a' * 99)",
        "input()\nwhile True: pass")},
    # eats
    **{f"eats: {code}": WRONG + "import os, threading\n" + code for code in (
        "a = []\nwhile True: a.append(bytearray(10 ** 7))", "x = [0] * 10 ** 14", "x = 'x' * 10 ** 12",
        "f = open('big', 'wb')\nwhile True: f.write(bytes(10 ** 6))", "i = 0\nwhile True: open(f'f{{i}}', 'w').close(); i += 1",
        "while True:\n    os.mkdir('d')\n    os.chdir('d')", "fds = []\nwhile True: fds.append(open('/dev/null'))",
        "while True: os.fork()", "while True:\n    try: os.fork()\n    except OSError: pass",
        "while True: threading.Thread(target=threading.Event().wait).start()")},
    # leaves something
    **{f"leaves: {code}": WRONG + "import os, sys, time, subprocess, socket\n" + code for code in (
        "subprocess.Popen(['sleep', '61'])", "subprocess.Popen(['sleep', '61'], start_new_session=True)",
        "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(61)\n    os._exit(0)",
        "os.posix_spawn('/bin/sleep', ['sleep', '61'], {{}})", "os.system('sleep 61 &')", "os.system('nohup setsid sleep 61 &')",
        "s = socket.socket(); s.bind(('127.0.0.1', 45671)); s.listen()\nif os.fork() == 0:\n    os.setsid(); time.sleep(61)",
        "s = socket.socket(socket.AF_UNIX); s.bind('\\0hostile'); s.listen(); os.fork()",
        "open('{victim}/made', 'w').write('x')", "open('/tmp/hostile', 'w').write('x')", "open('/dev/shm/hostile', 'w')",
        "os.symlink('/', 'root'); os.mkdir('closed', 0)")},
    # does harm
    **{f"harms: {code}": WRONG + "import os, sys, shutil, socket, ctypes, subprocess\n" + code for code in (
        "os.remove('{victim}/precious')", "shutil.rmtree('{victim}')", "open('{victim}/precious', 'w')",
        "os.chmod('{victim}', 0)",
        "os.system('rm -rf {victim}/* /tmp/* ~ 2>/dev/null')", "os.kill({pid}, 15)", "os.kill(os.getppid(), 9)", "os.kill(1, 9)",
        "os.kill(-1, 9)", "os.killpg(os.getpgid(os.getppid()), 9)", "os.setuid(0); os.system('id')",
        "socket.create_connection(('127.0.0.1', {port}), 1)", "socket.create_connection(('8.8.8.8', 53), 1)",
        "ctypes.CDLL(None).unshare(0x10020000)\n"
        "ctypes.CDLL(None).mount(None, b'/', None, 0x1020, None)\nopen('{victim}/made', 'w')",
        "open('/proc/sysrq-trigger', 'w').write('b')", "open('/proc/1/oom_score_adj', 'w').write('1000')",
        "open(os.__file__, 'a').write('#')", "subprocess.run(['kill', '-9', '--', '-1'])",
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1)); x = bytearray(10 ** 10)")},
}

HARMLESS = {
    "prints": RIGHT + "import sys\nprint('x' * 10 ** 6)\nsys.stderr.write('AssertionError')\n",
    "leaves a thread": RIGHT + "import threading\nthreading.Thread(target=threading.Event().wait).start()\n",
    "leaves a child": RIGHT + "import subprocess\nsubprocess.Popen(['sleep', '61'])\n",
    "writes files": IN + "open('a', 'w').write('b')\n    assert open('a').read() == 'b'\n    return x + 1",
    "closes its streams": RIGHT + "import sys\nsys.stdout.close(); sys.stderr.close(); sys.stdin.close()\n",
    "reads input": IN + "try: input()\n    except EOFError: return x + 1",
    "memory is limited": IN + "try: bytearray(10 ** 9)\n    except MemoryError: return x + 1",
    "processes are limited": "import os, time\ntry:\n    for _ in range(50):\n        if os.fork() == 0: time.sleep(9)\n"
                             "except BlockingIOError:\n" + "    def f(x):\n        return x + 1\n",
    "file size is limited": "try:\n    open('big', 'wb').write(bytes(10 ** 8))\nexcept OSError:\n    f = lambda x: x + 1\n",
    "environment is bare, network is not there": "import os, socket\n"
        "assert set(map(os.environ.get, set(os.environ) - {'LC_CTYPE'})) == {'1'}\ntry:\n"
        "    socket.create_connection(('1.1.1.1', 53), 1)\nexcept OSError:\n    f = lambda x: x + 1\n",
    "recurses": IN + "g = lambda n: g(n + 1)\n    try: g(0)\n    except RecursionError: return x + 1",
    "uses the library": "import collections, dataclasses, typing, enum, re, random, itertools, functools, math, logging\n"
                        "P = collections.namedtuple('P', 'a')\n@dataclasses.dataclass\nclass Q:\n    a: typing.List[int]\n"
                        "class E(enum.Enum):\n    A = 1\n" + RIGHT,
    "script part is dead": RIGHT + "if __name__ == '__main__':\n    raise SystemExit(3)\n",
    "future": "from __future__ import annotations\ndef f(x: Unknown) -> None:\n    return x + 1\n",
    "unicode": "def f(x):\n    'ü ≤ 𝔘'\n    é = 1\n    return x + é\n",
    "handles its end": RIGHT + "import atexit, sys\natexit.register(print, 1)\nsys.excepthook = None\n",
}


def is_of_a_program(line):
    return b"def boot(write" in line or line == b"sleep\x0061\0"


def is_anothers(pid):
    """Whether a process descends from a Python outside of sandboxes that is not of this test: from another worker."""
    another = False
    while pid > 1 and pid != os.getpid():
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
        is_python = "python" in Path(f"/proc/{pid}/comm").read_text()
        another |= is_python and b"warden.py" not in line and not is_of_a_program(line)
        status = Path(f"/proc/{pid}/stat").read_text()
        pid = int(status.rpartition(")")[2].split()[1])  # its parent
    return another and pid != os.getpid()


def leftovers():
    """Command lines of processes that a program left: copies of it, or its `sleep 61`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes()
            if is_of_a_program(line) and not is_anothers(int(entry.name)):
                found.append(line[:60])
        except OSError:  # it has ended meanwhile
            continue
    return found


def folders():
    return [name for name in os.listdir(tempfile.gettempdir()) if name.startswith("sandbox-")]


def full_or_skip():
    try:
        Sandbox().close()
    except OSError as e:
        pytest.skip(str(e))


@pytest.fixture(scope="module", autouse=True)
def own_folder(tmp_path_factory):
    """Where the sandboxes of these tests have their folders, apart from those of other workers."""
    tmp_path_factory.getbasetemp()  # lies where it ever does
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        os.chmod(folder, 0o755)
        patch.setenv("TMPDIR", folder)  # of processes
        patch.setattr(tempfile, "tempdir", folder)
        yield


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    """{name: (passed, result)} of all programs, run two at a time, and what the world looked like meanwhile."""
    full_or_skip()
    watched = ("/tmp", "/dev/shm", tempfile.gettempdir())
    before = {name for folder in watched for name in os.listdir(folder)}
    victim = tmp_path_factory.mktemp("victim")
    (victim / "precious").write_text("gold")
    for path in (victim, victim / "precious", *victim.parents[:2]):
        path.chmod(0o777)
    connections = []
    server = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=lambda: [connections.append(server.accept()) for _ in range(9)], daemon=True).start()
    fill = lambda text: text.replace("{victim}", str(victim)).replace("{port}", str(server.getsockname()[1])).replace(
        "{pid}", str(os.getpid())).replace("{{", "{").replace("}}", "}")

    def work(box, programs, names):
        return {name: box.run(fill(programs[name]), TEST, "f") for name in names}

    boxes = {}
    for programs, timeout in ((HOSTILE, TIMEOUT), (HARMLESS, PATIENCE)):
        names = list(programs)
        with Sandbox(timeout, memory_mb=512) as a, Sandbox(timeout, memory_mb=512) as b, ThreadPoolExecutor(2) as pool:
            for part in pool.map(work, (a, b), (programs, programs), (names[::2], names[1::2])):
                boxes.update(part)
    subprocess.run(["sleep", "0.1"], check=True)
    after = {name for folder in watched for name in os.listdir(folder)}
    left = {name for name in after - before if "hostile" in name} | {*folders()}
    return boxes, victim, connections, left


def test_a_hundred_hostile_programs_do_not_pass(verdicts):
    assert len(HOSTILE) >= 100
    assert [name for name in HOSTILE if verdicts[0][name][0]] == []
    assert {r for _, r in verdicts[0].values() if "warden" in r} == set()


def test_right_programs_that_do_odd_things_pass(verdicts):
    assert {name: verdicts[0][name][1] for name in HARMLESS if not verdicts[0][name][0]} == {}


def test_nothing_is_left_and_nothing_is_harmed(verdicts):
    _, victim, connections, files = verdicts
    assert leftovers() == [] and files == set() and connections == []
    assert [p.name for p in victim.iterdir()] == ["precious"] and (victim / "precious").read_text() == "gold"
    with socket.socket() as s:
        assert s.connect_ex(("127.0.0.1", 45671)) != 0


def test_results_say_what_happened(verdicts):
    result = {name: r for name, (_, r) in verdicts[0].items()}
    assert result["loops: while True: pass"] == "timed out"
    assert result["ends by os._exit(0)"] == "failed: it ended before the test did, with status 0"
    assert result["ends by os.kill(os.getpid(), 9)"] == "failed: it ended before the test did, with signal 9"
    assert result["does not parse"].startswith("failed: SyntaxError")
    assert result["right once"].startswith("failed: AssertionError") or "TypeError" in result["right once"]
    assert result["eats: x = [0] * 10 ** 14"].startswith("failed: MemoryError")
    assert result["objects"].startswith("failed: PermissionError")


def test_a_dead_warden_is_replaced():
    full_or_skip()
    with Sandbox(TIMEOUT) as box:
        assert box.run(RIGHT, TEST, "f") == (True, "passed")
        box.warden.kill()
        box.warden.wait()
        assert box.run(RIGHT, TEST, "f") == (True, "passed")
        folder = box.folder
    assert not os.path.exists(folder)


@pytest.mark.parametrize("library", [
    "import numpy\na = numpy.ones((600, 600), numpy.float32)\na @ a\n",
    "import numpy\nnumpy.linalg.svd(numpy.ones((200, 200)))\n",
    "import torch\na = torch.ones(600, 600)\na @ a\na.svd()\n"])
def test_libraries_of_many_threads_start_one(library):
    """A machine of many cores would start more than the limit on processes allows."""
    full_or_skip()
    count = "[line] = [line for line in open('/proc/self/status') if line.startswith('Threads')]\n"
    program = library + count + "assert line.split() == ['Threads:', '1'], line\n" + RIGHT
    with Sandbox(300, memory_mb=8192) as box:  # a busy machine imports torch in a minute
        assert box.run(program, TEST, "f") == (True, "passed")


def test_when_the_caller_dies_so_does_the_program(tmp_path):
    full_or_skip()
    script = f"import sys\nsys.path.insert(0, {str(Path(__file__).parents[1])!r})\nfrom evaluation.sandbox import *\n" \
             "box = Sandbox(timeout=60)\nprint('up', flush=True)\nbox.run('while True: pass', '', 'f')\n"
    caller = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert caller.stdout.readline() == b"up\n"
    while not leftovers():
        time.sleep(0.1)
    caller.kill()
    caller.wait()
    caller.stdout.close()
    for _ in range(1200):  # two minutes at most
        if leftovers() or folders():
            time.sleep(0.1)
    assert leftovers() == [] and folders() == []


def test_limits_only():
    pythons = (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3")  # root's own may be closed to user nobody
    for python in filter(os.path.exists, pythons):
        try:
            box = Sandbox(TIMEOUT, mode="process", memory_mb=512, python=python)
            break
        except OSError as e:
            reason = str(e)
    else:
        pytest.skip(reason)
    with box:
        names = [n for n in HOSTILE if n.startswith(("ends", "in the", "patch", "own", "loops: while True: pass", "leaves: sub"))
                 and "SIGSTOP" not in n]
        passed = [n for n in names if box.run(HOSTILE[n].replace("{{", "{").replace("}}", "}"), TEST, "f")[0]]
        assert passed == [] and leftovers() == []
    with Sandbox(PATIENCE, mode="process", memory_mb=512, python=python) as box:
        results = {n: box.run(HARMLESS[n], TEST, "f") for n in HARMLESS if "network" not in n}
        assert {n: r for n, (passed, r) in results.items() if not passed} == {}
    assert leftovers() == []


def test_the_program_that_runs_programs_keeps_the_secret_off_every_name():
    assert "secret.pop() * (pid == (getpid, exec(" in BOOT  # one expression: see the remark above BOOT
