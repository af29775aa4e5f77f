"""Experts and SwiGLU in FP8 against a float64 reading of spec §5, on one device and on eight."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh
from readings import draw, quantized

from dsv3_jax.errors import UserError
from dsv3_jax.model.runtime import Runtime
from dsv3_jax.parallel.expert_parallel import on_every_shard
from dsv3_jax.parallel.mesh import AXES
from dsv3_jax.precision import fp8, fp8_grouped
from dsv3_jax.precision.block_scaled import BlockScaled
from dsv3_jax.precision.fp8_experts import fp8_experts
from dsv3_jax.precision.fp8_ffn import fp8_swiglu_linear
from dsv3_jax.precision.fp8_weight import as_fp8
from dsv3_jax.precision.policy import PUBLISHED, Fp8Recipe

E, K = 8, 2
WIDTHS = (160, 72)  # D and F, ragged: a tile of h holds gate and up columns


def bf16(x):
    return np.asarray(x).astype(ml_dtypes.bfloat16).astype(np.float64)


def swiglu(h, weight):
    """silu(gate) * up * weight, and the derivatives as a function of its gradient."""
    gate, up = np.split(h, 2, axis=-1)
    sigmoid = 1 / (1 + np.exp(-gate))
    product = gate * sigmoid * up

    def backward(dy):
        dgate = dy * up * sigmoid * (1 + gate * (1 - sigmoid))
        dh = weight * np.concatenate([dgate, dy * gate * sigmoid], axis=-1)
        return dh, (dy * product).sum(-1)

    return product * weight, backward


def slots_of(ids_XK):
    """Token and choice of every slot, -1 in those that fill an expert up to 128; and the cuts."""
    parts = []
    for e in range(E):
        pairs = np.argwhere(np.asarray(ids_XK) == e)
        parts.append(np.pad(pairs, ((0, -len(pairs) % 128), (0, 0)), constant_values=-1))
    return np.concatenate(parts).T, np.cumsum([len(part) for part in parts])[:-1]


def reading(x_XD, ids_XK, weights_XK, w13_ED2F, w2_EFD, dy_XD, gradient_rows=1, one_scale=False):
    """y, dx, dweights, dw13 and dw2 of one device; quantisation is followed straight through.

    Args:
      gradient_rows: rows that share a scale in Dgrad.
      one_scale: a scale a tensor, of weights a scale an expert.
    """

    def rounded(x, rows, columns, power_of_two=False):
        return quantized(x, *((None, None) if one_scale else (rows, columns)), power_of_two)

    tiles, columns = partial(rounded, rows=1, columns=128), partial(rounded, rows=128, columns=1)
    gradients = partial(rounded, rows=gradient_rows, columns=128)
    w13_ED2F, w2_EFD = ([rounded(w, 128, 128) for w in w_E] for w_E in (w13_ED2F, w2_EFD))
    (token_M, choice_M), cuts = slots_of(ids_XK)
    full_M1 = token_M[:, None] >= 0

    def to_slots(x_XD):
        return np.where(full_M1, x_XD[token_M], 0)

    def to_tokens(y_MD):
        y_XD = np.zeros((len(x_XD), y_MD.shape[1]))
        np.add.at(y_XD, token_M, np.where(full_M1, bf16(y_MD), 0))
        return bf16(y_XD)

    def product(x_MI, w_EIO):
        return np.concatenate([x @ w for x, w in zip(np.split(x_MI, cuts), w_EIO, strict=True)])

    def weight_gradient(x_MI, dy_MO):
        pairs = zip(np.split(x_MI, cuts), np.split(dy_MO, cuts), strict=True)
        return np.stack([x.T @ dy for x, dy in pairs])

    x_MD, dy_MD = (
        to_slots(f(a, power_of_two=True)) for f, a in ((tiles, x_XD), (gradients, dy_XD))
    )
    weight_M1 = np.where(full_M1, weights_XK[token_M, choice_M][:, None], 0).astype(np.float64)
    h_M2F = bf16(product(x_MD, w13_ED2F))
    y_MD = product(tiles(bf16(swiglu(h_M2F, weight_M1)[0])), w2_EFD)
    product_MF, backward = swiglu(tiles(h_M2F), weight_M1)  # of what is kept of h
    dh_M2F, dweight_M = backward(bf16(product(dy_MD, [w.T for w in w2_EFD])))
    dx_MD = product(gradients(bf16(dh_M2F)), [w.T for w in w13_ED2F])
    dweights_XK = np.zeros(weights_XK.shape)
    np.add.at(dweights_XK, (token_M, choice_M), np.where(full_M1[:, 0], dweight_M, 0))
    dw13_ED2F = weight_gradient(columns(x_MD, power_of_two=True), columns(bf16(dh_M2F)))
    dw2_EFD = weight_gradient(columns(bf16(product_MF)), columns(dy_MD, power_of_two=True))
    return to_tokens(y_MD), to_tokens(dx_MD), dweights_XK, dw13_ED2F, dw2_EFD


def operands(num_tokens, pattern="any"):
    rng = np.random.default_rng()
    D, F = WIDTHS
    ids_XK = np.array([rng.permutation(E)[:K] for _ in range(num_tokens)], np.int32)
    if pattern == "one":  # every first choice, and nobody takes the first three experts
        ids_XK = np.array([[E - 1, *(3 + rng.permutation(4)[: K - 1])] for _ in ids_XK], np.int32)
    if pattern == "none":
        ids_XK[::3, 0] = E
        ids_XK[1] = E
    weights_XK = rng.uniform(0.1, 1.0, ids_XK.shape).astype(np.float32)
    w13_ED2F = rng.normal(size=(E, D, 2 * F)).astype(np.float32) / np.sqrt(D)
    w2_EFD = rng.normal(size=(E, F, D)).astype(np.float32) / np.sqrt(F)
    x_XD, dy_XD = (jnp.asarray(draw(rng, num_tokens, D), jnp.bfloat16) for _ in range(2))
    return x_XD, jnp.asarray(ids_XK), weights_XK, w13_ED2F, w2_EFD, dy_XD


def value_and_gradients(runtime, x_XD, ids_XK, weights_XK, w13_ED2F, w2_EFD, dy_XD):
    recipe = runtime.fp8

    def function(x_XD, weights_XK, w13_ED2F, w2_EFD):
        experts = as_fp8(w13_ED2F, recipe), as_fp8(w2_EFD, recipe)
        on_shard = partial(fp8_experts, recipe=recipe)
        return on_every_shard(on_shard, x_XD, ids_XK, weights_XK, *experts, runtime=runtime)[0]

    y_XD, transpose = jax.vjp(function, x_XD, weights_XK, w13_ED2F, w2_EFD)
    return y_XD, *transpose(dy_XD)


run = jax.jit(value_and_gradients, static_argnums=0)
ONE = Runtime(compute_dtype=jnp.dtype(jnp.bfloat16), fp8=PUBLISHED)


def check(found, expected, bound=2e-3):
    """||found - expected|| <= 0.002 ||expected||: a tenth of what one product's rounding makes."""
    for ours, theirs in zip(found, expected, strict=True):
        ours, theirs = (np.asarray(a, np.float64) for a in (ours, theirs))
        assert np.linalg.norm(ours - theirs) <= bound * np.linalg.norm(theirs)


