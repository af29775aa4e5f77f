"""Every weight of a model as a table of shapes, and the counts of spec §1.1 as sums over it.

Needs no array and no device: the same table feeds `flops.py` and `memory.py`.
"""

import math
from dataclasses import dataclass

from dsv3_jax.config import ModelConfig

_Table = dict[str, tuple[tuple[int, ...], tuple[str | None, ...]]]  # name -> shape, logical axes


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One leaf of the parameter tree."""

    path: str  # 'moe_blocks.attn.wq_a.kernel'
    shape: tuple[int, ...]  # with the leading dim of stacked layers
    axes: tuple[str | None, ...]  # logical axes, without that leading dim
    trained: bool = True  # False: the router's selection bias, which no gradient reaches

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """Numbers of parameters, row by row as in spec §1.1."""

    embedding: int
    head: int
    mla: int  # one layer's attention with its latent norms
    block_norms: int  # the two norms of one block
    dense_ffn: int
    expert: int  # one routed expert
    routed_experts: int  # all of one layer
    shared_experts: int  # of one layer
    router: int  # of one layer, bias excluded
    router_bias: int  # of one layer; 0 for the softmax router, which has none
    moe_ffn: int  # routed + shared + router + bias
    dense_block: int
    moe_block: int
    final_norm: int
    total: int  # main model, MTP excluded
    total_without_biases: int
    activated: int  # of the main model, by one token
    activated_without_embedding: int
    activated_without_embedding_and_head: int
    mtp_projection: int  # M_k of one module
    mtp_norms: int  # the three norms of one module
    mtp_unique: int  # all modules, without the shared embedding and head
    mtp_activated: int  # all modules, with the shared embedding and head once; 0 without MTP


def _attention(model: ModelConfig) -> _Table:
    """MLA, spec §2."""
    D, N, L, R = model.width, model.num_heads, model.kv_latent_dim, model.qk_rope_head_dim
    queries = N * model.qk_head_dim
    if model.q_latent_dim is None:
        table: _Table = {"wq.kernel": ((D, queries), ("embed", "heads"))}
    else:
        Q = model.q_latent_dim
        table = {
            "wq_a.kernel": ((D, Q), ("embed", "q_latent")),
            "q_norm.gain": ((Q,), (None,)),
            "wq_b.kernel": ((Q, queries), ("q_latent", "up_heads")),
        }
    values = N * model.v_head_dim
    return table | {
        "wkv_a.kernel": ((D, L + R), ("embed", "kv_latent")),
        "kv_norm.gain": ((L,), (None,)),
        "wkv_b.kernel": ((L, N * model.qk_nope_head_dim + values), ("kv_latent", "up_heads")),
        "wo.kernel": ((values, D), ("heads", "embed")),
    }


def _feed_forward(width: int, ffn_width: int) -> _Table:
    return {
        "w13.kernel": ((width, 2 * ffn_width), ("embed", "ffn")),
        "w2.kernel": ((ffn_width, width), ("ffn", "embed")),
    }


def _moe(model: ModelConfig) -> _Table:
    """DeepSeekMoE layer, spec §3; the shared experts are one FFN of their summed width."""
    D, E, F = model.width, model.num_experts, model.expert_ffn_width
    table: _Table = {
        "router.kernel": ((D, E), ("embed", None)),
        "router.bias": ((E,), (None,)),
        "experts.w13": ((E, D, 2 * F), ("expert", "expert_embed", "expert_ffn")),
        "experts.w2": ((E, F, D), ("expert", "expert_ffn", "expert_embed")),
    }
    if model.num_shared_experts:
        shared = _feed_forward(D, model.num_shared_experts * F)
        table |= {f"shared.{name}": entry for name, entry in shared.items()}
    return table


def _block(model: ModelConfig, ffn: _Table) -> _Table:
    norm = ((model.width,), (None,))
    return (
        {"norm_a.gain": norm, "norm_f.gain": norm}
        | {f"attn.{name}": entry for name, entry in _attention(model).items()}
        | {f"ffn.{name}": entry for name, entry in ffn.items()}
    )


def weights(model: ModelConfig) -> list[Weight]:
    """The leaves of the parameter tree: path, shape and logical axes (spec §1).

    Blocks are stacked by kind: `dense_blocks`, `moe_blocks` and, when there are any, `mtp`.
    """
    D, V = model.width, model.vocab_size
    norm = ((D,), (None,))
    moe_block = _block(model, _moe(model))
    module = {
        "enorm.gain": norm,
        "hnorm.gain": norm,
        "proj.kernel": ((2 * D, D), (None, "embed")),
        "out_norm.gain": norm,
    } | {f"block.{name}": entry for name, entry in moe_block.items()}
    stacks = (
        ("dense_blocks", model.num_dense_layers,
         _block(model, _feed_forward(D, model.dense_ffn_width))),
        ("moe_blocks", model.num_moe_layers, moe_block),
        ("mtp", model.mtp_depth, module),
    )  # fmt: skip
    leaves = [
        Weight(path="embed.table", shape=(V, D), axes=("vocab", "embed")),
        Weight(path="head.kernel", shape=(D, V), axes=("embed", "vocab")),
        Weight(path="final_norm.gain", shape=(D,), axes=(None,)),
    ]
    for group, layers, table in stacks:
        leaves += [
            Weight(
                path=f"{group}.{name}",
                shape=(layers, *shape),
                axes=axes,
                trained=not name.endswith("router.bias"),
            )
            for name, (shape, axes) in table.items()
            if layers
        ]
    return leaves


def _size(table: _Table, prefix: str = "") -> int:
    return sum(math.prod(shape) for name, (shape, _) in table.items() if name.startswith(prefix))


def count_parameters(model: ModelConfig) -> ParameterCounts:
    """Exact counts, e.g. 671,026,419,200 for V3 (spec §1.1).

    The selection bias is counted with the sigmoid router only, as in the published totals: V2's
    softmax router has none (spec §1).
    """
    moe = _moe(model)
    embedding = model.vocab_size * model.width
    mla, norms, projection = _size(_attention(model)), 2 * model.width, 2 * model.width**2
    dense_ffn = _size(_feed_forward(model.width, model.dense_ffn_width))
    router_bias = model.num_experts if model.affinity == "sigmoid" else 0
    moe_ffn = _size(moe) - model.num_experts + router_bias
    dense_block, moe_block = mla + norms + dense_ffn, mla + norms + moe_ffn
    routed = _size(moe, "experts.")
    expert = routed // model.num_experts
    total = (
        2 * embedding
        + model.num_dense_layers * dense_block
        + model.num_moe_layers * moe_block
        + model.width
    )
    idle = (model.num_experts - model.experts_per_token) * expert  # of one MoE layer, for one token
    activated = total - model.num_moe_layers * idle
    mtp_norms = 3 * model.width
    mtp_unique = model.mtp_depth * (projection + mtp_norms + moe_block)
    mtp_activated = mtp_unique - model.mtp_depth * idle + 2 * embedding if model.mtp_depth else 0
    return ParameterCounts(
        embedding=embedding,
        head=embedding,
        mla=mla,
        block_norms=norms,
        dense_ffn=dense_ffn,
        expert=expert,
        routed_experts=routed,
        shared_experts=_size(moe, "shared."),
        router=_size(moe, "router.kernel"),
        router_bias=router_bias,
        moe_ffn=moe_ffn,
        dense_block=dense_block,
        moe_block=moe_block,
        final_norm=model.width,
        total=total,
        total_without_biases=total - model.num_moe_layers * router_bias,
        activated=activated,
        activated_without_embedding=activated - embedding,
        activated_without_embedding_and_head=activated - 2 * embedding,
        mtp_projection=projection,
        mtp_norms=mtp_norms,
        mtp_unique=mtp_unique,
        mtp_activated=mtp_activated,
    )
