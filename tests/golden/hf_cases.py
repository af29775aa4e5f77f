"""The checkpoint folders under tests/golden/hf: which model each holds, typed out by hand."""

from dataclasses import replace
from pathlib import Path

from golden.cases import BASE, GROUPS, YARN, Case

from dsv3_jax.config import ModelConfig

FOLDER = Path(__file__).parent / "hf"

# Ragged 128x128 blocks: 136 = 128 + 8 columns, 144 = 128 + 16 rows of the joint KV projection,
# 130 = 128 + 2 rows of the dense FFN; the KV latent is exactly one block wide.
_FP8 = ModelConfig(
    vocab_size=32,
    width=136,
    num_layers=2,
    num_dense_layers=1,
    dense_ffn_width=130,
    expert_ffn_width=12,
    num_heads=2,
    qk_nope_head_dim=8,
    qk_rope_head_dim=16,
    v_head_dim=8,
    q_latent_dim=24,
    kv_latent_dim=128,
    num_experts=8,
    num_shared_experts=1,
    experts_per_token=3,
    num_groups=4,
    num_groups_kept=2,
    mtp_depth=1,
    rope_theta=50.0,
    yarn=YARN,
)

CASES = {
    # Written by transformers, float32.
    "transformers_v3": Case(
        model=replace(
            GROUPS,
            num_layers=3,
            num_dense_layers=1,
            mtp_depth=0,
            rope_theta=50.0,
            yarn=YARN,
        ),
        seed=43,
        bias_range=(-0.4, 0.4),
    ),
    # Written by transformers, bfloat16: V2-Lite in small.
    "transformers_v2": Case(
        model=replace(
            BASE,
            q_latent_dim=None,
            num_shared_experts=2,
            experts_per_token=3,
            affinity="softmax",
            normalize_weights=False,
            routed_scaling_factor=1.0,
            mtp_depth=0,
            rope_theta=50.0,
            yarn=replace(YARN, mscale=0.707),
        ),
        seed=42,
    ),
    # The released layout: FP8 with scales in three shards, MTP layer included.
    "released_fp8": Case(model=_FP8, seed=40, bias_range=(-0.4, 0.4)),
    # The same in bfloat16, one file; no YaRN, no groups.
    "released_bf16": Case(model=BASE, seed=41, bias_range=(-0.4, 0.4)),
}
