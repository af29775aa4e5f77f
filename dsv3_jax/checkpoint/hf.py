"""The names of the released checkpoints, as data: Hugging Face tensor <-> leaf of our tree.

The table has two columns (spec §1, checkpoint names). Everything else follows from it and from the
shapes in `plan/parameters.py`: a stored linear is [out, in], ours [in, out]; the stored gate and up
projections are the two column halves of our `w13`; routed experts are stored one by one.
"""

import math
from dataclasses import dataclass

from dsv3_jax.config import ModelConfig
from dsv3_jax.plan.parameters import weights

BLOCK_SIZE = 128  # rows and columns that share a scale (spec §5.1)
SCALE_SUFFIX = "_scale_inv"  # of the scales' names; they MULTIPLY, whatever the name says
DTYPES = ("fp8", "bf16", "f32")

_TOP = (
    ("model.embed_tokens.weight", "embed.table"),
    ("model.norm.weight", "final_norm.gain"),
    ("lm_head.weight", "head.kernel"),
)
_BLOCK = (
    ("input_layernorm.weight", "norm_a.gain"),
    ("self_attn.q_proj.weight", "attn.wq.kernel"),
    ("self_attn.q_a_proj.weight", "attn.wq_a.kernel"),
    ("self_attn.q_a_layernorm.weight", "attn.q_norm.gain"),
    ("self_attn.q_b_proj.weight", "attn.wq_b.kernel"),
    ("self_attn.kv_a_proj_with_mqa.weight", "attn.wkv_a.kernel"),
    ("self_attn.kv_a_layernorm.weight", "attn.kv_norm.gain"),
    ("self_attn.kv_b_proj.weight", "attn.wkv_b.kernel"),
    ("self_attn.o_proj.weight", "attn.wo.kernel"),
    ("post_attention_layernorm.weight", "norm_f.gain"),
    ("mlp.gate_proj.weight", "ffn.w13.kernel[gate]"),
    ("mlp.up_proj.weight", "ffn.w13.kernel[up]"),
    ("mlp.down_proj.weight", "ffn.w2.kernel"),
    ("mlp.gate.weight", "ffn.router.kernel"),
    ("mlp.gate.e_score_correction_bias", "ffn.router.bias"),
    ("mlp.experts.{expert}.gate_proj.weight", "ffn.experts.w13[gate]"),
    ("mlp.experts.{expert}.up_proj.weight", "ffn.experts.w13[up]"),
    ("mlp.experts.{expert}.down_proj.weight", "ffn.experts.w2"),
    ("mlp.shared_experts.gate_proj.weight", "ffn.shared.w13.kernel[gate]"),
    ("mlp.shared_experts.up_proj.weight", "ffn.shared.w13.kernel[up]"),
    ("mlp.shared_experts.down_proj.weight", "ffn.shared.w2.kernel"),
)
# An MTP module is one more layer: this, then a block. It stores copies of the embedding and of the
# head, which are the main model's, but its output norm is its own (spec §4).
_MTP = (
    ("embed_tokens.weight", "embed.table"),
    ("enorm.weight", "mtp.enorm.gain"),
    ("hnorm.weight", "mtp.hnorm.gain"),
    ("eh_proj.weight", "mtp.proj.kernel"),
    ("shared_head.norm.weight", "mtp.out_norm.gain"),
    ("shared_head.head.weight", "head.kernel"),
)
_HALVES = {"gate": 0, "up": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """Where a stored tensor lives in our tree: `leaf[index]`, a column half of it, transposed."""

    path: str  # of the leaf, as in `plan/parameters.py`: 'moe_blocks.ffn.experts.w13'
    index: tuple[int, ...] = ()  # layer in its stack, then expert
    half: int | None = None  # of the fused gate and up projections: 0 gate, 1 up
    transposed: bool = False  # stored [out, in]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """One tensor of a checkpoint folder."""

    name: str
    shape: tuple[int, ...]  # as stored
    dtype: str  # 'F8_E4M3', 'BF16' or 'F32', as safetensors spells them
    slot: Slot  # of scales: that of the weight they belong to
    is_scale: bool = False  # float32, one a block of the weight
    is_copy: bool = False  # MTP's copy of the embedding or the head

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def is_quantized(name: str) -> bool:
    """Whether an FP8 checkpoint stores this weight in FP8: the linears of MLA and of every FFN.

    Embedding, head, norms, router and MTP's `eh_proj` are not (spec §1.1, §5.4).
    """
    return "_proj" in name and name.endswith(".weight") and "eh_proj" not in name


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """One scale a 128x128 block, the last blocks ragged: [ceil(out / 128), ceil(in / 128)]."""
    return tuple(-(-dim // BLOCK_SIZE) for dim in shape)


def layer_groups(model: ModelConfig) -> list[tuple[str, int]]:
    """Stack and index in it of every stored layer: dense, MoE, then the MTP modules."""
    return (
        [("dense_blocks", i) for i in range(model.num_dense_layers)]
        + [("moe_blocks", i) for i in range(model.num_moe_layers)]
        + [("mtp", i) for i in range(model.mtp_depth)]
    )


def tensors(model: ModelConfig, dtype: str) -> dict[str, Tensor]:
    """Every tensor of a checkpoint of this model, by name, layer by layer.

    Args:
      dtype: 'fp8' (projections E4M3 with scales, the rest as 'bf16'), 'bf16' (the router bias
        float32) or 'f32'.

    The released map of V3 is exactly `tensors(deepseek_v3_671b().model, 'fp8')` (spec §1.1).
    """
    assert dtype in DTYPES, dtype
    shapes = {leaf.path: leaf.shape for leaf in weights(model)}
    if model.affinity == "softmax":  # V2 has no selection bias (spec §1)
        shapes = {path: shape for path, shape in shapes.items() if not path.endswith("router.bias")}
    found: dict[str, Tensor] = {}

    def add(name: str, target: str, index: tuple[int, ...], is_copy: bool = False) -> None:
        path, _, half = target.removesuffix("]").partition("[")
        if path not in shapes:
            return
        shape = shapes[path][len(index) :]
        transposed = len(shape) == 2 and path != "embed.table"
        if half:
            shape = (*shape[:-1], shape[-1] // 2)
        slot = Slot(path=path, index=index, half=_HALVES.get(half), transposed=transposed)
        shape = shape[::-1] if transposed else shape
        stored = "F32" if dtype == "f32" or path.endswith("router.bias") else "BF16"
        if dtype == "fp8" and is_quantized(name):
            scales = scale_shape(shape)
            found[name] = Tensor(name=name, shape=shape, dtype="F8_E4M3", slot=slot)
            name += SCALE_SUFFIX
            found[name] = Tensor(name=name, shape=scales, dtype="F32", slot=slot, is_scale=True)
        else:
            found[name] = Tensor(name=name, shape=shape, dtype=stored, slot=slot, is_copy=is_copy)

    add(*_TOP[0], ())
    for layer, (group, index) in enumerate(layer_groups(model)):
        prefix, block = f"model.layers.{layer}.", group
        if group == "mtp":
            block = "mtp.block"
            for name, target in _MTP:
                copy = not target.startswith("mtp.")
                add(prefix + name, target, () if copy else (index,), copy)
        for name, target in _BLOCK:
            target = f"{block}.{target}"
            if "{expert}" not in name:
                add(prefix + name, target, (index,))
            elif group != "dense_blocks":
                for expert in range(model.num_experts):
                    add(prefix + name.format(expert=expert), target, (index, expert))
    for name, target in _TOP[1:]:
        add(name, target, ())
    return found
