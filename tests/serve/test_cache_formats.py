"""What a latent cache in fewer bits does to the text, against teacher forcing in float32."""

import dataclasses
from functools import cache

import jax
import numpy as np
import pytest
from small_engine import OPTIONS, forced_logits, make_model, requests_of

from dsv3_jax.serve.engine import Engine


@cache
def readings(cache_dtype: str) -> tuple[float, float]:
    """Of a greedy engine's tokens: the part that is the argmax, and the error of their logprobs.

    Both against the model in float32 on the engine's own text, so that a token that differs does
    not change what later ones are compared with.
    """
    options = dataclasses.replace(OPTIONS, cache_dtype=cache_dtype)
    engine, requests = Engine(make_model(), options), requests_of(seed=0, count=24, num_logprobs=0)
    outputs = {engine.submit(request): [] for request in requests}
    while engine.has_work:
        for output in engine.step():
            outputs[output.request_id] += output.logprobs
    texts = [[given.token for given in output] for output in outputs.values()]
    forced = forced_logits(make_model(), requests, texts)
    equal = [logits.argmax(-1) == text for logits, text in zip(forced, texts, strict=True)]
    errors = [
        np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.array(text)[:, None], 1)[:, 0]
        - [given.logprob for given in output]
        for logits, text, output in zip(forced, texts, outputs.values(), strict=True)
    ]
    return np.concatenate(equal).mean(), np.sqrt(np.square(np.concatenate(errors)).mean())


@pytest.mark.parametrize(
    "cache_dtype, least_equal, largest_error",
    [("float32", 1.0, 1e-5), ("bfloat16", 0.995, 2e-3), ("fp8", 0.97, 0.02)],
)
def test_tokens_are_those_of_teacher_forcing(cache_dtype, least_equal, largest_error):
    equal, error = readings(cache_dtype)
    assert equal >= least_equal and error <= largest_error, (equal, error)


def test_fewer_bits_cost_precision():
    """The formats are in use, and text depends on what is in the cache."""
    errors = [readings(cache_dtype)[1] for cache_dtype in ("float32", "bfloat16", "fp8")]
    assert errors[1] > 10 * errors[0] and errors[2] > 2 * errors[1], errors
