"""A run's checkpoint as a model: the same logits on one device, on a mesh, and as text."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax import DeepSeekV3, configs
from dsv3_jax.checkpoint.manager import CheckpointManager
from dsv3_jax.checkpoint.pretrained import load_run_tokenizer
from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.errors import UserError
from dsv3_jax.overrides import to_dict
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.train.state import init_state

TOKENS_BT = np.random.default_rng(0).integers(0, 256, (8, 12))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A working directory with one checkpoint, and the logits of the model it was saved from."""
    tiny = configs.get("tiny")
    model = dataclasses.replace(tiny.model, num_layers=2, vocab_size=512)
    config = dataclasses.replace(tiny, model=model)
    graphdef, state, _ = init_state(config, make_mesh(config.parallel))
    # A bias that matters, so that losing it would show.
    bias = jax.tree.map(
        lambda b: jax.device_put(
            np.random.default_rng(1).normal(size=b.shape).astype(np.float32), b.sharding
        ),
        state.router_bias,
    )
    workdir = tmp_path_factory.mktemp("run")
    manager = CheckpointManager(workdir / "checkpoints", keep=1)
    tree = vars(state) | {"router_bias": bias}
    manager.save(7, tree, {"config": to_dict(config)}, wait=True)
    manager.close()
    train_tokenizer(["def f(x):\n    return x + 1\n"] * 20, 300).save(workdir / "tokenizer.json")
    plain = nnx.merge(graphdef, state.params, state.router_bias)
    biased = nnx.merge(graphdef, state.params, bias)
    return config, workdir, *(np.asarray(m(TOKENS_BT)) for m in (biased, plain))


def test_same_logits_on_one_device_and_on_another_mesh(run):
    config, workdir, expected, without_bias = run
    scale = np.abs(expected).max()
    assert np.abs(expected - without_bias).max() > 1e-2 * scale
    # The run computes in the config's dtype; loading as that dtype must give the same function.
    dtype = jnp.dtype(config.precision.compute)
    tolerance = 1e-5 if dtype == jnp.float32 else 3e-2
    one_device = DeepSeekV3.from_pretrained(workdir, dtype=dtype)
    np.testing.assert_allclose(one_device(TOKENS_BT), expected, atol=tolerance * scale)
    mesh = make_mesh(dataclasses.replace(config.parallel, data=4, expert=2))
    sharded = DeepSeekV3.from_pretrained(workdir / "checkpoints" / "7", dtype=dtype, mesh=mesh)
    assert sharded.moe_blocks.ffn.experts.w13[...].sharding.spec[1] == "expert"
    np.testing.assert_allclose(sharded(TOKENS_BT), expected, atol=tolerance * scale)


def test_weights_come_in_the_dtype_asked_for(run):
    model = DeepSeekV3.from_pretrained(run[1], dtype=jnp.bfloat16)
    assert model.head.kernel[...].dtype == jnp.bfloat16
    assert model.moe_blocks.ffn.router.bias[...].dtype == jnp.float32
    assert model(TOKENS_BT).dtype == jnp.float32


def test_tokenizer_is_found_from_the_run_or_a_step(run):
    workdir = run[1]
    text = "def g(y):"
    for path in (workdir, workdir / "checkpoints", workdir / "checkpoints" / "7"):
        tokenizer = load_run_tokenizer(path)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_folder_without_a_checkpoint_is_one_line(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        DeepSeekV3.from_pretrained(tmp_path)
