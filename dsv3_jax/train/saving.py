"""Checkpoints of a run whose disk may be full, read-only or away: saved again, then by choice.

A save fails in the background, while steps go on, so what is tried again is the state of the next
step boundary and not the old one: nothing has to be kept for it.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dsv3_jax.checkpoint.manager import CheckpointManager
from dsv3_jax.errors import UserError

PAUSES = (1.0, 4.0, 10.0)  # seconds before each further try; together less than a grace period


class Saver:
    """Saves through a `CheckpointManager`, with further tries after a failure.

    With several processes one may fail alone, so they agree at the interval's saves, which are the
    further tries too. A single process tries again when the pause is over.

    Attributes:
      failures: saves of this process's run that failed, further tries included.
    """

    def __init__(self, manager: CheckpointManager, on_error: str, say: Callable[[str], None]):
        """`on_error`: 'stop' raises after the last try, 'continue' waits for the next interval."""
        self._manager, self._stops, self._say = manager, on_error == "stop", say
        self._tries, self._again_at = 0, None
        self._single = jax.process_count() == 1
        self.failures = 0

    def failed(self) -> dict[str, int]:
        """For a step's record: `failures`, where there were any."""
        return {"save_failures": self.failures} if self.failures else {}

    def due(self, at_interval: bool) -> bool:
        """Whether to save before the next step.

        Raises:
          UserError: no try of a save succeeded, and the run shall stop.
        """
        if self._single and not self._manager.saving:
            self._collect()
        again = self._again_at is not None and time.monotonic() >= self._again_at
        return at_interval or (self._single and again)

    def save(self, step: int, state: Any, extra: dict[str, Any]) -> None:
        """Starts a save as `CheckpointManager.save`; raises as `due`."""
        self._collect()
        self._again_at = None
        try:
            self._manager.save(step, state, extra)
        except UserError as error:
            if not self._single:
                raise  # the others wait for this process, and end when it does
            self._failed(error)

    def finish(self, step: int, state: Any, extra: dict[str, Any]) -> None:
        """Saves and returns when the checkpoint is complete.

        Raises:
          UserError: no try succeeded, whatever `on_error`: this is the last chance.
        """
        for pause in (*PAUSES, None):
            try:
                self._manager.save(step, state, extra, wait=True)
                return
            except UserError as error:
                self.failures += 1
                if pause is None or not self._single:
                    raise
                self._say(f"{error}; trying again in {pause:g} s")
                time.sleep(pause)

    def _collect(self) -> None:
        """Waits for the save under way and takes its error."""
        error = None
        try:
            self._manager.wait()
        except UserError as own:
            error = own
        if not self._single:
            failed = multihost_utils.process_allgather(np.int32(error is not None))
            if failed.any() and error is None:
                error = UserError(
                    f"process {int(np.argmax(failed))} could not save its part of a checkpoint; "
                    f"see its output"
                )
        if error is not None:
            self._failed(error)
        elif self._again_at is None:
            self._tries = 0

    def _failed(self, error: UserError) -> None:
        self.failures += 1
        if self._tries < len(PAUSES):
            pause = PAUSES[self._tries]
            self._tries += 1
            self._again_at = time.monotonic() + pause
            when = f"in {pause:g} s" if self._single else "at the next interval"
            self._say(f"{error}; trying again {when}")
        elif self._stops:
            raise error
        else:
            self._tries, self._again_at = 0, None
            self._say(f"{error}; training goes on without, as checkpoint.on_save_error says")
