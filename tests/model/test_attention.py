"""Blockwise attention against a plain O(T^2) float64 reading of spec §2, gradients included."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import ParallelConfig
from dsv3_jax.errors import UserError
from dsv3_jax.model import attention, attention_kernels
from dsv3_jax.model import attention_cudnn as cudnn
from dsv3_jax.parallel.mesh import make_mesh

NAMES = ("q_nope", "q_rope", "k_nope", "k_rope", "v")
SCALE = 0.37


def random_inputs(seed, B=2, T=13, N=3, P=6, R=4, H=5, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shapes = [(B, T, N, P), (B, T, N, R), (B, T, N, P), (B, T, R), (B, T, N, H)]
    return [rng.standard_normal(s).astype(dtype) for s in shapes], rng.standard_normal(
        (B, T, N, H)
    ).astype(dtype)


def documents(B, T):
    """A different cut into documents for each row, padding (0) at the end of the last row."""
    segments = np.ones((B, T), np.int32)
    for row in range(B):
        segments[row, T // 3 + row :] = 2
    segments[-1, T - 2 :] = 0
    return segments


def reference(inputs, do, segments=None, scale=SCALE):
    """Output and input gradients for the cotangent `do`, written out in float64."""
    q_nope, q_rope, k_nope, k_rope, v = (x.astype(np.float64) for x in inputs)
    do = do.astype(np.float64)
    T = v.shape[1]
    logits = np.einsum("btnp,bsnp->bnts", q_nope, k_nope) * scale
    logits += np.einsum("btnr,bsr->bnts", q_rope, k_rope) * scale
    visible = np.tril(np.ones((T, T), bool))[None]
    if segments is not None:
        visible = visible & (segments[:, :, None] == segments[:, None, :])
    logits = np.where(visible[:, None], logits, -np.inf)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    o = np.einsum("bnts,bsnh->btnh", p, v)
    dp = np.einsum("btnh,bsnh->bnts", do, v)
    ds = p * (dp - (dp * p).sum(-1, keepdims=True)) * scale
    gradients = (
        np.einsum("bnts,bsnp->btnp", ds, k_nope),
        np.einsum("bnts,bsr->btnr", ds, k_rope),
        np.einsum("bnts,btnp->bsnp", ds, q_nope),
        np.einsum("bnts,btnr->bsr", ds, q_rope),
        np.einsum("bnts,btnh->bsnh", p, do),
    )
    return o, gradients


@partial(jax.jit, static_argnums=3)
def output_and_gradients(inputs, do, segments, block_tokens):
    o, vjp = jax.vjp(
        lambda *x: attention.blockwise_attention(*x, segments, SCALE, block_tokens), *inputs
    )
    return o, vjp(do)


@pytest.mark.parametrize("separate", [False, True], ids=["one_text", "documents"])
@pytest.mark.parametrize("T, block", [(13, 64), (12, 4), (13, 4), (1, 4)])
def test_equals_the_float64_reference(T, block, separate):
    inputs, do = random_inputs(T + block, T=T)
    segments = documents(2, T) if separate else None
    expected, expected_gradients = reference(inputs, do, segments)
    o, gradients = output_and_gradients(inputs, do, segments, block)
    np.testing.assert_allclose(o, expected, atol=1e-5)
    for name, got, want in zip(NAMES, gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5, err_msg=name)


@partial(jax.jit, static_argnums=3)
def passes(inputs, do, segments, name):
    """As `output_and_gradients`, of an implementation's two passes."""
    passes = attention.IMPLEMENTATIONS[name]
    o, lse = passes.forward(*inputs, segments, SCALE)
    return o, passes.backward(inputs, segments, SCALE, o, lse, do)


