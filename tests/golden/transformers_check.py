"""A third opinion on the main model: the transformers package, given the same weights."""

import numpy as np
import torch
import transformers
from golden import cases, reference


def make_config(case: cases.Case) -> transformers.PretrainedConfig:
    """The case's architecture in the words of transformers."""
    model, yarn = case.model, case.model.yarn
    rope = {"rope_type": "default", "rope_theta": model.rope_theta}
    if yarn.enabled:
        rope = {
            "rope_type": "yarn",
            "rope_theta": model.rope_theta,
            "factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_length,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            "mscale": yarn.mscale,
            "mscale_all_dim": yarn.mscale,
        }
    common = dict(
        vocab_size=model.vocab_size,
        hidden_size=model.width,
        intermediate_size=model.dense_ffn_width,
        moe_intermediate_size=model.expert_ffn_width,
        num_hidden_layers=model.num_layers,
        first_k_dense_replace=model.num_dense_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_heads,
        qk_nope_head_dim=model.qk_nope_head_dim,
        qk_rope_head_dim=model.qk_rope_head_dim,
        v_head_dim=model.v_head_dim,
        q_lora_rank=model.q_latent_dim,
        kv_lora_rank=model.kv_latent_dim,
        n_routed_experts=model.num_experts,
        n_shared_experts=model.num_shared_experts,
        num_experts_per_tok=model.experts_per_token,
        n_group=model.num_groups,
        topk_group=model.num_groups_kept,
        routed_scaling_factor=model.routed_scaling_factor,
        rms_norm_eps=model.norm_epsilon,
        max_position_embeddings=int(yarn.original_length * yarn.factor),
        rope_parameters=rope,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    if model.affinity == "sigmoid":
        return transformers.DeepseekV3Config(norm_topk_prob=model.normalize_weights, **common)
    method = "group_limited_greedy" if model.num_groups > 1 else "greedy"
    return transformers.DeepseekV2Config(topk_method=method, **common)


_ATTENTION = {
    "wq": "q_proj",
    "wq_a": "q_a_proj",
    "q_norm": "q_a_layernorm",
    "wq_b": "q_b_proj",
    "wkv_a": "kv_a_proj_with_mqa",
    "kv_norm": "kv_a_layernorm",
    "wkv_b": "kv_b_proj",
    "wo": "o_proj",
}


def block_state(w: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One block's weights by the names of transformers, linears as [out, in]."""
    state = {
        "input_layernorm.weight": w["norm_a.gain"],
        "post_attention_layernorm.weight": w["norm_f.gain"],
    }
    for ours, theirs in _ATTENTION.items():
        if f"attn.{ours}.kernel" in w:
            state[f"self_attn.{theirs}.weight"] = w[f"attn.{ours}.kernel"].T
        elif f"attn.{ours}.gain" in w:
            state[f"self_attn.{theirs}.weight"] = w[f"attn.{ours}.gain"]
    for ours, theirs in (("ffn.", "mlp."), ("ffn.shared.", "mlp.shared_experts.")):
        if f"{ours}w13.kernel" in w:
            gate, up = w[f"{ours}w13.kernel"].T.chunk(2)
            state |= {f"{theirs}gate_proj.weight": gate, f"{theirs}up_proj.weight": up}
            state[f"{theirs}down_proj.weight"] = w[f"{ours}w2.kernel"].T
    if "ffn.router.kernel" in w:
        state["mlp.gate.weight"] = w["ffn.router.kernel"].T
        state["mlp.gate.e_score_correction_bias"] = w["ffn.router.bias"]
        state["mlp.experts.gate_up_proj"] = w["ffn.experts.w13"].transpose(1, 2)
        state["mlp.experts.down_proj"] = w["ffn.experts.w2"].transpose(1, 2)
    return state


def make_network(case: cases.Case) -> transformers.PreTrainedModel:
    """The case's main model with its weights, float32."""
    network = transformers.AutoModelForCausalLM.from_config(make_config(case)).float().eval()
    w = {path: torch.tensor(leaf) for path, leaf in case.weights().items()}
    state = {
        "model.embed_tokens.weight": w["embed.table"],
        "model.norm.weight": w["final_norm.gain"],
        "lm_head.weight": w["head.kernel"].T,
    }
    for i in range(case.model.num_layers):
        dense = case.model.num_dense_layers
        group, index = ("dense_blocks", i) if i < dense else ("moe_blocks", i - dense)
        block = block_state(reference.layer(w, group, index))
        state |= {f"model.layers.{i}.{name}": leaf for name, leaf in block.items()}
    loaded = network.load_state_dict(state, strict=False)
    assert not loaded.missing_keys, loaded.missing_keys
    assert all("e_score_correction_bias" in key for key in loaded.unexpected_keys), loaded
    return network


def logits_difference(case: cases.Case) -> float:
    """Largest |difference| over largest |logit| of the main model, in float32."""
    tokens = case.tokens()[:, :-1]
    with torch.no_grad():
        theirs = make_network(case)(torch.tensor(tokens, dtype=torch.long)).logits
    w64 = {path: torch.tensor(leaf).double() for path, leaf in case.weights().items()}
    ours = reference.forward(w64, tokens.tolist(), case.model).logits
    return float(np.abs(theirs.double() - ours).max() / ours.abs().max())
