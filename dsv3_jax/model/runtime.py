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

    `mesh=None` runs without sharding: no constraint and no collective is emitted.
    """

    mesh: Mesh | None = None
    compute_dtype: jnp.dtype = jnp.dtype(jnp.float32)  # activations, and operands not in FP8
    fp8: Fp8Recipe | None = None  # how the Linears of `policy.LINEARS` multiply; None: as the rest
    remat: str = "none"  # 'none', 'paper' (spec §5.5), 'full'
    attention: str | None = None  # None: the best that accepts the shapes; 'blockwise', 'cudnn'
    grouped_matmul: str | None = None  # None: by platform; see `parallel/grouped_matmul.py`
    dispatch: str = "padded"  # 'padded', 'ragged', 'hierarchical'
    devices_per_node: int = 8  # hierarchical dispatch: `expert` positions that share a node

    @property
    def platform(self) -> str:
        """'cpu', 'gpu' or 'tpu': that of the mesh, which may differ from this machine's (AOT)."""
        has_devices = isinstance(self.mesh, Mesh)  # an abstract mesh, for tracing, has none
        return self.mesh.devices.flat[0].platform if has_devices else jax.default_backend()

    @classmethod
    def from_config(cls, config: Config, mesh: Mesh | None) -> "Runtime":
        return cls(
            mesh=mesh,
            compute_dtype=jnp.dtype(config.precision.activations),
            fp8=fp8_recipe(config.precision),
            remat=config.precision.remat,
            dispatch=config.parallel.dispatch,
            devices_per_node=config.parallel.devices_per_node,
        )
