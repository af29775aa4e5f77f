"""`tiny`: the whole system on a laptop."""

from dsv3_jax.config import (
    BalanceConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
)


def tiny() -> Config:
    """Every part of V3 (MLA, MoE, loss-free balance, MTP) at laptop size, on 8 emulated devices.

    1.3M parameters, 0.8M tokens of the standard library's source; about 3 minutes on 2 cores.
    Command: python -m experiments.pretrain
    """
    return Config(
        run=RunConfig(name="tiny", num_steps=200, eval_interval=50),
        model=ModelConfig(
            vocab_size=1024,
            width=128,
            num_layers=4,
            num_dense_layers=1,
            dense_ffn_width=256,
            expert_ffn_width=64,
            num_heads=4,
            qk_nope_head_dim=32,
            qk_rope_head_dim=16,
            v_head_dim=32,
            q_latent_dim=96,
            kv_latent_dim=64,
            num_experts=8,
            num_shared_experts=1,
            experts_per_token=2,
            num_groups=4,
            num_groups_kept=2,
            init_std=0.02,
        ),
        # 200 steps of 0.001 could move a bias by no more than 0.2: too little to balance in time.
        balance=BalanceConfig(bias_speed=0.01),
        parallel=ParallelConfig(data=2, expert=4),
        optim=OptimConfig(peak_lr=2e-3, warmup_steps=30),
        data=DataConfig(sequence_length=128, sequences_per_step=32, max_documents=400),
        checkpoint=CheckpointConfig(interval_steps=100),
    )
