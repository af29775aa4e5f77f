"""The inside of `sandbox.py`: a bare interpreter runs this file, which shuts itself in.

Standard library only: `python -I -S` has nothing else. Writes one byte to the descriptor `ready`
and closes it when all is set up, then becomes the program.
"""

import ctypes
import json
import os
import resource
import signal
import sys
import types

_NEWNS, _NEWUTS, _NEWIPC = 0x00020000, 0x04000000, 0x08000000
_NEWUSER, _NEWPID, _NEWNET = 0x10000000, 0x20000000, 0x40000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV = 0x1, 0x2, 0x4
_MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 0x20, 0x1000, 0x4000, 0x40000
_MNT_DETACH = 2
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_SECCOMP_MODE_FILTER, _ERRNO_EPERM, _ALLOW = 2, 0x00050001, 0x7FFF0000
_LOAD, _JUMP_IF_EQUAL, _JUMP_FROM, _RETURN = 0x20, 0x15, 0x35, 0x06  # instructions of the filter
_NOBODY = 65534

# Numbers of system calls, of x86_64 and aarch64.
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_PIVOT_ROOT = (155, 41)
# Memory that belongs to no process and so to no limit; looking into others; parts of the kernel
# that programs have no use for and attackers have.
_REFUSED_CALLS = {
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_by_handle_at": (304, 265),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "syslog": (103, 116),
}
# Without namespaces also the network, new processes, and signals to others.
_REFUSED_IN_PROCESS = {
    "socket": (41, 198),
    "execve": (59, 221),
    "execveat": (322, 281),
    "fork": (57, 220),
    "vfork": (58, 220),
    "clone": (56, 220),
    "clone3": (435, 435),
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "pidfd_send_signal": (424, 424),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
}

# What a program may read, beside the interpreter's own folder.
_READABLE = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/lib32", "/etc/ld.so.cache")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")


def main() -> None:
    settings = json.loads(sys.argv[1])
    sys.argv[1:] = []
    with open(settings["program"], encoding="utf-8", errors="surrogatepass") as file:
        code = file.read()
    if settings["mode"] == "namespaces":
        _enter_namespaces(settings)  # goes on in a process inside
        _limit(settings, settings["processes"])
        _refuse_calls(_REFUSED_CALLS)
    else:
        _become_nobody(settings["work"])
        os.chdir(settings["work"])
        _limit(settings, 0)
        if sys.platform.startswith("linux"):
            _refuse_calls({**_REFUSED_CALLS, **_REFUSED_IN_PROCESS})
    os.umask(0o077)
    os.write(settings["ready"], b"1")
    os.close(settings["ready"])
    program = types.ModuleType("__main__")
    sys.modules["__main__"] = program
    if settings["mode"] == "process":
        sys.addaudithook(_guard(os.path.realpath(settings["work"])))
    exec(compile(code, "<program>", "exec"), program.__dict__)


def _limit(settings: dict, processes: int) -> None:
    """Limits that the kernel keeps and that a program cannot raise."""
    memory, cpu = settings["memory_bytes"], settings["cpu_seconds"]
    limits = {
        "RLIMIT_CPU": (cpu, cpu + 1),  # SIGXCPU, and a second later SIGKILL
        "RLIMIT_FSIZE": (settings["disk_bytes"],) * 2,
        "RLIMIT_NOFILE": (settings["open_files"],) * 2,
        "RLIMIT_NPROC": (processes,) * 2,
        "RLIMIT_CORE": (0, 0),
        "RLIMIT_MSGQUEUE": (0, 0),
        "RLIMIT_AS": (memory, memory),
    }
    for name, values in limits.items():
        number = getattr(resource, name, None)
        if number is None:
            continue  # not on this system
        hard = resource.getrlimit(number)[1]
        if hard != resource.RLIM_INFINITY:
            values = tuple(min(value, hard) for value in values)
        try:
            resource.setrlimit(number, values)
        except (OSError, ValueError):
            if sys.platform.startswith("linux"):
                raise  # macOS refuses a limit of the address space


def _enter_namespaces(settings: dict) -> None:
    """Returns in the process that is to be the program; those around it wait for its end.

    Three processes: this one, in the host's process table; process 1 of the new one, with whose
    end the kernel ends all others; the program, a user of a further namespace that has no rights
    over the mounts of the first.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    root = os.geteuid() == 0
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # of all processes, let a lack of memory end these
    _call(libc.prctl, _PR_SET_PDEATHSIG, signal.SIGKILL)
    user, group = os.geteuid(), os.getegid()
    _call(libc.unshare, _NEWNS | _NEWUTS | _NEWIPC | _NEWPID | _NEWNET | (0 if root else _NEWUSER))
    if not root:
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{user} {user} 1"),
            ("gid_map", f"{group} {group} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    first = os.fork()
    if first:
        _wait_for(first, settings["ready"])
    _call(libc.prctl, _PR_SET_PDEATHSIG, signal.SIGKILL)
    processes = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
    _make_root(libc, settings)
    inner = os.fork()
    if inner:
        os.close(processes)
        _wait_for(inner, settings["ready"])
    if root:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    # Processes are counted by user and namespace, so this one's limit is about its own alone.
    _call(libc.unshare, _NEWUSER)
    try:
        number = os.open("sys/user/max_user_namespaces", os.O_WRONLY, dir_fd=processes)
        os.write(number, b"0")  # rights in yet another namespace would give it mounts of its own
        os.close(number)
    except OSError:
        pass  # /proc/sys is read-only in some containers; rights there reach nothing of the host
    os.close(processes)
    _drop_capabilities(libc)


def _make_root(libc, settings: dict) -> None:
    """Makes a small file system the root: what may be read, a few devices, and /tmp in memory."""
    root = settings["work"]
    _mount(libc, None, "/", None, _MS_REC | _MS_PRIVATE)
    _mount(libc, "tmpfs", root, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=755")
    readable = [*_READABLE, os.path.realpath(sys.base_prefix)]
    for path in (*readable, *_DEVICES):
        inside = root + path
        if os.path.exists(inside) or not os.path.exists(path):
            continue
        os.makedirs(os.path.dirname(inside), exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), inside)
            continue
        if os.path.isdir(path):
            os.mkdir(inside)
        else:
            os.close(os.open(inside, os.O_CREAT | os.O_WRONLY, 0o644))
        _mount(libc, path, inside, None, _MS_BIND | _MS_REC)
        if path not in _DEVICES:
            flags = _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV
            _mount(libc, None, inside, None, flags)
    os.mkdir(f"{root}/tmp")
    options = f"size={settings['disk_bytes']},nr_inodes=4096,mode=1777"
    _mount(libc, "tmpfs", f"{root}/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, options)
    os.mkdir(f"{root}/old")
    column, _ = _MACHINES[os.uname().machine]
    _call(libc.syscall, _PIVOT_ROOT[column], root.encode(), f"{root}/old".encode())
    os.chdir("/")
    _call(libc.umount2, b"/old", _MNT_DETACH)
    os.rmdir("/old")
    _mount(libc, None, "/", None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV)
    os.chdir("/tmp")


def _drop_capabilities(libc) -> None:
    """Gives up every right; the header asks for version 3, whose sets have two words of 32 bits."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    _call(libc.capset, header, (ctypes.c_uint32 * 6)())


