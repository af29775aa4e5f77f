"""Random checkpoint folders as the outside world writes them, for tests of whatever reads them.

Names, shapes and dtypes are typed out from the documented layout of the released checkpoint (spec
§1, §1.1), and the files are written byte by byte: nothing here comes from the code under test.
"""

import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np

FP8, BF16, F32 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16, np.float32
STORED_NAMES = {np.dtype(FP8): "F8_E4M3", np.dtype(BF16): "BF16", np.dtype(F32): "F32"}

# Keys of a released config.json; every matrix has a ragged edge: 160 = 128 + 32 columns,
# 144 = 128 + 16 rows of kv_a_proj_with_mqa.
RAGGED = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 64,
    "hidden_size": 160,
    "intermediate_size": 200,
    "moe_intermediate_size": 96,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 40,
    "q_lora_rank": 72,
    "kv_lora_rank": 128,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "hidden_act": "silu",
    "attention_bias": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "max_position_embeddings": 163840,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
}
# The same with every dim of every projection a multiple of 128.
ALIGNED = RAGGED | {
    "hidden_size": 256,
    "intermediate_size": 384,
    "moe_intermediate_size": 128,
    "qk_nope_head_dim": 48,
    "v_head_dim": 64,
    "q_lora_rank": 128,
    "kv_lora_rank": 112,
}
V2_LITE = {key: value for key, value in RAGGED.items() if key != "num_nextn_predict_layers"} | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "q_lora_rank": None,
    "n_shared_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "rope_scaling": RAGGED["rope_scaling"] | {"mscale": 0.707, "mscale_all_dim": 0.707},
}


def layout(values: dict) -> list[tuple[str, tuple[int, ...], str]]:
    """(name, stored shape, kind) of every tensor; only the kind 'linear' may be FP8.

    'linear': a projection, [out, in]. 'plain': everything else that FP8 checkpoints keep in BF16.
    'gain': of a norm, also BF16. 'bias': of the router, always float32.
    """
    D, V, N = values["hidden_size"], values["vocab_size"], values["num_attention_heads"]
    P, R, H = values["qk_nope_head_dim"], values["qk_rope_head_dim"], values["v_head_dim"]
    Q, L, E = values["q_lora_rank"], values["kv_lora_rank"], values["n_routed_experts"]
    F, X = values["intermediate_size"], values["moe_intermediate_size"]
    S, main = values["n_shared_experts"] * X, values["num_hidden_layers"]
    found = [("model.embed_tokens.weight", (V, D), "plain")]

    def feed_forward(prefix: str, width: int) -> None:
        found.append((f"{prefix}.gate_proj.weight", (width, D), "linear"))
        found.append((f"{prefix}.up_proj.weight", (width, D), "linear"))
        found.append((f"{prefix}.down_proj.weight", (D, width), "linear"))

    for i in range(main + values.get("num_nextn_predict_layers", 0)):
        layer = f"model.layers.{i}"
        if i >= main:
            found.append((f"{layer}.embed_tokens.weight", (V, D), "plain"))
            found.append((f"{layer}.enorm.weight", (D,), "gain"))
            found.append((f"{layer}.hnorm.weight", (D,), "gain"))
            found.append((f"{layer}.eh_proj.weight", (D, 2 * D), "plain"))
            found.append((f"{layer}.shared_head.norm.weight", (D,), "gain"))
            found.append((f"{layer}.shared_head.head.weight", (V, D), "plain"))
        found.append((f"{layer}.input_layernorm.weight", (D,), "gain"))
        found.append((f"{layer}.post_attention_layernorm.weight", (D,), "gain"))
        attention = f"{layer}.self_attn"
        if Q is None:
            found.append((f"{attention}.q_proj.weight", (N * (P + R), D), "linear"))
        else:
            found.append((f"{attention}.q_a_proj.weight", (Q, D), "linear"))
            found.append((f"{attention}.q_a_layernorm.weight", (Q,), "gain"))
            found.append((f"{attention}.q_b_proj.weight", (N * (P + R), Q), "linear"))
        found.append((f"{attention}.kv_a_proj_with_mqa.weight", (L + R, D), "linear"))
        found.append((f"{attention}.kv_a_layernorm.weight", (L,), "gain"))
        found.append((f"{attention}.kv_b_proj.weight", (N * (P + H), L), "linear"))
        found.append((f"{attention}.o_proj.weight", (D, N * H), "linear"))
        if i < values["first_k_dense_replace"]:
            feed_forward(f"{layer}.mlp", F)
            continue
        found.append((f"{layer}.mlp.gate.weight", (E, D), "plain"))
        if values["scoring_func"] == "sigmoid":
            found.append((f"{layer}.mlp.gate.e_score_correction_bias", (E,), "bias"))
        for expert in range(E):
            feed_forward(f"{layer}.mlp.experts.{expert}", X)
        if S:
            feed_forward(f"{layer}.mlp.shared_experts", S)
    found.append(("model.norm.weight", (D,), "gain"))
    found.append(("lm_head.weight", (V, D), "plain"))
    return found


