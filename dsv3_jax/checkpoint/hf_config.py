"""config.json of a released checkpoint <-> our `ModelConfig` (spec §1, §2).

Keys are the released ones; rotary settings are also read in the newer `rope_parameters` form. What
we cannot compute exactly is refused. Not carried over: the settings of a YaRN that is off, and
`initializer_range`, which the released files do not give as it was in training (spec §1).
"""

import re
import types
from typing import Any, get_args, get_type_hints

from dsv3_jax.checkpoint.hf import BLOCK_SIZE, DTYPES
from dsv3_jax.config import ModelConfig, YarnConfig
from dsv3_jax.errors import UserError
from dsv3_jax.validate import scalar_types, type_name, validate_model

# Our field -> released key, where the two mean the same.
_KEYS = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_dense_layers": "first_k_dense_replace",
    "dense_ffn_width": "intermediate_size",
    "expert_ffn_width": "moe_intermediate_size",
    "num_heads": "num_attention_heads",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "q_latent_dim": "q_lora_rank",
    "kv_latent_dim": "kv_lora_rank",
    "num_experts": "n_routed_experts",
    "num_shared_experts": "n_shared_experts",
    "experts_per_token": "num_experts_per_tok",
    "num_groups": "n_group",
    "num_groups_kept": "topk_group",
    "normalize_weights": "norm_topk_prob",
    "routed_scaling_factor": "routed_scaling_factor",
    "mtp_depth": "num_nextn_predict_layers",
    "norm_epsilon": "rms_norm_eps",
}
_YARN_KEYS = {
    "factor": "factor",
    "original_length": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
}
# What stands for an absent key or for null; every other key must be there.
_DEFAULTS = {
    "n_shared_experts": 0,
    "num_nextn_predict_layers": 0,
    "beta_fast": 32,
    "beta_slow": 1,
}
# Keys that change the arithmetic, with the only value that we compute; absent or null is as good.
_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "moe_layer_freq": 1,
    "rope_interleave": True,
}
_NEWER = ("mlp_bias", "rope_interleave")  # not in the released files, so not written either
# Scoring and choice of experts by model type. The first method is meant when the key is absent, as
# in files that transformers 5 writes.
_ROUTERS = {
    "deepseek_v3": ("sigmoid", ("noaux_tc",)),
    "deepseek_v2": ("softmax", ("greedy", "group_limited_greedy")),
}
QUANTIZATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [BLOCK_SIZE, BLOCK_SIZE],
}


def read_model_config(values: dict[str, Any], where: str) -> ModelConfig:
    """The model that a config.json describes.

    YaRN is enabled exactly when the file's rotary scaling is of type yarn, as engines do. Without
    it the original length is `max_position_embeddings`. `init_std` keeps our default.

    Args:
      values: contents of the file.
      where: its path, for messages.

    Raises:
      UserError: a key is missing, of the wrong type, or means what we do not compute.
    """

    def only(section: dict[str, Any], key: str, *allowed: Any, prefix: str = "") -> Any:
        """The value of a key that may only have some values; the first stands for no value."""
        value = section.get(key)
        if value is not None and (isinstance(value, bool), value) not in [
            (isinstance(a, bool), a) for a in allowed
        ]:
            shown = " or ".join(map(repr, allowed))
            raise UserError(f"{where}: {prefix}{key}={value!r} is not supported; allowed: {shown}")
        return allowed[0] if value is None else value

    if values.get("model_type") is None:
        raise UserError(f"{where} lacks model_type; allowed: {', '.join(_ROUTERS)}")
    affinity, methods = _ROUTERS[only(values, "model_type", *_ROUTERS)]
    for key, value in _FIXED.items():
        only(values, key, value)
    only(values, "scoring_func", affinity)
    method = only(values, "topk_method", *methods)
    quantization = _section(values, "quantization_config", where)
    for key, value in QUANTIZATION.items() if quantization else ():
        only(quantization, key, value, prefix="quantization_config.")
    if method == "greedy":  # the best experts, whatever their group
        values = values | {"n_group": 1, "topk_group": 1}
    fields = _read_fields(ModelConfig, _KEYS, values, where, "")
    heads = fields["num_heads"]
    only(values, "num_key_value_heads", heads)
    if method == "group_limited_greedy" and fields["num_groups"] > 1:
        fields["group_score"] = "max"
    model = ModelConfig(
        **fields,
        **_read_rope(values, where, only),
        affinity=affinity,
        mtp_hidden=only(values, "mtp_hidden", "post_norm", "pre_norm"),
    )
    if affinity == "softmax" and model.normalize_weights and model.routed_scaling_factor != 1:
        raise UserError(
            f"{where}: norm_topk_prob=True with routed_scaling_factor="
            f"{model.routed_scaling_factor} means different things in different engines for "
            f"model_type=deepseek_v2; allowed: one of False and 1.0"
        )
    try:
        validate_model(model)
    except UserError as error:
        keys = _KEYS | {f"yarn.{field}": key for field, key in _YARN_KEYS.items()}
        text = re.sub(r"model\.([\w.]*\w)", lambda found: keys.get(found[1], found[0]), str(error))
        raise UserError(f"{where}: {text}") from None
    return model


def _read_fields(
    section_type: type, keys: dict[str, str], values: dict[str, Any], where: str, prefix: str
) -> dict[str, Any]:
    """Fields of a config dataclass from the keys that stand for them, types checked."""
    hints, found = get_type_hints(section_type), {}
    for field, key in keys.items():
        hint = hints[field]
        value = values.get(key)
        value = _DEFAULTS.get(key) if value is None else value
        kinds = scalar_types(hint)
        nothing = value is None and key in values and types.NoneType in get_args(hint)
        fits = isinstance(value, (*kinds, int) if float in kinds else kinds)
        if not nothing and (not fits or (isinstance(value, bool) and bool not in kinds)):
            if key not in values:
                raise UserError(f"{where} lacks {prefix}{key}; it must be {type_name(hint)}")
            raise UserError(f"{where}: {prefix}{key}={value!r} must be {type_name(hint)}")
        found[field] = float(value) if float in kinds else value
    return found