def _refuse_calls(calls: dict) -> None:
    """From here on these system calls, and all of another architecture, fail with EPERM.

    The filter (seccomp) also holds for every process that this one starts.
    """

    class Instruction(ctypes.Structure):
        _fields_ = [
            ("code", ctypes.c_uint16),
            ("if_true", ctypes.c_uint8),  # instructions to skip
            ("if_false", ctypes.c_uint8),
            ("value", ctypes.c_uint32),
        ]

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_uint16), ("start", ctypes.POINTER(Instruction))]

    column, architecture = _MACHINES[os.uname().machine]
    refuse = (_RETURN, 0, 0, _ERRNO_EPERM)
    steps = [(_LOAD, 0, 0, 4), (_JUMP_IF_EQUAL, 1, 0, architecture), refuse, (_LOAD, 0, 0, 0)]
    steps += [(_JUMP_FROM, 0, 1, 0x40000000), refuse]  # x86_64's second set of numbers
    for numbers in calls.values():
        steps += [(_JUMP_IF_EQUAL, 0, 1, numbers[column]), refuse]
    steps.append((_RETURN, 0, 0, _ALLOW))
    instructions = (Instruction * len(steps))(*steps)
    program = Program(len(steps), instructions)
    libc = ctypes.CDLL(None, use_errno=True)
    _call(libc.prctl, _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _call(libc.prctl, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0)


def _wait_for(pid: int, ready: int) -> None:
    """Ends this process as `pid` ends, taking in what is orphaned meanwhile."""
    os.close(ready)
    for number in (0, 1, 2):
        os.close(number)  # so that the streams end with the program
    while True:
        ended, status = os.wait()
        if ended == pid:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)


def _call(function, *arguments) -> None:
    if function(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{function.__name__}: {os.strerror(number)}")


def _mount(libc, source, target, kind, flags, options="") -> None:
    def text(value):
        return value.encode() if value else None

    _call(libc.mount, text(source), text(target), text(kind), ctypes.c_ulong(flags), text(options))


def _become_nobody(work: str) -> None:
    """Gives up root, unless the standard library would then be out of reach."""
    if os.geteuid() != 0:
        return
    folder = os.path.dirname(os.path.realpath(os.__file__))
    while os.stat(folder).st_mode & 0o001:
        if folder == "/":
            os.chown(work, _NOBODY, _NOBODY)
            os.setgroups([])
            os.setresgid(_NOBODY, _NOBODY, _NOBODY)
            os.setresuid(_NOBODY, _NOBODY, _NOBODY)
            return
        folder = os.path.dirname(folder)


def _guard(work: str):
    """An audit hook that refuses what leaves the program's directory or its process."""
    import _posixsubprocess  # the one way to a process that tells no hook

    refused = ("socket.", "ctypes.", "subprocess.", "os.exec", "os.fork", "os.posix_spawn")
    refused += ("os.spawn", "os.system", "_thread.", "pty.", "signal.", "resource.", "sqlite3.")
    changing = {"os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chmod", "os.chown"}
    changing |= {"os.link", "os.symlink", "os.truncate", "os.utime", "os.setxattr", "os.chflags"}
    changing |= {"os.removexattr", "shutil.rmtree", "shutil.move"}
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def refuse(*_):
        raise PermissionError("starting a process is not allowed here")

    _posixsubprocess.fork_exec = refuse

    def outside(path) -> bool:
        path = os.path.realpath(os.fsdecode(path))
        return path != work and not path.startswith(work + os.sep)

    def hook(event: str, arguments: tuple) -> None:
        if event.startswith(refused):
            raise PermissionError(f"{event} is not allowed here")
        if event in ("os.kill", "os.killpg") and arguments[0] != os.getpid():
            raise PermissionError(f"{event} of another process is not allowed here")
        if event in changing or (event == "open" and arguments[2] & writing):
            paths = arguments[:1] if event == "open" else arguments
            paths = [path for path in paths if isinstance(path, str | bytes | os.PathLike)]
            if any(map(outside, paths)):
                raise PermissionError(f"{event} outside of the program's directory is not allowed")

    return hook


if __name__ == "__main__":
    main()