@pytest.mark.parametrize("pattern", ["any", "one", "none"])
def test_value_and_gradients_equal_float64(pattern):
    arrays = operands(300, pattern)
    found = run(ONE, *arrays)
    assert [f.dtype for f in found] == [jnp.bfloat16] * 2 + [jnp.float32] * 3
    check(found, reading(*arrays))


def test_nan_stays_with_its_token():
    x_XD, ids_XK, *others = operands(300)
    y_XD, _, _, dw13_ED2F, _ = run(ONE, x_XD.at[7, 3].set(jnp.nan), ids_XK, *others)
    np.testing.assert_array_equal(jnp.isnan(y_XD).any(-1), np.arange(300) == 7)
    reached_E = np.isin(np.arange(E), ids_XK[7])
    np.testing.assert_array_equal(jnp.isnan(dw13_ED2F).any((1, 2)), reached_E)


@pytest.mark.parametrize(
    ("recipe", "kwargs", "bound"),
    [
        (Fp8Recipe(gradient_scales="blocks"), {"gradient_rows": 128}, 2e-3),
        # Where the largest number rounds otherwise in bfloat16, so does every code of its tensor.
        (Fp8Recipe(scales="tensor"), {"one_scale": True}, 1e-2),
    ],
)
def test_ablations_reach_the_experts(recipe, kwargs, bound):
    arrays = operands(300)
    found, published = run(replace(ONE, fp8=recipe), *arrays), reading(*arrays)
    check(found, reading(*arrays, **kwargs), bound)
    with pytest.raises(AssertionError):
        check(found, published, bound)


