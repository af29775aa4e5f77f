"""`v2_lite_16b`: DeepSeek-V2-Lite (spec §1)."""

from dsv3_jax.config import (
    BalanceConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    YarnConfig,
)


def v2_lite_16b() -> Config:
    """15,706,484,224 parameters, 2,661,150,208 active: no query latent, softmax router, no MTP.

    Recipe of V2 App. B: batch 4608 x 4096, max LR 4.2e-4, 2K warm-up, 5.7T tokens, alpha_1 0.001.
    The learning-rate shape stays V3's (spec §8); V2's step decay is not reproduced.
    Command: python -m experiments.pretrain --config=v2_lite_16b --workdir=runs/v2_lite
    """
    return Config(
        run=RunConfig(name="v2_lite_16b"),
        model=ModelConfig(
            vocab_size=102400,
            width=2048,
            num_layers=27,
            num_dense_layers=1,
            dense_ffn_width=10944,
            expert_ffn_width=1408,
            num_heads=16,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            q_latent_dim=None,
            kv_latent_dim=512,
            num_experts=64,
            num_shared_experts=2,
            experts_per_token=6,
            affinity="softmax",
            normalize_weights=False,
            routed_scaling_factor=1.0,
            mtp_depth=0,
            yarn=YarnConfig(mscale=0.707),
        ),
        balance=BalanceConfig(
            method="auxiliary",
            sequence_weight=0.0,
            expert_weight=0.001,
            device_weight=0.0,
            communication_weight=0.0,
        ),
        parallel=ParallelConfig(data=8, expert=8, layout="fsdp_ep"),
        optim=OptimConfig(peak_lr=4.2e-4, warmup_steps=2000, total_tokens=5.7e12),
        data=DataConfig(sequence_length=4096, sequences_per_step=4608, microbatch_sequences=64),
    )
