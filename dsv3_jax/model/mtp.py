"""Multi-token prediction (spec §4): depth k adds the embedding of token i + k to the state at i.

Shape letters: B batch, T tokens, D width. Sequences keep their length T at every depth: the last k
positions are padding. Attention is causal, so they reach no other position.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.block import Block, remat
from dsv3_jax.model.layers import Linear, RMSNorm
from dsv3_jax.model.paged_cache import PagedCache, Paging
from dsv3_jax.model.rope import CosSin
from dsv3_jax.model.router import RouterStats
from dsv3_jax.model.runtime import Runtime
from dsv3_jax.parallel.context import balanced


class MTP(nnx.Module):
    """One module; embedding table and head are the main model's."""

    def __init__(self, config: ModelConfig, *, runtime: Runtime, rngs: nnx.Rngs):
        c = config
        self.enorm = RMSNorm(c.width, c.norm_epsilon)
        self.hnorm = RMSNorm(c.width, c.norm_epsilon)
        self.proj = Linear(
            rngs, 2 * c.width, c.width, (None, "embed"), c.init_std, runtime, "mtp_proj"
        )
        self.block = Block(c, moe=True, runtime=runtime, rngs=rngs)
        self.out_norm = RMSNorm(c.width, c.norm_epsilon)

    def __call__(
        self,
        hidden_BTD: jax.Array,
        ahead_BTD: jax.Array,
        *,
        cos_sin: CosSin,
        segments_BT: jax.Array | None,
        token_mask_BT: jax.Array,
    ) -> tuple[jax.Array, jax.Array, RouterStats]:
        """From h^{k-1}_i and Emb(t_{i+k}): h^k_i, the same after the output norm, statistics."""
        h_BTD, stats = self.block(
            self._joined(hidden_BTD, ahead_BTD),
            cos_sin=cos_sin,
            segments_BT=segments_BT,
            token_mask_BT=token_mask_BT,
        )
        return h_BTD, self.out_norm(h_BTD), stats

    def paged(
        self,
        hidden_BTD: jax.Array,
        ahead_BTD: jax.Array,
        cache: PagedCache,
        layer: jax.Array,
        paging: Paging,
        *,
        cos_sin: CosSin,
        absorbed: bool,
    ) -> tuple[jax.Array, jax.Array, PagedCache, RouterStats]:
        """As calling it, with a cache; see `Block.paged`."""
        h_BTD, cache, stats = self.block.paged(
            self._joined(hidden_BTD, ahead_BTD),
            cache,
            layer,
            paging,
            cos_sin=cos_sin,
            absorbed=absorbed,
        )
        return h_BTD, self.out_norm(h_BTD), cache, stats

    def _joined(self, hidden_BTD, ahead_BTD):
        # [embedding ; hidden], the order of the released weights (spec §4, trap 1).
        both = jnp.concatenate([self.enorm(ahead_BTD), self.hnorm(hidden_BTD)], axis=-1)
        return self.proj(both)


def predicted_mask(num_tokens: int, depth: int, segments_BT: jax.Array | None) -> jax.Array:
    """Bool [1, T] or [B, T]: positions whose token i + depth exists, in the same document if given.

    Padding, document 0, is out too.
    """
    mask_BT = (jnp.arange(num_tokens) < num_tokens - depth)[None]
    if segments_BT is not None:
        ahead_BT = jnp.roll(segments_BT, -depth, axis=1)
        mask_BT = mask_BT & (ahead_BT == segments_BT) & (segments_BT > 0)
    return mask_BT


def run_modules(
    modules: MTP,
    hidden_BTD: jax.Array,
    embedding_BTD: jax.Array,
    *,
    config: ModelConfig,
    runtime: Runtime,
    cos_sin: CosSin,
    segments_BT: jax.Array | None,
) -> tuple[list[jax.Array], RouterStats]:
    """Runs the stacked modules one after the other.

    Args:
      hidden_BTD: h^0, the main model's state. No gradient is stopped (spec §4, trap 5). Like
        `cos_sin` and `segments_BT` in balanced order (parallel/context.py).
      embedding_BTD: embeddings of the T input tokens, in natural order: depths look ahead in it.
      runtime: its `remat` is what the backward pass recomputes, see `block.remat`.

    Returns:
      The state of each depth, after its output norm and ready for the head (the last k positions of
      depth k mean nothing; in balanced order), and the statistics with a leading dim of depths.
    """
    graphdef, state = nnx.split(modules)
    mesh = runtime.mesh
    natural_segments = None if segments_BT is None else balanced(segments_BT, mesh)
    batch, num_tokens, _ = embedding_BTD.shape
    outputs, all_stats = [], []
    for depth in range(1, config.mtp_depth + 1):
        mask_BT = balanced(predicted_mask(num_tokens, depth, natural_segments), mesh)
        mask_BT = jnp.broadcast_to(mask_BT, (batch, num_tokens))

        def module(module_state, hidden_BTD, ahead_BTD, mask_BT=mask_BT):
            return nnx.merge(graphdef, module_state)(
                hidden_BTD,
                ahead_BTD,
                cos_sin=cos_sin,
                segments_BT=segments_BT,
                token_mask_BT=mask_BT,
            )

        module_state = jax.tree.map(lambda x, index=depth - 1: x[index], state)
        ahead_BTD = balanced(jnp.roll(embedding_BTD, -depth, axis=1), mesh)
        h_BTD, output_BTD, stats = remat(module, runtime, in_scan=False)(
            module_state, hidden_BTD, ahead_BTD
        )
        hidden_BTD = output_BTD if config.mtp_hidden == "post_norm" else h_BTD
        outputs.append(output_BTD)
        all_stats.append(stats)
    return outputs, jax.tree.map(lambda *depths: jnp.stack(depths), *all_stats)
