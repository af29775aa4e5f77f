"""Sampling settings against a plain numpy reading, seeds and batches."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from dsv3_jax.serve import sampling
from dsv3_jax.serve.requests import Sampling

VOCAB = 50
DRAWS = 10_000
process, sample = map(jax.jit, (sampling.process, sampling.sample))


def expected_probabilities(logits_V, settings, prompt, output):
    """The distribution of one row, token by token, in float64."""
    logits = {token: float(logit) for token, logit in enumerate(logits_V)}
    for token, value in settings.logit_bias:
        logits[token] += value
    for token in set(prompt) | set(output):
        penalty = settings.repetition_penalty
        logits[token] *= 1 / penalty if logits[token] > 0 else penalty
    for token in set(output):
        logits[token] -= settings.frequency_penalty * list(output).count(token)
        logits[token] -= settings.presence_penalty
    best = max(logits, key=logits.get)
    if settings.temperature == 0:
        return np.eye(len(logits))[best]
    weights = {t: np.exp((logits[t] - logits[best]) / settings.temperature) for t in logits}
    weights = {t: w for t, w in weights.items() if w >= settings.min_p}
    ranked = sorted(weights, key=weights.get, reverse=True)
    ranked = ranked[: settings.top_k or None]
    total, kept, reached = sum(weights[t] for t in ranked), [], 0.0
    for token in ranked:
        kept.append(token)
        reached += weights[token] / total
        if reached >= settings.top_p:
            break
    result = np.zeros(len(logits))
    result[kept] = [weights[t] for t in kept]
    return result / result.sum()


CASES = {
    "plain": Sampling(),
    "greedy": Sampling(temperature=0.0, top_k=3, logit_bias=((4, 1.5),), presence_penalty=0.7),
    "hot": Sampling(temperature=1.7),
    "top_k": Sampling(top_k=7),
    "top_k above the vocabulary": Sampling(top_k=1000),
    "top_p": Sampling(top_p=0.6),
    "one token": Sampling(top_p=1e-6),
    "min_p": Sampling(min_p=0.2),
    "repetition": Sampling(repetition_penalty=1.8),
    "presence": Sampling(presence_penalty=1.5),
    "frequency": Sampling(frequency_penalty=-0.9),
    "bias": Sampling(logit_bias=((3, 5.0), (0, -100.0), (3, 1.0))),
    "all": Sampling(
        temperature=0.8,
        top_p=0.8,
        top_k=12,
        min_p=0.02,
        repetition_penalty=1.3,
        presence_penalty=0.4,
        frequency_penalty=0.3,
        logit_bias=((7, 2.0), (9, -1.0)),
    ),
}


def test_distribution_equals_a_plain_reading():
    rng = np.random.default_rng(0)
    rows = sampling.rows_of(list(CASES.values()), VOCAB, [[1, 2, 3, 2]] * len(CASES))
    outputs = rng.integers(0, 12, (len(CASES), 6))
    for column in outputs.T:
        rows = sampling.counted(rows, column, np.ones(len(CASES), bool))
    logits_BV = 2 * rng.normal(size=(len(CASES), VOCAB)).astype(np.float32)
    processed_BV = process(logits_BV, rows)
    greedy_B1 = np.array([[settings.temperature == 0] for settings in CASES.values()])
    best_BV = np.eye(VOCAB)[np.argmax(processed_BV, axis=-1)]
    actual_BV = np.where(greedy_B1, best_BV, jax.nn.softmax(processed_BV, axis=-1))
    for row, (name, settings) in enumerate(CASES.items()):
        expected_V = expected_probabilities(logits_BV[row], settings, [1, 2, 3], outputs[row])
        np.testing.assert_array_equal(actual_BV[row] > 0, expected_V > 0, err_msg=name)
        np.testing.assert_allclose(actual_BV[row], expected_V, atol=2e-6, err_msg=name)


def test_tokens_follow_the_distribution():
    settings = Sampling(temperature=1.3, top_p=0.9)
    logits_V = np.random.default_rng(1).normal(size=12).astype(np.float32)
    rows = sampling.rows_of([settings], 12)
    many = jax.tree.map(lambda x: jnp.broadcast_to(x, (DRAWS, *x.shape[1:])), rows)
    tokens_B = sample(jnp.tile(logits_V, (DRAWS, 1)), many, jnp.arange(DRAWS))
    assert_distributed(tokens_B, expected_probabilities(logits_V, settings, [], []))


def assert_distributed(tokens, expected_V):
    """A chi-square test, and nothing outside the support."""
    counts_V = np.bincount(tokens, minlength=len(expected_V))
    support = expected_V > 0
    assert counts_V[~support].sum() == 0
    if support.sum() > 1:
        assert stats.chisquare(counts_V[support], len(tokens) * expected_V[support]).pvalue > 1e-3


def test_a_row_draws_the_same_alone_and_among_others():
    rng = np.random.default_rng(2)
    settings = [
        Sampling(temperature=rng.uniform(0, 2), top_p=rng.uniform(0.5, 1), seed=int(seed))
        for seed in rng.integers(0, 2**40, 32)
    ]
    settings[5] = Sampling(seed=2**32 + 7)
    logits_BV = rng.normal(size=(32, VOCAB)).astype(np.float32)
    position_B = rng.integers(0, 1000, 32)
    rows = sampling.rows_of(settings, VOCAB)
    together_B = np.asarray(sample(logits_BV, rows, position_B))
    alone = [sample(logits_BV[i : i + 1], row(rows, i), position_B[i : i + 1]) for i in range(32)]
    np.testing.assert_array_equal(together_B, np.concatenate(alone))


def row(rows, index):
    return jax.tree.map(lambda x: x[index : index + 1], rows)


def test_seed_and_position_change_the_draw_and_greedy_ignores_them():
    logits_BV = jnp.zeros((64, VOCAB)).at[:, 9].set(1e-3)
    seeds = sampling.rows_of([Sampling(seed=seed) for seed in range(64)], VOCAB)
    one_seed = sampling.rows_of([Sampling(seed=5)] * 64, VOCAB)
    at_3 = sample(logits_BV, seeds, jnp.full(64, 3))
    assert len(np.unique(at_3)) > 20
    assert len(np.unique(sample(logits_BV, one_seed, jnp.arange(64)))) > 20
    np.testing.assert_array_equal(sample(logits_BV, one_seed, jnp.full(64, 3)), at_3[5])
    greedy = sampling.rows_of([Sampling(temperature=0.0, seed=seed) for seed in range(64)], VOCAB)
    np.testing.assert_array_equal(sample(logits_BV, greedy, jnp.arange(64)), 9)


def test_a_tiny_temperature_is_greedy():
    logits_BV = np.random.default_rng(0).normal(size=(2, VOCAB)).astype(np.float32) * 100
    rows = sampling.rows_of([Sampling(temperature=t, top_p=0.9) for t in (1e-4, 1e-45)], VOCAB)
    tokens_B = sample(logits_BV, rows, jnp.zeros(2, int))
    np.testing.assert_array_equal(tokens_B, logits_BV.argmax(-1))


def test_rows_are_replaced_and_counted():
    rows = sampling.rows_of([Sampling(seed=i) for i in range(3)], 5, [[0], [1], [2]])
    rows = sampling.counted(rows, np.array([4, 4, 3]), np.array([True, False, True]))
    np.testing.assert_array_equal(rows.output_counts_BV, np.eye(5)[[4, 4, 3]] * [[1], [0], [1]])
    new = sampling.rows_of([Sampling(seed=8, top_k=2)], 5, [[3, 4]])
    rows = sampling.replaced(rows, 2, new)
    assert rows.seed_B.tolist() == [0, 1, 8] and rows.top_k_B.tolist() == [0, 0, 2]
    assert rows.output_counts_BV.sum(1).tolist() == [1, 0, 0]
    assert np.nonzero(rows.prompt_seen_BV[2])[0].tolist() == [3, 4]


def test_logprobs_are_of_the_unprocessed_distribution():
    logits_BV = np.random.default_rng(3).normal(size=(4, VOCAB)).astype(np.float32)
    tokens_B = np.array([3, 0, 49, 7])
    expected_BV = logits_BV - np.log(np.exp(logits_BV.astype(np.float64)).sum(-1, keepdims=True))
    run = jax.jit(sampling.logprobs, static_argnums=2)
    logprob_B, ids_BC, top_BC = run(logits_BV, tokens_B, 3)
    np.testing.assert_allclose(logprob_B, expected_BV[range(4), tokens_B], atol=1e-5)
    np.testing.assert_array_equal(ids_BC, np.argsort(-expected_BV, axis=-1)[:, :3])
    np.testing.assert_allclose(top_BC, -np.sort(-expected_BV, axis=-1)[:, :3], atol=1e-5)
