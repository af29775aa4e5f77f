"""How the model's maths is executed. Nothing here changes the result beyond rounding."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dsv3_jax.config import Config
from dsv3_jax.precision.policy import Fp8Recipe, fp8_recipe


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Static, hashable execution choices, kept by the modules as a plain attribute.

    `mesh=None` runs without sharding: no constraint is emitted, nor a collective unless `shard_of`
    names the axes of a surrounding `shard_map`.
    """

    mesh: Mesh | None = None
    shard_of: Mesh | None = None  # arrays are one device's shards, inside a `shard_map` over this
    compute_dtype: jnp.dtype = jnp.dtype(jnp.float32)  # activations, and operands not in FP8
    fp8: Fp8Recipe | None = None  # how the Linears of `policy.LINEARS` multiply; None: as the rest
    remat: str = "none"  # 'none', 'paper' (spec §5.5), 'full'
    scan_layers: bool = True  # one program for layers of a kind; False: each compiled on its own
    attention: str | None = None  # None: the best for the shapes; see `model/attention.py`
    grouped_matmul: str | None = None  # None: by platform; see `parallel/grouped_matmul.py`
    dispatch: str = "padded"  # 'padded', 'ragged', 'hierarchical'
    buffer_factor: float | None = None  # room for received rows over an even share; None: for all
    devices_per_node: int = 8  # hierarchical dispatch: `expert` positions that share a node

    @property
    def platform(self) -> str:
        """'cpu', 'gpu' or 'tpu': that of the mesh, which may differ from this machine's (AOT)."""
        mesh = self.mesh or self.shard_of
        has_devices = isinstance(mesh, Mesh)  # an abstract mesh, for tracing, has none
        return mesh.devices.flat[0].platform if has_devices else jax.default_backend()

    @property
    def num_expert_shards(self) -> int:
        """Devices that experts are split over."""
        mesh = self.mesh or self.shard_of
        return 1 if mesh is None else mesh.shape["expert"] * self.num_tensor_shards

    @property
    def num_tensor_shards(self) -> int:
        """Positions of the `tensor` axis, which only a mesh for serving has."""
        mesh = self.mesh or self.shard_of
        return 1 if mesh is None else mesh.shape.get("tensor", 1)

    @property
    def num_head_shards(self) -> int:
        """Parts of the heads of which this device has one: `tensor`, inside `shard_map` alone."""
        return 1 if self.shard_of is None else self.num_tensor_shards

    @classmethod
    def from_config(
        cls, config: Config, mesh: Mesh | None, *, shard_of: Mesh | None = None
    ) -> "Runtime":
        return cls(
            mesh=mesh,
            shard_of=shard_of,
            compute_dtype=jnp.dtype(config.precision.activations),
            fp8=fp8_recipe(config.precision),
            remat=config.precision.remat,
            scan_layers=config.run.scan_layers,
            dispatch=config.parallel.dispatch,
            buffer_factor=config.parallel.buffer_factor,
            devices_per_node=config.parallel.devices_per_node,
        )
