"""One program a row, by the Triton back end of Pallas: XLA reads the logits three times, for the
maximum, the sum and the gradient. Here the second reading can come from L2, as far as that holds
the rows under way.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

MAX_SIZE = 2**31 - 1  # logits: offsets are int32


@dataclass(frozen=True)
class Config:
    columns: int = 4096  # read at once; a power of two
    warps: int = 8


def cross_entropy_rows_hopper(
    logits_XV: jax.Array,
    targets_X: jax.Array,
    weights_X: jax.Array,
    dtype,
    config: Config = Config(),
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """As `cross_entropy_rows_reference`, but for the order of sums.

    Raises:
      NotImplementedError: no logits, or too many.
    """
    X, V = logits_XV.shape
    if not 0 < X * V <= MAX_SIZE:
        raise NotImplementedError(f"{X} x {V} logits; 1 to 2**31 - 1")
    if logits_XV.dtype != jnp.float32:
        raise NotImplementedError(f"takes float32 logits, not {logits_XV.dtype}")
    num_chunks = pl.cdiv(V, config.columns)

    def kernel(logits_XV, targets_X, weights_X, loss_X, d_logits_XV):
        x = pl.program_id(0)

        def read(chunk):
            column_C = chunk * config.columns + jnp.arange(config.columns, dtype=jnp.int32)
            inside_C = column_C < V
            logit_C = plt.load(logits_XV.at[x, column_C], mask=inside_C, other=-jnp.inf)
            return column_C, inside_C, logit_C

        def add(chunk, carry):
            maximum, total = carry
            _, _, logit_C = read(chunk)
            new = jnp.maximum(maximum, jnp.max(logit_C))
            return new, total * jnp.exp(maximum - new) + jnp.sum(jnp.exp(logit_C - new))

        _, _, logit_C = read(0)
        maximum = jnp.max(logit_C)
        start = maximum, jnp.sum(jnp.exp(logit_C - maximum))
        maximum, total = lax.fori_loop(1, num_chunks, add, start)
        log_sum = maximum + jnp.log(total)
        target, weight = plt.load(targets_X.at[x]), plt.load(weights_X.at[x])
        plt.store(loss_X.at[x], (log_sum - plt.load(logits_XV.at[x, target])) * weight)

        def write(chunk, _):
            column_C, inside_C, logit_C = read(chunk)
            is_target_C = jnp.where(column_C == target, 1.0, 0.0)
            d_logit_C = (jnp.exp(logit_C - log_sum) - is_target_C) * weight
            plt.store(d_logits_XV.at[x, column_C], d_logit_C.astype(dtype), mask=inside_C)

        lax.fori_loop(0, num_chunks, write, None)

    loss_X, d_logits_XV = pl.pallas_call(
        kernel,
        out_shape=[
            jax.ShapeDtypeStruct((X,), jnp.float32),
            jax.ShapeDtypeStruct((X, V), dtype),
        ],
        grid=(X,),
        compiler_params=plt.CompilerParams(num_warps=config.warps),
        name="cross_entropy_rows",
        interpret=interpret,
    )(logits_XV, targets_X, weights_X)
    return loss_X, d_logits_XV
