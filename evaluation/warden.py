"""The warden of evaluation/sandbox.py, which says what is promised: a script that runs programs.

    {"timeout": 3, "mode": "full", ...}         the first line of its input
    [true, "passed"]                            its answer, when it has tried itself out
    {"program": ..., "test": ..., "entry": ...} then an order a line
    [false, "timed out"]                        and an answer a line

    sandbox.py -- fork, exec -> warden -- unshare, fork -> warden in its namespaces
                                                            -- fork, exec -> python -c BOOT, limited
"""
import ctypes
import json
import marshal
import os
import resource
import select
import signal
import subprocess
import sys
import time

NOBODY = 65534

# The environment of a program: libraries that start a thread for each core would fail, or wait
# for threads that the limit on processes never lets start.
ENVIRONMENT = {name: "1" for name in (
    "OMP_NUM_THREADS", "OMP_THREAD_LIMIT", "OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS",
    "MKL_NUM_THREADS", "BLIS_NUM_THREADS", "NUMEXPR_NUM_THREADS", "NUMBA_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS", "RAYON_NUM_THREADS", "POLARS_MAX_THREADS")}

# the kernel's numbers (linux/sched.h, linux/mount.h, linux/prctl.h)
CLONE_NEWNS = 0x20000            # mounts
CLONE_NEWIPC = 0x8000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 0x40000
MNT_DETACH = 2
AT_FDCWD = -100
AT_RECURSIVE = 0x8000
MOUNT_ATTR_RDONLY = 1
SYS_MOUNT_SETATTR = 442
PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38

# What a program's own Python runs, by -c. The secret, and all that is used after the run, is only
# on the evaluation stack of the statement that calls the program, where no Python code can look
# names up or change them: that statement must stay one expression.
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
    refused = frozenset("sys.settrace sys.setprofile sys._current_frames sys._current_exceptions "
                        "gc.get_objects gc.get_referrers gc.get_referents "
                        "sys.monitoring.register_callback".split())
    def hook(event, args):
        if event in refused:
            raise PermissionError(event)
    def settle(space, kept, entry, _):
        if entry not in space:
            raise NameError(entry)
        return {**{k: v for k, v in space.items() if k == entry or k not in kept},
                "__builtins__": kept}
    sys.addaudithook(hook)
    hook = None
    try:
        program = compile(program, "program", "exec", 0, True)
        test = compile(test + "\n\ncheck(" + entry + ")\n", "test", "exec", 0, True)
        write(3, secret.pop() * (pid == (getpid, exec(
            test, settle(space, kept, entry, exec(program, space))))[0]()))
    except BaseException as e:
        write(3, f"failed: {type(e).__name__}: {e}"[:200].encode(errors="replace"))
        os._exit(1)
    os._exit(0)
