"""Run untrusted programs, each in a fresh Python, and tell which of them got through their test.

    with Sandbox(timeout=3.0) as box:
        passed, result = box.run(program, test, entry)     # exec program, then test, then check(entry)

A warden (this file as a script, without the packages and the memory of the process that starts it) runs one program at
a time. Mode 'full' puts the warden in namespaces of its own, so that all of this holds for every program:
  - it sees no network, no process but its own, and a file system that is read-only but for its working directory,
    64 MB in memory that are gone afterwards; it runs as nobody where the caller is root;
  - whatever it starts is killed with it, whether it left its session or not;
  - its environment is empty, its input is at the end, its output is thrown away;
  - CPU and wall time, memory (of each process), file size, open files and processes are limited.
What a program can read of the user's files it may read, but it can send it nowhere.
Mode 'process', for kernels that allow no namespaces, keeps the limits, the environment and the killing, but a program
may read and write what the user may, signal the user's processes and use the network.

A program has passed if its process wrote a secret to a pipe after the last assertion and ended with status 0. So
sys.exit, os._exit, a forked copy, printed verdicts and swallowed assertions do not pass. The test is compiled apart
and sees its own builtins; tracing and gc's lists of objects are refused. The secret is in no file, argument, variable
or environment. Not covered: objects that equal everything, changed modules that the test imports, and a program
written against this file that searches or edits its own interpreter (ctypes, frames); bugs of the kernel.
"""
import contextlib
import ctypes
import json
import marshal
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time

NOBODY = 65534
NEW_MOUNTS, NEW_IPC, NEW_USER, NEW_PIDS, NEW_NET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000

# What a program's own Python runs, by -c. The secret, and all that is used after the run, is only on the evaluation
# stack of the line that calls it, where no Python code can look names up or change them.
BOOT = r"""
import builtins, marshal, os, sys
def boot(write, getpid):
    with os.fdopen(0, "rb", closefd=False) as file:
        data = file.read()
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.close(null)
    secret, (program, test, entry), pid = [data[:16]], marshal.loads(data[16:]), getpid()
    space, kept, data = {}, dict(vars(builtins)), None
    refused = frozenset("sys.settrace sys.setprofile sys._current_frames sys._current_exceptions gc.get_objects "
                        "gc.get_referrers gc.get_referents sys.monitoring.register_callback".split())
    def hook(event, args):
        if event in refused:
            raise PermissionError(event)
    def settle(space, kept, entry, _):
        if entry not in space:
            raise NameError(entry)
        return {**{k: v for k, v in space.items() if k == entry or k not in kept}, "__builtins__": kept}
    sys.addaudithook(hook)
    hook = None
    try:
        program = compile(program, "program", "exec", 0, True)
        test = compile(test + "\n\ncheck(" + entry + ")\n", "test", "exec", 0, True)
        write(3, secret.pop() * (pid == (getpid, exec(test, settle(space, kept, entry, exec(program, space))))[0]()))
    except BaseException as e:
        write(3, f"failed: {type(e).__name__}: {e}"[:200].encode(errors="replace"))
        os._exit(1)
    os._exit(0)
boot(os.write, os.getpid)
"""


# ----------------------------------------------------------------------------- the caller's side
class Sandbox:
    """A warden and its working directory. Raises OSError when the mode cannot be had here."""

    def __init__(self, timeout=3.0, mode="full", memory_mb=2048, python=sys.executable):
        if not sys.platform.startswith("linux"):
            raise OSError(f"sandbox: running programs needs Linux, found {sys.platform}")
        self.timeout, self.mode, self.memory_mb, self.python, self.warden = timeout, mode, memory_mb, python, None
        self.start()

    def start(self):
        self.folder = tempfile.mkdtemp(prefix="sandbox-")
        order = {"timeout": self.timeout, "mode": self.mode, "memory": self.memory_mb << 20, "folder": self.folder}
        self.warden = subprocess.Popen([self.python, "-I", "-S", "-B", __file__], stdin=subprocess.PIPE, env={},
                                       stdout=subprocess.PIPE, start_new_session=True)
        passed, result = self.ask(order, seconds=60)  # the warden tries itself out on a program
        if not passed:
            self.close()
            raise OSError(f"sandbox={self.mode} cannot be had here ({result})" + (
                "; --sandbox=process runs programs with limits only: they may use the network and your files"
                if self.mode == "full" else ""))

    def ask(self, order, seconds):
        """Send one order; (passed, result), or (False, why not) when the warden is dead or late."""
        try:
            self.warden.stdin.write(json.dumps(order).encode() + b"\n")
            self.warden.stdin.flush()
            if select.select([self.warden.stdout], [], [], seconds)[0] and (line := self.warden.stdout.readline()):
                return json.loads(line)
        except BrokenPipeError:
            pass
        return None, "the warden did not answer"

    def run(self, program, test, entry):
        """(whether the program passed, 'passed' | 'timed out' | 'failed: why')."""
        for _ in range(2):
            answer = self.ask({"program": program, "test": test, "entry": entry}, self.timeout + 30)
            if answer[0] is not None:
                return tuple(answer)
            self.close()
            self.start()
        return False, "failed: it ended the warden, twice"

    def close(self):
        if self.warden:
            with contextlib.suppress(BrokenPipeError):
                self.warden.stdin.close()
            try:
                self.warden.wait(self.timeout + 5)
            except subprocess.TimeoutExpired:
                self.warden.kill()
                self.warden.wait()
            self.warden.stdout.close()
            if os.path.exists(self.folder):  # the warden was killed
                subprocess.run(["rm", "-rf", self.folder], check=False, stderr=subprocess.DEVNULL)
            self.warden = None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


