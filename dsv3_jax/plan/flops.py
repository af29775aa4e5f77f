"""Arithmetic of training, in floating-point operations (one multiply-add counts two)."""

from dsv3_jax.config import ModelConfig
from dsv3_jax.plan.parameters import count_parameters


def flops_per_token(
    model: ModelConfig, sequence_length: int, causal: bool = True, include_mtp: bool = False
) -> float:
    """FLOPs that training spends on one token, forward and backward (spec §12).

    Six a weight that the token activates, the embedding table excluded, and three times the
    forward attention products `q k^T` and `p v`; recomputed activations are not counted.

    Args:
      sequence_length: tokens a sequence; a query meets half of them on average when `causal`.
      include_mtp: add the MTP modules (spec §4), each of which runs the output head once more.

    Returns:
      e.g. 250.46e9 for V3 at 4096 tokens (281.16e9 non-causal).
    """
    counts = count_parameters(model)
    parameters, layers = counts.activated_without_embedding, model.num_layers
    if include_mtp and model.mtp_depth:
        modules = counts.mtp_activated - counts.embedding - counts.head
        parameters += modules + model.mtp_depth * counts.head
        layers += model.mtp_depth
    widths = model.num_heads * (model.qk_head_dim + model.v_head_dim)
    attended = sequence_length / 2 if causal else sequence_length
    return 6.0 * parameters + 3.0 * layers * 2.0 * widths * attended
