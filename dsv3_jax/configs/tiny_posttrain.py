"""`tiny` after pre-training: extended, fine-tuned on conversations, then rewarded."""

from dataclasses import replace

from dsv3_jax.config import Config, ExtendConfig, GrpoConfig, YarnConfig
from dsv3_jax.configs.tiny import tiny


def tiny_extend() -> Config:
    """`tiny` from 128 to 256 and 512 tokens by YaRN (spec §9).

    The rate is 100 times the paper's, which is for a model 500,000 times as large.
    Command: python -m experiments.extend_context --set checkpoint.initial_weights=runs/tiny
    """
    base = tiny()
    return replace(
        base,
        run=replace(base.run, name="tiny_extend"),
        model=replace(base.model, yarn=YarnConfig(factor=4.0, original_length=128)),
        optim=replace(base.optim, mtp_weight_late=0.1),
        extend=ExtendConfig(first_length=256, second_length=512, steps=50, learning_rate=7.3e-4),
    )


def tiny_sft() -> Config:
    """Two epochs over conversations, from the weights of a run of `tiny` (spec §10.1).

    The rates are 100 times the paper's, which are for a model 500,000 times as large.
    Command: python -m experiments.sft --set checkpoint.initial_weights=runs/tiny \\
        --set sft.conversations=conversations.jsonl
    """
    base = tiny()
    return replace(
        base,
        run=replace(base.run, name="tiny_sft", num_steps=None, eval_interval=20),
        # Unpublished: the last values of pre-training (spec §8).
        balance=replace(base.balance, bias_speed=0.0),
        optim=replace(
            base.optim,
            schedule="cosine",
            peak_lr=5e-4,
            final_lr=1e-4,
            warmup_steps=0,
            mtp_weight=0.1,
        ),
    )


def tiny_grpo() -> Config:
    """GRPO on the built-in arithmetic, from a fine-tuned `tiny` that sometimes solves it.

    Command: python -m experiments.grpo --set checkpoint.initial_weights=runs/tiny_sft
    """
    base = tiny()
    return replace(
        base,
        run=replace(base.run, name="tiny_grpo", num_steps=100, eval_interval=20, log_interval=5),
        balance=replace(base.balance, bias_speed=0.0),
        optim=replace(
            base.optim,
            schedule="cosine",
            peak_lr=2e-4,
            final_lr=2e-5,
            warmup_steps=0,
            # MTP's modules get no gradient here, and should not decay either.
            weight_decay=0.0,
        ),
        data=replace(base.data, sequence_length=23, sequences_per_step=256),
        checkpoint=replace(base.checkpoint, interval_steps=50),
        grpo=GrpoConfig(max_answer_tokens=8, kl_weight=0.001, reference_steps=50),
    )