def random_codes(
    rng: np.random.Generator, shape: tuple[int, int], recoverable: bool
) -> tuple[np.ndarray, np.ndarray]:
    """E4M3 codes, all but the NaNs, and the float32 scales of their 128x128 blocks."""
    codes = rng.integers(0, 256, shape).astype(np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0x80  # NaNs become -0
    blocks = tuple(math.ceil(dim / 128) for dim in shape)
    amax = (rng.uniform(0.5, 4.0, blocks) / math.sqrt(shape[1])).astype(F32)
    scales = amax / F32(448)
    if not recoverable:
        return codes.view(FP8), (scales * rng.uniform(0.9, 1.1, blocks)).astype(F32)
    for a, b in np.ndindex(blocks):
        height, width = min(128, shape[0] - 128 * a), min(128, shape[1] - 128 * b)
        row, column = 128 * a + rng.integers(height), 128 * b + rng.integers(width)
        codes[row, column] = rng.choice([0x7E, 0xFE])  # 448 or -448
    return codes.view(FP8), scales


def random_tensors(
    values: dict, dtype: str, seed: int, recoverable: bool = True
) -> dict[str, np.ndarray]:
    """Every tensor of a folder by name, of a size that keeps hidden states of order one.

    Args:
      dtype: 'fp8' (projections E4M3 with scales, the rest as 'bf16'), 'bf16' or 'f32'.
      recoverable: FP8 blocks each hold a 448 or -448 and their scales are quotients by 448, which
        is what quantising leaves: dequantised to float32 and quantised again they give the same
        bytes. Otherwise codes and scales are any.
    """
    rng = np.random.default_rng(seed)
    stored = F32 if dtype == "f32" else BF16
    tensors: dict[str, np.ndarray] = {}
    for name, shape, kind in layout(values):
        if kind == "linear" and dtype == "fp8":
            codes, scales = random_codes(rng, shape, recoverable)
            tensors[name], tensors[f"{name}_scale_inv"] = codes, scales
        elif kind == "bias":
            tensors[name] = rng.uniform(-0.5, 0.5, shape).astype(F32)
        elif kind == "gain":
            tensors[name] = rng.uniform(0.7, 1.3, shape).astype(stored)
        else:
            values_of_order_one = rng.normal(size=shape) / math.sqrt(shape[1])
            values_of_order_one.flat[0] = -0.0
            tensors[name] = values_of_order_one.astype(stored)
    for layer in range(values["num_hidden_layers"], values["num_hidden_layers"] + 9):
        for copy, source in (
            (f"model.layers.{layer}.embed_tokens.weight", "model.embed_tokens.weight"),
            (f"model.layers.{layer}.shared_head.head.weight", "lm_head.weight"),
        ):
            if copy in tensors:
                tensors[copy] = tensors[source]
    return tensors


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """8 bytes of header length, the header, the data."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": STORED_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor).tobytes())


def write_random_folder(
    path: str | Path,
    *,
    values: dict = RAGGED,
    dtype: str = "fp8",
    seed: int = 0,
    num_shards: int = 3,
    scales_elsewhere: bool = True,
    recoverable: bool = True,
) -> dict[str, np.ndarray]:
    """Writes config.json, shards and index; returns every tensor as stored.

    Args:
      values: keys of config.json, such as RAGGED, ALIGNED or V2_LITE; what the dtype adds
        (`quantization_config`, `torch_dtype`) is added here.
      dtype, seed, recoverable: see `random_tensors`.
      num_shards: 1 writes model.safetensors without an index.
      scales_elsewhere: every third scale goes to another shard than its weight.
    """
    path = Path(path)
    path.mkdir(parents=True)
    values = values | {"torch_dtype": "float32" if dtype == "f32" else "bfloat16"}
    if dtype == "fp8":
        values["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        }
    (path / "config.json").write_text(json.dumps(values, indent=2))
    tensors = random_tensors(values, dtype, seed, recoverable)
    if num_shards == 1:
        write_safetensors(path / "model.safetensors", tensors)
        return tensors
    total, done = sum(tensor.nbytes for tensor in tensors.values()), 0
    shards: list[dict[str, np.ndarray]] = [{} for _ in range(num_shards)]
    num_scales = 0
    for name, tensor in tensors.items():
        shard = min(done * num_shards // total, num_shards - 1)
        if name.endswith("_scale_inv"):
            num_scales += 1
            if scales_elsewhere and num_scales % 3 == 0:
                shard = (shard + 1) % num_shards
        shards[shard][name] = tensor
        done += tensor.nbytes
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{num_shards:06d}.safetensors"
        write_safetensors(path / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return tensors
