"""The latent cache of a server: pages of tokens, which rows of different lengths share (spec §2).

A row's tokens lie in pages that its table lists in order; equal beginnings of rows may be the same
pages. Page 0 belongs to no row: padding is written there. Arrays are one device's.
Shape letters: B rows, T new tokens, S tokens of a page or a block, Z pages, L KV latent, R rope
width, C = ceil(L / 128), N heads, H what attention returns a head.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax.model.cache import LatentCache
from pallas_kernels.quantize.reference import BLOCK, quantize_tiles_reference

# Formats are stored as their bits: on a CPU, XLA would write to 8- and 16-bit floats by converting
# the whole cache to float32 and back.
_FORMAT_OF_BITS = {"uint8": jnp.float8_e4m3fn, "uint16": jnp.bfloat16}


class Paging(NamedTuple):
    """Where the rows' tokens lie, and which tokens are new."""

    pages_BZ: jax.Array  # int32, of each row in the order of its tokens; 0 where it has no more
    position_BT: jax.Array  # int32, of the new tokens in their rows
    mask_BT: jax.Array  # bool, False for padding

    @property
    def length_B(self) -> jax.Array:
        """int32 tokens of each row, the new ones included; 0 for a row of padding."""
        return jnp.max(jnp.where(self.mask_BT, self.position_BT + 1, 0), axis=1)


