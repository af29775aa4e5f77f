"""Multi-head latent attention (spec §2): the naive form for training and prefill, the absorbed
form for decoding, of the same weights.

Shape letters: B batch, T query tokens, S key tokens, D width, N heads, Q query latent, L KV
latent, P nope, R rope, H value head.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.config import ModelConfig
from dsv3_jax.model import decode_hopper, rope
from dsv3_jax.model.attention import mla_attention
from dsv3_jax.model.attention_context import context_attention
from dsv3_jax.model.attention_fp8 import attend_and_project
from dsv3_jax.model.cache import LatentCache
from dsv3_jax.model.layers import Linear, RMSNorm
from dsv3_jax.model.paged_cache import PagedCache, Paging, paged_attention
from dsv3_jax.model.runtime import Runtime
from dsv3_jax.parallel.context import num_context_shards, whole_sequences


class MLA(nnx.Module):
    """[B, T, D] -> [B, T, D], causal. `config.q_latent_dim=None` leaves the query latent out."""

    def __init__(self, config: ModelConfig, *, runtime: Runtime, rngs: nnx.Rngs):
        c, std, eps = config, config.init_std, config.norm_epsilon
        self.config, self.runtime = config, runtime
        D, Q, L, R = c.width, c.q_latent_dim, c.kv_latent_dim, c.qk_rope_head_dim
        queries = c.num_heads * c.qk_head_dim
        keys_values = c.num_heads * (c.qk_nope_head_dim + c.v_head_dim)
        outputs = c.num_heads * c.v_head_dim
        if Q is None:
            self.wq = Linear(rngs, D, queries, ("embed", "heads"), std, runtime, "wq")
        else:
            self.wq_a = Linear(rngs, D, Q, ("embed", "q_latent"), std, runtime, "wq_a")
            self.q_norm = RMSNorm(Q, eps)
            self.wq_b = Linear(rngs, Q, queries, ("q_latent", "up_heads"), std, runtime, "wq_b")
        self.wkv_a = Linear(rngs, D, L + R, ("embed", "kv_latent"), std, runtime, "wkv_a")
        self.kv_norm = RMSNorm(L, eps)
        self.wkv_b = Linear(rngs, L, keys_values, ("kv_latent", "up_heads"), std, runtime, "wkv_b")
        self.wo = Linear(rngs, outputs, D, ("heads", "embed"), std, runtime, "wo")

    @property
    def num_heads(self) -> int:
        """N, of this device."""
        return self.config.num_heads // self.runtime.num_head_shards

    def __call__(
        self, x_BTD: jax.Array, *, cos_sin: rope.CosSin, segments_BT: jax.Array | None = None
    ) -> jax.Array:
        latents, mesh = self.latents(x_BTD, cos_sin), self.runtime.mesh
        if num_context_shards(mesh, x_BTD.shape[1]) == 1:
            return self.naive(x_BTD, latents, cos_sin, segments_BT)
        # All tokens are in balanced order (parallel/context.py).
        o_BTNH = context_attention(
            *(*self.queries(x_BTD, cos_sin), latents, self.wkv_b.kernel[...]),
            scale=rope.softmax_scale(self.config),
            mesh=mesh,
            segments_BT=segments_BT,
        )
        return self.wo(o_BTNH.reshape(*o_BTNH.shape[:2], -1))

    def latents(self, x_BTD: jax.Array, cos_sin: rope.CosSin) -> LatentCache:
        """What a cache keeps of x: c^KV after its norm, and the rotated shared rope key."""
        # The names mark what recomputation keeps (block.py): latents before their norms.
        down_BTK = checkpoint_name(self.wkv_a(x_BTD), "kv_latent")
        latent_BTL, k_rope_BTR = jnp.split(down_BTK, [self.config.kv_latent_dim], axis=-1)
        return LatentCache(self.kv_norm(latent_BTL), rope.rotate(k_rope_BTR, cos_sin))

    def queries(self, x_BTD: jax.Array, cos_sin: rope.CosSin) -> tuple[jax.Array, jax.Array]:
        """Returns q^C [B, T, N, P] and the rotated q^R [B, T, N, R]."""
        c = self.config
        if c.q_latent_dim is None:
            q = self.wq(x_BTD)
        else:
            q = self.wq_b(self.q_norm(checkpoint_name(self.wq_a(x_BTD), "q_latent")))
        q = q.reshape(*q.shape[:2], self.num_heads, c.qk_head_dim)
        q_nope_BTNP, q_rope_BTNR = jnp.split(q, [c.qk_nope_head_dim], axis=-1)
        return q_nope_BTNP, rope.rotate(q_rope_BTNR, cos_sin)

    def naive(
        self,
        x_BTD: jax.Array,
        latents: LatentCache,
        cos_sin: rope.CosSin,
        segments_BT: jax.Array | None = None,
    ) -> jax.Array:
        """Keys and values are formed per head from the latents of the same tokens (S = T).

        Tokens are in natural order, and no sequence is split.
        """
        c = self.config
        q_nope_BTNP, q_rope_BTNR = self.queries(x_BTD, cos_sin)
        kv = self.wkv_b(latents.latent_BSL)
        kv = kv.reshape(*kv.shape[:2], self.num_heads, c.qk_nope_head_dim + c.v_head_dim)
        k_nope_BSNP, v_BSNH = jnp.split(kv, [c.qk_nope_head_dim], axis=-1)
        inputs = (q_nope_BTNP, q_rope_BTNR, k_nope_BSNP, latents.k_rope_BSR, v_BSNH)
        inputs = [whole_sequences(x, self.runtime.mesh) for x in inputs]
        how = dict(
            scale=rope.softmax_scale(c),
            segments_BT=segments_BT,
            implementation=self.runtime.attention,
            mesh=self.runtime.mesh,
        )
        wo, runtime = self.wo.fp8_weight(), self.runtime
        if wo is not None:
            return attend_and_project(*inputs, wo, runtime.fp8, **how)
        o_BTNH = mla_attention(*inputs, **how)
        return self.wo(o_BTNH.reshape(*o_BTNH.shape[:2], -1))

    def absorbed(
        self, x_BTD: jax.Array, cache: LatentCache, cos_sin: rope.CosSin, visible_TS: jax.Array
    ) -> jax.Array:
        """Attends in the latent space: MQA with one key of width L + R, whose value is its latent.

        Args:
          x_BTD: the new tokens; `cos_sin` are their rotations.
          cache: S tokens, the new ones included.
          visible_TS: bool, which cached tokens each new token attends to.
        """
        queries = self._latent_queries(x_BTD, cos_sin)
        scores_BNTS = self._latent_scores(*queries, cache)
        scores_BNTS = jnp.where(visible_TS, scores_BNTS, -jnp.inf)
        p_BNTS = jax.nn.softmax(scores_BNTS, axis=-1)
        o_latent_BNTL = _weighted_latents(p_BNTS, cache.latent_BSL)
        return self._latent_output(jnp.swapaxes(o_latent_BNTL, 1, 2))

    def absorbed_paged(
        self,
        x_BTD: jax.Array,
        cache: PagedCache,
        layer: jax.Array,
        paging: Paging,
        cos_sin: rope.CosSin,
    ) -> jax.Array:
        """As `absorbed`, to the rows' pages in one layer, which hold the new tokens already.

        By our kernel where it accepts the cache and the queries, else by plain XLA.
        """
        queries = self._latent_queries(x_BTD, cos_sin)
        try:
            decode_hopper.refuse(*queries, cache, self.runtime)
        except NotImplementedError:
            return self._latent_output(self._blockwise_paged(queries, cache, layer, paging))
        sigma = rope.softmax_scale(self.config)
        return self._latent_output(decode_hopper.attend(*queries, cache, layer, paging, sigma))

    def _blockwise_paged(
        self, queries: tuple[jax.Array, jax.Array], cache: PagedCache, layer, paging: Paging
    ) -> jax.Array:
        def scores(latents: LatentCache):
            return self._latent_scores(*queries, latents), latents.latent_BSL

        return paged_attention(
            *(cache, layer, paging, scores, _weighted_latents),
            num_heads=self.num_heads,
            width=self.config.kv_latent_dim,
            dtype=self.runtime.compute_dtype,
        )

    def naive_paged(
        self,
        x_BTD: jax.Array,
        cache: PagedCache,
        layer: jax.Array,
        paging: Paging,
        cos_sin: rope.CosSin,
    ) -> jax.Array:
        """As `absorbed_paged` by the naive form, which is cheaper for many new tokens."""
        c = self.config
        q_nope_BTNP, q_rope_BTNR = self.queries(x_BTD, cos_sin)

        def scores(latents: LatentCache):
            kv = self.wkv_b(latents.latent_BSL)
            kv = kv.reshape(*kv.shape[:2], self.num_heads, c.qk_nope_head_dim + c.v_head_dim)
            k_nope_BSNP, v_BSNH = jnp.split(kv, [c.qk_nope_head_dim], axis=-1)
            scores_BNTS = _dot32("BTNP,BSNP->BNTS", q_nope_BTNP, k_nope_BSNP)
            scores_BNTS += _dot32("BTNR,BSR->BNTS", q_rope_BTNR, latents.k_rope_BSR)
            return scores_BNTS * rope.softmax_scale(c), v_BSNH

        def weigh(p_BNTS: jax.Array, v_BSNH: jax.Array) -> jax.Array:
            return _dot32("BNTS,BSNH->BNTH", p_BNTS.astype(v_BSNH.dtype), v_BSNH)

        o_BTNH = paged_attention(
            *(cache, layer, paging, scores, weigh),
            num_heads=self.num_heads,
            width=c.v_head_dim,
            dtype=self.runtime.compute_dtype,
        )
        return self._output(o_BTNH)

    def _output(self, o_BTNH: jax.Array) -> jax.Array:
        y_BTD = self.wo(o_BTNH.reshape(*o_BTNH.shape[:2], -1))
        return y_BTD if self.runtime.num_head_shards == 1 else jax.lax.psum(y_BTD, "tensor")

    def _up_projections(self) -> tuple[jax.Array, jax.Array]:
        """W^UK [L, N, P] and W^UV [L, N, H]."""
        c = self.config
        wkv_b = self.wkv_b.kernel[...].astype(self.runtime.compute_dtype)
        wkv_b = wkv_b.reshape(c.kv_latent_dim, self.num_heads, c.qk_nope_head_dim + c.v_head_dim)
        return tuple(jnp.split(wkv_b, [c.qk_nope_head_dim], axis=-1))

    def _latent_queries(self, x_BTD, cos_sin) -> tuple[jax.Array, jax.Array]:
        """q~ [B, T, N, L], which meets latents, and q^R [B, T, N, R]."""
        w_uk_LNP, _ = self._up_projections()
        q_nope_BTNP, q_rope_BTNR = self.queries(x_BTD, cos_sin)
        q_latent_BTNL = _dot32("BTNP,LNP->BTNL", q_nope_BTNP, w_uk_LNP)
        return q_latent_BTNL.astype(self.runtime.compute_dtype), q_rope_BTNR

    def _latent_scores(self, q_latent_BTNL, q_rope_BTNR, latents: LatentCache) -> jax.Array:
        scores_BNTS = _dot32("BTNL,BSL->BNTS", q_latent_BTNL, latents.latent_BSL)
        scores_BNTS += _dot32("BTNR,BSR->BNTS", q_rope_BTNR, latents.k_rope_BSR)
        # sigma is that of the naive width P + R, never of L + R (spec §2).
        return scores_BNTS * rope.softmax_scale(self.config)

    def _latent_output(self, o_latent_BTNL: jax.Array) -> jax.Array:
        dtype = self.runtime.compute_dtype
        _, w_uv_LNH = self._up_projections()
        o_BTNH = _dot32("BTNL,LNH->BTNH", o_latent_BTNL.astype(dtype), w_uv_LNH).astype(dtype)
        return self._output(o_BTNH)


def _dot32(subscripts: str, *operands: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, *operands, preferred_element_type=jnp.float32)


def _weighted_latents(p_BNTS: jax.Array, latent_BSL: jax.Array) -> jax.Array:
    """float32 [B, N, T, L]: weights are rounded to the latents' format."""
    return _dot32("BNTS,BSL->BNTL", p_BNTS.astype(latent_BSL.dtype), latent_BSL)
