"""Bytes a device needs for a run: exact for the state, rough for the activations."""

import math
from dataclasses import dataclass, fields

from dsv3_jax.config import Config, ModelConfig, PrecisionConfig
from dsv3_jax.parallel.mesh import abstract_mesh
from dsv3_jax.parallel.rules import optimizer_sharding, weight_sharding
from dsv3_jax.plan.parameters import weights
from dsv3_jax.precision.policy import is_fp8
from dsv3_jax.train.losses import LOGITS_BUDGET

_ITEMSIZE = {"float32": 4, "bfloat16": 2}
_CODE = 1 + 4 / 128  # an E4M3 code and its share of a scale
# Bytes of a number, by `precision.compute`: activations, inputs of linears, the attention output.
_FORMATS = {"float32": (4, 4, 4), "bfloat16": (2, 2, 2), "fp8": (2, _CODE, 1.5 + 1 / 128)}


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes on the fullest device."""

    parameters: int  # float32 masters and router biases, as the layout shards them
    gradients: int  # float32, sharded like the parameters until they are reduced
    moments: int  # AdamW m and v, ZeRO-1 shards
    codes: int  # weights in FP8, in both layouts, for as long as a step; 0 without FP8
    activations: int  # kept for the backward pass of one micro-batch, by recomputation policy
    logits: int  # one chunk of the cross-entropy: float32 logits and their gradient

    @property
    def total(self) -> int:
        return sum(getattr(self, item.name) for item in fields(self))


def _block_bytes(
    model: ModelConfig, compute: str, ffn_width: int, copies: int
) -> tuple[float, float]:
    """Bytes a token leaves behind in one block: (kept by 'paper', kept by 'none').

    'paper' keeps the residual stream, latents, the inputs of linears and of the gated product; norm
    outputs, latent up-projections and gated products come again in the backward pass (spec §5.5).
    The FFN runs on `copies` rows of a token.
    """
    item, code, attention_out = _FORMATS[compute]
    outputs = model.num_heads * model.v_head_dim
    queries = model.num_heads * model.qk_head_dim
    latents = (model.q_latent_dim or 0) + model.kv_latent_dim
    kept = item * (2 * model.width + latents + model.qk_rope_head_dim)
    kept += attention_out * outputs + code * copies * 2 * ffn_width
    recomputed = code * (2 * model.width + latents + copies * ffn_width)
    recomputed += item * (2 * queries + outputs)
    return kept, kept + recomputed


def _activation_bytes(model: ModelConfig, precision: PrecisionConfig) -> float:
    """Bytes a token leaves behind in the whole model, one block's working set included."""
    compute, remat = precision.compute, precision.remat
    item, code, _ = _FORMATS[compute]
    ffn_copies = model.experts_per_token + model.num_shared_experts
    # FP8 keeps a row as it was received, the others one copy for each of its experts.
    rows = code * model.width * (1 if compute == "fp8" else model.experts_per_token)
    dense = _block_bytes(model, compute, model.dense_ffn_width, 1)
    moe = tuple(
        size + rows + item * 2 * model.num_experts
        for size in _block_bytes(model, compute, model.expert_ffn_width, ffn_copies)
    )

    def kept(block: tuple[float, float]) -> float:
        return {"full": item * model.width, "paper": block[0], "none": block[1]}[remat]

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
    parameters = gradients = moments = codes = 0
    for weight in weights(config.model):
        sharding = weight_sharding(mesh, weight.shape, weight.axes, parallel.layout)
        shard = 4 * math.prod(sharding.shard_shape(weight.shape))
        parameters += shard
        if config.precision.compute == "fp8" and is_fp8(tuple(weight.path.split("."))):
            codes += 2 * shard // 4
        if weight.trained:
            gradients += shard
            optimizer = optimizer_sharding(sharding, weight.shape)
            moments += moment_bytes * math.prod(optimizer.shard_shape(weight.shape))
    tokens = config.microbatch_sequences * config.data.sequence_length
    tokens_a_device = math.ceil(tokens / (parallel.data * parallel.expert))
    return MemoryEstimate(
        parameters=parameters,
        gradients=gradients,
        moments=moments,
        codes=codes,
        activations=round(tokens_a_device * _activation_bytes(config.model, config.precision)),
        logits=2 * 4 * min(tokens_a_device * config.model.vocab_size, LOGITS_BUDGET),
    )
