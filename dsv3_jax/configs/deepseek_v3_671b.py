"""`deepseek_v3_671b`: the paper's model and pre-training recipe (spec §1, §8)."""

from dsv3_jax.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PrecisionConfig,
    RunConfig,
)


def deepseek_v3_671b() -> Config:
    """671,026,419,200 parameters, 37.55B active; 250.46 GFLOP a token at 4096 tokens, MTP excluded.

    14.8T tokens, batch 3072 -> 15360 sequences of 4096 over the first 469B, EP 64.
    Command: python -m experiments.pretrain --config=deepseek_v3_671b --dry_run
    """
    return Config(
        run=RunConfig(name="deepseek_v3_671b"),
        model=ModelConfig(
            vocab_size=129280,
            width=7168,
            num_layers=61,
            num_dense_layers=3,
            dense_ffn_width=18432,
            expert_ffn_width=2048,
            num_heads=128,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            q_latent_dim=1536,
            kv_latent_dim=512,
            num_experts=256,
            num_shared_experts=1,
            experts_per_token=8,
            num_groups=8,
            num_groups_kept=4,
        ),
        # Of 1,024 devices. A step's 48 to 240 micro-batches feed DualPipe from both ends.
        parallel=ParallelConfig(
            pipe=16,
            expert=64,
            schedule="dualpipe",
            max_deferred=1,
            dispatch="hierarchical",
            buffer_factor=2.0,
        ),
        precision=PrecisionConfig(remat="full"),
        optim=OptimConfig(total_tokens=14.8e12, ema_decay=0.999),
        data=DataConfig(
            tokenizer="tokenizer.json",
            sequences_per_step_start=3072,
            batch_ramp_sequences=1024,
            microbatch_sequences=64,
        ),
    )