@pytest.mark.slow
def test_products_without_promotion_are_those_of_each_expert_alone():
    rng = np.random.default_rng()
    sizes_E, recipe = jnp.asarray([128, 0, 256], jnp.int32), Fp8Recipe(promotion=False)
    x_MI, dy_MO = (jnp.asarray(draw(rng, 512, n), jnp.bfloat16) for n in (160, 72))
    w_EIO = jnp.asarray(rng.normal(size=(3, 160, 72)), jnp.float32)

    @partial(jax.jit, static_argnums=0)
    def grouped(recipe):
        weight = as_fp8(w_EIO)
        weight = weight.codes_OI, jnp.swapaxes(weight.scales_IO, 1, 2)
        y_MO = fp8_grouped.grouped_product(*fp8.tiles(x_MI, recipe), *weight, sizes_E, recipe)
        x_columns, dy_columns = fp8.columns(x_MI, recipe), fp8.columns(dy_MO, recipe)
        return y_MO, fp8_grouped.grouped_weight_gradient(*x_columns, *dy_columns, sizes_E, recipe)

    @jax.jit
    def alone(x_MI, dy_MO, w_IO):
        codes_OI, scales_OI = fp8.blocks(w_IO.T, recipe)
        y_MO = fp8.product(*fp8.tiles(x_MI, recipe), codes_OI, scales_OI, jnp.bfloat16, recipe)
        operands = *fp8.columns(x_MI, recipe), *fp8.columns(dy_MO, recipe)
        return y_MO, fp8.product(*operands, jnp.float32, recipe)

    (y_MO, dw_EIO), (promoted_y_MO, promoted_dw_EIO) = grouped(recipe), grouped(PUBLISHED)
    assert (y_MO != promoted_y_MO).mean() > 0.01 and (dw_EIO != promoted_dw_EIO).mean() > 0.3
    assert not np.any(y_MO[384:]) and not np.any(dw_EIO[1])
    for e, rows in ((0, slice(0, 128)), (2, slice(128, 384))):
        expected_y_MO, expected_dw_IO = alone(x_MI[rows], dy_MO[rows], w_EIO[e])
        np.testing.assert_array_equal(y_MO[rows], expected_y_MO)
        np.testing.assert_array_equal(dw_EIO[e], expected_dw_IO)


BACKENDS = {"padded": 8, "ragged": 8, "hierarchical": 2}  # devices a node


@cache
def on_mesh(dispatch):
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(1, 2, 4), AXES)
    return replace(ONE, mesh=mesh, dispatch=dispatch, devices_per_node=BACKENDS[dispatch])


@pytest.mark.parametrize("dispatch", BACKENDS)
def test_eight_devices_equal_float64(dispatch):
    """Each half of the mesh has its own experts' rows: the weights' gradients are added up."""
    arrays = operands(301)  # no multiple of 8
    order = np.arange(304)
    if dispatch == "hierarchical":  # rows arrive by place in the node, then by node
        order = order.reshape(2, 2, 2, 38).swapaxes(1, 2).ravel()
    order = order[order < 301]
    halves = []
    for tokens in (order[order < 152], order[order >= 152]):
        x_XD, ids_XK, weights_XK, w13_ED2F, w2_EFD, dy_XD = arrays
        own = (a[tokens] for a in (x_XD, ids_XK, weights_XK))
        halves.append(reading(*own, w13_ED2F, w2_EFD, dy_XD[tokens]))
    back = np.argsort(order)
    by_token = [np.concatenate(parts)[back] for parts in list(zip(*halves, strict=True))[:3]]
    weights = [first + second for first, second in list(zip(*halves, strict=True))[3:]]
    found = run(on_mesh(dispatch), *arrays)
    # Sums over devices are rounded to bfloat16 once more, up to twice.
    check(found[:2], by_token[:2], 2.0**-7)
    check(found[2:], by_token[2:] + weights)


