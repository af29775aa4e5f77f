"""Bytes a device needs for a run: exact for the state, rough for the activations."""

import math
from dataclasses import dataclass, fields

from dsv3_jax.config import Config, ModelConfig
from dsv3_jax.parallel.mesh import abstract_mesh
from dsv3_jax.parallel.rules import optimizer_sharding, weight_sharding
from dsv3_jax.plan.parameters import weights
from dsv3_jax.train.losses import LOGITS_BUDGET

_ITEMSIZE = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes on the fullest device."""

    parameters: int  # float32 masters and router biases, as the layout shards them
    gradients: int  # float32, sharded like the parameters until they are reduced
    moments: int  # AdamW m and v, ZeRO-1 shards
    activations: int  # kept for the backward pass of one micro-batch, by recomputation policy
    logits: int  # one chunk of the cross-entropy: float32 logits and their gradient

    @property
    def total(self) -> int:
        return sum(getattr(self, item.name) for item in fields(self))


def _block_widths(model: ModelConfig, ffn_width: int, copies: int) -> tuple[int, int]:
    """Numbers a token leaves behind in one block: (kept by 'paper', kept by 'none').

    'paper' keeps the inputs of linears and of the gated product; norm outputs, latent
    up-projections and gated products come again in the backward pass (spec §5.5). The FFN runs
    on `copies` rows of a token, which the first linear of routed experts keeps as its input.
    """
    queries = model.num_heads * model.qk_head_dim
    latents = (model.q_latent_dim or 0) + model.kv_latent_dim
    kept = 2 * model.width + latents + model.qk_rope_head_dim + model.num_heads * model.v_head_dim
    kept += copies * 2 * ffn_width
    recomputed = 2 * model.width + latents + 2 * queries + model.num_heads * model.v_head_dim
    recomputed += copies * ffn_width
    return kept, kept + recomputed


def _activation_width(model: ModelConfig, remat: str) -> int:
    """Numbers a token leaves behind in the whole model, one block's working set included."""
    ffn_copies = model.experts_per_token + model.num_shared_experts
    dense = _block_widths(model, model.dense_ffn_width, 1)
    moe = tuple(
        width + model.experts_per_token * model.width + 2 * model.num_experts
        for width in _block_widths(model, model.expert_ffn_width, ffn_copies)
    )

    def kept(block: tuple[int, int]) -> int:
        return {"full": model.width, "paper": block[0], "none": block[1]}[remat]

    working_set = 0 if remat == "none" else max(dense[1], moe[1])
    moe_blocks = model.num_moe_layers + model.mtp_depth
    return model.num_dense_layers * kept(dense) + moe_blocks * kept(moe) + working_set


def device_memory(config: Config) -> MemoryEstimate:
    """Estimates what one device holds while training `config`.

    Parameters, gradients and moments follow the layout's shardings to the byte. Activations count
    balanced routing and leave out the compiler's temporaries and communication buffers, so keep
    a margin.
    """
    parallel = config.parallel
    mesh = abstract_mesh(config.parallel)
    moment_bytes = 2 * _ITEMSIZE[config.precision.moments]
    parameters = gradients = moments = 0
    for weight in weights(config.model):
        sharding = weight_sharding(mesh, weight.shape, weight.axes, parallel.layout)
        shard = 4 * math.prod(sharding.shard_shape(weight.shape))
        parameters += shard
        if weight.trained:
            gradients += shard
            optimizer = optimizer_sharding(sharding, weight.shape)
            moments += moment_bytes * math.prod(optimizer.shard_shape(weight.shape))
    tokens = config.microbatch_sequences * config.data.sequence_length
    tokens_a_device = math.ceil(tokens / (parallel.data * parallel.expert))
    width = _activation_width(config.model, config.precision.remat)
    return MemoryEstimate(
        parameters=parameters,
        gradients=gradients,
        moments=moments,
        activations=tokens_a_device * width * _ITEMSIZE[config.precision.activations],
        logits=2 * 4 * min(tokens_a_device * config.model.vocab_size, LOGITS_BUDGET),
    )