boot(os.write, os.getpid)
"""


# ----------------------------------------------------------------------------- namespaces
def call(name, *args):
    """A function of libc; raises OSError."""
    if getattr(LIBC, name)(*args) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def homes_of_python():
    """The folders that a fresh Python reads: its installation, and its virtual environment."""
    executable = os.path.abspath(sys.executable)
    environment = os.path.dirname(os.path.dirname(executable))
    return {os.path.realpath(sys.base_prefix), environment}


def closed_ancestor(path):
    """The topmost folder on the way to `path` that other users cannot pass, or None."""
    parts = path.split("/")
    for count in range(1, len(parts) + 1):
        folder = "/".join(parts[:count]) or "/"
        if not os.stat(folder).st_mode & 1:
            return folder
    return None


def enter_namespaces(root, folder):
    """Own users, processes, network, IPC and mounts; returns in a new process, which is the first
    of its namespace. Everything is read-only there."""
    ready, tell_ready = os.pipe()
    mapped, tell_mapped = os.pipe()
    child = os.fork()
    if child:
        # out here: the maps of ids can be written only from outside of the new namespace
        os.close(tell_ready)
        if not os.read(ready, 1):
            wait_for(child, folder)  # which has reported why
        write_id_maps(child, root)
        os.write(tell_mapped, b"1")
        wait_for(child, folder)

    # the child enters the namespaces and waits for its maps; it dies with its parent
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    call("unshare", CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET)
    os.write(tell_ready, b"1")
    os.read(mapped, 1)

    # a namespace of processes begins with the next child
    child = os.fork()
    if child:
        wait_for(child)
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

    # mounts from here on are seen by nobody else, and all are read-only
    call("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)
    if root:
        open_the_way()
    read_only = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY, 0, 0, 0)  # struct mount_attr: what to set
    call("syscall", SYS_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, read_only, 32)
    try:
        call("mount", b"proc", b"/proc", b"proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, None)
    except OSError:
        # containers that hide parts of /proc allow no new one: programs see the outer one, whose
        # processes they cannot touch
        pass


def write_id_maps(child, root):
    """Say who the users of the child's namespace are outside: nobody is the caller; where the
    caller is root, root and nobody are themselves."""
    if not root:
        write_file(f"/proc/{child}/setgroups", "deny")  # or the kernel allows no gid_map
    for file, own_id in (("uid_map", os.geteuid()), ("gid_map", os.getegid())):
        if root:
            ids = f"0 0 1\n{NOBODY} {NOBODY} 1"
        else:
            ids = f"{NOBODY} {own_id} 1"
        write_file(f"/proc/{child}/{file}", ids)


def write_file(path, text):
    with open(path, "w") as file:
        file.write(text)


def wait_for(child, folder=None):
    """End when the child has ended."""
    # the pipes belong to the child now, and break when it dies
    os.close(0)
    os.close(1)
    os.waitpid(child, 0)
    if folder:
        os.rmdir(folder)
    os._exit(0)


def open_the_way():
    """Where root's Python lies in a folder closed to others (/root), put an empty folder in its
    place that holds nothing but the way to that Python. Only the warden and its programs see it."""
    # a handle on each home that lies in a closed folder
    handles = {}
    closed = set()
    for home in homes_of_python():
        ancestor = closed_ancestor(home)
        if ancestor:
            handles[home] = os.open(home, os.O_PATH)
            closed.add(ancestor)
    # the closed folders are covered; the handles still reach what lies in them
    for folder in closed:
        options = b"mode=755,size=1m"
        call("mount", b"tmpfs", folder.encode(), b"tmpfs", MS_NOSUID | MS_NODEV, options)
    for home, handle in handles.items():
        os.makedirs(home, exist_ok=True)
        source = f"/proc/self/fd/{handle}"
        call("mount", source.encode(), home.encode(), None, MS_BIND | MS_REC, None)
        os.close(handle)


# ----------------------------------------------------------------------------- programs
def set_limits(order):
    """Limits and user of the process that is to become a program."""
    limits = {resource.RLIMIT_AS: order["memory"],
              resource.RLIMIT_CPU: int(order["timeout"]) + 1,
              resource.RLIMIT_FSIZE: 16 << 20,
              resource.RLIMIT_CORE: 0,
              resource.RLIMIT_NOFILE: 64,
              resource.RLIMIT_NPROC: order["processes"]}
    for kind, value in limits.items():
        _, hard = resource.getrlimit(kind)
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        resource.setrlimit(kind, (value, value))
    # the user
    if order["nobody"]:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)  # nothing regains rights by a setuid file


def start_program(order, text, pipe):
    """Fork and exec; the pid. text: an open file, pipe: where the secret goes."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        os.chdir(order["folder"])
        # files 0 to 3 are its input, two times nothing, and the pipe; no other is open
        null = os.open(os.devnull, os.O_RDWR)
        if pipe < 4:
            pipe = os.dup(pipe)
        for old, new in ((text, 0), (null, 1), (null, 2), (pipe, 3)):
            os.dup2(old, new)
        os.closerange(4, 256)
        set_limits(order)
        os.execve(sys.executable, [sys.executable, "-I", "-B", "-c", BOOT], ENVIRONMENT)
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
                for pid, parent, _, _ in list(processes()):
                    if parent == os.getpid():
                        os.kill(pid, signal.SIGKILL)
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
    for pid in os.listdir("/proc"):
        if not pid.isdigit():
            continue
        try:
            with open(f"/proc/{pid}/stat") as file:
                text = file.read()
            fields = text.rpartition(")")[2].split()  # behind the name, which may hold anything
            yield int(pid), int(fields[1]), int(fields[17]), os.stat(f"/proc/{pid}").st_uid
        except (FileNotFoundError, ProcessLookupError):
            pass


