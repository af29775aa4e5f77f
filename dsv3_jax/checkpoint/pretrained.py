"""From a checkpoint to a model that computes: weights and router bias, nothing else.

A run of ours is read here, a Hugging Face folder in `hf_load.py`.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv3_jax.checkpoint import manifest
from dsv3_jax.checkpoint.hf_check import without_absent_mtp
from dsv3_jax.checkpoint.hf_config import read_model_config
from dsv3_jax.checkpoint.hf_folder import is_folder, open_folder
from dsv3_jax.checkpoint.hf_load import FP8, Source, check_dtype, load_folder
from dsv3_jax.checkpoint.reader import locate, open_checkpoint, steps_in
from dsv3_jax.config import ModelConfig
from dsv3_jax.data.tokenizer import Tokenizer, load_tokenizer
from dsv3_jax.errors import UserError
from dsv3_jax.model.router import RouterBias
from dsv3_jax.model.runtime import Runtime
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.overrides import from_dict
from dsv3_jax.parallel.rules import weight_sharding


def read_model(path: str | Path) -> ModelConfig:
    """The model that `load_model` would load, from headers alone.

    Raises:
      UserError: nothing of the kind is there, or its description is damaged.
    """
    if is_folder(path):
        folder = open_folder(path)
        described = read_model_config(folder.config, str(folder.path / "config.json"))
        return without_absent_mtp(folder, described)
    directory, step = locate(path)
    newest = directory / str(steps_in(directory)[-1] if step is None else step)
    try:
        return from_dict(manifest.read(newest)["extra"]["config"]).model
    except manifest.DamagedCheckpoint as error:
        raise UserError(f"{newest}: {error}; name another step") from None


def load_model(
    path: str | Path,
    dtype: jnp.dtype = jnp.float32,
    mesh: Mesh | None = None,
    layout: str | None = None,
) -> DeepSeekV3:
    """Loads a Hugging Face folder, or the newest checkpoint of a run that verifies.

    Args:
      path: a folder of safetensors (see `hf_load.load_folder`); or a run's working directory, its
        `checkpoints` folder, or one step in it.
      dtype: of the weights and the arithmetic; the router bias stays float32. float8_e4m3fn: FP8
        weights of a folder stay as they are.
      mesh: where the weights live; None: one device.
      layout: a key of `parallel.rules.LAYOUTS`; None: the run's, 'zero1_ep' for a folder.

    Raises:
      UserError: nothing of the kind is there, it is damaged, or it holds other arrays than its
        config says.
    """
    if is_folder(path):
        return load_folder(path, dtype, mesh, layout or "zero1_ep")
    dtype = check_dtype(dtype)
    if dtype == FP8:
        raise UserError(
            f"{path} holds no FP8 weights; load it with dtype=jnp.bfloat16 and save it with "
            f"save_pretrained(dtype='fp8') first"
        )
    directory, step = locate(path)
    checkpoint = open_checkpoint(directory, step)
    assert checkpoint is not None  # `locate` found steps
    config = from_dict(checkpoint.extra["config"])
    runtime = Runtime(
        mesh=mesh,
        compute_dtype=dtype,
        dispatch=config.parallel.dispatch,
        devices_per_node=config.parallel.devices_per_node,
    )
    model = nnx.eval_shape(lambda: DeepSeekV3(config.model, runtime=runtime, rngs=nnx.Rngs(0)))
    graphdef, params, router_bias = nnx.split(model, nnx.Param, RouterBias)
    one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def weight(variable):
        sharding = one_device
        if mesh is not None:
            rules = layout or config.parallel.layout
            sharding = weight_sharding(mesh, variable.shape, variable.axes, rules)
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
    model = nnx.merge(graphdef, weights, arrays["router_bias"])
    if tokenizer := tokenizer_file(path):
        model.source = Source(files={tokenizer.name: tokenizer.read_bytes()})
    return model


def load_run_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder, or that a run was trained with.

    Args:
      path: the folder; or a run's working directory, or a folder inside it.

    Raises:
      UserError: there is no tokenizer.json.
    """
    if file := tokenizer_file(path):
        return load_tokenizer(file)
    raise UserError(
        f"{path} has no tokenizer.json; give a Hugging Face folder or a run's working directory"
    )


def tokenizer_file(path: str | Path) -> Path | None:
    """The tokenizer.json that `load_run_tokenizer` would read, or None."""
    path = Path(path).absolute()
    folders = [path]
    if not is_folder(path):
        directory, _ = locate(path)
        folders += [directory, directory.parent]
    files = (folder / "tokenizer.json" for folder in folders)
    return next((file for file in files if file.is_file()), None)
