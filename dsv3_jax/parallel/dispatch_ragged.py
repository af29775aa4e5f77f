"""Dispatch by `jax.lax.ragged_all_to_all`: only the rows that are needed travel.

The receive buffer is static and holds the worst case, so no token is ever dropped. Letters: X own
tokens, K choices, S positions of the axis, R = S X received rows, M = X min(K, S) sent rows.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax.parallel.permute import Routes, collect, once, sort_pairs, spread, transposed_pair


class Segments(NamedTuple):
    """int32 [S] each: one device's side of a ragged exchange (the operands of the primitive)."""

    input_offsets: jax.Array  # where the rows for position s start in my operand
    send_sizes: jax.Array  # rows I send to s
    output_offsets: jax.Array  # where my rows go in the result of s
    recv_sizes: jax.Array  # rows that s sends me


class RaggedPlan(NamedTuple):
    routes: Routes  # token -> slot of the send buffer, sorted by destination
    there: Segments
    back: Segments


@dataclass(frozen=True)
class RaggedHop:
    """One exchange between the positions of a mesh axis. Call inside `shard_map`."""

    axis: str
    num_positions: int  # S
    platform: str  # on 'cpu', which lacks the primitive, the move is emulated

    def position(self) -> jax.Array:
        """This device's place on the axis: int32 in 0..S-1."""
        return jax.lax.axis_index(self.axis)

    def plan(self, destination_XK: jax.Array) -> RaggedPlan:
        """Orders the rows by destination and agrees on sizes and offsets with the others.

        Args:
          destination_XK: int32 position that owns each choice; S: nobody.
        """
        destination_XK = once(destination_XK, self.num_positions)
        routes, _, send_sizes = sort_pairs(destination_XK, self.num_positions)
        recv_sizes = self._exchange(send_sizes)
        send_offsets = jnp.cumsum(send_sizes) - send_sizes
        recv_offsets = jnp.cumsum(recv_sizes) - recv_sizes
        # Each receiver lays the segments out by sender, and tells every sender its place.
        there = Segments(send_offsets, send_sizes, self._exchange(recv_offsets), recv_sizes)
        back = Segments(recv_offsets, recv_sizes, self._exchange(send_offsets), send_sizes)
        return RaggedPlan(routes, there, back)

    def overflow(self, plan: RaggedPlan) -> jax.Array:
        """int32, the rows of a plan that found no room: none here."""
        return jnp.zeros((), jnp.int32)

    def send(self, x_XD: jax.Array, plan: RaggedPlan) -> jax.Array:
        """-> [R, D]: the copies that the others sent here, by sender; zeros after the last."""
        return self._pair[0](x_XD, plan)

    def collect(self, y_RD: jax.Array, plan: RaggedPlan) -> jax.Array:
        """The way back: -> [X, D], the float32 sum of what every copy became, in y's dtype."""
        return self._pair[1](y_RD, plan)

    @property
    def _pair(self):
        return transposed_pair(self._send, self._collect)

    def _exchange(self, numbers_S: jax.Array) -> jax.Array:
        return jax.lax.all_to_all(numbers_S, self.axis, 0, 0, tiled=True)

    def _send(self, x_XD: jax.Array, plan: RaggedPlan) -> jax.Array:
        num_received = self.num_positions * x_XD.shape[0]
        return self.move(spread(x_XD, plan.routes), num_received, plan.there)

    def _collect(self, y_RD: jax.Array, plan: RaggedPlan) -> jax.Array:
        num_sent = plan.routes.row_M.shape[0]
        return collect(self.move(y_RD, num_sent, plan.back), plan.routes)

    def move(self, rows: jax.Array, num_out: int, segments: Segments) -> jax.Array:
        output = jnp.zeros((num_out, *rows.shape[1:]), rows.dtype)
        if self.platform == "cpu":
            return self._emulated_move(rows, output, segments)
        return jax.lax.ragged_all_to_all(rows, output, *segments, axis_name=self.axis)

    def _emulated_move(self, rows: jax.Array, output: jax.Array, segments: Segments) -> jax.Array:
        """The primitive's definition by padded all-to-alls, from the same four arrays."""
        num_in, num_out = rows.shape[0], output.shape[0]
        step = jnp.arange(num_in)
        source = segments.input_offsets[:, None] + step
        source = jnp.where(step < segments.send_sizes[:, None], source, num_in)
        received = jax.lax.all_to_all(
            rows.at[source].get(mode="fill", fill_value=0), self.axis, 0, 0
        )
        target = self._exchange(segments.output_offsets)[:, None] + step
        target = jnp.where(step < segments.recv_sizes[:, None], target, num_out)
        return output.at[target].set(received, mode="drop")
