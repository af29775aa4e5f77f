"""The sandbox against hostile programs: each is contained within its limits, nothing changes.

A program prints ESCAPED when it got what it should not get.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from dsv3_jax.posttrain import sandbox
from dsv3_jax.posttrain.sandbox import Limits, run_program

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of Linux")
needs_namespaces = pytest.mark.skipif(
    sys.platform.startswith("linux") and sandbox.best_mode() != "namespaces",
    reason="this user may not make namespaces",
)
LIMITS = Limits(
    wall_seconds=1.5,
    cpu_seconds=1,
    memory_bytes=256 << 20,
    disk_bytes=4 << 20,
    output_bytes=10_000,
    processes=8,
    open_files=32,
)
GRACE = 3.0  # of a machine under load, to end what is over its limit

# Name: (program, how it may end). CANARY, VICTIM, PORT and NAP are filled in.
HOSTILE = {
    "infinite loop": ("while True: pass", "error timeout"),
    "sleeps": ("import time; time.sleep(1e6)", "timeout"),
    "fork bomb": ("import os\nwhile True: os.fork()", "error timeout"),
    "patient fork bomb": (
        "import os, time\nwhile True:\n  try: os.fork()\n  except OSError: time.sleep(0.01)",
        "error timeout",
    ),
    "100 GB at once": ("x = bytearray(100 << 30); print('ESCAPED')", "error"),
    "100 GB by and by": ("x = []\nwhile True: x.append(bytearray(1 << 20))", "error memory"),
    "memory of many processes": (
        "import os, time\nfor _ in range(6): os.fork()\nx = bytearray(b'x' * (100 << 20))\n"
        "time.sleep(60)\nprint('ESCAPED')",
        "error memory",
    ),
    "huge integer": ("print(9 ** 9 ** 9 ** 9)", "error timeout"),
    "regular expression": ("import re; re.match('(a+)+$', 'a' * 60 + 'b')", "error timeout"),
    "deep recursion": (
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(): return [f()]\nf()",
        "error memory",
    ),
    "recursive repr": (
        "x = []\nfor _ in range(10**6): x = [x]\nimport pickle; pickle.dumps(x)",
        "error",
    ),
    "huge pickle": (
        "import pickle; pickle.loads(b'\\x80\\x04B\\xff\\xff\\xff\\x7f' + b'0'); print('ESCAPED')",
        "error",
    ),
    "flood of stdout": ("while True: print('flood' * 1000)", "output"),
    "flood of stderr": ("import os\nwhile True: os.write(2, b'flood' * 1000)", "output"),
    "endless line": ("import os\nwhile True: os.write(1, b'x')", "output"),
    "huge file": (
        "f = open('big', 'wb')\nfor _ in range(100): f.write(bytes(1 << 20)); f.flush()\n"
        "print('ESCAPED')",
        "error",
    ),
    "sparse file": ("open('big', 'wb').truncate(1 << 40); print('ESCAPED')", "error"),
    "open files": ("x = [open('f', 'w') for _ in range(1000)]; print('ESCAPED')", "error"),
    "removes files": ("import os; os.remove('CANARY'); print('ESCAPED')", "error"),
    "removes a tree": (
        "import shutil, os\nshutil.rmtree(os.path.dirname('CANARY'))\nprint('ESCAPED')",
        "error",
    ),
    "removes everything": (
        "import os\nfor base, dirs, files in os.walk('/', topdown=False):\n"
        "  if base.startswith('/proc'): continue\n"
        "  for name in files:\n"
        "    try: os.remove(os.path.join(base, name))\n"
        "    except OSError: pass",
        "ok error timeout",
    ),
    "writes elsewhere": (
        "import os\nopen('CANARY', 'w').write('changed')\nprint('ESCAPED')",
        "error",
    ),
    "symbolic link out": (
        "import os\nos.symlink('CANARY', 'link')\nopen('link', 'a').write('changed')\n"
        "print('ESCAPED')",
        "error",
    ),
    "hard link out": ("import os; os.link('CANARY', 'link'); print('ESCAPED')", "error"),
    "leaves its directory": (
        "import os\nos.chdir(os.path.dirname('CANARY'))\nopen('new', 'w')\nprint('ESCAPED')",
        "error",
    ),
    "changes its interpreter": (
        "import os\nopen(os.__file__, 'a').write('#')\nprint('ESCAPED')",
        "error",
    ),
    "connects": (
        "import socket; socket.create_connection(('127.0.0.1', PORT)); print('ESCAPED')",
        "error",
    ),
    "asks for a name": ("import socket; socket.gethostbyname('example.org')", "error timeout"),
    "sends a datagram": (
        "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "s.sendto(b'x', ('192.0.2.1', 53))\nprint('ESCAPED')",
        "error",
    ),
    "kills a process": ("import os; os.kill(VICTIM, 9); print('ESCAPED')", "error"),
    "kills all": ("import os; os.kill(-1, 9); import time; time.sleep(60)", "error timeout"),
    "kills its parents": (
        "import os, time\nfor pid in (os.getppid(), 1):\n"
        "  try: os.kill(pid, 9)\n  except OSError: pass\ntime.sleep(60)",
        "error timeout",
    ),
    "ignores signals": (
        "import signal\nfor n in range(1, 65):\n"
        "  try: signal.signal(n, signal.SIG_IGN)\n  except (OSError, ValueError): pass\n"
        "while True: pass",
        "error timeout",
    ),
    "stops itself": ("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)", "error timeout"),
    "threads": (
        "import threading, time\n"
        "for _ in range(1000): threading.Thread(target=time.sleep, args=(60,)).start()\n"
        "print('ESCAPED')",
        "error timeout",
    ),
    "shell": (
        "import subprocess\n"
        "done = subprocess.run('rm -rf CANARY; sleep NAP', shell=True)\nprint('ESCAPED')",
        "error timeout",
    ),
    "daemon": (
        "import os\nif os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0:\n"
        "    for n in (0, 1, 2): os.close(n)\n    os.execv('/bin/sleep', ['sleep', 'NAP'])\n"
        "  os._exit(0)",
        "ok error",
    ),
    "background that keeps stdout": (
        "import os\nif os.fork() == 0:\n  os.setsid()\n  os.execv('/bin/sleep', ['sleep', 'NAP'])",
        "ok error",
    ),
    "closes its streams": (
        "import os, time\nfor n in range(64):\n  try: os.close(n)\n  except OSError: pass\n"
        "time.sleep(60)",
        "timeout",
    ),
    "reads the environment": (
        "import os\nassert not os.environ.get('SECRET_OF_THE_TESTS')\n"
        "print('ESCAPED' if 'secret of the tests' in str(os.environ) else '')",
        "ok",
    ),
    "reads another's environment": (
        "text = open('/proc/VICTIM/environ').read()\n"
        "print('ESCAPED' if 'secret of the tests' in text else '')",
        "ok error",
    ),
    "raises its limits": (
        "import resource\n"
        "resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)\n"
        "print('ESCAPED')",
        "error",
    ),
    "becomes root": ("import os; os.setuid(0); print('ESCAPED')", "error"),
    "mounts": (
        "import ctypes\nlibc = ctypes.CDLL(None)\n"
        "if libc.mount(b'tmpfs', b'/tmp', b'tmpfs', 0, None) == 0: print('ESCAPED')\n"
        "if libc.mount(None, b'/', None, 32, None) == 0: print('ESCAPED')\n"
        "if libc.unshare(0x10000000) == 0: print('ESCAPED')\n"
        "if libc.chroot(b'/tmp') == 0: print('ESCAPED')",
        "ok error",
    ),
    "traces": (
        "import ctypes\nlibc = ctypes.CDLL(None)\n"
        "if libc.ptrace(16, 1, 0, 0) == 0 or libc.ptrace(16, VICTIM, 0, 0) == 0:\n"
        "  print('ESCAPED')",
        "ok error",
    ),
    "memory of nobody": (
        "import ctypes\nlibc = ctypes.CDLL(None)\n"
        "if libc.shmget(0, 1 << 20, 0o1600) >= 0: print('ESCAPED')\n"
        "if libc.memfd_create(b'x', 0) >= 0: print('ESCAPED')\n"
        "if libc.msgget(0, 0o1600) >= 0: print('ESCAPED')",
        "ok error",
    ),
    "raw system calls": (
        "import ctypes\nlibc = ctypes.CDLL(None)\n"
        "for number in (101, 272, 165, 0x40000000 | 39):  # of x86_64\n"
        "  if libc.syscall(number, 0, 0, 0, 0) >= 0: print('ESCAPED')",
        "ok error",
    ),
    "crashes": ("import ctypes; ctypes.string_at(0)", "error"),
    "pretends": ("import os; os._exit(137)", "error"),
}
# What is over at once, and what 'process' cannot count or tell apart is left out.
QUICK_IN_PROCESS = [
    *("100 GB at once", "huge pickle", "flood of stdout", "huge file", "sparse file"),
    *("open files", "removes files", "removes a tree", "writes elsewhere", "symbolic link out"),
    *("hard link out", "leaves its directory", "changes its interpreter", "connects"),
    *("sends a datagram", "kills a process", "kills all", "threads", "shell", "daemon"),
    *("background that keeps stdout", "reads the environment", "raises its limits"),
    *("fork bomb", "mounts", "traces", "infinite loop", "closes its streams"),
    *("memory of nobody", "raw system calls"),
]


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """What hostile programs aim at: a file, a process with a secret, a port."""
    folder = tmp_path_factory.mktemp("outside")
    canary = folder / "tree" / "canary"
    canary.parent.mkdir()
    canary.write_text("alive")
    secret = {"SECRET_OF_THE_TESTS": "secret of the tests"}
    victim = subprocess.Popen(["sleep", "1000"], env={**os.environ, **secret})
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.MonkeyPatch.context() as patch:
        server.setblocking(False)
        patch.setenv(*secret.popitem())
        patch.setattr(tempfile, "tempdir", str(folder))
        os.chmod(folder, 0o711)
        yield canary, victim, server
    victim.kill()
    victim.wait()


def assert_contained(name, outside, mode):
    canary, victim, server = outside
    nap = f"98765.{os.getpid()}"
    program, allowed = HOSTILE[name]
    before = Path(os.__file__).stat()
    for word, value in {
        "CANARY": canary,
        "VICTIM": victim.pid,
        "PORT": server.getsockname()[1],
        "NAP": nap,
    }.items():
        program = program.replace(word, str(value))
    begin = time.monotonic()
    result = run_program(program, LIMITS, mode=mode)
    assert time.monotonic() - begin < LIMITS.wall_seconds + GRACE
    assert "ESCAPED" not in result.stdout, result
    allowed = allowed.split()
    if "error" in allowed:
        allowed.append("timeout")  # of a machine under load
    assert result.status in allowed, result
    assert len(result.stdout) + len(result.stderr) <= LIMITS.output_bytes
    assert canary.read_text() == "alive" and sorted(canary.parent.iterdir()) == [canary]
    assert victim.poll() is None
    with pytest.raises(BlockingIOError):
        server.accept()
    after = Path(os.__file__).stat()
    assert (after.st_size, after.st_mtime) == (before.st_size, before.st_mtime)
    assert os.listdir(canary.parents[1]) == ["tree"], "the sandbox's directory is left"
    end = time.monotonic() + GRACE  # the kernel ends the last ones after their parent
    while left := processes_with(nap, str(canary.parents[1])):
        assert time.monotonic() < end, left
        time.sleep(0.01)


def processes_with(*words):
    """Command lines that hold one of the words."""
    lines = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                lines.append((folder / "cmdline").read_text())
            except OSError:
                pass  # it has ended
    return [line for line in lines if any(word in line for word in words)]


@needs_namespaces
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs_are_contained(name, outside):
    assert_contained(name, outside, "namespaces")


@pytest.mark.parametrize("name", QUICK_IN_PROCESS)
def test_hostile_programs_without_namespaces(name, outside):
    assert_contained(name, outside, "process")


@pytest.mark.parametrize("name", ["connects", "shell", "kills a process", "fork bomb"])
def test_the_kernel_refuses_what_the_interpreter_let_pass(name, outside, monkeypatch, tmp_path):
    """Mode 'process' with its guard taken away: what the filter of system calls alone holds."""
    text = sandbox._CHILD.read_text()
    guarded = 'if settings["mode"] == "process":'
    assert text.count(guarded) == 1
    child = tmp_path / "child.py"
    child.write_text(text.replace(guarded, "if False:"))
    monkeypatch.setattr(sandbox, "_CHILD", child)
    assert_contained(name, outside, "process")


@pytest.mark.parametrize("mode", [pytest.param("namespaces", marks=needs_namespaces), "process"])
def test_a_peaceful_program(mode):
    code = (
        "import sys, math, json, dataclasses, pickle\n"
        "@dataclasses.dataclass\nclass Point:\n    x: int\n"
        "print(sum(map(int, sys.stdin)), __name__, pickle.loads(pickle.dumps(Point(3))))\n"
        "with open('note', 'w') as file:\n    file.write('kept')\n"
        "print(open('note').read(), file=sys.stderr)\n"
        "sys.exit(3)\n"
    )
    result = run_program(code, stdin="1\n2\n", mode=mode)
    assert (result.status, result.exit_code) == ("error", 3), result
    assert result.stdout == "3 __main__ Point(x=3)\n" and result.stderr == "kept\n"


@needs_namespaces
def test_processes_and_threads_within_the_limit_work():
    code = (
        "import subprocess, sys, threading\n"
        "t = threading.Thread(target=print, args=('thread',)); t.start(); t.join()\n"
        "print(subprocess.run([sys.executable, '-c', 'print(1)'], capture_output=True).stdout)\n"
        "print(subprocess.run('echo $((1+1))', shell=True, capture_output=True).stdout)"
    )
    result = run_program(code)
    assert result.stdout == "thread\nb'1\\n'\nb'2\\n'\n", result


def test_signals_are_told_as_shells_do():
    result = run_program("import os; os.kill(os.getpid(), 15)")
    assert (result.status, result.exit_code) == ("error", 128 + signal.SIGTERM)


def test_a_sandbox_that_cannot_be_made_is_no_verdict(monkeypatch, tmp_path):
    broken = tmp_path / "child.py"
    broken.write_text("raise OSError('no namespaces here')")
    monkeypatch.setattr(sandbox, "_CHILD", broken)
    with pytest.raises(sandbox.SandboxError, match="no namespaces here"):
        run_program("print(1)", mode="namespaces")
