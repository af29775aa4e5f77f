"""Writes tests/golden/hf/<name>: checkpoint folders that other code wrote, and their logits.

    python -m tools.make_hf_goldens [name ...]

Needs torch, transformers and safetensors. `transformers_*` are saved by transformers itself, which
also computes their logits. `released_*` are the layout of the released checkpoint, put together by
hand from tensors quantised in torch and written by the safetensors package; their logits, MTP
included, come from the plain torch reading of the spec. `golden.npz` beside each folder's files
holds tokens, logits and a digest of every tensor's bytes.
"""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from absl import app
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from golden import hf_cases, reference, transformers_check  # noqa: E402
from golden.cases import Case  # noqa: E402

_SMALLEST_MARGIN = 2e-4  # a float32 run must take every top-k decision as the float64 run does
_NUM_SHARDS = 3


def released_config(case: Case, fp8: bool) -> dict:
    """config.json with the keys of the released one."""
    model, yarn = case.model, case.model.yarn
    config = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "attention_bias": False,
        "aux_loss_alpha": 0.001,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "ep_size": 1,
        "first_k_dense_replace": model.num_dense_layers,
        "hidden_act": "silu",
        "hidden_size": model.width,
        "initializer_range": 0.02,
        "intermediate_size": model.dense_ffn_width,
        "kv_lora_rank": model.kv_latent_dim,
        "max_position_embeddings": yarn.original_length,
        "model_type": "deepseek_v3",
        "moe_intermediate_size": model.expert_ffn_width,
        "moe_layer_freq": 1,
        "n_group": model.num_groups,
        "n_routed_experts": model.num_experts,
        "n_shared_experts": model.num_shared_experts,
        "norm_topk_prob": True,
        "num_attention_heads": model.num_heads,
        "num_experts_per_tok": model.experts_per_token,
        "num_hidden_layers": model.num_layers,
        "num_key_value_heads": model.num_heads,
        "num_nextn_predict_layers": model.mtp_depth,
        "q_lora_rank": model.q_latent_dim,
        "qk_nope_head_dim": model.qk_nope_head_dim,
        "qk_rope_head_dim": model.qk_rope_head_dim,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": model.rope_theta,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "seq_aux": True,
        "tie_word_embeddings": False,
        "topk_group": model.num_groups_kept,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "v_head_dim": model.v_head_dim,
        "vocab_size": model.vocab_size,
    }
    if yarn.enabled:
        config["max_position_embeddings"] = int(yarn.original_length * yarn.factor)
        config["rope_scaling"] = {
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            "factor": yarn.factor,
            "mscale": yarn.mscale,
            "mscale_all_dim": yarn.mscale,
            "original_max_position_embeddings": yarn.original_length,
            "type": "yarn",
        }
    if fp8:
        config["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        }
    return config


def released_state(w: reference.Weights, case: Case) -> dict[str, torch.Tensor]:
    """The tensors of the released layout by name, each a view of the tree's leaves."""
    model = case.model
    state = {"model.embed_tokens.weight": w["embed.table"]}
    groups = [("dense_blocks", i) for i in range(model.num_dense_layers)]
    groups += [("moe_blocks", i) for i in range(model.num_moe_layers)]
    groups += [("mtp", i) for i in range(model.mtp_depth)]
    for number, (group, index) in enumerate(groups):
        block = leaves = reference.layer(w, group, index)
        layer = {}
        if group == "mtp":
            block = reference.under(leaves, "block.")
            layer["embed_tokens.weight"] = w["embed.table"]
            layer["enorm.weight"] = leaves["enorm.gain"]
            layer["hnorm.weight"] = leaves["hnorm.gain"]
            layer["eh_proj.weight"] = leaves["proj.kernel"].T
            layer["shared_head.norm.weight"] = leaves["out_norm.gain"]
            layer["shared_head.head.weight"] = w["head.kernel"].T
        layer |= transformers_check.block_state(block)
        if group != "dense_blocks":
            gate_up, down = (
                layer.pop("mlp.experts.gate_up_proj"),
                layer.pop("mlp.experts.down_proj"),
            )
            for e in range(model.num_experts):
                gate, up = gate_up[e].chunk(2)
                layer[f"mlp.experts.{e}.gate_proj.weight"] = gate
                layer[f"mlp.experts.{e}.up_proj.weight"] = up
                layer[f"mlp.experts.{e}.down_proj.weight"] = down[e]
        state |= {f"model.layers.{number}.{name}": leaf for name, leaf in layer.items()}
    return state | {"model.norm.weight": w["final_norm.gain"], "lm_head.weight": w["head.kernel"].T}


def spread(scales: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Each block's scale at each of its elements."""
    return scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[: shape[0], : shape[1]]


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """E4M3 codes and the float32 scales of the 128x128 blocks, which multiply (spec §5.1)."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % 128, 0, -rows % 128))
    blocks = padded.unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
    scales = blocks.abs().amax(dim=(1, 3)).clamp(min=1e-4) / 448
    codes = (weight / spread(scales, weight.shape)).clamp(-448, 448)
    return codes.to(torch.float8_e4m3fn), scales


def round_tree(w: reference.Weights, case: Case, fp8: bool) -> dict[str, torch.Tensor]:
    """The stored tensors; the leaves of `w` are rounded, in place, to what these hold."""
    stored = {}
    for name, view in released_state(w, case).items():
        if name.endswith("e_score_correction_bias"):
            stored[name] = view.clone()
        elif fp8 and "_proj" in name and "eh_proj" not in name:
            codes, scales = quantize(view)
            stored[name], stored[f"{name}_scale_inv"] = codes.contiguous(), scales.contiguous()
            view.copy_(codes.float() * spread(scales, view.shape))
        else:
            stored[name] = view.to(torch.bfloat16).contiguous().clone()
            view.copy_(stored[name])
    return stored


def write_shards(folder: Path, stored: dict[str, torch.Tensor]) -> None:
    """Shards of like size and their index; every third scale lies a file after its weight."""
    sizes = {name: tensor.nbytes for name, tensor in stored.items()}
    total, done, where = sum(sizes.values()), 0, {}
    scales = [name for name in stored if name.endswith("_scale_inv")]
    for name, size in sizes.items():
        where[name] = min(done * _NUM_SHARDS // total, _NUM_SHARDS - 1)
        done += size
    for name in scales[::3]:
        where[name] = (where[name] + 1) % _NUM_SHARDS
    files = [f"model-{i + 1:05d}-of-{_NUM_SHARDS:06d}.safetensors" for i in range(_NUM_SHARDS)]
    for shard, file in enumerate(files):
        part = {name: tensor for name, tensor in stored.items() if where[name] == shard}
        save_file(part, folder / file, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: files[where[name]] for name in sorted(stored)},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=0) + "\n")


def write_released(folder: Path, case: Case, fp8: bool) -> dict[str, np.ndarray]:
    """Writes the folder; returns its logits, of the MTP modules too."""
    w = {path: torch.tensor(leaf) for path, leaf in case.weights().items()}
    stored = round_tree(w, case, fp8)
    if fp8:
        write_shards(folder, stored)
    else:
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.dumps(released_config(case, fp8), indent=2, sort_keys=True)
    (folder / "config.json").write_text(config + "\n")
    output = read_spec(w, case)
    named = {f"mtp_logits_{k}": logits for k, logits in enumerate(output.mtp_logits, start=1)}
    return {"logits": output.logits.numpy(), **{k: v.numpy() for k, v in named.items()}}


def write_transformers(folder: Path, case: Case, dtype: torch.dtype) -> dict[str, np.ndarray]:
    """Lets transformers save, load again and run its own folder, in float32."""
    transformers_check.make_network(case).to(dtype).save_pretrained(folder)
    network = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    with torch.no_grad():
        logits = network(torch.tensor(case.tokens()[:, :-1], dtype=torch.long)).logits
    w = {path: torch.tensor(leaf) for path, leaf in case.weights().items()}
    w = {p: leaf if "router.bias" in p else leaf.to(dtype).float() for p, leaf in w.items()}
    expected = read_spec(w, case).logits
    difference = float((logits - expected).abs().max() / expected.abs().max())
    print(f"{folder.name}: transformers differs from the reading of the spec by {difference:.1e}")
    assert difference < 1e-5, difference
    return {"logits": logits.numpy()}


def read_spec(w: reference.Weights, case: Case) -> reference.Output:
    """The logits of the torch reading, in float64.

    Raises:
      ValueError: a top-k decision is too close to call; take another seed.
    """
    w64 = {path: leaf.double() for path, leaf in w.items()}
    output = reference.forward(w64, case.tokens()[:, :-1].tolist(), case.model)
    if min(output.margins) < _SMALLEST_MARGIN:
        raise ValueError(f"seed {case.seed}: a routing margin is {min(output.margins):.1e}")
    return output


def digests(folder: Path) -> dict[str, np.ndarray]:
    """SHA-256 of every tensor's bytes, as the safetensors package reads them; names sorted."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    names = sorted(tensors)
    raw = [tensors[name].contiguous().view(torch.uint8).numpy().tobytes() for name in names]
    sums = [np.frombuffer(hashlib.sha256(data).digest(), np.uint8) for data in raw]
    return {"tensor_names": np.array(names), "tensor_sha256": np.stack(sums)}


_WRITERS = {
    "transformers_v3": lambda folder, case: write_transformers(folder, case, torch.float32),
    "transformers_v2": lambda folder, case: write_transformers(folder, case, torch.bfloat16),
    "released_fp8": lambda folder, case: write_released(folder, case, fp8=True),
    "released_bf16": lambda folder, case: write_released(folder, case, fp8=False),
}


def main(argv: list[str]) -> None:
    for name in argv[1:] or hf_cases.CASES:
        folder, case = hf_cases.FOLDER / name, hf_cases.CASES[name]
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        arrays = {k: v.astype(np.float32) for k, v in _WRITERS[name](folder, case).items()}
        np.savez_compressed(
            folder / "golden.npz", tokens=case.tokens()[:, :-1], **arrays, **digests(folder)
        )
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(f"{folder}: {size / 1024:.0f} KB")


if __name__ == "__main__":
    app.run(main)