@pytest.mark.parametrize("separate", [False, True], ids=["one_text", "documents"])
def test_passes_apart_equal_the_float64_reference(separate, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK_TOKENS", 4)
    inputs, do = random_inputs(7)
    segments = documents(2, 13) if separate else None
    whole = attention.Attention(
        *[None] * 2, *attention.by_differentiation(attention.blockwise_attention)
    )
    monkeypatch.setitem(attention.IMPLEMENTATIONS, "whole", whole)
    expected, expected_gradients = reference(inputs, do, segments)
    for name in ("blockwise", "whole"):
        o, gradients = passes(inputs, do, segments, name)
        np.testing.assert_allclose(o, expected, atol=1e-5)
        for got, want in zip(gradients, expected_gradients, strict=True):
            np.testing.assert_allclose(got, want, atol=1e-5)


def test_backward_pass_takes_the_output_that_it_is_given():
    inputs, do = random_inputs(8)
    blockwise = attention.IMPLEMENTATIONS["blockwise"]
    o, lse = blockwise.forward(*inputs, None, SCALE)
    # ds = p (dp - do . o) has no sum over keys to lose when o is 0.
    d_q_nope, *_ = blockwise.backward(inputs, None, SCALE, 0 * o, lse, do)
    q_nope, q_rope, k_nope, k_rope, v = (x.astype(np.float64) for x in inputs)
    logits = np.einsum("btnp,bsnp->bnts", q_nope, k_nope)
    logits += np.einsum("btnr,bsr->bnts", q_rope, k_rope)
    p = np.where(np.tril(np.ones((13, 13))), np.exp(logits * SCALE), 0)
    p /= p.sum(-1, keepdims=True)
    expected = np.einsum("bnts,btnh,bsnh,bsnp->btnp", p, do, v, k_nope, optimize=True) * SCALE
    np.testing.assert_allclose(d_q_nope, expected, atol=1e-5)


def test_large_logits_stay_finite():
    inputs, do = random_inputs(5)
    inputs[0] *= 200.0
    expected, expected_gradients = reference(inputs, do)
    o, gradients = output_and_gradients(inputs, do, None, 4)
    np.testing.assert_allclose(o, expected, atol=1e-3)
    assert np.isfinite(o).all() and all(np.isfinite(g).all() for g in gradients)
    np.testing.assert_allclose(gradients[4], expected_gradients[4], atol=1e-3)


def test_bfloat16_inputs_keep_their_dtype_and_float32_softmax():
    inputs, do = random_inputs(6, T=24)
    inputs, do = [jnp.asarray(x, jnp.bfloat16) for x in inputs], jnp.asarray(do, jnp.bfloat16)
    expected, expected_gradients = reference([np.asarray(x) for x in inputs], np.asarray(do))
    o, gradients = output_and_gradients(inputs, do, None, 8)
    assert o.dtype == jnp.bfloat16 and all(g.dtype == jnp.bfloat16 for g in gradients)
    np.testing.assert_allclose(o.astype(np.float32), expected, atol=0.03)
    for name, got, want in zip(NAMES, gradients, expected_gradients, strict=True):
        tolerance = 0.02 * np.abs(want).max()
        np.testing.assert_allclose(got.astype(np.float32), want, atol=tolerance, err_msg=name)


def all_shapes(jaxpr):
    """Shapes of every intermediate of a program, inner ones included."""
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield tuple(variable.aval.shape)
        for value in equation.params.values():
            for inner in jax.tree.leaves(value, is_leaf=lambda v: hasattr(v, "eqns")):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from all_shapes(inner)


def test_no_score_matrix_at_4096_tokens():
    T = 4096
    inputs, do = random_inputs(0, B=1, T=16, N=1)
    wide = [jax.ShapeDtypeStruct((1, T, *x.shape[2:]), jnp.bfloat16) for x in [*inputs, do]]

    def program(*arrays):
        o, vjp = jax.vjp(partial(attention.mla_attention, scale=SCALE), *arrays[:5])
        return o, vjp(arrays[5])

    def is_scores(shape):
        return sum(dim >= T for dim in shape) >= 2

    shapes = list(all_shapes(jax.make_jaxpr(program)(*wide).jaxpr))
    block = attention.BLOCK_TOKENS
    assert any(shape[-2:] == (block, block) for shape in shapes)  # the walk reaches the loops
    assert not [shape for shape in shapes if is_scores(shape)]
    compiled = jax.jit(program).lower(*wide).compile()
    shapes = re.findall(r"\w+\[([\d,]+)\]", compiled.as_text())
    assert not [shape for shape in shapes if is_scores(tuple(map(int, shape.split(","))))]


@pytest.fixture
def kernels_by_definition(monkeypatch):
    """Our kernels as what defines them, so that all around them runs here."""
    for name in attention_kernels.PLATFORMS:
        _, *passes = attention_kernels.passes(name)
        accepted = attention.by_passes(lambda *_: None, *passes)
        monkeypatch.setitem(attention.IMPLEMENTATIONS, name, accepted)
    for name in ("forward", "backward"):
        function = getattr(attention_kernels.kernels, name)

        def by_definition(*args, function=function, implementation):
            return function(*args, implementation="reference")

        monkeypatch.setattr(attention_kernels.kernels, name, by_definition)


@pytest.mark.parametrize("name", ["hopper", "tpu"])
@pytest.mark.parametrize("separate", [False, True], ids=["one_text", "documents"])
def test_kernels_run_on_each_device_of_a_mesh(separate, name, kernels_by_definition):
    inputs, do = random_inputs(9, B=8)
    segments = documents(8, 13) if separate else None
    expected, expected_gradients = reference(inputs, do, segments)
    for mesh in (None, make_mesh(ParallelConfig(data=2, expert=4))):
        attend = partial(
            attention.mla_attention, scale=SCALE, segments_BT=segments, mesh=mesh,
            implementation=name,
        )  # fmt: skip

        @jax.jit
        def both(inputs, do, attend=attend):
            o, vjp = jax.vjp(attend, *inputs)
            return o, vjp(do)

        o, gradients = both(inputs, do)
        np.testing.assert_allclose(o, expected, atol=1e-5)
        for got, want in zip(gradients, expected_gradients, strict=True):
            np.testing.assert_allclose(got, want, atol=1e-5)


def test_recomputation_keeps_what_a_kernel_returns(kernels_by_definition):
    """Its forward pass then runs once: one softmax less than without the names."""
    inputs, do = random_inputs(10, B=8)
    mesh = make_mesh(ParallelConfig(data=8))
    attend = partial(attention.mla_attention, scale=SCALE, mesh=mesh, implementation="hopper")

    def num_exponentials(*names):
        def both(inputs, do):
            kept = jax.checkpoint_policies.save_only_these_names(*names)
            return jax.vjp(jax.checkpoint(attend, policy=kept), *inputs)[1](do)

        return str(jax.make_jaxpr(both)(inputs, do)).count("= exp ")

    assert num_exponentials("attention_out", "attention_lse") < num_exponentials()


def test_a_kernel_takes_no_sequences_that_a_mesh_does_not_divide(kernels_by_definition):
    inputs, _ = random_inputs(1, B=3)
    attend = partial(attention.mla_attention, *inputs, scale=SCALE)
    mesh = make_mesh(ParallelConfig(data=2, expert=4))
    with pytest.raises(NotImplementedError, match="takes no 3 sequences on 8 devices"):
        attend(mesh=mesh, implementation="hopper")
    assert attention.choose(inputs, None, None, mesh) is attention.IMPLEMENTATIONS["blockwise"]


def test_a_tpu_takes_its_kernels_for_what_they_accept(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    inputs, _ = random_inputs(1, T=8, P=128, R=64, H=128, dtype=jnp.bfloat16)
    for segments in (None, documents(2, 8)):
        assert attention.choose(inputs, segments, None, None) is attention.IMPLEMENTATIONS["tpu"]
    wide = [x.astype(jnp.float32) for x in inputs]
    assert attention.choose(wide, None, None, None) is attention.IMPLEMENTATIONS["blockwise"]


def test_dispatch_names_every_reason():
    inputs, _ = random_inputs(1)
    short_keys = [x[:, :5] if i in (2, 3, 4) else x for i, x in enumerate(inputs)]
    with pytest.raises(NotImplementedError, match=r"cudnn: .*; blockwise: takes as many keys"):
        attention.mla_attention(*short_keys, scale=SCALE)
    with pytest.raises(NotImplementedError, match="cudnn: "):
        attention.mla_attention(*inputs, scale=SCALE, implementation="cudnn")
    with pytest.raises(UserError, match="did you mean 'blockwise'"):
        attention.mla_attention(*inputs, scale=SCALE, implementation="blokwise")


def test_cudnn_passes_fit_this_jax(monkeypatch):
    """What can be known of the private functions without a GPU: they take what we give them."""
    assert cudnn.has_passes()
    monkeypatch.setattr(cudnn._cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn._cudnn, "check_compute_capability", lambda capability: True)
    inputs, do = random_inputs(2, T=64, P=16, R=8, H=16, dtype=jnp.bfloat16)
    apart = partial(passes, segments=None, name="cudnn")
    o, gradients = jax.eval_shape(apart, inputs, do)
    for got, like in zip((o, *gradients), (do, *inputs), strict=True):
        assert (got.shape, got.dtype) == (like.shape, like.dtype)

    def whole(inputs, do):
        o, vjp = jax.vjp(lambda *x: cudnn.attend(*x, None, SCALE), *inputs)
        return o, vjp(do)

    def calls(function):
        lowered = jax.jit(function).trace(inputs, do).lower(lowering_platforms=("cuda",))
        return [line for line in lowered.as_text().splitlines() if "__cudnn$" in line]

    def settings(function):
        return [re.search(r'backend_config = ".*?"', line).group() for line in calls(function)]

    assert len(settings(apart)) == 2 and settings(apart) == settings(whole)
    monkeypatch.setattr(cudnn, "_cudnn", None)
    assert not cudnn.has_passes()


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize("P, R, H", [(64, 32, 64), (128, 64, 128)])
def test_cudnn_passes_equal_those_of_blockwise(P, R, H):
    inputs, do = random_inputs(3, T=640, N=4, P=P, R=R, H=H)
    inputs, do = [jnp.asarray(x, jnp.bfloat16) for x in inputs], jnp.asarray(do, jnp.bfloat16)
    results = [passes(inputs, do, None, name) for name in ("cudnn", "blockwise")]
    for got, want in zip(*(jax.tree.leaves(result) for result in results), strict=True):
        got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
        np.testing.assert_allclose(got, want, atol=0.02 * np.abs(want).max())


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize("P, R, H", [(64, 32, 64), (128, 64, 128)])
def test_cudnn_equals_blockwise(P, R, H):
    inputs, do = random_inputs(2, T=640, N=4, P=P, R=R, H=H)
    inputs, do = [jnp.asarray(x, jnp.bfloat16) for x in inputs], jnp.asarray(do, jnp.bfloat16)
    results = {}
    for name in ("cudnn", "blockwise"):
        attend = partial(attention.mla_attention, scale=0.1, implementation=name)
        o, vjp = jax.vjp(jax.jit(attend), *inputs)
        results[name] = [np.asarray(x, np.float32) for x in (o, *vjp(do))]
    for name, got, want in zip(("o", *NAMES), *results.values(), strict=True):
        tolerance = 0.02 * np.abs(want).max()
        np.testing.assert_allclose(got, want, atol=tolerance, err_msg=name)
