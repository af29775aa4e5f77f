"""The train step in FP8: which weights, how often they are quantised, and what comes out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params
from small_run import MODEL, RATE, SPEED, WEIGHT, make_batch, make_config, make_mesh, run

from dsv3_jax.model.layers import Linear
from dsv3_jax.model.runtime import Runtime
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.precision import fp8
from dsv3_jax.precision.policy import LINEARS, PUBLISHED, is_fp8
from dsv3_jax.train.state import abstract_state, init_state
from dsv3_jax.train.step import make_eval_step, make_train_step


@pytest.fixture(scope="module")
def start():
    """The same first state for all, on the host."""
    return jax.device_get(init_state(make_config(), make_mesh())[1])


def test_the_weights_quantised_are_those_of_linears_and_experts_in_fp8():
    runtime = Runtime(compute_dtype=jnp.dtype(jnp.bfloat16), fp8=PUBLISHED)
    model = nnx.eval_shape(lambda: DeepSeekV3(MODEL, runtime=runtime, rngs=nnx.Rngs(0)))
    by_role = {
        (*path, "kernel"): LINEARS[module.role] is not None
        for path, module in nnx.iter_modules(model)
        if isinstance(module, Linear)
    }
    flat = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    assert {path: is_fp8(path) for path in by_role} == by_role
    others = {path for path in flat if is_fp8(path) and path not in by_role}
    assert others == {
        (*block, "ffn", "experts", name)
        for block in (("moe_blocks",), ("mtp", "block"))
        for name in ("w13", "w2")
    }
    # 5 of attention and 2 of a FFN a block, shared and routed experts alike.
    assert sum(map(is_fp8, flat)) == 7 + 9 + 9


def executions(jaxpr, name):
    """How often functions of that name run, a scan's body once a turn."""
    total = 0
    for eqn in jaxpr.eqns:
        inner = sum(executions(sub, name) for sub in jaxprs_in_params(eqn.params))
        total += inner * eqn.params.get("length", 1) + (eqn.params.get("name") == name)
    return total


@pytest.mark.parametrize("remat", [pytest.param("none", marks=pytest.mark.slow), "paper"])
def test_weights_are_quantised_once_a_step(remat, start, monkeypatch):
    original = fp8.quantize_blocks

    def quantize_weight(w_NK):
        return original(w_NK)

    monkeypatch.setattr(fp8, "quantize_blocks", jax.jit(quantize_weight))
    config, mesh = make_config(remat=remat), make_mesh()
    graphdef, template = abstract_state(config, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, template)
    step = make_train_step(config, graphdef, shardings)

    def count(function, *args):
        return executions(function.trace(*args).jaxpr.jaxpr, "quantize_weight")

    for microbatches in (1, 2, 4):
        batch = make_batch(4, microbatches)
        assert count(step, start, batch, RATE, SPEED, WEIGHT) == 7 + 9 + 9
    # Outside the step every Linear quantises its own.
    evaluate = make_eval_step(graphdef)
    batch = {"tokens": make_batch(2)["tokens"][0]}
    assert count(evaluate, start.params, start.router_bias, batch) >= 7 + 7


@pytest.mark.slow
def test_gradients_and_losses_are_near_those_of_bfloat16(start):
    batches = [make_batch(8, microbatches=2) for _ in range(6)]
    histories = [
        run(make_config(compute, remat="paper"), start, batches) for compute in ("fp8", "bfloat16")
    ]
    ours, theirs = (np.array([metrics["loss"] for _, metrics in h]) for h in histories)
    assert ours[-1] < 0.8 * ours[0]
    np.testing.assert_allclose(ours[0], theirs[0], rtol=5e-3)
    np.testing.assert_allclose(ours, theirs, rtol=0.1)
    assert (ours != theirs).all()
    # After a step AdamW's first moment is the gradient but for a factor.
    gradients = [history[0][0].opt_state.mean for history in histories]

    def cosine(a, b):
        a, b = (x.astype(np.float64).ravel() for x in (a, b))
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    # Rounding sends a few tokens to other experts, so no weight has quite the same gradient.
    cosines = jax.tree.leaves(jax.tree.map(cosine, *gradients))
    assert min(cosines) > 0.7 and np.median(cosines) > 0.9, sorted(cosines)
