"""The specification, in plain jnp."""

import jax
import jax.numpy as jnp


def grouped_weight_gradient_reference(
    x_MI: jax.Array, dy_MO: jax.Array, group_sizes_G: jax.Array
) -> jax.Array:
    """dW_GIO[g] = sum over the rows m of group g of x[m]^T dy[m], in float32.

    Args:
      x_MI: [M, I] rows sorted by group.
      dy_MO: [M, O] output gradients of the same rows.
      group_sizes_G: [G] int32 rows of each group, 0 included; rows past their sum are ignored.

    Returns:
      [G, I, O] float32, zeros for an empty group.
    """
    ends_G = jnp.cumsum(group_sizes_G)
    row_M = jnp.arange(x_MI.shape[0])
    member_GM = (row_M >= (ends_G - group_sizes_G)[:, None]) & (row_M < ends_G[:, None])
    x_GMI = jnp.where(member_GM[..., None], x_MI, 0).astype(jnp.float32)
    dy_GMO = jnp.where(member_GM[..., None], dy_MO, 0).astype(jnp.float32)
    return jnp.einsum("gmi,gmo->gio", x_GMI, dy_GMO)
