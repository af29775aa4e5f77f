"""Arithmetic of training and serving, in floating-point operations (a multiply-add is two)."""

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


def prefill_flops_per_token(model: ModelConfig, prompt_length: int, causal: bool = True) -> float:
    """FLOPs of a prompt's forward pass, a token of it.

    Keys and values are made per head, as in training. The head runs for the last token alone; MTP
    does not.

    Args:
      prompt_length: tokens; a query meets half of them on average when `causal`.
    """
    counts = count_parameters(model)
    parameters = counts.activated_without_embedding_and_head + counts.head / prompt_length
    widths = model.num_heads * (model.qk_head_dim + model.v_head_dim)
    attended = prompt_length / 2 if causal else prompt_length
    return 2.0 * parameters + model.num_layers * 2.0 * widths * attended


def decode_flops_per_token(model: ModelConfig, context_length: int) -> float:
    """FLOPs of one new token, by the absorbed form of MLA (spec §2), which reads latents alone.

    `wkv_b` multiplies queries and outputs instead of every cached latent: as many FLOPs as for one
    token. A head then meets L + R numbers of a cached token for its score and L for its value.

    Args:
      context_length: cached tokens, the new one included.
    """
    parameters = count_parameters(model).activated_without_embedding
    widths = model.num_heads * (2 * model.kv_latent_dim + model.qk_rope_head_dim)
    return 2.0 * parameters + model.num_layers * 2.0 * widths * context_length
