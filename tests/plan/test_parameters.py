"""The published counts, and the weight table against the parameter tree of the real model."""

import math

import pytest
from flax import nnx

from dsv3_jax.config import ModelConfig
from dsv3_jax.configs import get
from dsv3_jax.model.runtime import Runtime
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.plan.parameters import count_parameters, weights

V3_COUNTS = {  # spec §1.1
    "embedding": 926_679_040,
    "head": 926_679_040,
    "mla": 187_107_328,
    "block_norms": 14_336,
    "dense_ffn": 396_361_728,
    "expert": 44_040_192,
    "routed_experts": 11_274_289_152,
    "shared_experts": 44_040_192,
    "router": 1_835_008,
    "router_bias": 256,
    "moe_ffn": 11_320_164_608,
    "dense_block": 583_483_392,
    "moe_block": 11_507_286_272,
    "final_norm": 7_168,
    "total": 671_026_419_200,
    "total_without_biases": 671_026_404_352,
    "activated": 37_552_297_472,
    "activated_without_embedding": 36_625_618_432,
    "activated_without_embedding_and_head": 35_698_939_392,
    "mtp_projection": 102_760_448,
    "mtp_norms": 21_504,
    "mtp_unique": 11_610_068_224,
    "mtp_activated": 2_541_458_688,
}

V3_ATTENTION = {  # spec §1.1
    "wq_a.kernel": 11_010_048,
    "q_norm.gain": 1_536,
    "wq_b.kernel": 37_748_736,
    "wkv_a.kernel": 4_128_768,
    "kv_norm.gain": 512,
    "wkv_b.kernel": 16_777_216,
    "wo.kernel": 117_440_512,
}

V2_236B = ModelConfig(  # spec §1
    vocab_size=102400,
    width=5120,
    num_layers=60,
    num_dense_layers=1,
    dense_ffn_width=12288,
    expert_ffn_width=1536,
    num_heads=128,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    q_latent_dim=1536,
    kv_latent_dim=512,
    num_experts=160,
    num_shared_experts=2,
    experts_per_token=6,
    num_groups=8,
    num_groups_kept=3,
    group_score="max",
    affinity="softmax",
    normalize_weights=False,
    routed_scaling_factor=16.0,
    mtp_depth=0,
)


def test_v3_counts_are_exact():
    counts = count_parameters(get("deepseek_v3_671b").model)
    assert vars(counts) == V3_COUNTS


def test_v3_attention_rows_are_exact():
    prefix = "dense_blocks.attn."
    leaves = weights(get("deepseek_v3_671b").model)
    rows = {w.path: w.size // 3 for w in leaves if w.path.startswith(prefix)}
    assert rows == {prefix + name: count for name, count in V3_ATTENTION.items()}


def test_v2_lite_counts_are_exact():
    counts = count_parameters(get("v2_lite_16b").model)
    assert counts.total == counts.total_without_biases == 15_706_484_224
    assert counts.activated == 2_661_150_208
    assert counts.activated_without_embedding == 2_451_435_008
    assert counts.mtp_unique == counts.mtp_activated == 0


def test_v2_236b_counts_are_exact():
    counts = count_parameters(V2_236B)
    assert counts.total == 235_741_434_880
    assert counts.activated == 21_375_800_320
    assert counts.activated_without_embedding == 20_851_512_320


@pytest.mark.parametrize("name", ["tiny", "small", "v2_lite_16b", "deepseek_v3_671b"])
def test_weight_table_is_the_models_parameter_tree(name):
    config = get(name).model
    model = nnx.eval_shape(lambda: DeepSeekV3(config, runtime=Runtime(), rngs=nnx.Rngs(0)))
    leaves = {".".join(path): leaf for path, leaf in nnx.to_flat_state(nnx.state(model))}
    table = {weight.path: weight for weight in weights(config)}
    assert {path: leaf.shape for path, leaf in leaves.items()} == {
        path: weight.shape for path, weight in table.items()
    }
    trained = {path for path, leaf in leaves.items() if isinstance(leaf, nnx.Param)}
    assert trained == {path for path, weight in table.items() if weight.trained}
    for path in trained:
        assert tuple(leaves[path].axes) == table[path].axes, path

    counts = count_parameters(config)
    elements = sum(math.prod(leaves[path].shape) for path in trained)
    mtp_biases = config.mtp_depth * counts.router_bias
    assert elements == counts.total_without_biases + counts.mtp_unique - mtp_biases
