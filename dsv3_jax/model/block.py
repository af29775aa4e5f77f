"""The block: x <- x + MLA(norm_a(x)); x <- x + FFN(norm_f(x)) (spec §1), and what it recomputes.

Shape letters: B batch, T tokens, D width, S cached tokens.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.cache import LatentCache
from dsv3_jax.model.layers import RMSNorm
from dsv3_jax.model.mla import MLA
from dsv3_jax.model.moe import FeedForward, MoE
from dsv3_jax.model.paged_cache import PagedCache, Paging
from dsv3_jax.model.rope import CosSin
from dsv3_jax.model.router import RouterStats
from dsv3_jax.model.runtime import Runtime
from dsv3_jax.parallel.context import shard_tokens

# What the 'paper' policy keeps (spec §5.5) beside the block's input: the latents before their
# norms, the attention's output (with its log-sum-exp, so its forward is not run again), the input
# of norm_f, the routing, the rows that the experts received, and the inputs of SwiGLU. RMSNorm
# outputs, q, k, v and SwiGLU products are recomputed. In FP8 the attention's output is kept in
# E5M6, the received rows (once, not in the slots of experts) and the inputs of SwiGLU in E4M3,
# under the same names; the inputs of norms stay bfloat16, and codes of norm outputs are made again.
_KEPT_NAMES = (
    "q_latent",
    "kv_latent",
    "attention_out",
    "attention_lse",
    "attention_residual",
    "routing",
    "expert_in",
    "w13_out",
)


def _keeps_cudnn(primitive, *_, **__) -> bool:
    # cuDNN's attention names nothing; its forward primitive returns the output and the log-sum-exp.
    return primitive.name.startswith("dot_product_attention_fwd")


def remat(function: Callable, runtime: Runtime, *, in_scan: bool) -> Callable:
    """Wraps a block function so that its backward pass recomputes what `runtime.remat` drops.

    'none' keeps everything, 'paper' what spec §5.5 keeps, 'full' the inputs alone.

    Args:
      in_scan: the function is the body of `lax.scan`, which needs no guard against the compiler
        merging the recomputation with the first pass.
    """
    if runtime.remat == "none":
        return function
    kept = None
    if runtime.remat == "paper":
        policies = jax.checkpoint_policies
        kept = policies.save_only_these_names(*_KEPT_NAMES)
        if runtime.fp8 is None:  # else its output is named, in E5M6
            kept = policies.save_from_both_policies(kept, _keeps_cudnn)
    return jax.checkpoint(function, policy=kept, prevent_cse=not in_scan)


class BlockContext(NamedTuple):
    """The keyword arguments of a block that all blocks share; see `Block.__call__`."""

    cos_sin: CosSin
    segments_BT: jax.Array | None = None
    token_mask_BT: jax.Array | None = None


class Block(nnx.Module):
    """One layer; `moe` picks the MoE or the dense FFN.

    Calling it trains, `prefill` also returns the latents to cache, `decode` reads a cache, `paged`
    a server's.
    """

    def __init__(self, config: ModelConfig, *, moe: bool, runtime: Runtime, rngs: nnx.Rngs):
        c = config
        self.moe, self.runtime = moe, runtime
        self.norm_a = RMSNorm(c.width, c.norm_epsilon)
        self.attn = MLA(c, runtime=runtime, rngs=rngs)
        self.norm_f = RMSNorm(c.width, c.norm_epsilon)
        if moe:
            self.ffn = MoE(c, runtime=runtime, rngs=rngs)
        else:
            self.ffn = FeedForward(rngs, c.width, c.dense_ffn_width, c.init_std, runtime)

    def __call__(
        self,
        x_BTD: jax.Array,
        *,
        cos_sin: CosSin,
        segments_BT: jax.Array | None = None,
        token_mask_BT: jax.Array | None = None,
    ) -> tuple[jax.Array, RouterStats | None]:
        """Returns the block's output and, of an MoE block, its routing statistics.

        Args:
          segments_BT: int32 documents, when attention must not cross them.
          token_mask_BT: False marks padding, which the statistics leave out.
        """
        attended = self.attn(self.norm_a(x_BTD), cos_sin=cos_sin, segments_BT=segments_BT)
        return self._feed_forward(x_BTD + attended, token_mask_BT)

    def prefill(self, x_BTD: jax.Array, *, cos_sin: CosSin) -> tuple[jax.Array, LatentCache]:
        """As `__call__` without statistics; also returns the latents of the T tokens."""
        u_BTD = self.norm_a(x_BTD)
        latents = self.attn.latents(u_BTD, cos_sin)
        attended = self.attn.naive(u_BTD, latents, cos_sin)
        return self._feed_forward(x_BTD + attended)[0], latents

    def decode(
        self,
        x_BTD: jax.Array,
        cache: LatentCache,
        layer: jax.Array,
        position: jax.Array,
        *,
        cos_sin: CosSin,
    ) -> tuple[jax.Array, LatentCache]:
        """One new token (T = 1) at `position`, in the absorbed form.

        Args:
          cache: of a stack of layers, of which this one is number `layer`.

        Returns:
          The output and the cache with the new token in it.
        """
        u_BTD = self.norm_a(x_BTD)
        cache = cache.written(layer, position, self.attn.latents(u_BTD, cos_sin))
        visible_TS = jnp.arange(cache.latent_BSL.shape[-2])[None] <= position
        attended = self.attn.absorbed(u_BTD, cache.layer(layer), cos_sin, visible_TS)
        return self._feed_forward(x_BTD + attended)[0], cache

    def paged(
        self,
        x_BTD: jax.Array,
        cache: PagedCache,
        layer: jax.Array,
        paging: Paging,
        *,
        cos_sin: CosSin,
        absorbed: bool,
    ) -> tuple[jax.Array, PagedCache, RouterStats | None]:
        """New tokens of rows of any lengths, in pages. Padding goes to no expert.

        Args:
          cache: of a stack of layers, of which this one is number `layer`.
          absorbed: the form of attention; the naive one is cheaper for many new tokens a row.

        Returns:
          The output, the cache with the new tokens in it, and the statistics without padding.
        """
        cache = self.written(x_BTD, cache, layer, paging, cos_sin)
        y_BTD, stats = self.after_writing(
            x_BTD, cache, layer, paging, cos_sin=cos_sin, absorbed=absorbed
        )
        return y_BTD, cache, stats

    def written(
        self,
        x_BTD: jax.Array,
        cache: PagedCache,
        layer: jax.Array,
        paging: Paging,
        cos_sin: CosSin,
    ) -> PagedCache:
        """The first half of `paged`: the cache with the new tokens in it."""
        return cache.written(layer, paging, self.attn.latents(self.norm_a(x_BTD), cos_sin))

    def after_writing(
        self,
        x_BTD: jax.Array,
        cache: PagedCache,
        layer: jax.Array,
        paging: Paging,
        *,
        cos_sin: CosSin,
        absorbed: bool,
    ) -> tuple[jax.Array, RouterStats | None]:
        """The second half: the output and the statistics. Some of the rows may do."""
        attend = self.attn.absorbed_paged if absorbed else self.attn.naive_paged
        x_BTD = x_BTD + attend(self.norm_a(x_BTD), cache, layer, paging, cos_sin)
        return self._feed_forward(x_BTD, paging.mask_BT, drop_masked=True)

    def _feed_forward(self, x_BTD, token_mask_BT=None, drop_masked=False):
        x_BTD = checkpoint_name(x_BTD, "attention_residual")
        u_BTD = self.norm_f(x_BTD)
        if self.moe:
            y_BTD, stats = self.ffn(u_BTD, token_mask_BT, drop_masked=drop_masked)
        else:
            y_BTD, stats = self.ffn(u_BTD), None
        return shard_tokens(x_BTD + y_BTD, self.runtime.mesh), stats
