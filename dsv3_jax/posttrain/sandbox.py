"""Runs Python programs that nobody trusts, within limits (spec §10.2: code judged by its tests).

On Linux, where the kernel lets this user make namespaces, a program runs as a user without rights
in a file system of its own: the interpreter and /usr to read, a /tmp in memory to write that
vanishes afterwards, no /proc, no /home, no network, no processes but its own. Elsewhere (mode
'process') its own interpreter refuses sockets, processes, threads and writing outside its
directory; on Linux the kernel refuses the first three as well. In both modes limits of the kernel
hold, system calls that make memory without an owner or look into other processes fail, and the
program sees no environment variable, no site-packages and no file descriptor but 0, 1 and 2.

What it does not stop:

- Bugs of the kernel, which is the host's. Where programs come from people who mean harm and not
  from a model, run the whole job in a virtual machine.
- In mode 'process': reading files that this user may read, filling the disk with many files, and
  writing files by a program that attacks its own interpreter, which is the only guard of them
  there. It is meant for a laptop.
- Reading what is readable below /usr and the interpreter's folder.
- Use of the processor: `cpu_seconds` counts for each process, so up to `processes` of them may
  compute until `wall_seconds`.
- `memory_bytes` over all processes is looked at 20 times a second, so several of them together may
  pass it for a moment; each alone is held to it by the kernel. What is in /tmp comes on top, up to
  `disk_bytes`, and so do buffers of pipes and sockets, up to some 100 MB.
- A program that lies about itself. Its exit code and output are what it says; see `passes_tests`.
"""

import functools
import json
import os
import random
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

_CHILD = Path(__file__).with_name("sandbox_child.py")
_SETUP_SECONDS = 60.0  # for an interpreter to start on a machine under load
_LOOK_SECONDS = 0.05  # between looks at the memory of all processes
_CHUNK = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of one program."""

    wall_seconds: float = 10.0
    cpu_seconds: int = 10  # of each process
    memory_bytes: int = 1 << 30  # address space of each process, and resident in all of them
    disk_bytes: int = 64 << 20  # of a file; in namespaces of all files together
    output_bytes: int = 1 << 20  # stdout and stderr together
    processes: int = 16  # with threads; in mode 'process' one, without threads
    open_files: int = 64


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a program ended.

    Attributes:
      status: 'ok' (exit code 0), 'error' (another), 'timeout', 'output' (too much), 'memory' (all
        processes together).
      exit_code: 128 + n after signal n, as shells say it.
      stdout, stderr: what arrived up to the end, at most `output_bytes`.
    """

    status: str
    exit_code: int
    stdout: str
    stderr: str
    seconds: float


class SandboxError(RuntimeError):
    """The sandbox itself could not be set up: nothing is known of the program."""


def run_program(
    code: str,
    limits: Limits = Limits(),  # noqa: B008 (frozen)
    *,
    stdin: str = "",
    mode: str | None = None,
) -> Result:
    """Runs a program as `__main__` and waits for its end, at most `wall_seconds` and a little.

    Args:
      mode: 'namespaces' or 'process'; None: the first where it can be had.

    Raises:
      SandboxError: it could not be started.
    """
    mode = mode or best_mode()
    with tempfile.TemporaryDirectory(prefix="sandbox-") as folder:
        os.chmod(folder, 0o711)  # a program that root starts runs as somebody else
        paths = {name: os.path.join(folder, name) for name in ("program", "input", "work")}
        Path(paths["program"]).write_text(code, encoding="utf-8", errors="surrogatepass")
        Path(paths["input"]).write_text(stdin, encoding="utf-8", errors="surrogatepass")
        os.mkdir(paths["work"])
        ready, tell = os.pipe()
        settings = {**asdict(limits), **paths, "mode": mode, "ready": tell}
        with open(paths["input"], "rb") as given:
            process = subprocess.Popen(
                [_interpreter(), "-I", "-S", "-B", str(_CHILD), json.dumps(settings)],
                stdin=given,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=folder,
                env={},
                pass_fds=(tell,),
                start_new_session=True,
            )
        os.close(tell)
        try:
            return _watch(process, ready, limits)
        finally:
            os.close(ready)
            _kill(process)
            process.stdout.close()
            process.stderr.close()


