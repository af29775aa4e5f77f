"""Dispatch by a padded all-to-all: every pair of devices exchanges a buffer of X rows.

Row t of the buffer is token t, or zeros where the token is not sent: nothing to sort, nothing to
overflow, at the price of moving the zeros. It is the dropless oracle of the other back ends, and
one hop of `hierarchical`. Letters: X own tokens, K choices, S positions, R = S X received rows.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax.parallel.permute import transposed_pair


@dataclass(frozen=True, kw_only=True)
class PaddedHop:
    """One exchange between the positions of a mesh axis, or of each group of its positions.

    Call inside `shard_map`.
    """

    axis: str
    num_positions: int  # S, of the axis or of each group
    groups: tuple[tuple[int, ...], ...] | None = None  # mesh positions that talk; None: all

    def position(self) -> jax.Array:
        """This device's place among those that it talks to: int32 in 0..S-1."""
        index = jax.lax.axis_index(self.axis)
        if self.groups is None:
            return index
        places = {member: place for group in self.groups for place, member in enumerate(group)}
        return jnp.asarray([places[i] for i in range(len(places))], jnp.int32)[index]

    def plan(self, destination_XK: jax.Array) -> jax.Array:
        """sent_SX: is token x sent to position s? Once, however many of its choices are there.

        Args:
          destination_XK: int32 position that owns each choice; S: nobody.
        """
        positions_S = jnp.arange(self.num_positions)
        return (destination_XK == positions_S[:, None, None]).any(-1)

    def overflow(self, plan: Any) -> jax.Array:
        """int32, the rows of a plan that found no room: none here."""
        return jnp.zeros((), jnp.int32)

    def send(self, x_XD: jax.Array, sent_SX: jax.Array) -> jax.Array:
        """-> [R, D]: the copies that the others sent here, zeros between them."""
        return self._pair[0](x_XD, sent_SX)

    def collect(self, y_RD: jax.Array, sent_SX: jax.Array) -> jax.Array:
        """The way back: -> [X, D], the float32 sum of what every copy became, in y's dtype."""
        return self._pair[1](y_RD, sent_SX)

    @property
    def _pair(self):
        return transposed_pair(self._send, self._collect)

    def _exchange(self, x_SXD: jax.Array) -> jax.Array:
        return jax.lax.all_to_all(x_SXD, self.axis, 0, 0, axis_index_groups=self.groups)

    def _send(self, x_XD: jax.Array, sent_SX: jax.Array) -> jax.Array:
        copies_SXD = jnp.where(sent_SX[..., None], x_XD, jnp.zeros((), x_XD.dtype))
        return self._exchange(copies_SXD).reshape(-1, *x_XD.shape[1:])

    def _collect(self, y_RD: jax.Array, sent_SX: jax.Array) -> jax.Array:
        y_SXD = self._exchange(y_RD.reshape(*sent_SX.shape, *y_RD.shape[1:]))
        total_XD = jnp.sum(jnp.where(sent_SX[..., None], y_SXD, 0), axis=0, dtype=jnp.float32)
        return total_XD.astype(y_RD.dtype)
