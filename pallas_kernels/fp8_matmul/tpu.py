"""TPU: the dense product, blocks or tiles of scales on the right; see `tpu_gemm`."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.tpu_gemm import DEFAULT, Config, Visits, gemm, of_rows


def fp8_matmul_tpu(
    q_MK: jax.Array,
    s_MT: jax.Array,
    q_NK: jax.Array,
    s_BT: jax.Array,
    out_dtype: jnp.dtype = jnp.bfloat16,
    add_MN: jax.Array | None = None,
    config: Config = DEFAULT,
    interpret: bool = False,
) -> jax.Array:
    """As `fp8_matmul_reference`."""
    M, N = q_MK.shape[0], q_NK.shape[0]
    if M * N * q_MK.shape[1] == 0:
        return jnp.zeros((M, N), out_dtype) if add_MN is None else add_MN.astype(out_dtype)
    config = config.fitted(M, N)
    tile_V = jnp.arange(pl.cdiv(M, config.rows), dtype=jnp.int32)
    none_V = jnp.zeros_like(tile_V)
    return gemm(
        config,
        (q_MK, s_MT, q_NK[None], of_rows(s_BT, N)[None]),
        Visits(tile_V, none_V, none_V, none_V + M),
        len(tile_V),
        jax.ShapeDtypeStruct((M, N), out_dtype),
        add_MN,
        interpret,
    )