def _section(values: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    """A nested object; {} when it is absent or null."""
    section = values.get(key)
    if section is not None and not isinstance(section, dict):
        raise UserError(f"{where}: {key}={section!r} must be an object or null")
    return section or {}


def _read_rope(values: dict[str, Any], where: str, only) -> dict[str, Any]:
    """`rope_theta` and `yarn` from either form of the rotary settings."""
    new = isinstance(values.get("rope_parameters"), dict)
    name = "rope_parameters" if new else "rope_scaling"
    rope, prefix = _section(values, name, where), f"{name}."
    only(rope, "partial_rotary_factor", 1, prefix=prefix)
    only(rope, "truncate", True, prefix=prefix)
    only(rope, "attention_factor", 1, prefix=prefix)
    kinds = {
        only(rope, key, "default", "yarn", prefix=prefix)
        for key in ("type", "rope_type")
        if rope.get(key) is not None
    }
    if rope and not new and not kinds:
        raise UserError(f"{where}: rope_scaling lacks type; allowed: 'default' or 'yarn'")
    if len(kinds) > 1:
        raise UserError(f"{where}: {prefix}type and {prefix}rope_type differ; remove one of them")
    thetas = {"rope_theta": values.get("rope_theta", 10000.0)}
    if new and rope.get("rope_theta") is not None:
        thetas = rope
    fields = _read_fields(ModelConfig, {"rope_theta": "rope_theta"}, thetas, where, "")
    if "yarn" not in kinds:
        length = {"original_length": "max_position_embeddings"}
        return fields | {"yarn": YarnConfig(**_read_fields(YarnConfig, length, values, where, ""))}
    yarn = YarnConfig(enabled=True, **_read_fields(YarnConfig, _YARN_KEYS, rope, where, prefix))
    # Their ratio multiplies the rotated part alone, which we do not do; it is 1 in every release.
    if not yarn.mscale == rope.get("mscale_all_dim") > 0:
        raise UserError(
            f"{where}: {prefix}mscale={yarn.mscale} and {prefix}mscale_all_dim="
            f"{rope.get('mscale_all_dim')} must be equal and positive"
        )
    return fields | {"yarn": yarn}


def config_values(model: ModelConfig, dtype: str) -> dict[str, Any]:
    """Contents of the config.json of an exported checkpoint, read by engines and by the above.

    Args:
      dtype: 'fp8', 'bf16' or 'f32', as in `hf.tensors`.

    Raises:
      UserError: no released model type routes as this model does, so no engine would compute it.
    """
    assert dtype in DTYPES, dtype
    grouped, yarn = model.num_groups > 1, model.yarn
    model_type = "deepseek_v3" if model.affinity == "sigmoid" else "deepseek_v2"
    score = {"sigmoid": "top2_sum", "softmax": "max"}[model.affinity]
    if grouped and model.group_score != score:
        raise UserError(
            f"model.group_score={model.group_score} with model.affinity={model.affinity} cannot be "
            f"written as a config.json: {model_type} models score groups by {score}"
        )
    if model.affinity == "softmax" and model.normalize_weights and model.routed_scaling_factor != 1:
        raise UserError(
            f"model.routed_scaling_factor={model.routed_scaling_factor} with "
            f"model.normalize_weights=True cannot be written as a config.json: engines differ "
            f"about deepseek_v2 models; allowed: one of 1.0 and False"
        )
    if yarn.enabled and not yarn.mscale:
        raise UserError(
            "model.yarn.mscale=0 cannot be written as a config.json: engines differ about it; "
            "allowed: a positive number"
        )
    methods = _ROUTERS[model_type][1]
    values = {
        "architectures": [f"DeepseekV{model_type[-1]}ForCausalLM"],
        "model_type": model_type,
        "torch_dtype": "float32" if dtype == "f32" else "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
        **{key: getattr(model, field) for field, key in _KEYS.items()},
        **{key: value for key, value in _FIXED.items() if key not in _NEWER},
        "attention_dropout": 0.0,
        "initializer_range": model.init_std,
        "max_position_embeddings": yarn.original_length,
        "num_key_value_heads": model.num_heads,
        "rope_scaling": None,
        "rope_theta": _integral(model.rope_theta),
        "scoring_func": model.affinity,
        "topk_method": methods[-1] if grouped else methods[0],
        "use_cache": True,
    }
    if yarn.enabled:
        scaling = {key: _integral(getattr(yarn, field)) for field, key in _YARN_KEYS.items()}
        mscale = {"mscale": yarn.mscale, "mscale_all_dim": yarn.mscale}
        values["rope_scaling"] = {"type": "yarn", **scaling, **mscale}
        values["max_position_embeddings"] = round(yarn.original_length * yarn.factor)
    if not model.num_shared_experts:
        values["n_shared_experts"] = None
    if not model.mtp_depth and model_type == "deepseek_v2":
        del values["num_nextn_predict_layers"]
    if model.mtp_hidden != "post_norm":
        values["mtp_hidden"] = model.mtp_hidden  # engines know post_norm only
    if dtype == "fp8":
        values["quantization_config"] = dict(QUANTIZATION)
    return dict(sorted(values.items()))


def _integral(value: float) -> int | float:
    """40.0 as 40, as in the released files."""
    return int(value) if value == int(value) else value
