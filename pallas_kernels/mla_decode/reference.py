"""The definition: absorbed attention over a paged latent cache, in float32 (spec §2)."""

import jax
import jax.numpy as jnp


def mla_decode_reference(
    q_latent_BTNL: jax.Array,
    q_rope_BTNR: jax.Array,
    latent_YZSL: jax.Array,
    k_rope_YZSR: jax.Array,
    layer: jax.Array,
    pages_BZ: jax.Array,
    position_BT: jax.Array,
    scale: float,
) -> jax.Array:
    """See `mla_decode`."""
    num_rows = pages_BZ.shape[0]

    def tokens(cache_YZSX):
        """float32 [B, S, X]: the tokens of each row's pages, one after the other."""
        return cache_YZSX[layer, pages_BZ].reshape(num_rows, -1, cache_YZSX.shape[-1])

    latent_BSL, k_rope_BSR = (tokens(x).astype(jnp.float32) for x in (latent_YZSL, k_rope_YZSR))
    visible_BTS = jnp.arange(latent_BSL.shape[1]) <= position_BT[..., None]
    scores_BNTS = jnp.einsum("BTNL,BSL->BNTS", q_latent_BTNL.astype(jnp.float32), latent_BSL)
    scores_BNTS += jnp.einsum("BTNR,BSR->BNTS", q_rope_BTNR.astype(jnp.float32), k_rope_BSR)
    scores_BNTS = jnp.where(visible_BTS[:, None], scores_BNTS * scale, -jnp.inf)
    p_BNTS = jax.nn.softmax(scores_BNTS, axis=-1)
    return jnp.einsum("BNTS,BSL->BTNL", p_BNTS, latent_BSL).astype(q_latent_BTNL.dtype)
