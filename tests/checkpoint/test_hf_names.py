"""The name table against the map of the released files, and against names typed out by hand."""

import gzip
import hashlib
import json
import math
import time
from pathlib import Path

import pytest
from checkpoint.hf_random import ALIGNED, RAGGED, V2_LITE, layout

from dsv3_jax import configs
from dsv3_jax.checkpoint import hf
from dsv3_jax.checkpoint.hf_config import read_model_config
from dsv3_jax.plan.parameters import count_parameters, weights

RELEASED = Path(__file__).parents[3] / "shared" / "data" / "deepseek" / "hf_params_map.json.gz"
# sha256 of the released map, a line `name shape dtype` a tensor, sorted by name.
RELEASED_DIGEST = "f0e6dbabee5aa69b2646e90308d72a2bc719cd3ae73b396db82f1377abcd9618"


def digest(entries):
    """Of (name, shape, dtype)."""
    lines = sorted(f"{name} {'x'.join(map(str, shape))} {dtype}" for name, shape, dtype in entries)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def model_of(name):
    return configs.get(name).model


def test_the_table_is_the_released_map():
    if not RELEASED.is_file():
        pytest.skip("needs the map of the released files")
    start = time.monotonic()
    table = hf.tensors(model_of("deepseek_v3_671b"), "fp8")
    released = json.loads(gzip.decompress(RELEASED.read_bytes()))
    assert len(released) == 91_991
    assert not released.keys() - table.keys() and not table.keys() - released.keys()
    for name, entry in released.items():
        assert tuple(entry["shape"]) == table[name].shape, name
        assert entry["dtype"] == table[name].dtype, name
    assert time.monotonic() - start < 30
    assert digest((n, e["shape"], e["dtype"]) for n, e in released.items()) == RELEASED_DIGEST


def test_the_table_has_the_digest_of_the_released_map():
    table = hf.tensors(model_of("deepseek_v3_671b"), "fp8").values()
    assert digest((t.name, t.shape, t.dtype) for t in table) == RELEASED_DIGEST


def test_layer_61_is_the_mtp_module():
    table = hf.tensors(model_of("deepseek_v3_671b"), "fp8")
    prefix = "model.layers.61."
    layer = {n.removeprefix(prefix): t for n, t in table.items() if n.startswith(prefix)}
    experts = {
        f"mlp.experts.{e}.{linear}.weight{end}"
        for e in range(256)
        for linear in ("gate_proj", "up_proj", "down_proj")
        for end in ("", "_scale_inv")
    }
    shapes = {
        "embed_tokens.weight": (129280, 7168),
        "enorm.weight": (7168,),
        "hnorm.weight": (7168,),
        "eh_proj.weight": (7168, 14336),
        "shared_head.norm.weight": (7168,),
        "shared_head.head.weight": (129280, 7168),
        "input_layernorm.weight": (7168,),
        "post_attention_layernorm.weight": (7168,),
        "self_attn.q_a_proj.weight": (1536, 7168),
        "self_attn.q_a_proj.weight_scale_inv": (12, 56),
        "self_attn.q_a_layernorm.weight": (1536,),
        "self_attn.q_b_proj.weight": (24576, 1536),
        "self_attn.q_b_proj.weight_scale_inv": (192, 12),
        "self_attn.kv_a_proj_with_mqa.weight": (576, 7168),
        "self_attn.kv_a_proj_with_mqa.weight_scale_inv": (5, 56),
        "self_attn.kv_a_layernorm.weight": (512,),
        "self_attn.kv_b_proj.weight": (32768, 512),
        "self_attn.kv_b_proj.weight_scale_inv": (256, 4),
        "self_attn.o_proj.weight": (7168, 16384),
        "self_attn.o_proj.weight_scale_inv": (56, 128),
        "mlp.gate.weight": (256, 7168),
        "mlp.gate.e_score_correction_bias": (256,),
        "mlp.shared_experts.gate_proj.weight": (2048, 7168),
        "mlp.shared_experts.gate_proj.weight_scale_inv": (16, 56),
        "mlp.shared_experts.up_proj.weight": (2048, 7168),
        "mlp.shared_experts.up_proj.weight_scale_inv": (16, 56),
        "mlp.shared_experts.down_proj.weight": (7168, 2048),
        "mlp.shared_experts.down_proj.weight_scale_inv": (56, 16),
    }
    assert layer.keys() == shapes.keys() | experts
    for name, shape in shapes.items():
        assert layer[name].shape == shape, name
        quantized = "_proj" in name and not name.startswith("eh_proj")
        expected = "BF16"
        if name.endswith(("_scale_inv", "_bias")):
            expected = "F32"
        elif quantized:
            expected = "F8_E4M3"
        assert layer[name].dtype == expected, name
    assert {n for n, t in layer.items() if t.is_copy} == {
        "embed_tokens.weight",
        "shared_head.head.weight",
    }
    assert not any(name.startswith("model.layers.62.") for name in table)


