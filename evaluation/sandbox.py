"""Run untrusted programs, each in a fresh Python, and find out which of them pass their test.

    with Sandbox(timeout=3.0) as box:
        passed, result = box.run(program, test, entry)  # exec program, then test, then check(entry)

    caller                     warden                            program
    Sandbox.run   -- order -->  in namespaces of its own
                                start_program  -- secret, texts -->  python -c BOOT
                                poll, kill_all <-- secret ---------  after the last assertion
                  <- verdict -  the secret came back, status 0

A warden (evaluation/warden.py, without the packages and the memory of the process that starts it)
runs one program at a time. Mode 'full' puts the warden in namespaces of its own, so that all of
this holds for every program:
  - it sees no network, no process but its own, and a file system that is read-only but for its
    working directory, 64 MB in memory that are gone afterwards; it runs as nobody where the caller
    is root;
  - whatever it starts is killed with it, whether it left its session or not;
  - its environment only tells libraries to start one thread each; its input is at the end, its
    output is thrown away;
  - CPU and wall time, memory (of each process), file size, open files and processes are limited.
What a program can read of the user's files it may read, but it can send it nowhere.
Mode 'process', for kernels that allow no namespaces, keeps the limits, the environment and the
killing, but a program may read and write what the user may, signal the user's processes and use
the network.

A program has passed if its process wrote a secret to a pipe after the last assertion and ended
with status 0. So sys.exit, os._exit, a forked copy, printed verdicts and swallowed assertions do
not pass. The test is compiled apart and sees its own builtins; tracing and gc's lists of objects
are refused. The secret is in no file, argument, variable or environment. Not covered: objects that
equal everything, changed modules that the test imports, and a program written against these
files that searches or edits its own interpreter (ctypes, frames); bugs of the kernel.
"""
import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
from pathlib import Path

WARDEN = Path(__file__).with_name("warden.py")


class Sandbox:
    """A warden and its working directory. Raises OSError when the mode cannot be had here."""

    def __init__(self, timeout=3.0, mode="full", memory_mb=2048, python=sys.executable):
        if not sys.platform.startswith("linux"):
            raise OSError(f"sandbox: running programs needs Linux, found {sys.platform}")
        self.timeout = timeout
        self.mode = mode
        self.memory_mb = memory_mb
        self.python = python
        self.warden = None
        self.start()

    def start(self):
        # in a session of its own, so that the user's Ctrl-C does not reach it
        self.folder = tempfile.mkdtemp(prefix="sandbox-")
        self.warden = subprocess.Popen([self.python, "-I", "-S", "-B", WARDEN], env={},
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                       start_new_session=True)
        # the warden answers when it has tried itself out on a program
        order = {"timeout": self.timeout, "mode": self.mode, "memory": self.memory_mb << 20,
                 "folder": self.folder}
        passed, result = self.ask(order, seconds=60)
        if not passed:
            self.close()
            message = f"sandbox={self.mode} cannot be had here ({result})"
            if self.mode == "full":
                message += ("; --sandbox=process runs programs with limits only: they may use the "
                            "network and your files")
            raise OSError(message)

    def ask(self, order, seconds):
        """Send one order; (passed, result), or (None, why not) when the warden is dead or late."""
        try:
            self.warden.stdin.write(json.dumps(order).encode() + b"\n")
            self.warden.stdin.flush()
            answered, _, _ = select.select([self.warden.stdout], [], [], seconds)
            line = self.warden.stdout.readline() if answered else b""
            if line:
                return json.loads(line)
        except BrokenPipeError:
            pass
        return None, "the warden did not answer"

    def run(self, program, test, entry):
        """(whether the program passed, 'passed' | 'timed out' | 'failed: why')."""
        # the warden may have died of something else, so that a program is tried twice
        order = {"program": program, "test": test, "entry": entry}
        for _ in range(2):
            passed, result = self.ask(order, self.timeout + 30)
            if passed is not None:
                return passed, result
            # a new warden in place of the one that is gone
            self.close()
            self.start()
        return False, "failed: it ended the warden, twice"

    def close(self):
        if not self.warden:
            return
        # without orders it ends by itself
        with contextlib.suppress(BrokenPipeError):
            self.warden.stdin.close()
        try:
            self.warden.wait(self.timeout + 5)
        except subprocess.TimeoutExpired:
            self.warden.kill()
            self.warden.wait()
        self.warden.stdout.close()
        # a warden that was killed has left its folder
        if os.path.exists(self.folder):
            subprocess.run(["rm", "-rf", self.folder], check=False, stderr=subprocess.DEVNULL)
        self.warden = None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()
