"""The published GSM8K, where it lies beside the repository; and a model of no size."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax import DeepSeekV3, configs
from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.model.runtime import Runtime

VOCAB, CONTEXT = 280, 64
_FOLDER = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(scope="session")
def gsm8k_file():
    def find(split):
        path = _FOLDER / f"gsm8k_{split}.jsonl"
        if not path.is_file():
            pytest.skip("needs the published GSM8K")
        return path

    return find


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(["What is it? It is it.\n"], VOCAB)


@pytest.fixture(scope="session")
def model():
    """Random weights, wide awake: the logits are far from equal. No initialiser is compiled."""
    config = dataclasses.replace(
        configs.get("tiny").model, vocab_size=VOCAB, width=32, num_layers=2, mtp_depth=0
    )
    shapes = nnx.eval_shape(lambda: DeepSeekV3(config, runtime=Runtime(), rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(shapes)
    rng = np.random.default_rng(0)
    values = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype), state)
    return nnx.merge(graphdef, values)


@pytest.fixture(scope="session")
def folder(model, tokenizer, tmp_path_factory):
    """The model as a Hugging Face folder."""
    path = tmp_path_factory.mktemp("evals") / "folder"
    model.save_pretrained(path, dtype="f32", tokenizer=tokenizer)
    return path


@pytest.fixture(scope="session")
def forced(model):
    """ids -> float64 [len(ids), V]: what the model says after each of them, by one program."""

    def logits(ids):
        tokens = np.zeros((1, CONTEXT), np.int32)  # attention is causal: zeros come after
        tokens[0, : len(ids)] = ids
        return np.asarray(model(tokens), np.float64)[0, : len(ids)]

    return logits


@pytest.fixture(scope="session")
def greedy(forced):
    """(ids, count) -> the likeliest next tokens."""

    def continued(ids, count):
        ids = list(ids)
        for _ in range(count):
            ids.append(int(forced(ids)[-1].argmax()))
        return ids[-count:]

    return continued
