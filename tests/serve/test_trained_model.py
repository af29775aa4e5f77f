"""What is promised of a server, shown on `tiny` as the first command of the README trains it."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small_engine import GREEDY, differing_tokens, eight_devices

from dsv3_jax.checkpoint.pretrained import load_model
from dsv3_jax.configs.tiny import tiny
from dsv3_jax.data.pipeline import prepare_corpus, validation_rows
from dsv3_jax.serve.engine import Engine
from dsv3_jax.serve.requests import EngineOptions, Request, Sampling
from tools.bench_speculative import measure

pytestmark = pytest.mark.slow
NEW, CONTEXT = 128, 288
OPTIONS = EngineOptions(
    max_rows=16,
    context_tokens=CONTEXT,
    page_tokens=16,
    prefill_chunk=64,
    cache_dtype="float32",
)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    # A process of its own: compiled with the tests' flags it would be another model, which writes
    # other text, and takes four times as long to train.
    changed = ("XLA_FLAGS", "JAX_DEFAULT_MATMUL_PRECISION")
    env = {name: value for name, value in os.environ.items() if name not in changed}
    command = [sys.executable, "-m", "experiments.pretrain", f"--workdir={path}"]
    subprocess.run(command, env=env, cwd=Path(__file__).parents[2], check=True, timeout=1800)
    return path


@pytest.fixture(scope="module")
def model(workdir):
    return load_model(workdir)


@pytest.fixture(scope="module")
def requests():
    """64 held-out prompts of mixed lengths; every fourth begins like the one before it."""
    config, rng, made = tiny(), np.random.default_rng(0), []
    for i, row in enumerate(validation_rows(config, prepare_corpus(config), 64)["tokens"]):
        prompt = row[: rng.integers(1, 128)].tolist()
        if i % 4 == 3:
            prompt = [*made[-1].prompt[:96], *prompt[:30]]
        made.append(Request(prompt=tuple(prompt), max_tokens=NEW, sampling=GREEDY))
    return made


def run(engine, requests):
    texts = {engine.submit(request): [] for request in requests}
    while engine.has_work:
        for output in engine.step():
            texts[output.request_id] += output.tokens
    return list(texts.values())


@pytest.mark.parametrize("drafts", [0, 2])
@pytest.mark.parametrize("devices", [1, 8])
def test_greedy_text_is_that_of_teacher_forcing(workdir, model, requests, devices, drafts):
    served = model if devices == 1 else load_model(workdir, mesh=eight_devices())
    engine = Engine(served, dataclasses.replace(OPTIONS, num_draft_tokens=drafts))
    outputs = run(engine, requests)
    assert sum(map(len, outputs)) == 64 * NEW
    assert differing_tokens(model, requests, outputs, CONTEXT) == 0
    assert run(engine, requests[-8:]) == outputs[-8:]
    assert engine.statistics().reused_tokens > 0


def test_the_same_seed_gives_the_same_text_at_batch_1_and_32(model, requests):
    sampled = [
        dataclasses.replace(request, sampling=Sampling(seed=i), max_tokens=64)
        for i, request in enumerate(requests[:32])
    ]
    alone, together = (
        run(Engine(model, dataclasses.replace(OPTIONS, max_rows=rows)), sampled) for rows in (1, 32)
    )
    assert alone == together


def test_drafts_are_accepted(model):
    """The bar is 60 % and 1.6 tokens a pass; what may be missing is the sample's own error."""
    config = tiny()
    corpus = prepare_corpus(config)
    length = config.data.sequence_length
    rows = validation_rows(config, corpus, 64)["tokens"][:, :length].tolist()
    options = dataclasses.replace(
        OPTIONS, context_tokens=length, num_draft_tokens=1, max_queue=1024
    )
    engine = Engine(model, options)
    for result in measure(engine, rows, corpus.tokenizer.eos_id, 0.0, places=16):
        assert result.passes > 1000
        assert result.accepted[0] > 0.57 and result.tokens_per_pass > 1.57, result
