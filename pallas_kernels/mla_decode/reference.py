"""The definition: absorbed attention over a paged latent cache, in float32 (spec §2)."""

import jax
import jax.numpy as jnp

TILE = 128  # latent numbers that share a scale


def mla_decode_reference(
    q_latent_BTNL: jax.Array,
    q_rope_BTNR: jax.Array,
    latent_YZSL: jax.Array,
    k_rope_YZSR: jax.Array,
    layer: jax.Array,
    pages_BZ: jax.Array,
    position_BT: jax.Array,
    scale: float,
    latent_scale_YZCS: jax.Array | None = None,
) -> jax.Array:
    """See `mla_decode`."""
    num_rows, dtype = pages_BZ.shape[0], q_latent_BTNL.dtype

    def tokens(cache_YZSX):
        """float32 [B, S, X]: the tokens of each row's pages, one after the other."""
        cache_BZSX = cache_YZSX[layer, pages_BZ].astype(jnp.float32)
        return cache_BZSX.reshape(num_rows, -1, cache_YZSX.shape[-1])

    latent_BSL, k_rope_BSR = tokens(latent_YZSL), tokens(k_rope_YZSR)
    if latent_scale_YZCS is not None:
        scale_BSC = tokens(jnp.swapaxes(latent_scale_YZCS, 2, 3))
        scale_BSL = jnp.repeat(scale_BSC, TILE, axis=-1)[..., : latent_BSL.shape[-1]]
        latent_BSL = (latent_BSL * scale_BSL).astype(dtype).astype(jnp.float32)
    index_S = jnp.arange(latent_BSL.shape[1])
    visible_BTS = index_S <= position_BT[..., None]
    visible_B1TS = visible_BTS[:, None]
    # A weight of zero does not silence what earlier owners of a page left there.
    latent_BSL = jnp.where(visible_BTS.any(1)[..., None], latent_BSL, 0.0)
    scores_BNTS = jnp.einsum("BTNL,BSL->BNTS", q_latent_BTNL.astype(jnp.float32), latent_BSL)
    scores_BNTS += jnp.einsum("BTNR,BSR->BNTS", q_rope_BTNR.astype(jnp.float32), k_rope_BSR)
    scores_BNTS = jnp.where(visible_B1TS, scores_BNTS * scale, -jnp.inf)
    p_BNTS = jnp.where(visible_B1TS, jax.nn.softmax(scores_BNTS, axis=-1), 0.0)
    return jnp.einsum("BNTS,BSL->BTNL", p_BNTS, latent_BSL).astype(dtype)