# ----------------------------------------------------------------------------- the warden
def call(name, *args):
    """A function of libc; raises OSError."""
    if getattr(LIBC, name)(*args) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def homes_of_python():
    """The folders that a fresh Python reads: its installation, and the virtual environment if it is in one."""
    return {os.path.realpath(sys.base_prefix), os.path.dirname(os.path.dirname(os.path.abspath(sys.executable)))}


def closed_ancestor(path):
    """The topmost folder on the way to `path` that other users cannot pass, or None."""
    parts = path.split("/")
    ways = ["/".join(parts[:n]) or "/" for n in range(1, len(parts) + 1)]
    return next((way for way in ways if not os.stat(way).st_mode & 1), None)


def enter_namespaces(root, folder):
    """Own users, processes, network, IPC and mounts; returns in a new process, which is the first of its namespace.
    Everything is read-only there."""
    (ready, tell_ready), (mapped, tell_mapped) = os.pipe(), os.pipe()
    if child := os.fork():  # maps of ids can be written only from outside
        os.close(tell_ready)
        if not os.read(ready, 1):
            wait_for(child, folder)  # which has told why
        for file in ("uid_map", "gid_map") if root else ("setgroups", "uid_map", "gid_map"):
            one = f"{NOBODY} {os.getegid() if file == 'gid_map' else os.geteuid()} 1"
            with open(f"/proc/{child}/{file}", "w") as f:
                f.write("deny" if file == "setgroups" else f"0 0 1\n{NOBODY} {NOBODY} 1" if root else one)
        os.write(tell_mapped, b"1")
        wait_for(child, folder)
    call("prctl", 1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    call("unshare", NEW_MOUNTS | NEW_IPC | NEW_USER | NEW_PIDS | NEW_NET)
    os.write(tell_ready, b"1")
    os.read(mapped, 1)
    if child := os.fork():
        wait_for(child)
    call("prctl", 1, signal.SIGKILL, 0, 0, 0)
    call("mount", None, b"/", None, 0x4000 | 0x40000, None)  # MS_REC | MS_PRIVATE
    if root:
        open_the_way()
    read_only = (ctypes.c_uint64 * 4)(1, 0, 0, 0)  # struct mount_attr: set MOUNT_ATTR_RDONLY
    call("syscall", 442, -100, b"/", 0x8000, read_only, 32)  # mount_setattr, AT_RECURSIVE
    try:
        call("mount", b"proc", b"/proc", b"proc", 2 | 4 | 8, None)  # nosuid, nodev, noexec
    except OSError:
        pass  # containers that hide parts of /proc: programs see the outer one, whose processes they cannot touch


def wait_for(child, folder=None):
    os.close(0), os.close(1)  # the pipes belong to the child now, and break when it dies
    os.waitpid(child, 0)
    if folder:
        os.rmdir(folder)
    os._exit(0)


def open_the_way():
    """Where root's Python lies in a folder closed to others (/root), put an empty folder in its place that holds
    nothing but the way to that Python. Only the warden and its programs see it."""
    homes = [(home, os.open(home, os.O_PATH)) for home in homes_of_python() if closed_ancestor(home)]
    for closed in {closed_ancestor(home) for home, _ in homes}:
        call("mount", b"tmpfs", closed.encode(), b"tmpfs", 2 | 4, b"mode=755,size=1m")
    for home, handle in homes:
        os.makedirs(home, exist_ok=True)
        call("mount", f"/proc/self/fd/{handle}".encode(), home.encode(), None, 0x1000 | 0x4000, None)  # MS_BIND | MS_REC
        os.close(handle)


def limit(order):
    """Limits and user of the process that is to become a program."""
    seconds = int(order["timeout"]) + 1
    limits = {"AS": order["memory"], "CPU": seconds, "FSIZE": 16 << 20, "CORE": 0, "NOFILE": 64, "NPROC": order["processes"]}
    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
    if order["nobody"]:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS: nothing regains rights by a setuid file


def start_program(order, text, pipe):
    """Fork and exec; the pid. text: an open file, pipe: where the secret goes."""
    if pid := os.fork():
        return pid
    try:
        os.setsid()
        os.chdir(order["folder"])
        null = os.open(os.devnull, os.O_RDWR)
        pipe = os.dup(pipe) if pipe < 4 else pipe
        for old, new in ((text, 0), (null, 1), (null, 2), (pipe, 3)):
            os.dup2(old, new)
        os.closerange(4, 256)
        limit(order)
        os.execve(sys.executable, [sys.executable, "-I", "-B", "-c", BOOT], {})
    finally:
        os._exit(127)


def kill_all(order):
    """End every process that the program left, and reap it."""
    while True:
        try:
            if order["mode"] == "full":
                os.kill(-1, signal.SIGKILL)  # the first process of a namespace: all others in it
            else:
                # those that were left have this process as their parent: it is their subreaper
                for left in [p for p, parent, _, _ in processes() if parent == os.getpid()]:
                    os.kill(left, signal.SIGKILL)
        except ProcessLookupError:
            pass
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.001)


