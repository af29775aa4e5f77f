"""Checkpoints of a run whose disk may be full, read-only or away: saved again, then by choice.

A save fails in the background, while steps go on, so what is tried again is the state of the next
step boundary and not the old one: nothing has to be kept for it.

A kill costs the steps since the last complete checkpoint. A save that starts every I steps and must
be complete before the next one starts leaves up to 2 I of them; `checkpoint.max_lost_steps` = I + D
gives a save D steps' time, after which training waits for it. D = 0 waits for every save.
"""

import time
from collections.abc import Callable
from typing import Any

import jax

from dsv3_jax.checkpoint.manager import CheckpointManager
from dsv3_jax.config import CheckpointConfig
from dsv3_jax.errors import UserError

PAUSES = (1.0, 4.0, 10.0)  # seconds before each further try; together less than a grace period


class Saver:
    """Saves through a `CheckpointManager`, with further tries after a failure.

    A single process tries again when the pause is over. Several have no clock in common: their
    further tries are the interval's saves, or where training waits for one.

    Attributes:
      failures: saves of this process's run that failed, further tries included.
    """

    def __init__(
        self,
        manager: CheckpointManager,
        config: CheckpointConfig,
        first_step: int,
        say: Callable[[str], None],
    ):
        """`first_step` is the step of the checkpoint that the run goes on from, or 0."""
        self._manager, self._stops = manager, config.on_save_error == "stop"
        self._say, self._max_lost = say, config.max_lost_steps
        self._complete, self._under_way = first_step, None  # steps of saves
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
            self._under_way = step
        except UserError as error:
            self._failed(error)

    def must_wait(self, step: int, ahead: int = 1) -> bool:
        """Whether a kill after `ahead` steps more could cost more than `max_lost_steps`."""
        return self._max_lost is not None and step + ahead - self._complete > self._max_lost

    def wait(self, step: int, save: Callable[[], None], ahead: int = 1) -> None:
        """Returns when `must_wait` no longer holds; tries a failed save again with `save()`.

        With `on_save_error` 'continue' it returns too when every try has failed. Raises as `due`.
        """
        while self.must_wait(step, ahead):
            self._collect()
            if self._again_at is not None:
                time.sleep(max(0.0, self._again_at - time.monotonic()))
                save()
            elif self._under_way is None:
                return

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
                if pause is None:
                    raise
                self._say(f"{error}; trying again in {pause:g} s")
                time.sleep(pause)

    def _collect(self) -> None:
        """Waits for the save under way and takes its error."""
        saved, self._under_way = self._under_way, None
        try:
            self._manager.wait()
        except UserError as error:
            self._failed(error)
        else:
            if saved is not None:
                self._complete, self._tries = saved, 0

    def _failed(self, error: UserError) -> None:
        self.failures += 1
        if self._tries < len(PAUSES):
            pause = PAUSES[self._tries]
            self._tries += 1
            self._again_at = time.monotonic() + pause
            when = f"in {pause:g} s" if self._single else "with the next save"
            self._say(f"{error}; trying again {when}")
        elif self._stops:
            raise error
        else:
            self._tries, self._again_at = 0, None
            self._say(f"{error}; training goes on without, as checkpoint.on_save_error says")
