"""Decoding by MLA in its absorbed form: all heads share one key, whose value is its latent."""

import jax

from pallas_kernels import dispatch
from pallas_kernels.mla_decode.gpu import mla_decode_hopper
from pallas_kernels.mla_decode.reference import mla_decode_reference
from pallas_kernels.mla_decode.tpu import mla_decode_tpu

__all__ = ["mla_decode"]

_IMPLEMENTATIONS = {
    "hopper": mla_decode_hopper,
    "tpu": mla_decode_tpu,
    "reference": mla_decode_reference,
}


def mla_decode(
    q_latent_BTNL: jax.Array,
    q_rope_BTNR: jax.Array,
    latent_YZSL: jax.Array,
    k_rope_YZSR: jax.Array,
    layer: jax.Array,
    pages_BZ: jax.Array,
    position_BT: jax.Array,
    scale: float,
    *,
    latent_scale_YZCS: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """o_BTNL: softmax over a row's tokens of scale * (q_latent.latent + q_rope.k_rope), times the
    latents (spec §2).

    Letters: B rows, T new tokens of each (2 where one is a guess), N heads, L latent, R rope width;
    Y layers, Z pages, S tokens of a page, C = ceil(L / 128).

    Args:
      latent_YZSL, k_rope_YZSR: the cache. What lies after a row's last position may be anything,
        NaN too; a number up to there that is not finite makes the row's outputs NaN.
      layer: int32 scalar.
      pages_BZ: int32, the pages of each row in the order of its tokens.
      position_BT: int32; a new token sees the positions up to its own. -1: it sees nothing and gets
        zeros.
      latent_scale_YZCS: float32, where the latents are E4M3 codes: of 128 numbers of a token. A
        latent is code * scale, rounded to the queries' dtype. None: latents are numbers.
      implementation: 'reference', 'hopper' or 'tpu'; None: the best that accepts the operands.

    Raises:
      NotImplementedError: the implementation named does not take these operands, and why.
    """
    cache = (latent_YZSL, k_rope_YZSR, layer, pages_BZ)
    operands = (q_latent_BTNL, q_rope_BTNR, *cache, position_BT, scale)
    scales = {} if latent_scale_YZCS is None else {"latent_scale_YZCS": latent_scale_YZCS}
    return dispatch.call("mla_decode", _IMPLEMENTATIONS, implementation, *operands, **scales)
