"""MLA's attention: the definition against numpy, kernels interpreted, Hopper's on the chip too."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import mla_attention as mla
from pallas_kernels.checking import relative_error
from pallas_kernels.mla_attention import common, gpu, tpu, tpu_blocks
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


def kernel_results(inputs, starts_BT, do_BTNH, forward, backward):
    o_BTNH, lse_BNT = forward(*inputs, starts_BT, SCALE)
    return o_BTNH, lse_BNT, *backward(*inputs, starts_BT, SCALE, o_BTNH, lse_BNT, do_BTNH)


def hopper_passes(interpret=None):
    return [partial(f, interpret=interpret) for f in (gpu.forward_hopper, gpu.backward_hopper)]


def tpu_passes(tokens=128, heads=2, interpret=True):
    settings = dict(config=tpu_blocks.Config(tokens, heads), interpret=interpret)
    return [partial(f, **settings) for f in (tpu.forward_tpu, tpu.backward_tpu)]


def check_kernels(num_tokens, num_heads, with_documents, passes, batch=1):
    *inputs, do_BTNH = draw(num_tokens, num_heads, batch=batch)
    starts_BT = None
    if with_documents:
        starts_BT = document_starts(random_segments(num_tokens, batch))
    expected = float32_results(inputs, starts_BT, do_BTNH)
    for y, y_expected in zip(
        kernel_results(inputs, starts_BT, do_BTNH, *passes), expected, strict=True
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
        check_kernels(300, 2, with_documents, hopper_passes(InterpretGPUParams()))


class TestTpuInterpreted:
    @pytest.mark.parametrize(
        ("num_tokens", "num_heads", "batch", "with_documents"),
        [(300, 4, 1, False), (300, 3, 2, True), (40, 1, 1, True)],
    )
    def test_several_blocks_and_a_part_of_one(self, num_tokens, num_heads, batch, with_documents):
        check_kernels(num_tokens, num_heads, with_documents, tpu_passes(), batch)

    def test_derivative_in_memory_that_starts_as_nan(self):
        *inputs, do_BTNH = draw(130, 2)
        segments_BT = random_segments(130)

        def loss(inputs, **settings):
            o_BTNH = mla.mla_attention(*inputs, scale=SCALE, segments_BT=segments_BT, **settings)
            return jnp.vdot(o_BTNH.astype(jnp.float32), do_BTNH.astype(jnp.float32))

        with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
            gradients = jax.grad(partial(loss, implementation="tpu"))(inputs)
        wide = [x.astype(jnp.float32) for x in inputs]
        for y, y_expected in zip(gradients, jax.grad(loss)(wide), strict=True):
            assert relative_error(y, y_expected) <= ROUNDED_ERROR

    def test_blocks_that_nobody_sees_are_not_used(self):
        """Nor are their queries, where keys are asked for their gradients."""
        *inputs, do_BTNH = draw(256, 2)
        starts_BT = jnp.repeat(jnp.asarray([[0, 128]]), 128, axis=1)
        clean = kernel_results(inputs, starts_BT, do_BTNH, *tpu_passes())
        for rows in (slice(0, 128), slice(128, 256)):
            spoilt = [x.at[:, rows].set(jnp.nan) for x in (*inputs, do_BTNH)]
            results = kernel_results(spoilt[:-1], starts_BT, spoilt[-1], *tpu_passes())
            other = slice(128, 256) if rows.start == 0 else slice(0, 128)
            for i, (y, y_clean) in enumerate(zip(results, clean, strict=True)):
                where = (..., other) if i == 1 else (slice(None), other)  # lse_BNT
                np.testing.assert_array_equal(y[where], y_clean[where])

    def test_refuses_other_widths(self):
        *inputs, _ = draw(4, 2, widths=(128, 64, 64))
        with pytest.raises(NotImplementedError, match=r"tpu: takes widths .*\(128, 64, 64\)"):
            mla.mla_attention(*inputs, scale=SCALE, implementation="tpu")


@pytest.mark.parametrize("locate", [tpu_blocks.keys_of_queries, tpu_blocks.queries_of_keys])
@pytest.mark.parametrize("with_documents", [False, True])
def test_tpu_steps_visit_what_is_seen_and_copy_nothing_else(locate, with_documents):
    batch, num_tokens, tokens = 2, 2048, 256
    starts_BT = np.zeros((batch, num_tokens), np.int32)
    if with_documents:
        starts_BT = np.asarray(document_starts(random_segments(num_tokens, batch)))
    given = jnp.asarray(starts_BT) if with_documents else None
    limits = [np.asarray(x) for x in tpu_blocks.bounds(given, (batch, num_tokens), tokens)]
    limits = tpu_blocks.Bounds(*limits)
    key, query = np.arange(num_tokens), np.arange(num_tokens)[:, None]
    num_blocks = num_tokens // tokens
    for b in range(batch):
        visible = (key <= query) & (key >= starts_BT[b][:, None])
        cut = visible.reshape(num_blocks, tokens, num_blocks, tokens)
        seen, whole = cut.any(axis=(1, 3)), cut.all(axis=(1, 3))
        visits = []
        for own in range(num_blocks):
            outer = (b, 0, own) if locate is tpu_blocks.keys_of_queries else (b, own, 0)
            before, lasts = None, 0
            for number in range(num_blocks):
                step = locate(*outer, number, limits)
                here = int(step.query), int(step.key)
                assert step.is_first == (number == 0)
                assert step.is_visit or here == before
                if step.is_visit:
                    visits.append(here)
                    lasts += step.is_last
                if step.is_visit and here[1] < here[0]:
                    assert whole[here] == (here[1] >= limits.whole[b, here[0]])
                before = here
            assert lasts == 1
        assert sorted(visits) == sorted(zip(*np.nonzero(seen), strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a Hopper GPU")
@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize(
    ("num_tokens", "num_heads", "batch"), [(40, 1, 1), (200, 3, 2), (2048, 16, 1)]
)
def test_on_the_chip(num_tokens, num_heads, batch, with_documents):
    check_kernels(num_tokens, num_heads, with_documents, hopper_passes(), batch)