class PagedCache(NamedTuple):
    """What MLA keeps of the tokens, of a stack of layers: a leading layer dim before Z."""

    latent_ZSL: jax.Array  # after its norm: float32, bits of bfloat16, or of E4M3 with scales
    k_rope_ZSR: jax.Array  # rotated, shared by all heads: float32 or bits of bfloat16
    scale_ZCS: jax.Array | None  # float32, of 128 latent numbers; they multiply

    @classmethod
    def zeros(
        cls, layers: int, pages: int, page_tokens: int, latent: int, rope: int, dtype: str
    ) -> "PagedCache":
        """An empty cache; `dtype` is 'float32', 'bfloat16' or 'fp8' (the rope key: bfloat16)."""
        latent_bits, rope_bits = {
            "float32": (jnp.float32, jnp.float32),
            "bfloat16": (jnp.uint16, jnp.uint16),
            "fp8": (jnp.uint8, jnp.uint16),
        }[dtype]
        shape = layers, pages, page_tokens
        scales = None
        if dtype == "fp8":
            scales = jnp.zeros((layers, pages, -(-latent // BLOCK), page_tokens), jnp.float32)
        return cls(
            jnp.zeros((*shape, latent), latent_bits), jnp.zeros((*shape, rope), rope_bits), scales
        )

    def written(self, layer: jax.Array, paging: Paging, new: LatentCache) -> "PagedCache":
        """The cache with the new tokens in one layer."""
        page_tokens = self.latent_ZSL.shape[-2]
        page_BT = jnp.take_along_axis(paging.pages_BZ, paging.position_BT // page_tokens, axis=1)
        page_BT = jnp.where(paging.mask_BT, page_BT, 0)
        where = layer, page_BT, paging.position_BT % page_tokens
        latent_BTL, scale_ZCS = new.latent_BSL, self.scale_ZCS
        if scale_ZCS is not None:
            rows, width = latent_BTL.shape[:2], latent_BTL.shape[-1]
            latent, scale = quantize_tiles_reference(latent_BTL.reshape(-1, width))
            latent_BTL = latent.reshape(*rows, width)
            there = layer, page_BT, slice(None), where[-1]
            scale_ZCS = scale_ZCS.at[there].set(scale.reshape(*rows, -1))
        return PagedCache(
            self.latent_ZSL.at[where].set(_bits(latent_BTL, self.latent_ZSL.dtype)),
            self.k_rope_ZSR.at[where].set(_bits(new.k_rope_BSR, self.k_rope_ZSR.dtype)),
            scale_ZCS,
        )

    def values(self) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Latents or their codes, rope keys, and scales of codes, in the formats that they have."""
        return _values(self.latent_ZSL), _values(self.k_rope_ZSR), self.scale_ZCS

    def read(self, layer: jax.Array, pages_BZ: jax.Array, dtype: jnp.dtype) -> LatentCache:
        """The tokens of some pages of each row, one page after the other, in one layer."""
        rows = pages_BZ.shape[0]

        def tokens(x_BZSX):
            return _values(x_BZSX.reshape(rows, -1, x_BZSX.shape[-1]))

        latent_BSL = tokens(self.latent_ZSL[layer, pages_BZ])
        if self.scale_ZCS is not None:
            scale_BSC = tokens(jnp.swapaxes(self.scale_ZCS[layer, pages_BZ], 2, 3))
            scale_BSL = jnp.repeat(scale_BSC, BLOCK, axis=-1)[..., : latent_BSL.shape[-1]]
            latent_BSL = latent_BSL.astype(jnp.float32) * scale_BSL
        k_rope_BSR = tokens(self.k_rope_ZSR[layer, pages_BZ])
        return LatentCache(latent_BSL.astype(dtype), k_rope_BSR.astype(dtype))


def _bits(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """x as an array of `dtype` stores it."""
    if dtype.name not in _FORMAT_OF_BITS:
        return x.astype(dtype)
    return jax.lax.bitcast_convert_type(x.astype(_FORMAT_OF_BITS[dtype.name]), dtype)


def _values(stored: jax.Array) -> jax.Array:
    """What `_bits` stored."""
    if stored.dtype.name not in _FORMAT_OF_BITS:
        return stored
    return jax.lax.bitcast_convert_type(stored, _FORMAT_OF_BITS[stored.dtype.name])


def block_tokens(num_new: int) -> int:
    """Cached tokens of each row to attend to at once, for that many new tokens together.

    More for few, where an iteration takes longer than its work; for others not so many that their
    scores leave a GPU's cache.
    """
    return min(max(32768 // num_new, 512), 2048)


def paged_attention(
    cache: PagedCache,
    layer: jax.Array,
    paging: Paging,
    scores: Callable[[LatentCache], tuple[jax.Array, Any]],
    weigh: Callable[[jax.Array, Any], jax.Array],
    *,
    num_heads: int,
    width: int,
    dtype: jnp.dtype,
) -> jax.Array:
    """Causal softmax attention of the new tokens to their rows, by online softmax over blocks.

    As many blocks are visited as the longest row needs, so one program serves every length. Blocks
    that lie wholly after a row's tokens change nothing of it, to the last bit.

    Args:
      scores: latents of a block -> scaled float32 scores [B, N, T, S] and what `weigh` takes.
      weigh: float32 weights [B, N, T, S] and that -> float32 [B, N, T, H].
      num_heads, width: N and H.
      dtype: of the latents that `scores` gets.

    Returns:
      [B, T, N, H] in `dtype`; of padding, something finite.
    """
    page_tokens = cache.latent_ZSL.shape[-2]
    tokens = block_tokens(paging.position_BT.size)
    block_pages = min(max(1, tokens // page_tokens), paging.pages_BZ.shape[1])
    num_tokens = block_pages * page_tokens
    missing = -paging.pages_BZ.shape[1] % block_pages
    pages_BZ = jnp.pad(paging.pages_BZ, ((0, 0), (0, missing)))
    length_B = paging.length_B
    num_blocks = jnp.maximum(1, -(-jnp.max(length_B) // num_tokens))

    def block(i, carry):
        o_BNTH, total_BNT, maximum_BNT = carry
        pages = jax.lax.dynamic_slice_in_dim(pages_BZ, i * block_pages, block_pages, axis=1)
        position_S = i * num_tokens + jnp.arange(num_tokens)
        # What earlier owners left behind could be NaN, which a weight of 0 would not silence.
        written_BS1 = (position_S < length_B[:, None])[..., None]
        latents = cache.read(layer, pages, dtype)
        latents = jax.tree.map(lambda x: jnp.where(written_BS1, x, jnp.zeros((), dtype)), latents)
        scores_BNTS, values = scores(latents)
        visible_BTS = position_S <= paging.position_BT[..., None]
        scores_BNTS = jnp.where(visible_BTS[:, None], scores_BNTS, -jnp.inf)
        # Position 0 is visible to all, so that no maximum is infinite after the first block.
        new_BNT = jnp.maximum(maximum_BNT, scores_BNTS.max(-1))
        p_BNTS = jnp.exp(scores_BNTS - new_BNT[..., None])
        rescale_BNT = jnp.exp(maximum_BNT - new_BNT)
        o_BNTH = o_BNTH * rescale_BNT[..., None] + weigh(p_BNTS, values)
        return o_BNTH, total_BNT * rescale_BNT + p_BNTS.sum(-1), new_BNT

    rows = paging.position_BT.shape[0], num_heads, paging.position_BT.shape[1]
    initial = (
        jnp.zeros((*rows, width), jnp.float32),
        jnp.zeros(rows, jnp.float32),
        jnp.full(rows, -jnp.inf, jnp.float32),
    )
    o_BNTH, total_BNT, _ = jax.lax.fori_loop(0, num_blocks, block, initial)
    return jnp.swapaxes(o_BNTH / total_BNT[..., None], 1, 2).astype(dtype)
