"""config.json to a model and back: released files, newer forms, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from checkpoint.hf_random import RAGGED, V2_LITE

from dsv3_jax import configs
from dsv3_jax.checkpoint.hf_config import config_values, read_model_config
from dsv3_jax.config import ModelConfig, YarnConfig
from dsv3_jax.errors import UserError
from dsv3_jax.validate import validate_model

RELEASED = Path(__file__).parents[3] / "shared" / "data" / "deepseek" / "config.json"
# Keys of the released file that say nothing about the model's arithmetic: where to find code and
# how it was trained.
MEANINGLESS = {
    "auto_map",
    "aux_loss_alpha",
    "ep_size",
    "initializer_range",
    "pretraining_tp",
    "seq_aux",
    "transformers_version",
}
# The published table of V2-Lite (spec §1) under the released keys.
V2_LITE_16B = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "vocab_size": 102400,
    "hidden_size": 2048,
    "num_hidden_layers": 27,
    "first_k_dense_replace": 1,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "moe_layer_freq": 1,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "max_position_embeddings": 163840,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    },
    "attention_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
V2_236B = V2_LITE_16B | {
    "hidden_size": 5120,
    "num_hidden_layers": 60,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "n_routed_experts": 160,
    "n_group": 8,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
    "routed_scaling_factor": 16.0,
}


def read(values):
    return read_model_config(values, "config.json")


def extended(model):
    """With YaRN enabled."""
    return replace(model, yarn=replace(model.yarn, enabled=True))


def essence(model):
    """What a config.json carries: neither initialisation nor settings that have no effect."""
    yarn = model.yarn
    if not yarn.enabled:
        yarn = YarnConfig(original_length=yarn.original_length)
    score = model.group_score if model.num_groups > 1 else "top2_sum"
    return replace(model, init_std=0.006, yarn=yarn, group_score=score)


def test_the_released_file_is_the_671b_model_in_its_extended_form():
    if not RELEASED.is_file():
        pytest.skip("needs the released config.json")
    released = json.loads(RELEASED.read_text())
    model = read(released)
    assert model == extended(configs.get("deepseek_v3_671b").model)
    written = config_values(model, "fp8")
    assert released.keys() - written.keys() == MEANINGLESS - {"initializer_range"}
    assert written.keys() <= released.keys()
    for key in written.keys() - MEANINGLESS:
        assert written[key] == released[key], key
        assert type(written[key]) is type(released[key]), key
    assert json.dumps(written["rope_scaling"], sort_keys=True) == json.dumps(
        released["rope_scaling"], sort_keys=True
    )
    assert written["initializer_range"] == 0.006  # of training; the released file says 0.02


def test_v2_files():
    lite = read(V2_LITE_16B)
    assert lite == extended(configs.get("v2_lite_16b").model)
    assert lite.yarn.mscale == 0.707
    assert {k: v for k, v in config_values(lite, "bf16").items() if k in V2_LITE_16B} == V2_LITE_16B
    large = read(V2_236B)
    assert (large.num_groups, large.num_groups_kept, large.group_score) == (8, 3, "max")
    assert (large.affinity, large.normalize_weights) == ("softmax", False)
    assert (large.routed_scaling_factor, large.mtp_depth) == (16.0, 0)
    assert {k: v for k, v in config_values(large, "bf16").items() if k in V2_236B} == V2_236B
    # 'greedy' ignores the groups
    free = read(V2_236B | {"topk_method": "greedy"})
    assert (free.num_groups, free.num_groups_kept) == (1, 1)
    assert read(V2_LITE_16B | {"n_shared_experts": None}).num_shared_experts == 0
    assert read(V2_LITE_16B | {"n_group": None, "topk_group": None}) == lite


@pytest.mark.parametrize("values", [RAGGED, V2_LITE], ids=["v3", "v2"])
def test_the_form_that_transformers_5_writes(values):
    """`rope_parameters` and `dtype`; without scoring_func, topk_method (V3) and moe_layer_freq."""
    scaling = values["rope_scaling"]
    newer = {k: v for k, v in values.items() if k not in ("rope_scaling", "rope_theta")}
    for key in ("moe_layer_freq", "scoring_func", "topk_method"):
        del newer[key]
    newer |= {
        "dtype": "bfloat16",
        "head_dim": values["qk_rope_head_dim"],
        "qk_head_dim": values["qk_nope_head_dim"] + values["qk_rope_head_dim"],
        "rope_interleave": True,
        "mlp_bias": False,
        "output_router_logits": False,
        "pad_token_id": None,
        "rope_parameters": scaling | {"rope_type": "yarn", "rope_theta": 5e4},
    }
    expected = read(values | {"rope_theta": 5e4})
    assert expected.rope_theta == 5e4 and expected.yarn.enabled
    assert read(newer) == expected
    del newer["rope_parameters"]["type"]
    assert read(newer) == expected
    del newer["rope_parameters"]["beta_fast"], newer["rope_parameters"]["beta_slow"]
    assert read(newer) == expected
    plain = newer | {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}
    without = read(plain | {"max_position_embeddings": 2048})
    assert without.yarn == YarnConfig(enabled=False, original_length=2048)
    assert replace(without, yarn=expected.yarn, rope_theta=5e4) == expected


@pytest.mark.parametrize("dtype", ["fp8", "bf16", "f32"])
@pytest.mark.parametrize("yarn", [False, True])
@pytest.mark.parametrize("name", configs.CONFIGS)
def test_named_models_come_back(name, yarn, dtype):
    model = configs.get(name).model
    model = extended(model) if yarn else model
    values = json.loads(json.dumps(config_values(model, dtype), allow_nan=False))
    assert read(values) == essence(model)
    assert ("quantization_config" in values) == (dtype == "fp8")
    assert values["torch_dtype"] == ("float32" if dtype == "f32" else "bfloat16")
    factor = model.yarn.factor if yarn else 1
    assert values["max_position_embeddings"] == model.yarn.original_length * factor
    assert (values["rope_scaling"] is None) == (not yarn)


def random_model(rng):
    softmax, groups = rng.random() < 0.4, int(rng.choice([1, 2, 4]))
    normalize = bool(rng.random() < 0.5)
    layers = int(rng.integers(1, 9))
    return ModelConfig(
        vocab_size=int(rng.integers(1, 999)),
        width=int(rng.integers(1, 999)),
        num_layers=layers,
        num_dense_layers=int(rng.integers(0, layers)),
        dense_ffn_width=int(rng.integers(1, 999)),
        expert_ffn_width=int(rng.integers(1, 999)),
        num_heads=int(rng.integers(1, 99)),
        qk_nope_head_dim=int(rng.integers(1, 99)),
        qk_rope_head_dim=2 * int(rng.integers(1, 99)),
        v_head_dim=int(rng.integers(1, 99)),
        q_latent_dim=None if rng.random() < 0.3 else int(rng.integers(1, 999)),
        kv_latent_dim=int(rng.integers(1, 999)),
        num_experts=groups * int(rng.integers(2, 9)),
        num_shared_experts=int(rng.integers(0, 4)),
        experts_per_token=int(rng.integers(1, 3)),
        num_groups=groups,
        num_groups_kept=int(rng.integers(1, groups + 1)),
        group_score="max" if softmax else "top2_sum",
        affinity="softmax" if softmax else "sigmoid",
        normalize_weights=normalize,
        routed_scaling_factor=1.0 if softmax and normalize else float(rng.uniform(0.1, 20)),
        mtp_depth=int(rng.integers(0, 3)),
        mtp_hidden=str(rng.choice(["post_norm", "pre_norm"])),
        rope_theta=float(rng.choice([1e4, 5e5, 12345.5])),
        yarn=YarnConfig(
            enabled=bool(rng.random() < 0.5),
            factor=float(rng.choice([1.0, 2.5, 40.0])),
            original_length=int(rng.integers(1, 9)) * 1024,
            beta_fast=float(rng.uniform(2, 40)),
            beta_slow=float(rng.uniform(0.5, 1.5)),
            mscale=float(rng.uniform(0.1, 2)),
        ),
        norm_epsilon=float(rng.choice([1e-6, 1e-5])),
        init_std=float(rng.uniform(0.001, 0.1)),
    )


@pytest.mark.parametrize("seed", range(50))
def test_random_models_come_back(seed):
    rng = np.random.default_rng(seed)
    model = random_model(rng)
    validate_model(model)
    values = json.loads(json.dumps(config_values(model, "fp8"), allow_nan=False))
    assert read(values) == essence(model)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"affinity": "softmax", "normalize_weights": False}, "group_score=top2_sum"),
        ({"group_score": "max"}, "group_score=max"),
        ({"affinity": "softmax", "group_score": "max"}, "routed_scaling_factor=2.5"),
        ({"yarn": YarnConfig(enabled=True, mscale=0.0)}, "yarn.mscale=0"),
    ],
)
def test_models_that_no_engine_computes_are_not_written(change, named):
    with pytest.raises(UserError, match="cannot be written") as error:
        config_values(replace(configs.get("tiny").model, **change), "bf16")
    assert f"model.{named}" in str(error.value) and "\n" not in str(error.value)


def rope(**changes):
    return {"rope_scaling": RAGGED["rope_scaling"] | changes}


REFUSED = [
    ({"model_type": "llama"}, "model_type='llama'", "deepseek_v2"),
    ({"model_type": None}, "lacks model_type", "deepseek_v3"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu'", "silu"),
    ({"attention_bias": True}, "attention_bias=True", "False"),
    ({"mlp_bias": True}, "mlp_bias=True", "False"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings=True", "False"),
    ({"moe_layer_freq": 2}, "moe_layer_freq=2", "1"),
    ({"rope_interleave": False}, "rope_interleave=False", "True"),
    ({"num_key_value_heads": 1}, "num_key_value_heads=1", "2"),
    ({"scoring_func": "softmax"}, "scoring_func='softmax'", "sigmoid"),
    ({"topk_method": "greedy"}, "topk_method='greedy'", "noaux_tc"),
    ({"mtp_hidden": "none"}, "mtp_hidden='none'", "pre_norm"),
    (rope(type="linear"), "rope_scaling.type='linear'", "yarn"),
    (rope(rope_type="longrope"), "rope_scaling.rope_type='longrope'", "yarn"),
    (rope(rope_type="default"), "rope_scaling.type and rope_scaling.rope_type differ", "remove"),
    (rope(type=None), "rope_scaling lacks type", "yarn"),
    (rope(mscale=0.7), "rope_scaling.mscale=0.7", "rope_scaling.mscale_all_dim=1.0"),
    (rope(mscale_all_dim=None), "rope_scaling.mscale_all_dim=None", "equal"),
    (rope(mscale=0, mscale_all_dim=0), "rope_scaling.mscale=0.0", "positive"),
    (rope(factor="40"), "rope_scaling.factor='40'", "a number"),
    (rope(factor=0.5), "factor=0.5", "[1, inf)"),
    (rope(factor=float("nan")), "factor=nan", "[1, inf)"),
    (rope(original_max_position_embeddings=1.5), "max_position_embeddings=1.5", "an integer"),
    (rope(truncate=False), "rope_scaling.truncate=False", "True"),
    (rope(attention_factor=1.2), "rope_scaling.attention_factor=1.2", "1"),
    ({"rope_scaling": "yarn"}, "rope_scaling='yarn'", "object"),
    ({"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters.rope_type='llama3'", "yarn"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5", "1"),
    (
        {"rope_scaling": None, "max_position_embeddings": "4k"},
        "max_position_embeddings='4k'",
        "int",
    ),
    ({"quantization_config": {"quant_method": "gptq"}}, "quant_method='gptq'", "fp8"),
    ({"quantization_config": {"fmt": "e5m2"}}, "quantization_config.fmt='e5m2'", "e4m3"),
    ({"quantization_config": {"weight_block_size": [64, 64]}}, "weight_block_size=[64, 64]", "128"),
    ({"quantization_config": {"activation_scheme": "static"}}, "'static'", "dynamic"),
    ({"hidden_size": "160"}, "hidden_size='160'", "an integer"),
    ({"hidden_size": 160.0}, "hidden_size=160.0", "an integer"),
    ({"hidden_size": True}, "hidden_size=True", "an integer"),
    ({"hidden_size": None}, "hidden_size=None", "an integer"),
    ({"hidden_size": 0}, "hidden_size=0", "[1, "),
    ({"norm_topk_prob": 1}, "norm_topk_prob=1", "true or false"),
    ({"rms_norm_eps": [1e-6]}, "rms_norm_eps=[1e-06]", "a number"),
    ({"q_lora_rank": 0}, "q_lora_rank=0", "[1, "),
    ({"n_routed_experts": 7}, "n_routed_experts=7", "n_group=4"),
    ({"num_experts_per_tok": 5}, "num_experts_per_tok=5", "4 experts"),
    ({"first_k_dense_replace": 4}, "first_k_dense_replace=4", "num_hidden_layers=3"),
    ({"qk_rope_head_dim": 15}, "qk_rope_head_dim=15", "multiple of 2"),
]


@pytest.mark.parametrize(("change", "named", "allowed"), REFUSED, ids=[r[1] for r in REFUSED])
def test_what_we_cannot_compute_is_one_line(change, named, allowed):
    read(RAGGED)
    with pytest.raises(UserError) as error:
        read(RAGGED | change)
    text = str(error.value)
    assert text.startswith("config.json") and "\n" not in text and len(text) < 300
    assert named in text and allowed in text.partition(named)[2] + text.partition(named)[0], text


@pytest.mark.parametrize("key", sorted(RAGGED.keys() | RAGGED["rope_scaling"].keys()))
def test_missing_keys_are_named_unless_their_absence_has_a_meaning(key):
    values = json.loads(json.dumps(RAGGED))
    section = values if key in values else values["rope_scaling"]
    del section[key]
    model, same = read(RAGGED), {
        "architectures", "attention_bias", "beta_fast", "beta_slow", "hidden_act",
        "initializer_range", "max_position_embeddings", "moe_layer_freq", "num_key_value_heads",
        "rope_theta", "scoring_func", "tie_word_embeddings", "topk_method",
    }  # fmt: skip
    meant = {
        "n_shared_experts": {"num_shared_experts": 0},
        "num_nextn_predict_layers": {"mtp_depth": 0},
        "rope_scaling": {"yarn": YarnConfig(original_length=163840)},  # no extension
    } | dict.fromkeys(same, {})
    if key in meant:
        assert read(values) == replace(model, **meant[key])
        return
    with pytest.raises(UserError, match="lacks|must be equal") as error:
        read(values)
    assert key in str(error.value)


def test_softmax_models_that_engines_disagree_about_are_refused():
    assert read(V2_LITE | {"norm_topk_prob": True}).normalize_weights
    with pytest.raises(UserError, match="norm_topk_prob=True with routed_scaling_factor=16"):
        read(V2_LITE | {"norm_topk_prob": True, "routed_scaling_factor": 16})
