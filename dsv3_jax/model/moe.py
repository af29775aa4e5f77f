"""DeepSeekMoE (spec §3): a shared expert that sees every token, and routed experts.

Shape letters: `shapes.md`. `w13` holds the gate (W1) columns first, then the up (W3) columns.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.layers import Linear, parameter
from dsv3_jax.model.router import Router, RouterStats
from dsv3_jax.model.runtime import Runtime
from dsv3_jax.parallel.context import flat_tokens, unflat_tokens
from dsv3_jax.parallel.expert_parallel import apply_experts, on_every_shard
from dsv3_jax.parallel.grouped_matmul import best_implementation, grouped_matmul
from dsv3_jax.parallel.permute import collect, sort_pairs, spread
from dsv3_jax.precision.fp8_experts import fp8_experts
from dsv3_jax.precision.fp8_ffn import fp8_swiglu_linear
from dsv3_jax.precision.fp8_weight import as_fp8
from pallas_kernels.quantize.reference import gated


# Its inputs are kept alone: five float32 arrays lie between them and the product.
@partial(jax.checkpoint, prevent_cse=False)
def gated_silu(h_2F: jax.Array, weight_1: jax.Array | None = None) -> jax.Array:
    """silu(gate) * up [* weight], float32 inside: [..., 2F] -> [..., F] in h's dtype (spec §1)."""
    gate_F, up_F = jnp.split(h_2F.astype(jnp.float32), 2, axis=-1)
    return gated(gate_F, up_F, weight_1).astype(h_2F.dtype)


class FeedForward(nnx.Module):
    """W2 (silu(W1 x) * W3 x): dense blocks and the shared expert. [..., D] -> [..., D]."""

    def __init__(self, rngs: nnx.Rngs, width: int, ffn_width: int, std: float, runtime: Runtime):
        self.w13 = Linear(rngs, width, 2 * ffn_width, ("embed", "ffn"), std, runtime, "w13")
        self.w2 = Linear(rngs, ffn_width, width, ("ffn", "embed"), std, runtime, "w2")
        self.runtime = runtime

    def __call__(self, x_D: jax.Array) -> jax.Array:
        h_2F, recipe = self.w13(x_D), self.runtime.fp8
        if recipe is not None:
            w2 = as_fp8(self.w2.kernel[...], recipe)
            return fp8_swiglu_linear(h_2F, w2, recipe, mesh=self.runtime.mesh)
        return self.w2(gated_silu(checkpoint_name(h_2F, "w13_out")))


