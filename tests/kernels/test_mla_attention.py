"""MLA's attention: the definition against numpy, the Hopper kernels interpreted and on the chip."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mla_attention as mla
from pallas_kernels.checking import relative_error
from pallas_kernels.mla_attention import common, gpu
from pallas_kernels.mla_attention.operands import WIDTHS
from pallas_kernels.mla_attention.reference import (
    document_starts,
    mla_attention_reference,
    mla_gradients_reference,
)

try:
    from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams
except ImportError:  # jax < 0.11, whose interpreter lacks what the kernels use
    InterpretGPUParams = None

SCALE = 192**-0.5
ROUNDED_ERROR = 4e-3  # of bfloat16 results whose weights were rounded to bfloat16 too


def draw(num_tokens, num_heads, dtype=jnp.bfloat16, widths=WIDTHS, batch=1):
    """q_nope, q_rope, k_nope, k_rope, v and a gradient of the output."""
    P, R, H = widths
    shapes = [(num_tokens, num_heads, width) for width in (P, R, P, H, H)]
    shapes.insert(3, (num_tokens, R))
    keys = jax.random.split(jax.random.key(np.random.default_rng().integers(2**31)), len(shapes))
    return [
        jax.random.normal(key, (batch, *shape), dtype)
        for key, shape in zip(keys, shapes, strict=True)
    ]


def random_segments(num_tokens, batch=1):
    """Documents of random lengths, one of a single token."""
    rng = np.random.default_rng()
    cuts = np.zeros((batch, num_tokens), np.int32)
    for row in cuts:
        row[rng.choice(np.arange(1, num_tokens), 3, replace=False)] = 1
        row[num_tokens // 2 : num_tokens // 2 + 2] = 1
    return jnp.asarray(np.cumsum(cuts, axis=1) * 7)


def float32_results(inputs, starts_BT, do_BTNH):
    """o, lse and the five gradients, all computed in float32."""
    inputs = [x.astype(jnp.float32) for x in inputs]
    o_BTNH, lse_BNT = mla_attention_reference(*inputs, starts_BT, SCALE)
    gradients = mla_gradients_reference(
        *inputs, starts_BT, SCALE, o_BTNH, lse_BNT, do_BTNH.astype(jnp.float32)
    )
    return o_BTNH, lse_BNT, *gradients


def kernel_results(inputs, starts_BT, do_BTNH, interpret=None):
    o_BTNH, lse_BNT = gpu.forward_hopper(*inputs, starts_BT, SCALE, interpret=interpret)
    gradients = gpu.backward_hopper(
        *inputs, starts_BT, SCALE, o_BTNH, lse_BNT, do_BTNH, interpret=interpret
    )
    return o_BTNH, lse_BNT, *gradients


def check_kernels(num_tokens, num_heads, with_documents, batch=1, interpret=None):
    *inputs, do_BTNH = draw(num_tokens, num_heads, batch=batch)
    starts_BT = None
    if with_documents:
        starts_BT = document_starts(random_segments(num_tokens, batch))
    expected = float32_results(inputs, starts_BT, do_BTNH)
    for y, y_expected in zip(
        kernel_results(inputs, starts_BT, do_BTNH, interpret), expected, strict=True
    ):
        assert y.shape == y_expected.shape
        assert relative_error(y, y_expected) <= ROUNDED_ERROR


def test_documents_start_where_their_number_changes():
    segments_BT = jnp.asarray([[4, 4, 0, 0, 0, 4], [1, 2, 3, 3, 3, 3]])
    assert document_starts(segments_BT).tolist() == [[0, 0, 2, 2, 2, 5], [0, 1, 2, 2, 2, 2]]
    ends_BT = common.document_ends(document_starts(segments_BT))
    assert ends_BT.tolist() == [[2, 2, 5, 5, 5, 6], [1, 2, 6, 6, 6, 6]]


def test_definition_against_loops():
    *inputs, _ = draw(7, 2, jnp.float32, widths=(5, 3, 4), batch=2)
    segments_BT = random_segments(7, 2)
    o_BTNH = np.asarray(mla.mla_attention(*inputs, scale=0.3, segments_BT=segments_BT))
    q_nope, q_rope, k_nope, k_rope, v = (np.asarray(x, np.float64) for x in inputs)
    for b, t, n in np.ndindex(2, 7, 2):
        seen = [j for j in range(t + 1) if segments_BT[b, j] == segments_BT[b, t]]
        scores = [q_nope[b, t, n] @ k_nope[b, j, n] + q_rope[b, t, n] @ k_rope[b, j] for j in seen]
        weights = np.exp(0.3 * np.array(scores))
        expected = weights @ v[b, seen, n] / weights.sum()
        np.testing.assert_allclose(o_BTNH[b, t, n], expected, rtol=1e-4, atol=1e-5)


def test_derivative_keeps_output_and_lse_by_name():
    *inputs, do_BTNH = draw(6, 2, jnp.float32, widths=(5, 3, 4))

    def loss(inputs, attend):
        return jnp.vdot(attend(*inputs), do_BTNH)

    def attend(*inputs):
        return mla.mla_attention(*inputs, scale=SCALE)

    names = "attention_out", "attention_lse"
    kept = jax.checkpoint(attend, policy=jax.checkpoint_policies.save_only_these_names(*names))
    expected = jax.grad(loss)(inputs, lambda *x: mla_attention_reference(*x, None, SCALE)[0])
    for gradient, y in zip(jax.grad(loss)(inputs, kept), expected, strict=True):
        np.testing.assert_allclose(gradient, y, rtol=1e-4, atol=1e-5)
    assert all(
        name in str(jax.make_jaxpr(jax.grad(loss), static_argnums=1)(inputs, attend))
        for name in names
    )


def test_kernels_refuse_what_they_do_not_take():
    *inputs, _ = draw(4, 2, jnp.float32)
    with pytest.raises(NotImplementedError, match=r"bfloat16|jax 0\.11"):
        mla.mla_attention(*inputs, scale=SCALE, implementation="hopper")


@pytest.mark.skipif(InterpretGPUParams is None, reason="needs the interpreter of jax 0.11")
class TestInterpreted:
    @pytest.fixture(autouse=True)
    def few_multiprocessors(self, monkeypatch):
        """So that one has several tiles, and the interpreter few threads."""
        monkeypatch.setattr(common, "SMS", 2)
        with jax.default_device(jax.devices("cpu")[0]):
            yield

    @pytest.mark.parametrize("with_documents", [False, True])
    def test_several_tiles_and_a_part_of_one(self, with_documents):
        check_kernels(300, 2, with_documents, interpret=InterpretGPUParams())


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a Hopper GPU")
@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize(
    ("num_tokens", "num_heads", "batch"), [(40, 1, 1), (200, 3, 2), (2048, 16, 1)]
)
def test_on_the_chip(num_tokens, num_heads, batch, with_documents):
    check_kernels(num_tokens, num_heads, with_documents, batch)
