"""From logits to a token, row by row: each row has its own settings, and none sees another.

The order in which the settings act is that of vLLM and of the OpenAI API:

  1. the bias of tokens is added
  2. repetition penalty: a logit of a token in the prompt or the output is divided by it, or
     multiplied where negative
  3. frequency and presence penalty: subtracted, times a token's count in the output, and once for
     a token in it
  4. temperature: logits are divided by it; 0 takes the largest, the lowest id of equal ones
  5. min-p: probabilities below min_p times the largest are cut
  6. top-k: the k largest of what is left stay
  7. top-p: of the distribution over what is left, the fewest largest that together reach top_p stay

A cut keeps all tokens whose logits equal the last one kept. The draw of a row depends on its seed
and the token's position alone. Shape letters: B rows, V vocabulary, C most likely tokens.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from dsv3_jax.serve.requests import Sampling

_GREEDY_BELOW = 1e-5  # a smaller temperature would overflow float32


class SamplingRows(NamedTuple):
    """The settings of each row, and the tokens that its penalties look at."""

    temperature_B: jax.Array  # float32; 0: greedy
    top_p_B: jax.Array  # float32 in (0, 1]
    top_k_B: jax.Array  # int32; 0: all
    min_p_B: jax.Array  # float32 in [0, 1]
    repetition_penalty_B: jax.Array  # float32 > 0; 1: none
    presence_penalty_B: jax.Array  # float32
    frequency_penalty_B: jax.Array  # float32
    seed_B: jax.Array  # uint32
    output_counts_BV: jax.Array  # int32, how often the row's output holds a token
    prompt_seen_BV: jax.Array  # bool, is a token in the row's prompt?
    bias_BV: jax.Array  # float32, added to the logits


def rows_of(
    samplings: Sequence["Sampling"], vocab: int, prompts: Sequence[Sequence[int]] | None = None
) -> SamplingRows:
    """Settings as numpy arrays, one row each, before any output.

    Args:
      samplings: a seed of more than 32 bits counts modulo 2^32.
      vocab: V; ids of tokens, those of `logit_bias` too, are below it.
      prompts: tokens of each row, for the repetition penalty; None: none seen.
    """
    shape = len(samplings), vocab

    def column(name: str, dtype: type) -> np.ndarray:
        return np.array([getattr(s, name) for s in samplings], dtype)

    bias_BV, prompt_seen_BV = np.zeros(shape, np.float32), np.zeros(shape, bool)
    for row, sampling in enumerate(samplings):
        for token, value in sampling.logit_bias:
            bias_BV[row, token] += value
        if prompts is not None:
            prompt_seen_BV[row, list(prompts[row])] = True
    return SamplingRows(
        temperature_B=column("temperature", np.float32),
        top_p_B=column("top_p", np.float32),
        top_k_B=column("top_k", np.int32),
        min_p_B=column("min_p", np.float32),
        repetition_penalty_B=column("repetition_penalty", np.float32),
        presence_penalty_B=column("presence_penalty", np.float32),
        frequency_penalty_B=column("frequency_penalty", np.float32),
        seed_B=np.array([s.seed % 2**32 for s in samplings], np.uint32),
        output_counts_BV=np.zeros(shape, np.int32),
        prompt_seen_BV=prompt_seen_BV,
        bias_BV=bias_BV,
    )


def replaced(rows: SamplingRows, index: jax.Array, new: SamplingRows) -> SamplingRows:
    """`rows` with row `index` taken from the only row of `new`."""
    return jax.tree.map(lambda all_B, one: jnp.asarray(all_B).at[index].set(one[0]), rows, new)


def counted(rows: SamplingRows, tokens_B: jax.Array, active_B: jax.Array) -> SamplingRows:
    """`rows` after an output token of each row that is active (bool)."""
    at_token = jnp.arange(len(tokens_B)), tokens_B
    counts_BV = jnp.asarray(rows.output_counts_BV)
    return rows._replace(output_counts_BV=counts_BV.at[at_token].add(active_B.astype(jnp.int32)))


def process(logits_BV: jax.Array, rows: SamplingRows) -> jax.Array:
    """float32 logits whose softmax is what a row draws from; -inf for a token that is cut.

    A greedy row is left as it is after the penalties (its argmax is the token).
    """
    logits_BV = logits_BV.astype(jnp.float32) + rows.bias_BV
    in_output_BV = rows.output_counts_BV > 0
    repetition_B1 = rows.repetition_penalty_B[:, None]
    repeated_BV = jnp.where(logits_BV > 0, logits_BV / repetition_B1, logits_BV * repetition_B1)
    logits_BV = jnp.where(in_output_BV | rows.prompt_seen_BV, repeated_BV, logits_BV)
    logits_BV -= rows.frequency_penalty_B[:, None] * rows.output_counts_BV
    logits_BV -= rows.presence_penalty_B[:, None] * in_output_BV
    greedy_B = _greedy(rows)
    logits_BV /= jnp.where(greedy_B, 1.0, rows.temperature_B)[:, None]
    cuts_B = ~greedy_B & ((rows.min_p_B > 0) | (rows.top_k_B > 0) | (rows.top_p_B < 1))
    # Sorting a vocabulary takes longer than the rest together: not without a row that asks.
    threshold_B = jax.lax.cond(
        cuts_B.any(),
        lambda: jnp.where(cuts_B, _lowest_kept(logits_BV, rows), -jnp.inf),
        lambda: jnp.full_like(rows.temperature_B, -jnp.inf),
    )
    return jnp.where(logits_BV >= threshold_B[:, None], logits_BV, -jnp.inf)


def _greedy(rows: SamplingRows) -> jax.Array:
    return rows.temperature_B < _GREEDY_BELOW


def _lowest_kept(logits_BV: jax.Array, rows: SamplingRows) -> jax.Array:
    """The smallest logit of each row that min-p, top-k and top-p keep."""
    vocab = logits_BV.shape[-1]
    sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    min_p_B1 = sorted_BV[:, :1] + jnp.log(rows.min_p_B)[:, None]
    top_k_B1 = jnp.where(rows.top_k_B > 0, jnp.minimum(rows.top_k_B, vocab), vocab)[:, None]
    kth_B1 = jnp.take_along_axis(sorted_BV, top_k_B1 - 1, axis=-1)
    sorted_BV = jnp.where(sorted_BV >= jnp.maximum(min_p_B1, kth_B1), sorted_BV, -jnp.inf)
    probabilities_BV = jax.nn.softmax(sorted_BV, axis=-1)
    better_BV = jnp.cumsum(probabilities_BV, axis=-1) - probabilities_BV  # of larger logits
    top_p_B1 = rows.top_p_B[:, None]
    # The largest always stays. Rounding must not cut the tail of a row without top-p.
    kept_BV = (better_BV < top_p_B1) | (top_p_B1 >= 1) | (jnp.arange(vocab) == 0)
    return jnp.min(jnp.where(kept_BV & (sorted_BV > -jnp.inf), sorted_BV, jnp.inf), axis=-1)


def keys_of(rows: SamplingRows, position_B: jax.Array) -> jax.Array:
    """A random key a row, of its seed and the position in the row of the token to draw."""

    def key(seed, position):
        return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position)

    return jax.vmap(key)(rows.seed_B, position_B)


def draw(keys_B: jax.Array, logits_BV: jax.Array) -> jax.Array:
    """int32 token of each row ~ softmax(logits), by the largest logit plus Gumbel noise.

    A row draws the same whatever the other rows are, and however many.
    """
    vocab = logits_BV.shape[-1]
    noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, (vocab,)))(keys_B)
    return jnp.argmax(logits_BV + noise_BV, axis=-1).astype(jnp.int32)


def sample(logits_BV: jax.Array, rows: SamplingRows, position_B: jax.Array) -> jax.Array:
    """int32 token of each row.

    Args:
      logits_BV: of the model, unprocessed.
      position_B: int32 position that the token will have in its row, prompt included.
    """
    processed_BV = process(logits_BV, rows)
    drawn_B = draw(keys_of(rows, position_B), processed_BV)
    return jnp.where(_greedy(rows), processed_BV.argmax(-1).astype(jnp.int32), drawn_B)


def logprobs(
    logits_BV: jax.Array, tokens_B: jax.Array, num_top: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probabilities of the model's own distribution, before any setting acts.

    Returns:
      float32 logprob_B of `tokens_B`; int32 ids [B, num_top] of the most likely tokens, best first,
      and their float32 log-probabilities.
    """
    logprobs_BV = jax.nn.log_softmax(logits_BV.astype(jnp.float32), axis=-1)
    logprob_B = jnp.take_along_axis(logprobs_BV, tokens_B[:, None], axis=-1)[:, 0]
    top_BC, ids_BC = jax.lax.top_k(logprobs_BV, num_top)
    return logprob_B, ids_BC.astype(jnp.int32), top_BC
