"""Rotary positions on adjacent pairs, YaRN frequencies, and the softmax scale (spec §2).

Shape letters: B batch, T tokens, N heads, R rope width; `C` is R / 2 pairs, here only.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import ModelConfig


class CosSin(NamedTuple):
    """Rotation of every position and pair, float32. B is 1 when all rows share positions."""

    cos_BTC: jax.Array
    sin_BTC: jax.Array


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """Radians a position for each adjacent pair: [R/2] float32 (spec §2, RoPE/YaRN detail).

    With YaRN, pairs that turn more than `beta_fast` times over the original length keep their
    frequency, pairs below `beta_slow` turns are slowed by `factor`, a ramp lies in between.
    """
    width, base, yarn = config.qk_rope_head_dim, config.rope_theta, config.yarn
    frequencies = base ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    if yarn.enabled:

        def pair_of(rotations: float) -> float:
            turns = yarn.original_length / (2 * math.pi * rotations)
            return width * math.log(turns) / (2 * math.log(base))

        low = min(max(math.floor(pair_of(yarn.beta_fast)), 0), width - 1)
        high = min(max(math.ceil(pair_of(yarn.beta_slow)), 0), width - 1)
        span = (high - low) or 0.001
        ramp = np.clip((np.arange(width // 2) - low) / span, 0.0, 1.0)
        frequencies = frequencies * (1.0 - ramp) + frequencies / yarn.factor * ramp
    return frequencies.astype(np.float32)


def softmax_scale(config: ModelConfig) -> float:
    """sigma = (P + R)^-1/2; with YaRN times m^2, m = 0.1 mu ln s + 1, on the whole logit."""
    scale = config.qk_head_dim**-0.5
    if config.yarn.enabled:
        m = 0.1 * config.yarn.mscale * math.log(config.yarn.factor) + 1.0
        scale *= m * m
    return scale


def positions(num_tokens: int, segments_BT: jax.Array | None = None) -> jax.Array:
    """Position of each token, int32: [1, T] counting from 0, or [B, T] restarting per document."""
    index_T = jnp.arange(num_tokens, dtype=jnp.int32)
    if segments_BT is None:
        return index_T[None]
    starts_BT = jnp.pad(segments_BT[:, 1:] != segments_BT[:, :-1], ((0, 0), (1, 0)))
    return index_T - jax.lax.cummax(jnp.where(starts_BT, index_T, 0), axis=1)


def cos_sin(positions_BT: jax.Array, config: ModelConfig) -> CosSin:
    """Rotations of integer positions [B, T] (B may be 1)."""
    angles_BTC = positions_BT[..., None].astype(jnp.float32) * inverse_frequencies(config)
    return CosSin(jnp.cos(angles_BTC), jnp.sin(angles_BTC))


def rotate(x: jax.Array, rotation: CosSin) -> jax.Array:
    """Rotates adjacent pairs (x_2p, x_2p+1) in float32 and casts back.

    Args:
      x: [B, T, R] (the shared key) or [B, T, N, R] (queries).
    """
    cos, sin = rotation
    if x.ndim == 4:
        cos, sin = cos[:, :, None], sin[:, :, None]
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    rotated = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)
