"""How a person reaches a running job: stop it with a signal, profile it by touching a file."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

PROFILED_STEPS = 3


class Stop:
    """Whether to stop, asked before every step."""

    def __init__(self):
        self.asked = threading.Event()  # of this process

    def before(self, step: int) -> bool:
        """All processes get the same answer: where one was asked to stop, all do at one step."""
        if jax.process_count() == 1:
            return self.asked.is_set()
        return multihost_utils.reached_preemption_sync_point(step)


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Lets SIGINT or SIGTERM stop the run; a second SIGINT interrupts at once.

    Python delivers signals to the main thread only; from elsewhere nothing stops the run. Of
    several processes JAX itself watches SIGTERM, to tell the others.
    """
    stop = Stop()

    def handler(number, frame):
        if stop.asked.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.asked.set()
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    ours = (signal.SIGINT,) if jax.process_count() > 1 else (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, handler) for number in ours}
    try:
        yield stop
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


class Profiler:
    """`touch WORKDIR/PROFILE` traces the next three steps into WORKDIR/profile."""

    def __init__(self, workdir: Path):
        self._request, self._output = workdir / "PROFILE", workdir / "profile"
        self._steps_left = 0

    def before_step(self) -> None:
        if not self._steps_left and self._request.exists():
            self._request.unlink(missing_ok=True)
            # Python's own calls, of a compilation above all, would bury the device's events.
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0
            jax.profiler.start_trace(str(self._output), profiler_options=options)
            self._steps_left = PROFILED_STEPS

    def after_step(self, results: Any) -> None:
        """`results` are arrays of the step: the trace ends when the last step has ended."""
        if self._steps_left:
            self._steps_left -= 1
            if not self._steps_left:
                jax.block_until_ready(results)
                jax.profiler.stop_trace()

    def close(self) -> None:
        if self._steps_left:
            jax.profiler.stop_trace()
