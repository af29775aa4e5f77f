"""Dispatch by a padded all-to-all with room for fewer rows than the worst case.

Every pair of devices exchanges a buffer of C rows, filled from the front. A row that finds no room
is counted, and the training step that counts one changes nothing (`train/step.py`): no token is
dropped silently. Letters: X own tokens, K choices, S positions, R = S C received rows.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax.parallel.dispatch_padded import PaddedHop
from dsv3_jax.parallel.permute import Routes, collect, once, sort_pairs, spread


class CappedPlan(NamedTuple):
    routes: Routes  # token -> slot s C + j of the send buffer
    overflow: jax.Array  # int32, rows without room


@dataclass(frozen=True, kw_only=True)
class CappedHop(PaddedHop):
    """One exchange as `PaddedHop`'s. Call inside `shard_map`."""

    capacity: int  # C
    pairs: int  # room for pairs of a row and an expert, where this hop is the last

    def plan(self, destination_XK: jax.Array) -> CappedPlan:
        """Gives each token its place in the buffers of the positions it goes to.

        Args:
          destination_XK: int32 position that owns each choice; S: nobody.
        """
        S, C = self.num_positions, self.capacity
        destination_XK = once(destination_XK, S)
        routes, _, sizes_S = sort_pairs(destination_XK, S)
        first_S = jnp.cumsum(sizes_S) - sizes_S
        slot_R = jnp.arange(S * C, dtype=jnp.int32)
        position_R, place_R = slot_R // C, slot_R % C
        num_rows, num_slots = len(destination_XK), len(routes.row_M)
        sorted_R = jnp.where(
            place_R < sizes_S[position_R], first_S[position_R] + place_R, num_slots
        )
        row_R = routes.row_M.at[sorted_R].get(mode="fill", fill_value=num_rows)
        place_XK = routes.slot_XK - first_S[jnp.minimum(destination_XK, S - 1)]
        has_room_XK = (destination_XK < S) & (place_XK < C)
        slot_XK = jnp.where(has_room_XK, destination_XK * C + place_XK, S * C)
        return CappedPlan(Routes(row_R, slot_XK), jnp.sum(jnp.maximum(sizes_S - C, 0)))

    def overflow(self, plan: CappedPlan) -> jax.Array:
        return plan.overflow

    def _send(self, x_XD: jax.Array, plan: CappedPlan) -> jax.Array:
        copies_RD = spread(x_XD, plan.routes)
        return self._exchange_rows(copies_RD)

    def _collect(self, y_RD: jax.Array, plan: CappedPlan) -> jax.Array:
        return collect(self._exchange_rows(y_RD), plan.routes)

    def _exchange_rows(self, x_RD: jax.Array) -> jax.Array:
        x_SCD = x_RD.reshape(self.num_positions, self.capacity, *x_RD.shape[1:])
        return self._exchange(x_SCD).reshape(x_RD.shape)