def passes_tests(
    program: str,
    tests: str,
    limits: Limits = Limits(),  # noqa: B008 (frozen)
) -> bool:
    """Whether a program, and then tests that assert, run to their end.

    The proof is a random number printed last, so that `sys.exit(0)` proves nothing. A program that
    searches its interpreter for that number can still lie.

    Raises:
      SandboxError: as for `run_program`.
    """
    proof = f"passed {random.SystemRandom().getrandbits(128):x}"
    result = run_program(f"{program}\n{tests}\nprint({proof!r})\n", limits)
    return result.status == "ok" and result.stdout.endswith(f"{proof}\n")


@functools.cache
def best_mode() -> str:
    """'namespaces' where a trial works, else 'process'."""
    if not sys.platform.startswith("linux"):
        return "process"
    try:
        trial = run_program("print(6 * 7)", mode="namespaces")
    except SandboxError:
        return "process"
    return "namespaces" if trial.stdout == "42\n" else "process"


def _interpreter() -> str:
    """The interpreter below a virtual environment, so that its packages are not in reach."""
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


def _watch(process: subprocess.Popen, ready: int, limits: Limits) -> Result:
    _until_started(process, ready)
    begin = time.monotonic()
    deadline, look = begin + limits.wall_seconds, begin
    parts: dict[str, list[bytes]] = {"stdout": [], "stderr": []}
    room, broken = limits.output_bytes, None
    with selectors.DefaultSelector() as selector:
        for name in parts:
            selector.register(getattr(process, name), selectors.EVENT_READ, name)
        # The end of both streams is the end of every process that has them; one that closes them
        # early is waited for in the same loop.
        while broken is None and (selector.get_map() or process.poll() is None):
            now = time.monotonic()
            if now >= deadline:
                broken = "timeout"
                break
            if now >= look:
                look = now + _LOOK_SECONDS
                if _resident_bytes(process.pid) > limits.memory_bytes:
                    broken = "memory"
                    break
            for key, _ in selector.select(min(_LOOK_SECONDS, deadline - now)):
                data = os.read(key.fd, _CHUNK)
                if not data:
                    selector.unregister(key.fileobj)
                parts[key.data].append(data[:room])
                if len(data) > room:
                    broken = "output"
                room -= min(room, len(data))
    seconds = time.monotonic() - begin
    if broken:
        _kill(process)
    code = process.wait()
    code = code if code >= 0 else 128 - code
    texts = {name: b"".join(data).decode("utf-8", "replace") for name, data in parts.items()}
    status = broken or ("ok" if code == 0 else "error")
    return Result(status=status, exit_code=code, seconds=seconds, **texts)


def _until_started(process: subprocess.Popen, ready: int) -> None:
    """Waits for the byte that is written just before the program begins."""
    with selectors.DefaultSelector() as selector:
        selector.register(ready, selectors.EVENT_READ)
        started = selector.select(_SETUP_SECONDS) and os.read(ready, 1)
    if not started:
        _kill(process)
        lines = process.stderr.read(_CHUNK).decode("utf-8", "replace").strip().splitlines()
        raise SandboxError(f"no sandbox could be made: {lines[-1] if lines else 'no answer'}")


def _kill(process: subprocess.Popen) -> None:
    """Ends the session of the sandbox; in namespaces the kernel then ends all that is inside."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass  # all of it has ended
    process.wait()


def _resident_bytes(pid: int) -> int:
    """Memory of a process and all below it; 0 where the system does not tell."""
    total, waiting = 0, [pid]
    while waiting:
        folder = f"/proc/{waiting.pop()}"
        try:
            with open(f"{folder}/statm") as file:
                total += int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            for thread in os.listdir(f"{folder}/task"):
                with open(f"{folder}/task/{thread}/children") as file:
                    waiting += file.read().split()
        except OSError:
            pass  # it has ended
    return total
