"""Our Hopper kernel of decoding (pallas_kernels/mla_decode) over the pages of a server.

Shape letters: B rows, T new tokens, N heads, L KV latent, R rope width.
"""

import jax
import jax.numpy as jnp

from dsv3_jax.model.paged_cache import PagedCache, Paging
from dsv3_jax.model.runtime import Runtime
from pallas_kernels.mla_decode import mla_decode
from pallas_kernels.mla_decode.gpu import refuse as refuse_operands


def refuse(
    q_latent_BTNL: jax.Array, q_rope_BTNR: jax.Array, cache: PagedCache, runtime: Runtime
) -> None:
    """Raises NotImplementedError, with the reason, where plain XLA has to do it."""
    if runtime.attention not in (None, "hopper"):
        raise NotImplementedError(f"attention={runtime.attention!r} was asked for")
    if runtime.platform != "gpu":
        raise NotImplementedError("needs an NVIDIA GPU")
    latent, k_rope, scale = jax.eval_shape(cache.values)
    refuse_operands(q_latent_BTNL, q_rope_BTNR, latent, k_rope, has_scales=scale is not None)


def attend(
    q_latent_BTNL: jax.Array,
    q_rope_BTNR: jax.Array,
    cache: PagedCache,
    layer: jax.Array,
    paging: Paging,
    scale: float,
) -> jax.Array:
    """o_BTNL, as `paged_attention` gives it in the latent space; zeros for padding."""
    latent, k_rope, latent_scale = cache.values()
    position_BT = jnp.where(paging.mask_BT, paging.position_BT, -1)
    pages = (latent, k_rope, layer, paging.pages_BZ, position_BT)
    return mla_decode(
        *(q_latent_BTNL, q_rope_BTNR, *pages, scale),
        latent_scale_YZCS=latent_scale,
        implementation="hopper",
    )
