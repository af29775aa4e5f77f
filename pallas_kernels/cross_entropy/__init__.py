"""Cross-entropy of rows of logits and its gradient in them (spec §4)."""

import jax

from pallas_kernels import dispatch
from pallas_kernels.cross_entropy.gpu import cross_entropy_rows_hopper
from pallas_kernels.cross_entropy.reference import cross_entropy_rows_reference

__all__ = ["cross_entropy_rows"]

_IMPLEMENTATIONS = {
    "hopper": cross_entropy_rows_hopper,
    "reference": cross_entropy_rows_reference,
}


def cross_entropy_rows(
    logits_XV: jax.Array,
    targets_X: jax.Array,
    weights_X: jax.Array,
    dtype: jax.typing.DTypeLike,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """weight * -log softmax(logits)[target] of every row, and its gradient in the logits.

    Args:
      logits_XV: float32.
      targets_X: int32, 0 to V - 1.
      weights_X: float32.
      dtype: of the gradient.
      implementation: 'reference' or 'hopper'; None: the best that accepts the operands.

    Returns:
      loss_X, float32, nats; d_logits_XV in `dtype`.

    Raises:
      NotImplementedError: the implementation named does not take these operands, and why.
    """
    operands = (logits_XV, targets_X, weights_X, dtype)
    return dispatch.call("cross_entropy_rows", _IMPLEMENTATIONS, implementation, *operands)
