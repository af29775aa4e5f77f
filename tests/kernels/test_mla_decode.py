"""Decoding by absorbed MLA: the definition against float64, the Hopper kernel interpreted."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.checking import relative_error
from pallas_kernels.mla_decode import mla_decode
from pallas_kernels.mla_decode.gpu import DEFAULT_CODES, Config, mla_decode_hopper, num_parts
from pallas_kernels.mla_decode.reference import mla_decode_reference
from pallas_kernels.quantize.reference import quantize_tiles_reference

try:
    from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams
except ImportError:  # jax < 0.11, whose interpreter lacks what the kernel uses
    InterpretGPUParams = None

SCALE = 192**-0.5
ROUNDED_ERROR = 8e-3  # of bfloat16 results, whose weights and parts were rounded to bfloat16 too


def draw(lengths, num_heads, num_new=1, page_tokens=16, widths=(512, 64), dtype=jnp.bfloat16):
    """Operands of `mla_decode` but the scale: rows of some lengths in scattered pages of layer 1.

    The first page of the first two rows is the same one. All that is no row's token is no number.
    """
    rng = np.random.default_rng()
    L, R = widths
    num_rows, num_pages = len(lengths), -(-max(lengths) // page_tokens)
    pages_BZ = rng.permutation(np.arange(1, num_rows * num_pages + 1)).reshape(num_rows, num_pages)
    pages_BZ[1:2, 0] = pages_BZ[0, 0]
    slots = (2, num_rows * num_pages + 1, page_tokens)
    is_token = np.zeros(slots, bool)
    for pages, length in zip(pages_BZ, lengths, strict=True):
        for index, page in enumerate(pages):
            is_token[1, page, : max(0, length - index * page_tokens)] = True
    latent, rope = (
        np.where(is_token[..., None], rng.normal(size=(*slots, width)), np.nan) for width in (L, R)
    )
    queries = [rng.normal(size=(num_rows, num_new, num_heads, width)) for width in (L, R)]
    position_BT = np.array(lengths)[:, None] - np.arange(num_new, 0, -1)
    arrays = (jnp.asarray(x, dtype) for x in (*queries, latent, rope))
    return *arrays, jnp.int32(1), jnp.asarray(pages_BZ, jnp.int32), jnp.asarray(position_BT)


def with_codes(q_latent, q_rope, latent, rope, layer, pages, positions):
    """The same operands with the latents as codes; and with what these stand for, in bfloat16."""
    code, scale = quantize_tiles_reference(latent.reshape(-1, latent.shape[-1]))
    numbers = code.astype(jnp.float32) * jnp.repeat(scale, 128, -1)[:, : code.shape[-1]]
    scale_YZCS = jnp.swapaxes(scale.reshape(*latent.shape[:3], -1), 2, 3)
    rest = (rope, layer, pages, positions)
    plain = (q_latent, q_rope, numbers.astype(q_latent.dtype).reshape(latent.shape), *rest)
    return (q_latent, q_rope, code.reshape(latent.shape), *rest), scale_YZCS, plain


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


def test_definition_with_codes():
    operands = draw([3, 40, 17], 3, widths=(200, 4), dtype=jnp.float32)
    codes, scale_YZCS, plain = with_codes(*operands)
    o_BTNL = mla_decode(*codes, SCALE, latent_scale_YZCS=scale_YZCS, implementation="reference")
    np.testing.assert_allclose(o_BTNL, in_float64(*plain, SCALE), rtol=2e-5, atol=2e-5)
    # Of normal numbers E4M3 keeps 4 bits: each is off by 2^-4 at most, and 2.6 % on average.
    assert 5e-3 < relative_error(o_BTNL, in_float64(*operands, SCALE)) < 2**-4


def test_who_sees_nothing_gets_zeros():
    *operands, position_BT = draw([20, 3], 2, num_new=2, widths=(12, 4), dtype=jnp.float32)
    position_BT = position_BT.at[0].set(-1).at[1, 1].set(-1)
    o_BTNL = mla_decode(*operands, position_BT, SCALE, implementation="reference")
    assert (o_BTNL[0] == 0).all() and (o_BTNL[1, 1] == 0).all() and (o_BTNL[1, 0] != 0).all()


def test_parts_fill_the_chip_but_stay_long_enough():
    assert num_parts(1, 2, 64) == 16
    assert num_parts(32, 2, 64) == 2
    assert num_parts(128, 4, 64) == 1
    assert num_parts(1, 1, 3) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(widths=(256, 64)), r"widths \(latent, rope\) \(512, 64\)"),
        (dict(dtype=jnp.float32), "queries and rope keys in bfloat16 alone"),
        (dict(page_tokens=48), "8, 16, 32 or n x 64 tokens, not 48"),
    ],
)
def test_kernel_refuses_what_it_does_not_take(changes, message):
    operands = draw([20], 2, **changes)
    with pytest.raises(NotImplementedError, match=message):
        mla_decode_hopper(*operands, SCALE, interpret=True)


def test_kernel_refuses_codes_without_scales_and_in_small_pages():
    codes, scale_YZCS, _ = with_codes(*draw([20], 2))
    with pytest.raises(NotImplementedError, match="32 or n x 64 tokens, not 16"):
        mla_decode_hopper(*codes, SCALE, scale_YZCS, interpret=True)
    with pytest.raises(NotImplementedError, match="or in E4M3 with scales"):
        mla_decode_hopper(*codes, SCALE, interpret=True)


def interpreted(*operands, **options):
    with jax.default_device(jax.devices("cpu")[0]):
        return mla_decode_hopper(*operands, interpret=InterpretGPUParams(), **options)


needs_interpreter = pytest.mark.skipif(
    InterpretGPUParams is None, reason="needs the interpreter of jax 0.11"
)


@needs_interpreter
@pytest.mark.parametrize(
    ("lengths", "num_heads", "num_new", "page_tokens", "config"),
    [
        ([130, 65], 3, 2, 16, Config(parts=1)),
        ([200, 20], 70, 1, 64, Config(parts=2)),
        ([70, 33], 3, 1, 16, Config(parts=1, keys=32, stages=4)),
    ],
)
def test_interpreted(lengths, num_heads, num_new, page_tokens, config):
    operands = draw(lengths, num_heads, num_new, page_tokens)
    o_BTNL = interpreted(*operands, SCALE, config=config)
    assert relative_error(o_BTNL, in_float64(*operands, SCALE)) <= ROUNDED_ERROR


@needs_interpreter
@pytest.mark.parametrize(
    ("lengths", "num_heads", "page_tokens", "parts"),
    [([250, 33], 3, 32, 1), ([200, 20], 70, 64, 2)],
)
def test_codes_interpreted(lengths, num_heads, page_tokens, parts):
    codes, scale_YZCS, plain = with_codes(*draw(lengths, num_heads, page_tokens=page_tokens))
    config = replace(DEFAULT_CODES, parts=parts)
    o_BTNL = interpreted(*codes, SCALE, scale_YZCS, config=config)
    assert relative_error(o_BTNL, in_float64(*plain, SCALE)) <= ROUNDED_ERROR
    # As the kernel of numbers on the same numbers, to the last bit.
    numbers = interpreted(*plain, SCALE, config=Config(parts=parts, keys=config.keys))
    assert (o_BTNL == numbers).all()


@needs_interpreter
def test_a_broken_row_and_an_idle_one_interpreted():
    """A NaN in a row's own tokens reaches its outputs alone; a row of padding gets zeros."""
    q_latent, q_rope, latent, *rest, pages_BZ, position_BT = draw([100, 30, 70], 2)
    clean = interpreted(q_latent, q_rope, latent, *rest, pages_BZ, position_BT, SCALE)
    latent = latent.at[1, pages_BZ[2, 1], 5, 300].set(jnp.nan)
    position_BT = position_BT.at[1].set(-1)
    o_BTNL = interpreted(q_latent, q_rope, latent, *rest, pages_BZ.at[1].set(0), position_BT, SCALE)
    assert (o_BTNL[0] == clean[0]).all() and (o_BTNL[1] == 0).all() and jnp.isnan(o_BTNL[2]).all()


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a Hopper GPU")
@pytest.mark.parametrize("has_codes", [False, True])
@pytest.mark.parametrize(
    ("lengths", "num_heads", "num_new", "page_tokens"),
    [([5], 1, 1, 32), ([1000, 77, 64], 128, 2, 64), ([4096, 9], 16, 1, 64), ([900], 128, 1, 128)],
)
def test_on_the_chip(lengths, num_heads, num_new, page_tokens, has_codes):
    operands, scales = draw(lengths, num_heads, num_new, page_tokens), None
    if has_codes:
        operands, scales, _ = with_codes(*operands)
    kernel = jax.jit(partial(mla_decode, implementation="hopper", scale=SCALE))
    o_BTNL = kernel(*operands, latent_scale_YZCS=scales)
    expected = mla_decode_reference(*operands, SCALE, scales)
    assert relative_error(o_BTNL, expected) <= ROUNDED_ERROR
