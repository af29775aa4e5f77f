"""Equality of mathematical answers through the math-verify library, in a process of its own.

A computer algebra system that reads what a model writes may compute for ever, inside of C code
that no thread can interrupt: `9^{9^{9^9}}` is enough. So it runs in a worker that is ended when it
takes too long, and that has a limit of memory.
"""

import functools
import importlib.util
import json
import selectors
import subprocess
import sys
import threading

_START_SECONDS = 60.0  # to import the library on a machine under load
_MEMORY_BYTES = 2 << 30


@functools.cache
def is_installed() -> bool:
    """Whether the library can be had: pip install 'dsv3-jax[eval]'."""
    return importlib.util.find_spec("math_verify") is not None


class MathVerifier:
    """A worker, started when it is first needed. For many threads; they take turns."""

    def __init__(self, seconds: float = 5.0):
        """`seconds`: of one comparison."""
        self._seconds, self._lock = seconds, threading.Lock()
        self._process: subprocess.Popen | None = None

    def equal(self, answer: str, reference: str) -> bool:
        """Whether two answers, LaTeX or plain, mean the same.

        Raises:
          TimeoutError: not known in time; the worker is ended.
          RuntimeError: the worker failed.
        """
        with self._lock:
            if self._process is None:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", __file__],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                )
                self._line(_START_SECONDS)
            request = json.dumps([answer, reference]) + "\n"
            try:
                self._process.stdin.write(request.encode())
                self._process.stdin.flush()
            except BrokenPipeError:
                self._end()
                raise RuntimeError("the worker of math-verify has ended") from None
            return json.loads(self._line(self._seconds))

    def close(self) -> None:
        with self._lock:
            self._end()

    def _line(self, seconds: float) -> bytes:
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            ready = selector.select(seconds)
        line = self._process.stdout.readline() if ready else b""
        if not line:
            self._end()
            if ready:
                raise RuntimeError("the worker of math-verify has ended")
            raise TimeoutError(f"math-verify took more than {seconds:g} seconds")
        return line

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process.stdin.close()
            self._process.stdout.close()
            self._process = None

    def __del__(self):
        if self._process is not None:
            self._process.kill()


def main() -> None:
    """The worker: reads [answer, reference] a line, writes true or false."""
    import logging
    import resource

    from math_verify import parse, verify

    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    logging.disable()

    def read(text: str):
        marked = text if "\\boxed" in text or "$" in text else f"${text}$"
        return parse(marked, parsing_timeout=None)

    print("ready", flush=True)
    for line in sys.stdin:
        answer, reference = json.loads(line)
        # The reference goes first: the library's comparison is not symmetric.
        same = verify(read(reference), read(answer), timeout_seconds=None)
        print(json.dumps(bool(same)), flush=True)


if __name__ == "__main__":
    main()