def test_v2_lite_has_direct_queries_and_no_selection_bias():
    table = hf.tensors(model_of("v2_lite_16b"), "bf16")
    # embedding, norm, head; 27 x (4 projections, 3 norms); 1 dense and 26 MoE layers
    assert len(table) == 3 + 27 * 7 + 3 + 26 * (64 * 3 + 3 + 1) == 5291
    first = {n.removeprefix("model.layers.0.") for n in table if n.startswith("model.layers.0.")}
    assert first == {
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        "self_attn.q_proj.weight",
        "self_attn.kv_a_proj_with_mqa.weight",
        "self_attn.kv_a_layernorm.weight",
        "self_attn.kv_b_proj.weight",
        "self_attn.o_proj.weight",
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
        "mlp.down_proj.weight",
    }
    assert table["model.layers.0.self_attn.q_proj.weight"].shape == (3072, 2048)
    assert table["model.layers.26.mlp.shared_experts.up_proj.weight"].shape == (2816, 2048)
    assert not any("e_score_correction_bias" in name or ".q_a_" in name for name in table)
    assert {t.dtype for t in table.values()} == {"BF16"}


@pytest.mark.parametrize("values", [RAGGED, ALIGNED, V2_LITE, RAGGED | {"n_shared_experts": None}])
@pytest.mark.parametrize("dtype", ["fp8", "bf16", "f32"])
def test_the_table_is_the_documented_layout(values, dtype):
    """`layout` was typed out independently."""
    plain = "F32" if dtype == "f32" else "BF16"
    expected = {}
    for name, shape, kind in layout(values | {"n_shared_experts": values["n_shared_experts"] or 0}):
        expected[name] = (shape, "F32" if kind == "bias" else plain)
        if kind == "linear" and dtype == "fp8":
            expected[name] = (shape, "F8_E4M3")
            blocks = tuple(math.ceil(dim / 128) for dim in shape)
            expected[f"{name}_scale_inv"] = (blocks, "F32")
    table = hf.tensors(read_model_config(values, "config.json"), dtype)
    assert {t.name: (t.shape, t.dtype) for t in table.values()} == expected
    names = list(table)
    for name, tensor in table.items():
        assert name == tensor.name
        if tensor.is_scale:  # they stay together in a file
            assert names[names.index(name) - 1] == name.removesuffix("_scale_inv")


@pytest.mark.parametrize("name", configs.CONFIGS)
def test_every_number_of_our_tree_has_one_place_in_a_checkpoint(name):
    model = model_of(name)
    held = dict.fromkeys((leaf.path for leaf in weights(model)), 0)
    places = set()
    for tensor in hf.tensors(model, "bf16").values():
        if not tensor.is_copy:
            held[tensor.slot.path] += tensor.size
            place = (tensor.slot.path, tensor.slot.index, tensor.slot.half)
            assert place not in places
            places.add(place)
    for leaf in weights(model):
        bias_of_v2 = leaf.path.endswith("router.bias") and model.affinity == "softmax"
        assert held[leaf.path] == (0 if bias_of_v2 else leaf.size), leaf.path
    counts = count_parameters(model)
    assert sum(held.values()) == counts.total + counts.mtp_unique
