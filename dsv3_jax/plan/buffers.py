"""Bytes that one layer needs on a device for its tokens: kept, queued, at work, on the way.

What the layer's parts keep for each other was read from their traces (`pipeline/split.py` and the
checkpoint policies of `model/block.py`); a test compares. Letters: T a device's tokens of a
micro-batch, R rows that it receives for its experts, M slots of (row, expert) pairs.
"""

from dataclasses import dataclass

from dsv3_jax.config import Config, ModelConfig
from dsv3_jax.model.runtime import Runtime
from dsv3_jax.parallel.dispatch_capped import CappedHop
from dsv3_jax.parallel.expert_parallel import make_hops, room_for_pairs
from dsv3_jax.parallel.mesh import abstract_mesh
from dsv3_jax.precision.block_scaled import BLOCK

ITEMSIZE = {"float32": 4, "bfloat16": 2}
CODE = 1 + 4 / 128  # an E4M3 code and its share of a scale
E5M6 = 1.5 + 1 / 128  # attention outputs between forward and backward, spec §5.5


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Static sizes of a device's dispatch, whatever the routing is."""

    tokens: int  # T
    exchanged: int  # rows of all hops' receive buffers, and as many of their send buffers
    received: int  # R
    slots: int  # M

    @classmethod
    def of(cls, config: Config) -> "Rows":
        """With `parallel.buffer_factor`'s room, or for the worst routing without it."""
        model, parallel = config.model, config.parallel
        sequences = config.microbatch_sequences // (parallel.data * parallel.expert)
        tokens = rows = sequences * config.data.sequence_length // parallel.context
        runtime = Runtime(
            shard_of=abstract_mesh(parallel),
            # A ragged exchange receives in a buffer of the same size.
            dispatch="padded" if parallel.dispatch == "ragged" else parallel.dispatch,
            buffer_factor=parallel.buffer_factor,
            devices_per_node=parallel.devices_per_node,
        )
        hops, exchanged = make_hops(runtime, tokens, model.experts_per_token), 0
        for hop in hops:
            rows = hop.num_positions * (hop.capacity if isinstance(hop, CappedHop) else rows)
            exchanged += rows
        local_experts = model.num_experts // parallel.expert
        slots = rows * min(model.experts_per_token, local_experts)
        slots = min(slots, room_for_pairs(hops) or slots)
        if config.precision.compute == "fp8":  # every expert starts at a multiple of 128
            slots += local_experts * (BLOCK - 1)
            slots = -(-slots // BLOCK) * BLOCK
        return cls(tokens=tokens, exchanged=exchanged, received=rows, slots=slots)


@dataclass(frozen=True, kw_only=True)
class LayerBytes:
    """One block's, of one micro-batch."""

    kept: float  # from forward to backward, by the recomputation policy
    queued: float  # from backward to a weight gradient that waits (spec §6.1)
    values: float  # attention, shared expert and residual stream while the block runs
    rows: float  # all-to-all buffers and the routed experts' slots while the block runs


def moe_layer(config: Config) -> LayerBytes:
    """Of an MoE block."""
    model, precision = config.model, config.precision
    rows, item = Rows.of(config), ITEMSIZE[precision.activations]
    D, F = model.width, model.expert_ffn_width
    shared = model.num_shared_experts * F
    is_fp8 = precision.compute == "fp8"
    row = CODE if is_fp8 else item  # of what goes to the experts
    # A pipeline keeps them as they come; the checkpoint policy of other runs keeps codes.
    ffn_input = item if config.parallel.pipe > 1 or not is_fp8 else CODE
    tokens = _tokens(config, shared, ffn_input)

    # In FP8 a row is kept as it was received, else once in the slot of each of its experts.
    inputs = row * D * (rows.received if is_fp8 else rows.slots)
    kept = {
        "full": 0.0,
        "paper": inputs + rows.slots * ffn_input * 2 * F,
        "none": inputs + rows.slots * item * 3 * F,
    }[precision.remat]
    if precision.remat == "full":
        product = 4 if is_fp8 else item
        queued = inputs + rows.slots * (row * D + item * 2 * F + product * F)
    elif is_fp8:
        queued = rows.slots * (row * D + item * 2 * F + 4 * F)
    else:
        queued = rows.slots * item * (D + F)
    # Sent and received, there and back; inputs, hidden units and outputs of the experts.
    exchanged = 2 * rows.exchanged * D * (row + item)
    slots = rows.slots * (row * D + item * 3 * F + item * D)
    return LayerBytes(
        kept=tokens.kept + kept,
        queued=tokens.queued + queued,
        values=tokens.values + rows.tokens * 8 * model.num_experts,
        rows=exchanged + slots,
    )


def dense_layer(config: Config) -> LayerBytes:
    """Of a block with a dense FFN."""
    ffn_input = CODE if config.precision.compute == "fp8" else ITEMSIZE[config.precision.compute]
    return _tokens(config, config.model.dense_ffn_width, ffn_input)


def _tokens(config: Config, ffn_width: int, ffn_input: float) -> LayerBytes:
    """Of attention, the FFN that every token meets, norms and the residual stream."""
    model, precision, tokens = config.model, config.precision, Rows.of(config).tokens
    item, D = ITEMSIZE[precision.activations], model.width
    is_fp8 = precision.compute == "fp8"
    attention_out = E5M6 if is_fp8 and config.parallel.pipe == 1 else item
    queries, keys_values, outputs, latents = _attention_widths(model)
    kept = {"full": item * D}
    kept["paper"] = item * (2 * D + latents) + attention_out * outputs + ffn_input * 2 * ffn_width
    kept["none"] = item * (3 * D + 2 * latents + queries + keys_values + outputs + 3 * ffn_width)
    both = item * (3 * D + latents + queries + keys_values)
    redone = item * ((5 if is_fp8 else 3) * D + latents + outputs + 3 * ffn_width)
    if precision.remat != "full":
        redone = item * (outputs + 3 * 2 * ffn_width) if is_fp8 else 0
    if config.parallel.context > 1:  # the output of all blocks is summed in float32
        keys_values, outputs = 0, 2 * outputs
    values = item * (6 * D + 2 * latents + 2 * queries + keys_values + outputs + 3 * ffn_width)
    # The latents of whole sequences, gathered and put into order.
    gathered = 2 * item * (model.kv_latent_dim + model.qk_rope_head_dim) * config.parallel.context
    values += gathered if config.parallel.context > 1 else 0
    return LayerBytes(
        kept=tokens * kept[precision.remat],
        queued=tokens * (both + redone),
        values=tokens * values,
        rows=0.0,
    )


def _attention_widths(model: ModelConfig) -> tuple[int, int, int, int]:
    """Numbers a token of q, of k and v before rope, of the output, and of all latents."""
    heads = model.num_heads
    latents = (model.q_latent_dim or 0) + model.kv_latent_dim + model.qk_rope_head_dim
    return (
        heads * model.qk_head_dim,
        heads * (model.qk_nope_head_dim + model.v_head_dim),
        heads * model.v_head_dim,
        latents,
    )
