"""Grouped matmul: rows sorted by group, each group times its own weight.

One function, several implementations, each a pair (product, weight gradient):

  rows        every row times the weight of its group: GPU, where there are few rows a group.
  ragged      `jax.lax.ragged_dot`: TPU. On CPU and GPU it multiplies every group with every row.
  mosaic_gpu  jax's Pallas kernels for Hopper (`grouped_matmul_mosaic.py`).
  padded      groups padded to whole blocks of rows, one batched matmul: any GPU, any shape.
  loop        a loop over the blocks that hold rows: CPU, where it does no work for the empty
              rows of a worst-case buffer.

Letters here: M rows, G groups, I and O widths in and out.
"""

from functools import partial

import jax
import jax.numpy as jnp

from dsv3_jax.parallel import grouped_matmul_blocks as blocks
from dsv3_jax.parallel import grouped_matmul_mosaic as mosaic
from dsv3_jax.precision.block_scaled import BlockScaled, refuse_gradient


def best_implementation(
    platform: str, num_rows: int, w_shape: tuple[int, int, int], compute_dtype: jnp.dtype
) -> str:
    """The fastest implementation on a platform that accepts the shape [G, I, O] of the weights."""
    num_groups, d_in, d_out = w_shape
    if platform == "gpu":
        # Reads and copies a weight a row; the others read those of all groups, empty or not.
        if 4 * num_rows <= num_groups:
            return "rows"
        return "mosaic_gpu" if mosaic.accepts(d_in, d_out, compute_dtype) else "padded"
    return "ragged" if platform == "tpu" else "loop"


def grouped_matmul(
    x_MI: jax.Array,
    w_GIO: jax.Array | BlockScaled,
    group_sizes_G: jax.Array,
    *,
    compute_dtype: jnp.dtype,
    implementation: str | None = None,
) -> jax.Array:
    """y_m = x_m w_g for every row m of group g.

    Args:
      x_MI: rows, those of group 0 first. Rows after the last group give zeros.
      w_GIO: float32 master weights, or weights kept in FP8.
      group_sizes_G: int32 rows of each group, 0 allowed, at most M together.
      compute_dtype: format of the operands and the result; accumulation is float32.
      implementation: one of the list above; None: the best on jax's default backend.

    Returns:
      y_MO in `compute_dtype`. Gradients: dx in x's dtype (zeros after the last group), dw in w's.
    """
    if implementation is None:
        platform = jax.default_backend()
        implementation = best_implementation(platform, len(x_MI), w_GIO.shape, compute_dtype)
    return _grouped(x_MI, w_GIO, group_sizes_G, jnp.dtype(compute_dtype), implementation)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _grouped(x_MI, w_GIO, sizes_G, compute_dtype, implementation):
    return _forward(x_MI, w_GIO, sizes_G, compute_dtype, implementation)[0]


# Compiled programs show kernels by their scope alone (`plan/overlap.py`).
@jax.named_scope("grouped_matmul")
def _forward(x_MI, w_GIO, sizes_G, compute_dtype, implementation):
    product, _ = _IMPLEMENTATIONS[implementation]
    x_low = x_MI.astype(compute_dtype)
    y_MO = product(x_low, w_GIO.astype(compute_dtype), sizes_G, transposed=False)
    # The zero-size array carries x's dtype to the backward pass.
    return y_MO, (x_low, w_GIO, sizes_G, jnp.zeros((0,), x_MI.dtype))


@jax.named_scope("grouped_matmul")
def _backward(compute_dtype, implementation, residuals, dy_MO):
    x_low, w_GIO, sizes_G, like_x = residuals
    refuse_gradient(w_GIO)
    product, weight_gradient = _IMPLEMENTATIONS[implementation]
    dy_MO = dy_MO.astype(compute_dtype)
    dx_MI = product(dy_MO, w_GIO.astype(compute_dtype), sizes_G, transposed=True)
    dw_GIO = weight_gradient(x_low, dy_MO, sizes_G)
    return dx_MI.astype(like_x.dtype), dw_GIO.astype(w_GIO.dtype), None


_grouped.defvjp(_forward, _backward)


def _ragged_product(x_MI, w_GIO, sizes_G, *, transposed):
    dimensions = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2 if transposed else 1,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[0],
    )
    y_MO = jax.lax.ragged_dot_general(
        x_MI, w_GIO, sizes_G, dimensions, preferred_element_type=x_MI.dtype
    )
    return blocks.zero_after_groups(y_MO, sizes_G)


def _ragged_weight_gradient(x_MI, dy_MO, sizes_G):
    dimensions = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[],
    )
    return jax.lax.ragged_dot_general(
        x_MI, dy_MO, sizes_G, dimensions, preferred_element_type=jnp.float32
    )


# product(x_MI, w_GIO, sizes_G, transposed=) -> [M, O] in x's dtype; transposed: w is [G, O, I].
# weight_gradient(x_MI, dy_MO, sizes_G) -> float32 [G, I, O].
_IMPLEMENTATIONS = {
    "rows": (blocks.rows_product, blocks.loop_weight_gradient),
    "ragged": (_ragged_product, _ragged_weight_gradient),
    "mosaic_gpu": (mosaic.product, mosaic.weight_gradient),
    "padded": (blocks.padded_product, blocks.loop_weight_gradient),
    "loop": (blocks.loop_product, blocks.loop_weight_gradient),
}
