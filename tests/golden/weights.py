"""Weights and tokens that two implementations can draw alike, from raw PCG64 words."""

import math

import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.plan.parameters import weights


class Draw:
    """Uniform numbers from the raw 64-bit words of PCG64, which no numpy release changes."""

    def __init__(self, seed: int):
        self._words = np.random.PCG64(seed)

    def uniform(self, shape: tuple[int, ...]) -> np.ndarray:
        """Float64 in [-1, 1)."""
        words = self._words.random_raw(math.prod(shape))
        return ((words >> np.uint64(11)) * 2.0**-52 - 1.0).reshape(shape)

    def tokens(self, shape: tuple[int, ...], vocab_size: int) -> np.ndarray:
        """Int32 in [0, vocab_size)."""
        words = self._words.random_raw(math.prod(shape))
        return (words % np.uint64(vocab_size)).astype(np.int32).reshape(shape)


def make_weights(
    model: ModelConfig, seed: int, bias_range: tuple[float, float] = (0.0, 0.0)
) -> dict[str, np.ndarray]:
    """Every leaf of the parameter tree by its dotted path, float32, router biases included.

    Kernels have variance 1 / inputs, so hidden states, scores and logits stay of order one and
    every part of the model matters; gains vary around 1. `bias_range` bounds the router biases.
    """
    draw, tree = Draw(seed), {}
    low, high = bias_range
    for leaf in weights(model):
        noise = draw.uniform(leaf.shape)
        if leaf.path.endswith("gain"):
            value = 1.0 + 0.3 * noise
        elif leaf.path.endswith("router.bias"):
            value = (low + high) / 2 + (high - low) / 2 * noise
        elif leaf.path == "embed.table":
            value = noise
        else:
            value = math.sqrt(3.0 / leaf.shape[-2]) * noise
        tree[leaf.path] = value.astype(np.float32)
    return tree


def nested(flat: dict[str, np.ndarray]) -> dict:
    """{'a.b': x} as {'a': {'b': x}}."""
    tree: dict = {}
    for path, leaf in flat.items():
        *parents, name = path.split(".")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[name] = leaf
    return tree
