"""The TPU kernel of decoding, interpreted, against float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from test_mla_decode import ROUNDED_ERROR, SCALE, draw, in_float64

from pallas_kernels.checking import relative_error
from pallas_kernels.mla_decode.tpu import Config, mla_decode_tpu


@pytest.mark.parametrize(
    ("lengths", "num_heads", "num_new", "page_tokens", "stages"),
    [
        ([300, 130, 64, 260], 3, 2, 16, 3),  # two cores
        ([129, 2, 500], 20, 1, 64, 2),
        ([700], 16, 1, 256, 4),  # pages larger than a block
    ],
)
def test_interpreted(lengths, num_heads, num_new, page_tokens, stages):
    """Copies arrive no sooner than they are waited for, and memory starts as NaN."""
    operands = draw(lengths, num_heads, num_new, page_tokens)
    settings = pltpu.InterpretParams(
        dma_execution_mode="on_wait", uninitialized_memory="nan", num_cores_or_threads=2
    )
    decode = partial(mla_decode_tpu, config=Config(128, stages), interpret=settings)
    o_BTNL = jax.jit(partial(decode, scale=SCALE))(*operands)
    assert relative_error(o_BTNL, in_float64(*operands, SCALE)) <= ROUNDED_ERROR


def test_reads_no_page_after_a_row():
    operands = list(draw([70, 20], 2, page_tokens=16))
    run = jax.jit(partial(mla_decode_tpu, scale=SCALE, config=Config(128), interpret=True))
    expected = run(*operands)
    used = np.unique(np.concatenate([np.asarray(operands[5])[0, :5], operands[5][1, :2]]))
    unused = np.setdiff1d(np.arange(operands[2].shape[1]), used)
    for i in (2, 3):
        operands[i] = operands[i].at[:, unused].set(jnp.nan)
    np.testing.assert_array_equal(run(*operands), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(widths=(256, 64)), r"widths \(latent, rope\) \(512, 64\)"),
        (dict(dtype=jnp.float32), "bfloat16 alone"),
        (dict(page_tokens=48), "not 48"),
    ],
)
def test_refuses_what_it_does_not_take(changes, message):
    operands = draw([20], 2, **changes)
    with pytest.raises(NotImplementedError, match=message):
        mla_decode_tpu(*operands, SCALE, interpret=True)


def test_an_idle_row_and_a_masked_guess_get_zeros():
    operands = list(draw([70, 20], 2, num_new=2, page_tokens=16))
    operands[6] = operands[6].at[0].set(-1).at[1, 1].set(-1)
    decode = partial(mla_decode_tpu, scale=SCALE, config=Config(128), interpret=True)
    o_BTNL = np.asarray(jax.jit(decode)(*operands), np.float32)
    assert not o_BTNL[0].any() and not o_BTNL[1, 1].any()
    expected = in_float64(
        *(x[1:] for x in operands[:2]), *operands[2:5], operands[5][1:], operands[6][1:, :1], SCALE
    )
    assert relative_error(o_BTNL[1:, :1], expected[:, :1]) <= ROUNDED_ERROR