def processes():
    """(pid, parent, threads, user) of all processes in sight."""
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        try:
            with open(f"/proc/{pid}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
            yield pid, int(fields[1]), int(fields[17]), os.stat(f"/proc/{pid}").st_uid
        except (FileNotFoundError, ProcessLookupError):
            pass


def run(order, program, test, entry):
    """(passed, result) of one program, of which nothing is left."""
    secret, text = os.urandom(16), os.memfd_create("program")
    with open(text, "wb", closefd=False) as file:
        file.write(secret + marshal.dumps((program, test, entry)))
    os.lseek(text, 0, os.SEEK_SET)
    folder = order["folder"].encode()
    if order["mode"] == "full":
        call("mount", b"tmpfs", folder, b"tmpfs", 2 | 4, b"size=64m,nr_inodes=4096,mode=700,uid=65534,gid=65534")
    out, pipe = os.pipe()
    pid = start_program(order, text, pipe)
    os.close(pipe), os.close(text)
    handle = os.pidfd_open(pid)
    watch = select.poll()
    watch.register(handle, select.POLLIN)
    watch.register(0, 0)  # the caller's death
    events = dict(watch.poll(order["timeout"] * 1000))
    in_time = handle in events
    status = os.waitpid(pid, 0)[1] if in_time else None
    kill_all(order)
    os.set_blocking(out, False)
    try:
        told = os.read(out, 1 << 16)
    except BlockingIOError:
        told = b""
    os.close(out), os.close(handle)
    if order["mode"] == "full":
        call("umount2", folder, 2)  # MNT_DETACH: with all that is in it
    else:
        subprocess.run(["/bin/rm", "-rf", "--", *(os.path.join(order["folder"], name) for name in os.listdir(folder.decode()))])
    if not in_time:
        return False, "timed out"
    if status == 0 and told == secret:
        return True, "passed"
    if told.startswith(b"failed: "):
        return False, told[:200].decode(errors="replace")
    ending = os.waitstatus_to_exitcode(status)
    return False, f"failed: it ended before the test did, with {'status' if ending >= 0 else 'signal'} {abs(ending)}"


def warden():
    order = json.loads(sys.stdin.buffer.readline())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    root = os.geteuid() == 0
    order.update(processes=10, nobody=root)
    if order["mode"] == "full":
        enter_namespaces(root, order["folder"])
    else:
        if root and (closed := list(filter(None, map(closed_ancestor, homes_of_python())))):
            raise OSError(f"root's programs run as user nobody, to whom {closed[0]}, on the way to Python, is closed")
        if root:
            os.chown(order["folder"], NOBODY, NOBODY)
        call("prctl", 36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
        user = NOBODY if root else os.geteuid()  # whose processes elsewhere count as well
        order["processes"] += sum(threads for _, _, threads, uid in processes() if uid == user)
    call("prctl", 4, 0, 0, 0, 0)  # not dumpable: closed to programs of the same user
    answer = run(order, "def f(): pass", "def check(f): f()", "f")
    try:
        while os.write(1, json.dumps(answer).encode() + b"\n") and (line := sys.stdin.buffer.readline()):
            answer = run(order, **json.loads(line))
    except BrokenPipeError:
        pass  # the caller is gone
    if order["mode"] != "full":
        os.rmdir(order["folder"])


if __name__ == "__main__":
    LIBC = ctypes.CDLL(None, use_errno=True)
    try:
        warden()
    except OSError as e:
        os.write(1, json.dumps((False, str(e))).encode() + b"\n")
