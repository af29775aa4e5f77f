"""Grouped matmul in plain XLA, by blocks of rows that do not straddle groups.

A group of n rows owns ceil(n / size) consecutive blocks. The last one may reach over rows of the
next group, or over the end: those are masked.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

_LOOP_ROWS = 64  # rows of a block: small enough to waste little on short groups
_PADDED_ROWS = 128


def zero_after_groups(y_MO: jax.Array, sizes_G: jax.Array) -> jax.Array:
    """Zeros the rows that belong to no group."""
    return jnp.where(jnp.arange(y_MO.shape[0])[:, None] < sizes_G.sum(), y_MO, 0)


class _Blocks(NamedTuple):
    """int32 per group: its rows, and its blocks, are start..end."""

    row_start_G: jax.Array
    row_end_G: jax.Array
    start_G: jax.Array
    end_G: jax.Array
    rows: int  # of a block

    @classmethod
    def of(cls, sizes_G: jax.Array, rows: int) -> "_Blocks":
        row_end_G, blocks_G = jnp.cumsum(sizes_G), -(-sizes_G // rows)
        end_G = jnp.cumsum(blocks_G)
        return cls(row_end_G - sizes_G, row_end_G, end_G - blocks_G, end_G, rows)

    def locate(self, block: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Group, first row and which of its rows belong to the group, of one or more blocks.

        A block past the last one counts to the last group, with no row of it.
        """
        group = jnp.sum(block[..., None] >= self.end_G, axis=-1)
        group = jnp.minimum(group, len(self.end_G) - 1)
        row = self.row_start_G[group] + (block - self.start_G[group]) * self.rows
        return group, row, row[..., None] + jnp.arange(self.rows) < self.row_end_G[group][..., None]


def _matmul(x_MI, w_IO, transposed):
    dimensions = (((1,), (1 if transposed else 0,)), ((), ()))
    y_MO = jax.lax.dot_general(x_MI, w_IO, dimensions, preferred_element_type=jnp.float32)
    return y_MO.astype(x_MI.dtype)


def loop_product(x_MI, w_GIO, sizes_G, *, transposed):
    """Blocks in order, each written over the rows where its predecessor reached too far."""
    num_rows, d_out = x_MI.shape[0], w_GIO.shape[1 if transposed else 2]
    rows = min(_LOOP_ROWS, num_rows)
    blocks = _Blocks.of(sizes_G, rows)
    padded_x = jnp.pad(x_MI, ((0, rows), (0, 0)))

    def one_block(block, y_MO):
        group, row, valid = blocks.locate(block)
        x_block = jax.lax.dynamic_slice_in_dim(padded_x, row, rows)
        y_block = _matmul(x_block, w_GIO[group], transposed)
        y_block = jnp.where(valid[:, None], y_block, 0)
        return jax.lax.dynamic_update_slice_in_dim(y_MO, y_block, row, axis=0)

    y_MO = jnp.zeros((num_rows + rows, d_out), x_MI.dtype)
    return jax.lax.fori_loop(0, blocks.end_G[-1], one_block, y_MO)[:num_rows]


def loop_weight_gradient(x_MI, dy_MO, sizes_G):
    """float32 sum over the blocks of x^T dy, each added to its group."""
    rows = min(_LOOP_ROWS, x_MI.shape[0])
    blocks = _Blocks.of(sizes_G, rows)
    padded_x, padded_dy = (jnp.pad(a, ((0, rows), (0, 0))) for a in (x_MI, dy_MO))

    def one_block(block, dw_GIO):
        group, row, valid = blocks.locate(block)
        x_block = jax.lax.dynamic_slice_in_dim(padded_x, row, rows)
        dy_block = jax.lax.dynamic_slice_in_dim(padded_dy, row, rows)
        dw_IO = jax.lax.dot_general(
            jnp.where(valid[:, None], x_block, 0),
            jnp.where(valid[:, None], dy_block, 0),
            (((0,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        return jax.lax.dynamic_update_index_in_dim(dw_GIO, dw_GIO[group] + dw_IO, group, 0)

    shape = (sizes_G.shape[0], x_MI.shape[1], dy_MO.shape[1])
    return jax.lax.fori_loop(0, blocks.end_G[-1], one_block, jnp.zeros(shape, jnp.float32))


def padded_product(x_MI, w_GIO, sizes_G, *, transposed):
    """Every block gathers its rows and its weight; one batched matmul; gather the rows back."""
    num_rows, num_groups = x_MI.shape[0], w_GIO.shape[0]
    rows = min(_PADDED_ROWS, num_rows)
    blocks = _Blocks.of(sizes_G, rows)
    group, row, valid = blocks.locate(jnp.arange(-(-num_rows // rows) + num_groups))
    source = jnp.where(valid, row[:, None] + jnp.arange(rows), num_rows)
    x_blocks = x_MI.at[source].get(mode="fill", fill_value=0)
    dimensions = (((2,), (2 if transposed else 1,)), ((0,), (0,)))
    y_blocks = jax.lax.dot_general(
        x_blocks, w_GIO[group], dimensions, preferred_element_type=x_MI.dtype
    )
    row_M = jnp.arange(num_rows)
    group_M = jnp.sum(row_M[:, None] >= blocks.row_end_G, axis=-1)
    slot_M = (blocks.start_G * rows - blocks.row_start_G).at[group_M].get(mode="clip") + row_M
    # Rows after the last group land on rows of a block that belong to no group: zeros.
    return y_blocks.reshape(-1, y_blocks.shape[-1]).at[slot_M].get(mode="clip")


def rows_product(x_MI, w_GIO, sizes_G, *, transposed):
    """Every row reads its group's weight, and no other group is read: for fewer rows than groups.

    A product a row, each of a slice of the weights, which XLA reads where it lies.
    """
    group_M = jnp.sum(jnp.arange(len(x_MI))[:, None] >= jnp.cumsum(sizes_G), axis=-1)

    def one_row(_, row):
        x_I, group = row
        w_IO = jax.lax.dynamic_index_in_dim(w_GIO, group, keepdims=False)
        w_IO = w_IO.T if transposed else w_IO
        return None, jnp.dot(x_I[None], w_IO, preferred_element_type=jnp.float32)[0]

    _, y_MO = jax.lax.scan(one_row, None, (x_MI, group_M))
    return zero_after_groups(y_MO.astype(x_MI.dtype), sizes_G)
