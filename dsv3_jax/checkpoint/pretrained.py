"""From a checkpoint of a run to a model that computes: weights and router bias, nothing else."""

from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv3_jax.checkpoint.reader import locate, open_checkpoint
from dsv3_jax.data.tokenizer import Tokenizer, load_tokenizer
from dsv3_jax.errors import UserError
from dsv3_jax.model.router import RouterBias
from dsv3_jax.model.runtime import Runtime
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.overrides import from_dict
from dsv3_jax.parallel.rules import weight_sharding


def load_model(
    path: str | Path, dtype: jnp.dtype = jnp.float32, mesh: Mesh | None = None
) -> DeepSeekV3:
    """Loads the newest checkpoint that verifies.

    Args:
      path: a run's working directory, its `checkpoints` folder, or one step in it.
      dtype: of the weights and the arithmetic; the router bias stays float32.
      mesh: where the weights live, laid out as the run's `parallel.layout` says; None: one device.

    Raises:
      UserError: no checkpoint there, none verifies, or it holds other arrays than its config says.
    """
    directory, step = locate(path)
    checkpoint = open_checkpoint(directory, step)
    assert checkpoint is not None  # `locate` found steps
    config = from_dict(checkpoint.extra["config"])
    runtime = Runtime(
        mesh=mesh,
        compute_dtype=jnp.dtype(dtype),
        dispatch=config.parallel.dispatch,
        devices_per_node=config.parallel.devices_per_node,
    )
    model = nnx.eval_shape(lambda: DeepSeekV3(config.model, runtime=runtime, rngs=nnx.Rngs(0)))
    graphdef, params, router_bias = nnx.split(model, nnx.Param, RouterBias)
    one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def weight(variable):
        sharding = one_device
        if mesh is not None:
            sharding = weight_sharding(mesh, variable.shape, variable.axes, config.parallel.layout)
        return jax.ShapeDtypeStruct(variable.shape, variable.dtype, sharding=sharding)

    def bias(variable):
        sharding = one_device if mesh is None else NamedSharding(mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(variable.shape, variable.dtype, sharding=sharding)

    template = {
        name: nnx.to_pure_dict(
            jax.tree.map(make, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
        )
        for name, make, state in (("params", weight, params), ("router_bias", bias, router_bias))
    }
    arrays = checkpoint.restore(template, partial=True)
    weights = jax.tree.map(lambda x: x.astype(dtype), arrays["params"])
    return nnx.merge(graphdef, weights, arrays["router_bias"])


def load_run_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer a run was trained with, from its working directory (or a folder inside it).

    Raises:
      UserError: there is no tokenizer.json.
    """
    directory, _ = locate(path)
    for folder in (Path(path).absolute(), directory, directory.parent):
        if (folder / "tokenizer.json").is_file():
            return load_tokenizer(str(folder / "tokenizer.json"))
    raise UserError(f"{path} has no tokenizer.json; give the working directory of a run")
