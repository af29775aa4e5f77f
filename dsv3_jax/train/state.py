"""Everything a step changes, created where it belongs on the mesh.

Tokens consumed are not here: 14.8T does not fit in an int32, so the loop counts them on the host.
"""

import dataclasses
from dataclasses import dataclass

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv3_jax.checkpoint.pretrained import load_model, read_model
from dsv3_jax.config import Config
from dsv3_jax.errors import UserError
from dsv3_jax.model.router import RouterBias
from dsv3_jax.model.runtime import Runtime
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.parallel.rules import optimizer_sharding, weight_sharding
from dsv3_jax.train.optim import AdamWState, adamw


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Arrays of a run: plain dicts as in the model's parameter tree."""

    step: jax.Array  # int32 [], optimizer steps taken
    params: chex.ArrayTree  # float32 masters
    router_bias: chex.ArrayTree  # float32, one [layers, E] leaf a group of MoE layers
    opt_state: AdamWState


def abstract_state(config: Config, mesh: Mesh) -> tuple[nnx.GraphDef, TrainState]:
    """The static model and the state as shapes with shardings: a template for restoring.

    Parameters follow the layout preset; AdamW moments are further split over the batch axes
    (ZeRO-1, spec §8); step and router bias are on every device.
    """
    model = nnx.eval_shape(lambda: _create_model(config, mesh))
    graphdef, params, router_bias = nnx.split(model, nnx.Param, RouterBias)
    replicated = NamedSharding(mesh, PartitionSpec())

    def weight(param):
        sharding = weight_sharding(mesh, param.shape, param.axes, config.parallel.layout)
        return jax.ShapeDtypeStruct(param.shape, jnp.float32, sharding=sharding)

    def moment(param):
        sharding = optimizer_sharding(param.sharding, param.shape)
        dtype = jnp.dtype(config.precision.moments)
        return jax.ShapeDtypeStruct(param.shape, dtype, sharding=sharding)

    scalar = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
    params = nnx.to_pure_dict(
        jax.tree.map(weight, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    )
    moments = jax.tree.map(moment, params)
    return graphdef, TrainState(
        step=scalar,
        params=params,
        router_bias=jax.tree.map(
            lambda bias: jax.ShapeDtypeStruct(bias.shape, bias.dtype, sharding=replicated),
            nnx.to_pure_dict(router_bias),
        ),
        opt_state=AdamWState(scalar, moments, moments),
    )


def inference_graphdef(config: Config, mesh: Mesh) -> nnx.GraphDef:
    """The static model with room for any routing, for what runs outside the training step."""
    parallel = dataclasses.replace(config.parallel, buffer_factor=None)
    return abstract_state(dataclasses.replace(config, parallel=parallel), mesh)[0]


def init_state(config: Config, mesh: Mesh) -> tuple[nnx.GraphDef, TrainState, TrainState]:
    """Creates the state on the mesh, no array ever whole on one device that does not hold it.

    Returns:
      The static model, the state, and the state's shardings. The numbers depend on `run.seed`
      alone, not on the mesh.
    """
    graphdef, abstract = abstract_state(config, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)

    def init():
        model = _create_model(config, mesh)
        _, params, router_bias = nnx.split(model, nnx.Param, RouterBias)
        params = nnx.to_pure_dict(params)
        optimizer = adamw(config.optim, jnp.dtype(config.precision.moments))
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            router_bias=nnx.to_pure_dict(router_bias),
            opt_state=optimizer.init(params),
        )

    return graphdef, jax.jit(init, out_shardings=shardings)(), shardings


def check_initial_weights(config: Config) -> None:
    """Checks `checkpoint.initial_weights` by its headers, before anything is allocated.

    Context extension may differ (it holds no weights), and so may the initialiser.

    Raises:
      UserError: it cannot be read, or holds another model.
    """
    path = config.checkpoint.initial_weights
    if not path:
        return
    theirs = dataclasses.replace(
        read_model(path), yarn=config.model.yarn, init_std=config.model.init_std
    )
    for field in dataclasses.fields(theirs):
        here, there = getattr(config.model, field.name), getattr(theirs, field.name)
        if here != there:
            raise UserError(
                f"checkpoint.initial_weights={path} holds another model: {field.name} is {there} "
                f"there and {here} here; set model.{field.name}={there} or give other weights"
            )


def initial_state(config: Config, mesh: Mesh) -> TrainState:
    """The state before the first step: random, or with the weights and biases of a checkpoint.

    Raises:
      UserError: `checkpoint.initial_weights` is damaged.
    """
    path = config.checkpoint.initial_weights
    if not path:
        return init_state(config, mesh)[1]
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh)[1])
    model = load_model(path, jnp.float32, mesh if mesh.size > 1 else None, config.parallel.layout)
    _, params, router_bias = nnx.split(model, nnx.Param, RouterBias)
    params = jax.device_put(nnx.to_pure_dict(params), shardings.params)
    optimizer = adamw(config.optim, jnp.dtype(config.precision.moments))
    return TrainState(
        step=jax.device_put(np.int32(0), shardings.step),
        params=params,
        router_bias=jax.device_put(nnx.to_pure_dict(router_bias), shardings.router_bias),
        opt_state=jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params),
    )


def _create_model(config: Config, mesh: Mesh) -> DeepSeekV3:
    runtime = Runtime.from_config(config, mesh if mesh.size > 1 else None)
    return DeepSeekV3(config.model, runtime=runtime, rngs=nnx.Rngs(config.run.seed))
