"""Speculative decoding: the text of decoding without drafts, and the distribution of the model."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.stats import chi2
from small_engine import (
    CONFIG,
    CONTEXT,
    OPTIONS,
    differing_tokens,
    forced_logits,
    make_model,
    requests_of,
    run,
    seeded,
)

from dsv3_jax.serve import programs
from dsv3_jax.serve.engine import Engine
from dsv3_jax.serve.requests import Request, Sampling

DRAFTS = 2


def make_engine(model=None, **options) -> Engine:
    options = {"num_draft_tokens": DRAFTS, **options}
    return Engine(model or make_model(), dataclasses.replace(OPTIONS, **options))


def test_greedy_text_is_that_of_teacher_forcing_in_fewer_passes():
    requests = requests_of(seed=0, count=24)
    engine = make_engine()
    outputs = run(engine, requests)
    assert [len(output) for output in outputs] == [r.max_tokens for r in requests]
    assert differing_tokens(make_model(), requests, outputs) == 0
    statistics = engine.statistics()
    assert 0.3 < statistics.drafts_accepted / statistics.drafts_proposed < 0.9
    assert statistics.decoded_tokens > 1.5 * statistics.decode_passes
    assert statistics.reused_tokens > 0 and statistics.pages_used == 0


def test_sampled_text_is_that_without_drafts():
    requests = [
        *seeded(requests_of(seed=3, count=10), temperature=1.0),
        *seeded(requests_of(seed=4, count=4), temperature=0.7, top_p=0.8, top_k=20),
        *seeded(requests_of(seed=5, count=4), repetition_penalty=1.4, presence_penalty=0.5),
        *seeded(requests_of(seed=6, count=4), frequency_penalty=1.0, logit_bias=((7, 3.0),)),
    ]
    engine = make_engine()
    outputs = run(engine, requests)
    assert outputs == run(make_engine(num_draft_tokens=0), requests)
    statistics = engine.statistics()
    assert 0.2 < statistics.drafts_accepted / statistics.drafts_proposed < 0.9


def ranks(requests, outputs, rng, temperature=1.0):
    """Of each sampled token, the probability of more likely ones plus a random part of its own.

    Uniform on [0, 1] if and only if tokens are drawn from the model's own distribution.
    """
    found = []
    for logits, output in zip(forced_logits(make_model(), requests, outputs), outputs, strict=True):
        p = np.asarray(jax.nn.softmax(logits.astype(np.float64) / temperature, axis=-1))
        own = p[np.arange(len(output)), output]
        above = np.where(p > own[:, None], p, 0.0).sum(-1)
        found.append(above + rng.random(len(output)) * own)
    return np.concatenate(found)


def chi_square(values, bins=16):
    """The statistic of uniformity over its 0.1 % quantile: above 1, uniformity is rejected."""
    counts, _ = np.histogram(values, bins, (0.0, 1.0))
    expected = len(values) / bins
    return ((counts - expected) ** 2 / expected).sum() / chi2.ppf(0.999, bins - 1)


@cache
def sampled(count):
    requests = seeded(requests_of(seed=7, count=count))
    return requests, run(make_engine(max_queue=count), requests)


def test_sampled_tokens_follow_the_model():
    rng = np.random.default_rng(0)
    assert chi_square(ranks(*sampled(60), rng)) < 1
    assert chi_square(ranks(*sampled(60), rng, temperature=1.2)) > 1  # that it would see


@pytest.mark.slow
def test_ten_thousand_tokens_follow_the_model():
    values = ranks(*sampled(700), np.random.default_rng(0))
    assert len(values) > 10_000 and chi_square(values, bins=50) < 1


def test_drafts_are_those_of_the_mtp_module():
    """The first is the argmax of `hidden_states`' depth 1, the second of its state once more."""
    model, seen = make_model(), []
    engine = make_engine()
    decode = programs.decode

    def watched(weights, state, inputs, **static):
        result, state = decode(weights, state, inputs, **static)
        count = int(result.count_B[0])
        position = int(inputs.position_B[0]) + count  # of the last new token
        seen.append((position, np.asarray(result.drafts_BK[0]).tolist()))
        return result, state

    prompt = tuple(np.random.default_rng(8).integers(0, CONFIG.vocab_size, 13).tolist())
    request = Request(prompt=prompt, max_tokens=24, sampling=Sampling(temperature=0.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "decode", watched)
        (output,) = run(engine, [request])
    text = np.zeros((1, CONTEXT), np.int32)
    text[0, : len(prompt) + len(output)] = [*prompt, *output]

    @jax.jit
    def forced(tokens):
        hidden = model.hidden_states(tokens)[1][0]
        return jnp.argmax(model.logits(hidden), axis=-1)

    first = np.asarray(forced(text))[0]
    assert len(seen) > 5
    for position, drafts in seen[:-1]:  # after the last pass some positions were left out
        assert drafts[0] == first[position - 1]


def test_a_reused_beginning_fills_the_cache_of_the_mtp_module():
    prompt = tuple(np.random.default_rng(9).integers(0, CONFIG.vocab_size, 21).tolist())
    request = Request(prompt=prompt, max_tokens=20, sampling=Sampling(temperature=0.0))
    engine, passes = make_engine(), []
    for _ in range(2):
        before = engine.statistics().decode_passes
        run(engine, [request])
        passes.append(engine.statistics().decode_passes - before)
    assert engine.statistics().reused_tokens == 20
    assert passes[0] == passes[1] < 16


@pytest.mark.slow
def test_drafts_pass_on_the_raw_state_where_the_model_is_trained_so():
    config = dataclasses.replace(CONFIG, mtp_hidden="pre_norm")
    graphdef = nnx.graphdef(make_model(config=config))
    model = nnx.merge(graphdef, nnx.state(make_model()))
    requests = requests_of(seed=10, count=6)
    outputs = run(make_engine(model), requests)
    assert differing_tokens(make_model(), requests, outputs) == 0
