"""How the processes of a job agree about a save that may fail on one of them alone.

They write in threads of their own while the main threads train, so they meet at the coordination
service and not by a collective, whose order with those of the steps nobody could tell.
"""

import itertools

import jax
from jax._src import distributed

# The same in all processes, which take part in all meetings in one order.
_meetings, _rounds = itertools.count(), itertools.count()
_TIMEOUT_MS = 600_000  # Orbax's own for a save; a dead process is noticed by its heartbeat before
_BARRIERS = 2  # that Orbax makes of every save: all have written, process 0 has committed


class Meeting:
    """Of one save; every process makes one and takes part in all of it."""

    def __init__(self):
        self._name, self._barriers = f"dsv3_save/meeting/{next(_meetings)}", 0

    def errors(self, own: str) -> list[tuple[int, str]]:
        """(process, text) of those that had one; blocks until all have said theirs, '' for none."""
        if jax.process_count() == 1:
            return [(0, own)] if own else []
        client, number, index = distributed.global_state.client, next(_rounds), jax.process_index()
        client.key_value_set(f"dsv3_save/{number}/{index}", own)
        said = [
            client.blocking_key_value_get(f"dsv3_save/{number}/{i}", _TIMEOUT_MS)
            for i in range(jax.process_count())
        ]
        if number:  # whoever spoke in this round has heard all of the one before
            client.key_value_delete(f"dsv3_save/{number - 1}/{index}")
        return [(i, text) for i, text in enumerate(said) if text]

    def barrier(self, timeout_ms: int = _TIMEOUT_MS) -> None:
        """Blocks until all processes are at their barrier of this number."""
        number, self._barriers = self._barriers, self._barriers + 1
        distributed.global_state.client.wait_at_barrier(f"{self._name}/{number}", timeout_ms)

    def pass_barriers(self) -> None:
        """Goes through those that Orbax left out after an error, where the others wait."""
        while jax.process_count() > 1 and self._barriers < _BARRIERS:
            self.barrier()
