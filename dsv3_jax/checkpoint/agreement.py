"""How the processes of a job learn of an error that one of them had while saving.

They write in threads of their own while the main threads train, so they meet at the coordination
service and not by a collective, whose order with those of the steps nobody could tell.
"""

import itertools

import jax
from jax._src import distributed

from dsv3_jax.errors import UserError

_rounds = itertools.count()  # the same in all processes
_TIMEOUT_MS = 600_000  # as long as Orbax gives a save; a dead process is noticed much sooner


class OtherProcessError(UserError):
    """Another process had an error, which all have heard of."""


def hear(own: str = "") -> None:
    """Says this process's error, '' for none, and waits until all have said theirs.

    A round of all processes. Where one was left out by an error, the process says it in its next
    round, at which the others wait; for all of them that is the last round of this save.

    Raises:
      OtherProcessError: another process has an error, and this one has none.
    """
    if jax.process_count() == 1:
        return
    client, number, index = distributed.global_state.client, next(_rounds), jax.process_index()
    client.key_value_set(f"dsv3_save/{number}/{index}", own)
    said = [
        client.blocking_key_value_get(f"dsv3_save/{number}/{i}", _TIMEOUT_MS)
        for i in range(jax.process_count())
    ]
    if number:  # whoever spoke in this round has heard all of the one before
        client.key_value_delete(f"dsv3_save/{number - 1}/{index}")
    for i, error in enumerate(said):
        if error and not own:
            raise OtherProcessError(f"process {i}: {error}")
