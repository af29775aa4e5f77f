"""A model small enough to compile in seconds."""

from dsv3_jax.config import ModelConfig

SMALL_MODEL = ModelConfig(
    vocab_size=64,
    width=16,
    num_layers=2,
    num_dense_layers=1,
    dense_ffn_width=32,
    expert_ffn_width=16,
    num_heads=2,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    q_latent_dim=8,
    kv_latent_dim=8,
    num_experts=8,
    num_shared_experts=1,
    experts_per_token=2,
    num_groups=4,
    num_groups_kept=2,
    init_std=0.3,
)
