"""Decoding by absorbed MLA: the definition against float64, the Hopper kernel interpreted."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.checking import relative_error
from pallas_kernels.mla_decode import mla_decode
from pallas_kernels.mla_decode.gpu import Config, mla_decode_hopper, num_parts
from pallas_kernels.mla_decode.reference import mla_decode_reference

try:
    from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams
except ImportError:  # jax < 0.11, whose interpreter lacks what the kernel uses
    InterpretGPUParams = None

SCALE = 192**-0.5
ROUNDED_ERROR = 8e-3  # of bfloat16 results, whose weights and parts were rounded to bfloat16 too


def draw(lengths, num_heads, num_new=1, page_tokens=16, widths=(512, 64), dtype=jnp.bfloat16):
    """Operands of `mla_decode` but the scale: rows of some lengths in scattered pages of layer 1.

    The first page of the first two rows is the same one. Latents after a row's end are large.
    """
    rng = np.random.default_rng()
    L, R = widths
    num_rows, num_pages = len(lengths), -(-max(lengths) // page_tokens)
    pages_BZ = rng.permutation(np.arange(1, num_rows * num_pages + 1)).reshape(num_rows, num_pages)
    pages_BZ[1:2, 0] = pages_BZ[0, 0]
    shape = (2, num_rows * num_pages + 1, page_tokens)
    latent, rope = (rng.normal(size=(*shape, width)) for width in (L, R))
    for row, length in enumerate(lengths):
        page, token = divmod(length, page_tokens)
        if token:
            latent[1, pages_BZ[row, page], token:] = 1e4
    queries = [rng.normal(size=(num_rows, num_new, num_heads, width)) for width in (L, R)]
    position_BT = np.array(lengths)[:, None] - np.arange(num_new, 0, -1)
    arrays = (jnp.asarray(x, dtype) for x in (*queries, latent, rope))
    return *arrays, jnp.int32(1), jnp.asarray(pages_BZ, jnp.int32), jnp.asarray(position_BT)


def in_float64(q_latent, q_rope, latent, rope, layer, pages, positions, scale):
    q_latent, q_rope, latent, rope = (
        np.asarray(x, np.float64) for x in (q_latent, q_rope, latent, rope)
    )
    o = np.zeros_like(q_latent)
    for (row, new), position in np.ndenumerate(np.asarray(positions)):
        keys, key_rope = (
            x[int(layer), np.asarray(pages)[row]].reshape(-1, x.shape[-1])[: position + 1]
            for x in (latent, rope)
        )
        scores = (q_latent[row, new] @ keys.T + q_rope[row, new] @ key_rope.T) * scale
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        o[row, new] = weights / weights.sum(-1, keepdims=True) @ keys
    return o


@pytest.mark.parametrize("num_new", [1, 2])
def test_definition_equals_float64(num_new):
    operands = draw([3, 40, 17], 3, num_new, widths=(12, 4), dtype=jnp.float32)
    o_BTNL = mla_decode(*operands, SCALE, implementation="reference")
    np.testing.assert_allclose(o_BTNL, in_float64(*operands, SCALE), rtol=2e-5, atol=2e-5)


def test_parts_fill_the_chip_but_stay_long_enough():
    assert num_parts(1, 2, 64) == 16
    assert num_parts(32, 2, 64) == 2
    assert num_parts(128, 4, 64) == 1
    assert num_parts(1, 1, 3) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(widths=(256, 64)), r"widths \(latent, rope\) \(512, 64\)"),
        (dict(dtype=jnp.float32), "bfloat16 alone"),
        (dict(page_tokens=48), "not 48"),
    ],
)
def test_kernel_refuses_what_it_does_not_take(changes, message):
    operands = draw([20], 2, **changes)
    with pytest.raises(NotImplementedError, match=message):
        mla_decode_hopper(*operands, SCALE, interpret=True)


@pytest.mark.skipif(InterpretGPUParams is None, reason="needs the interpreter of jax 0.11")
@pytest.mark.parametrize(
    ("lengths", "num_heads", "num_new", "page_tokens", "parts"),
    [([130, 65], 3, 2, 16, 1), ([200, 20], 70, 1, 64, 2)],
)
def test_interpreted(lengths, num_heads, num_new, page_tokens, parts):
    operands = draw(lengths, num_heads, num_new, page_tokens)
    with jax.default_device(jax.devices("cpu")[0]):
        o_BTNL = mla_decode_hopper(
            *operands, SCALE, config=Config(parts=parts), interpret=InterpretGPUParams()
        )
    assert relative_error(o_BTNL, in_float64(*operands, SCALE)) <= ROUNDED_ERROR


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a Hopper GPU")
@pytest.mark.parametrize(
    ("lengths", "num_heads", "num_new", "page_tokens"),
    [([5], 1, 1, 16), ([1000, 77, 64], 128, 2, 16), ([4096, 9], 16, 1, 64), ([900], 128, 1, 128)],
)
def test_on_the_chip(lengths, num_heads, num_new, page_tokens):
    operands = draw(lengths, num_heads, num_new, page_tokens)
    o_BTNL = jax.jit(partial(mla_decode, implementation="hopper", scale=SCALE))(*operands)
    expected = mla_decode_reference(*operands, SCALE)
    assert relative_error(o_BTNL, expected) <= ROUNDED_ERROR
