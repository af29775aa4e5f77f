"""`small`: 539M parameters (main model), one GPU."""

from dsv3_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    PrecisionConfig,
    RunConfig,
    SourceConfig,
)


def small() -> Config:
    """539M parameters plus one MTP module, for one GPU; source text of the Python installation.

    Command: python -m experiments.pretrain --config=small --workdir=runs/small
    """
    return Config(
        run=RunConfig(
            name="small",
            num_steps=3000,
            eval_interval=500,
            log_interval=20,
            scan_layers=False,  # few and small layers
        ),
        model=ModelConfig(
            vocab_size=32768,
            width=1024,
            num_layers=12,
            num_dense_layers=1,
            dense_ffn_width=2816,
            expert_ffn_width=384,
            num_heads=16,
            qk_nope_head_dim=64,
            qk_rope_head_dim=32,
            v_head_dim=64,
            q_latent_dim=384,
            kv_latent_dim=256,
            num_experts=32,
            num_shared_experts=1,
            experts_per_token=4,
            num_groups=4,
            num_groups_kept=2,
        ),
        precision=PrecisionConfig(remat="none"),
        optim=OptimConfig(peak_lr=6e-4, warmup_steps=200),
        data=DataConfig(
            sources=(SourceConfig(kind="python", path="packages"),),
            sequence_length=2048,
            sequences_per_step=8,
        ),
        checkpoint=CheckpointConfig(interval_steps=1000),
    )