class Experts(nnx.Module):
    """The weights of the E routed experts."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        num_experts, width, ffn = config.num_experts, config.width, config.expert_ffn_width
        axes_in = ("expert", "expert_embed", "expert_ffn")
        axes_out = ("expert", "expert_ffn", "expert_embed")
        self.w13 = parameter(rngs, (num_experts, width, 2 * ffn), axes_in, config.init_std)
        self.w2 = parameter(rngs, (num_experts, ffn, width), axes_out, config.init_std)


class ReplicaTable(nnx.Variable):
    """int32 numbers that tell where copies of experts are; no gradient."""


class Replicas(nnx.Module):
    """Where an expert may be in several slots, for balance at inference (spec §11.1).

    The weights of `Experts` are then those of R slots; see `serve/placement.py`.
    """

    def __init__(self, slots_EC: jax.Array, counts_E: jax.Array):
        # Of the copies of each expert; -1 after the last. C is R - E + 1, the most there can be.
        self.slots = ReplicaTable(slots_EC)
        self.counts = ReplicaTable(counts_E)

    def choose(self, ids_XK: jax.Array) -> jax.Array:
        """The slot for each choice of an expert: tokens one after the other take another copy.

        Args:
          ids_XK: int32 experts; E for none, which becomes R.
        """
        num_slots = sum(self.slots.shape) - 1
        counts_XK = self.counts[...].at[ids_XK].get(mode="fill", fill_value=1)
        # By the expert too: else the first token of a small batch would take all first copies.
        copy_XK = (jnp.arange(len(ids_XK), dtype=jnp.int32)[:, None] + ids_XK) % counts_XK
        return self.slots[...].at[ids_XK, copy_XK].get(mode="fill", fill_value=num_slots)


def routed_ffn(
    x_XD: jax.Array,
    ids_XK: jax.Array,
    weights_XK: jax.Array,
    w13_ED2F: jax.Array,
    w2_EFD: jax.Array,
    *,
    runtime: Runtime,
    max_slots: int | None = None,
) -> jax.Array:
    """sum_k weight_k FFN_k(x) over the experts given (spec §3, step 6): [X, D] -> [X, D].

    The weight multiplies the SwiGLU product before the down-projection, so every later sum (over a
    row's experts here, over devices in combine) is plain.

    Args:
      ids_XK: int32 row of `w13`, different within a row; E for a choice that is not among them.
      weights_XK: float32.
      max_slots: pairs of a row and an expert that there is room for; None: for any.
    """
    routes = sort_pairs(ids_XK, w13_ED2F.shape[0], max_slots)
    rows, pairs, sizes_E = checkpoint_name(routes, "routing")

    def matmul(x_MI: jax.Array, w_EIO: jax.Array) -> jax.Array:
        implementation = runtime.grouped_matmul or best_implementation(
            runtime.platform, len(x_MI), w_EIO.shape, runtime.compute_dtype
        )
        return grouped_matmul(
            x_MI,
            w_EIO,
            sizes_E,
            compute_dtype=runtime.compute_dtype,
            implementation=implementation,
        )

    x_MD = checkpoint_name(spread(x_XD, rows), "expert_in")
    weight_M1 = spread(weights_XK.reshape(-1, 1), pairs)
    h_M2F = checkpoint_name(matmul(x_MD, w13_ED2F), "w13_out")
    return collect(matmul(gated_silu(h_M2F, weight_M1), w2_EFD), rows)


class MoE(nnx.Module):
    """y = FFN_shared(u) + sum_k g_k FFN_k(u) (spec §3, step 6). The shared expert has weight 1."""

    def __init__(self, config: ModelConfig, *, runtime: Runtime, rngs: nnx.Rngs):
        self.router = Router(config, runtime=runtime, rngs=rngs)
        self.experts = Experts(config, rngs=rngs)
        self.replicas: Replicas | None = None
        if config.num_shared_experts:
            shared_width = config.num_shared_experts * config.expert_ffn_width
            self.shared = FeedForward(rngs, config.width, shared_width, config.init_std, runtime)
        self.config = config
        self.runtime = runtime

    def __call__(
        self,
        u_BTD: jax.Array,
        token_mask_BT: jax.Array | None = None,
        *,
        drop_masked: bool = False,
    ) -> tuple[jax.Array, RouterStats]:
        """u_BTD -> y_BTD in the compute dtype, and the load.

        The mask touches only the load; with `drop_masked`, masked tokens go to no routed expert.
        """
        ids_BTK, weights_BTK, stats = self.router(u_BTD, token_mask_BT)
        if drop_masked:
            ids_BTK = jnp.where(token_mask_BT[..., None], ids_BTK, self.config.num_experts)
        mesh = self.runtime.mesh
        tokens = [flat_tokens(x, mesh) for x in (u_BTD, ids_BTK, weights_BTK)]
        y_XD, overflow = self._routed(*tokens)
        y_BTD = unflat_tokens(y_XD, u_BTD.shape[1], mesh)
        if self.config.num_shared_experts:
            y_BTD = y_BTD + self.shared(u_BTD)
        return y_BTD, stats._replace(overflow=overflow.astype(jnp.float32))

    def _routed(self, u_XD, ids_XK, weights_XK):
        experts, runtime = (self.experts.w13[...], self.experts.w2[...]), self.runtime
        if self.replicas is not None:
            ids_XK = self.replicas.choose(ids_XK)
        if runtime.fp8 is None:
            function, apply = partial(routed_ffn, runtime=runtime), apply_experts
        else:
            experts = [as_fp8(weight, runtime.fp8) for weight in experts]
            function, apply = partial(fp8_experts, recipe=runtime.fp8), on_every_shard
        return apply(function, u_XD, ids_XK, weights_XK, *experts, runtime=runtime)