def exchanged(jaxpr, widths):
    """Dtypes of the rows of such widths that travel between devices, in order."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("all_to_all", "ragged_all_to_all"):
            aval = eqn.invars[0].aval
            found += [str(aval.dtype)] if aval.shape[-1] in widths else []
        for inner in jaxprs_in_params(eqn.params):
            found += exchanged(inner, widths)
    return found


@pytest.mark.parametrize("dispatch", BACKENDS)
def test_rows_and_gradients_leave_as_bytes_and_return_in_bfloat16(dispatch, monkeypatch):
    monkeypatch.setattr(Runtime, "platform", "gpu")  # so that the ragged primitive is traced
    arrays, runtime = operands(304), on_mesh(dispatch)
    D = WIDTHS[0]
    widths = (D, D + 2 * 4)  # codes alone, or with the scales of two tiles
    hops = 2 if dispatch == "hierarchical" else 1

    def sent(dy_XD, *arrays):
        return value_and_gradients(runtime, *arrays, dy_XD)

    found = exchanged(jax.make_jaxpr(sent)(arrays[-1], *arrays[:-1]).jaxpr, widths)
    assert found == (["uint8"] * hops + ["bfloat16"] * hops) * 2  # forward, then backward


def test_what_is_kept_of_rows_is_in_eight_bits():
    x_XD, ids_XK, weights_XK, w13_ED2F, w2_EFD, _ = operands(300)
    policy = jax.checkpoint_policies.save_only_these_names("routing", "expert_in", "w13_out")

    def kept(x_XD, weights_XK, *experts):
        @partial(jax.checkpoint, policy=policy)
        def function(x_XD, weights_XK, *experts):
            experts = [as_fp8(w) for w in experts]
            on_shard = partial(fp8_experts, recipe=PUBLISHED)
            return on_every_shard(on_shard, x_XD, ids_XK, weights_XK, *experts, runtime=ONE)[0]

        return jax.vjp(function, x_XD, weights_XK, *experts)[1]

    residuals = jax.tree.leaves(jax.eval_shape(kept, x_XD, weights_XK, w13_ED2F, w2_EFD))
    D, F = WIDTHS
    rows = [r for r in residuals if r.ndim == 2 and r.shape[-1] >= F]
    num_slots = -(-(300 * K + 127 * E) // 128) * 128
    assert {(r.shape, str(r.dtype)) for r in rows} == {
        ((300, D + 4 * 2), "uint8"),  # what was received, in the order of arrival
        ((num_slots, 2 * F), "float8_e4m3fn"),
    }


@pytest.mark.slow
def test_released_weights_run_but_do_not_train():
    x_XD, ids_XK, weights_XK, w13_ED2F, w2_EFD, dy_XD = operands(300)
    experts = [as_fp8(jnp.asarray(w)) for w in (w13_ED2F, w2_EFD)]
    released = [BlockScaled(w.codes_IO, w.scales_IO) for w in experts]

    @jax.jit
    def forward(*experts):
        weights = [as_fp8(w) for w in experts]
        on_shard = partial(fp8_experts, recipe=PUBLISHED)
        return on_every_shard(on_shard, x_XD, ids_XK, weights_XK, *weights, runtime=ONE)[0]

    np.testing.assert_array_equal(forward(*released), forward(w13_ED2F, w2_EFD))
    with pytest.raises(UserError, match="do not train"):
        value_and_gradients(ONE, x_XD, ids_XK, weights_XK, *released, dy_XD)


@partial(jax.jit, static_argnums=0)
def feed_forward(mesh, h, w_FO, dy):
    def function(h, w_FO):
        return fp8_swiglu_linear(h, as_fp8(w_FO), PUBLISHED, mesh=mesh)

    y, backward = jax.vjp(function, h, w_FO)
    return y, *backward(dy)


@pytest.mark.parametrize("devices", [1, 8])
def test_dense_swiglu_and_down_projection_equal_float64(devices):
    rng = np.random.default_rng()
    tokens, F, O = 8 * 40, 72, 160
    h, dy = (jnp.asarray(draw(rng, tokens, n), jnp.bfloat16) for n in (2 * F, O))
    w_FO = rng.normal(size=(F, O)).astype(np.float32)
    mesh = None if devices == 1 else on_mesh("padded").mesh
    y, dh, dw_FO = feed_forward(mesh, h.reshape(8, 40, -1), w_FO, dy.reshape(8, 40, -1))
    w = quantized(w_FO, 128, 128)
    product, _ = swiglu(np.asarray(h, np.float64), 1.0)
    expected_y = bf16(quantized(bf16(product), 1, 128) @ w)
    product, backward = swiglu(quantized(h, 1, 128), 1.0)
    expected_dh, _ = backward(bf16(quantized(dy, 1, 128) @ w.T))
    expected_dw = sum(  # tiles of 128 rows lie within a device
        quantized(bf16(x), 128, 1).T @ quantized(g, 128, 1)
        for x, g in zip(np.split(product, devices), np.split(np.asarray(dy), devices), strict=True)
    )
    assert y.dtype == dh.dtype == jnp.bfloat16 and dw_FO.dtype == jnp.float32
    found = y.reshape(tokens, O), dh.reshape(tokens, 2 * F), dw_FO
    check(found, (expected_y, bf16(expected_dh), expected_dw))