def run_limited(order, program, test, entry):
    """(passed, result) of one program; nothing of it is left."""
    # what it reads: the secret and the three texts, in a file without a name
    secret = os.urandom(16)
    text = os.memfd_create("program")
    with open(text, "wb", closefd=False) as file:
        file.write(secret + marshal.dumps((program, test, entry)))
    os.lseek(text, 0, os.SEEK_SET)
    folder = order["folder"]
    if order["mode"] == "full":
        options = b"size=64m,nr_inodes=4096,mode=700,uid=65534,gid=65534"
        call("mount", b"tmpfs", folder.encode(), b"tmpfs", MS_NOSUID | MS_NODEV, options)

    # start it, and wait until it ends, its time is over, or the caller dies
    out, pipe = os.pipe()
    pid = start_program(order, text, pipe)
    os.close(pipe)
    os.close(text)
    handle = os.pidfd_open(pid)
    watch = select.poll()
    watch.register(handle, select.POLLIN)
    watch.register(0, 0)  # the caller's death
    events = dict(watch.poll(order["timeout"] * 1000))
    in_time = handle in events
    status = os.waitpid(pid, 0)[1] if in_time else None

    # end whatever it started, and only then read what it reported
    kill_all(order)
    os.set_blocking(out, False)
    try:
        reported = os.read(out, 1 << 16)
    except BlockingIOError:
        reported = b""
    os.close(out)
    os.close(handle)

    # delete what it wrote
    if order["mode"] == "full":
        call("umount2", folder.encode(), MNT_DETACH)  # with all that is in it
    else:
        paths = [os.path.join(folder, name) for name in os.listdir(folder)]
        subprocess.run(["/bin/rm", "-rf", "--", *paths])

    if not in_time:
        return False, "timed out"
    if status == 0 and reported == secret:
        return True, "passed"
    if reported.startswith(b"failed: "):
        return False, reported[:200].decode(errors="replace")
    ending = os.waitstatus_to_exitcode(status)
    kind = "status" if ending >= 0 else "signal"
    return False, f"failed: it ended before the test did, with {kind} {abs(ending)}"


def enter_process_mode(order, root):
    """What stands for namespaces where there are none."""
    if root:
        for home in homes_of_python():
            closed = closed_ancestor(home)
            if closed:
                raise OSError(f"root's programs run as user nobody, to whom {closed}, on the way "
                              "to Python, is closed")
        os.chown(order["folder"], NOBODY, NOBODY)
    call("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    # the user's processes elsewhere count against the limit as well
    user = NOBODY if root else os.geteuid()
    order["processes"] += sum(threads for _, _, threads, owner in processes() if owner == user)


def warden():
    """Read orders from standard input, one JSON object a line, and answer each with a line.

    The first holds the limits; its answer is that of a program that passes."""
    order = json.loads(sys.stdin.buffer.readline())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    root = os.geteuid() == 0
    order["processes"] = 10
    order["nobody"] = root
    if order["mode"] == "full":
        enter_namespaces(root, order["folder"])
    else:
        enter_process_mode(order, root)
    call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)  # closed to programs of the same user
    answer = run_limited(order, "def f(): pass", "def check(f): f()", "f")
    try:
        # the caller reads every answer before it sends another order
        while os.write(1, json.dumps(answer).encode() + b"\n"):
            line = sys.stdin.buffer.readline()
            if not line:
                break
            answer = run_limited(order, **json.loads(line))
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
