"""Moving rows: sort by destination, gather, and gather back. No scatter-add in any derivative.

A `Routes` says which source row fills each slot and, the same map read backwards, which slots a
source row went to. `spread` gathers by the first and `collect` sums by the second; each is the
other's transpose, so each is the other's derivative, and both are gathers.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.moe_permute import unpermute_sum


class Routes(NamedTuple):
    """A map from X source rows to M slots, at most K slots a row; out of range means none."""

    row_M: jax.Array  # int32, the source row of each slot; >= X: the slot stays empty (zeros)
    slot_XK: jax.Array  # int32, the slots of each source row; M: none


def transposed_pair(forward: Callable, backward: Callable) -> tuple[Callable, Callable]:
    """Makes two functions of (x, routing), each the transpose of the other in x, differentiable.

    `routing` is a pytree of integers and has no derivative.
    """

    def with_derivative(function, transpose):
        wrapped = jax.custom_vjp(function)
        wrapped.defvjp(
            lambda x, routing: (function(x, routing), routing),
            lambda routing, dy: (transpose(dy, routing), None),
        )
        return wrapped

    return with_derivative(forward, backward), with_derivative(backward, forward)


def _spread(x_XD: jax.Array, routes: Routes) -> jax.Array:
    """x_XD -> [M, D]: the source row of each slot, zeros in an empty one."""
    return x_XD.at[routes.row_M].get(mode="fill", fill_value=0)


def _collect(y_MD: jax.Array, routes: Routes) -> jax.Array:
    """y_MD -> [X, D]: the sum of each source row's slots, added in float32."""
    return unpermute_sum(y_MD, routes.slot_XK)


spread, collect = transposed_pair(_spread, _collect)


def once(destination_XK: jax.Array, nowhere: int) -> jax.Array:
    """Sends a row once to each destination: a later choice of the same one goes `nowhere`."""
    same_XKK = destination_XK[:, :, None] == destination_XK[:, None, :]
    return jnp.where(jnp.tril(same_XKK, -1).any(-1), nowhere, destination_XK)


def sort_pairs(
    ids_XK: jax.Array, num_groups: int, max_slots: int | None = None
) -> tuple[Routes, Routes, jax.Array]:
    """Gives every (row, choice) pair a slot, sorted by the group it goes to; ties keep their order.

    Args:
      ids_XK: int32 group of each pair, e.g. an expert or a device; `num_groups` for a pair that
        goes nowhere. The groups of one row differ, which bounds the slots by X min(K, groups).
      num_groups: G.
      max_slots: room for fewer pairs than that bound; the last ones are left out.

    Returns:
      The routes of rows, the routes of pairs (row-major, one slot each), and sizes_G, int32.
    """
    num_rows, top_k = ids_XK.shape
    num_pairs, num_slots = num_rows * top_k, num_rows * min(top_k, num_groups)
    group_of_pair = ids_XK.reshape(-1)
    sizes_G = jnp.sum(group_of_pair[:, None] == jnp.arange(num_groups), axis=0, dtype=jnp.int32)
    if max_slots is not None and max_slots < num_slots:
        num_slots = max_slots
        sizes_G = jnp.diff(jnp.minimum(jnp.cumsum(sizes_G), num_slots), prepend=0)
    total = sizes_G.sum()
    pair_of_position = jnp.argsort(group_of_pair, stable=True).astype(jnp.int32)
    positions = jnp.arange(num_pairs, dtype=jnp.int32)
    position_of_pair = (
        jnp.zeros_like(positions).at[pair_of_position].set(positions, unique_indices=True)
    )
    slot_of_pair = jnp.where(position_of_pair < total, position_of_pair, num_slots)
    pair_M = jnp.where(positions < total, pair_of_position, num_pairs)[:num_slots]
    rows = Routes(pair_M // top_k, slot_of_pair.reshape(num_rows, top_k))
    return rows, Routes(pair_M, slot_of_pair[:, None]), sizes_G


def align(
    rows: Routes, pairs: Routes, sizes_G: jax.Array, alignment: int
) -> tuple[Routes, Routes, jax.Array]:
    """Lets every group of `sort_pairs` start at a multiple of `alignment`, after empty slots.

    Returns:
      The routes with M + G (alignment - 1) slots, rounded up to a multiple of `alignment`, and the
      int32 sizes with the empty slots at a group's end, multiples of `alignment` too.
    """
    aligned_G = -(-sizes_G // alignment) * alignment
    end_G, aligned_end_G = jnp.cumsum(sizes_G), jnp.cumsum(aligned_G)
    shift_G = (aligned_end_G - aligned_G) - (end_G - sizes_G)
    num_slots, num_groups = rows.row_M.shape[0], sizes_G.shape[0]
    num_aligned = -(-(num_slots + num_groups * (alignment - 1)) // alignment) * alignment

    def group_of(slot: jax.Array, end_G: jax.Array) -> jax.Array:
        """Slots after the last group are counted as its own."""
        group = jnp.searchsorted(end_G, slot, side="right", method="compare_all")
        return jnp.minimum(group, num_groups - 1)

    new_slot_M = jnp.arange(num_aligned, dtype=jnp.int32)
    group_M = group_of(new_slot_M, aligned_end_G)
    slot_M = new_slot_M - shift_G[group_M]
    slot_M = jnp.where(slot_M < end_G[group_M], slot_M, num_slots)

    def moved(routes: Routes) -> Routes:
        num_rows = routes.slot_XK.shape[0]
        row_M = routes.row_M.at[slot_M].get(mode="fill", fill_value=num_rows)
        slot_XK = routes.slot_XK + shift_G[group_of(routes.slot_XK, end_G)]
        return Routes(row_M, jnp.where(routes.slot_XK < num_slots, slot_XK, num_aligned))

    return moved(rows), moved(pairs), aligned_G
