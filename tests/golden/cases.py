"""The golden cases: which variants of the model are compared, and with which data."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from golden.weights import Draw, make_weights

from dsv3_jax.config import ModelConfig, YarnConfig

FOLDER = Path(__file__).parent
BATCH, LENGTH = 2, 14  # sequences, input tokens of each; one more token is the last target
MTP_WEIGHT, SEQUENCE_WEIGHT = 0.3, 0.05  # lambda; alpha, large enough for its gradient to show


@dataclass(frozen=True, kw_only=True)
class Case:
    """One variant; `bias_range` bounds the router biases."""

    model: ModelConfig
    seed: int
    bias_range: tuple[float, float] = (0.0, 0.0)

    def weights(self) -> dict[str, np.ndarray]:
        return make_weights(self.model, self.seed, self.bias_range)

    def tokens(self) -> np.ndarray:
        """Int32 [BATCH, LENGTH + 1]."""
        return Draw(self.seed + 1000).tokens((BATCH, LENGTH + 1), self.model.vocab_size)


BASE = ModelConfig(
    vocab_size=40,
    width=16,
    num_layers=3,
    num_dense_layers=1,
    dense_ffn_width=20,
    expert_ffn_width=6,
    num_heads=2,
    qk_nope_head_dim=6,
    qk_rope_head_dim=8,
    v_head_dim=10,
    q_latent_dim=12,
    kv_latent_dim=14,
    num_experts=8,
    num_shared_experts=1,
    experts_per_token=2,
    mtp_depth=1,
)

# Low base and short original length: the ramp and the interpolation show within LENGTH tokens.
YARN = YarnConfig(enabled=True, factor=8.0, original_length=64, beta_fast=8.0, beta_slow=0.5)

GROUPS = replace(
    BASE,
    num_layers=2,
    num_dense_layers=0,
    num_experts=12,
    experts_per_token=3,
    num_groups=4,
    num_groups_kept=2,
)

V2_LITE = replace(
    BASE,
    q_latent_dim=None,
    num_shared_experts=2,
    experts_per_token=3,
    affinity="softmax",
    normalize_weights=False,
    routed_scaling_factor=1.0,
    mtp_depth=0,
)

CASES = {
    "query_latent": Case(model=BASE, seed=1, bias_range=(-0.6, 0.6)),
    "direct_query": Case(
        model=replace(BASE, q_latent_dim=None, num_dense_layers=0, num_layers=2),
        seed=22,
        bias_range=(-0.6, 0.6),
    ),
    "yarn": Case(
        model=replace(BASE, rope_theta=50.0, yarn=YARN, mtp_depth=0),
        seed=13,
        bias_range=(-0.3, 0.3),
    ),
    "groups": Case(model=replace(GROUPS, mtp_depth=0), seed=24, bias_range=(-0.3, 0.3)),
    # All biased scores of most tokens are negative: a masked group must lose all the same.
    "groups_negative": Case(
        model=replace(GROUPS, num_shared_experts=2), seed=35, bias_range=(-1.6, -0.4)
    ),
    "softmax": Case(
        model=replace(V2_LITE, rope_theta=50.0, yarn=replace(YARN, mscale=0.707)), seed=6
    ),
    "softmax_groups": Case(
        model=replace(
            V2_LITE,
            q_latent_dim=12,
            num_layers=2,
            num_dense_layers=0,
            num_experts=12,
            num_groups=4,
            num_groups_kept=2,
            group_score="max",
            routed_scaling_factor=16.0,
        ),
        seed=17,
    ),
    "mtp_two_deep": Case(model=replace(BASE, mtp_depth=2), seed=8, bias_range=(-0.6, 0.6)),
    "mtp_pre_norm": Case(
        model=replace(BASE, num_layers=1, num_dense_layers=0, mtp_depth=2, mtp_hidden="pre_norm"),
        seed=9,
        bias_range=(-0.6, 0.6),
    ),
}
