"""Programs compiled for TPU slices and GPU clusters that are not there (ahead of time).

The compilers come with `pip install 'dsv3-jax[aot]'`; no device is needed and no array is made.
"""

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from dsv3_jax.config import Config, ParallelConfig
from dsv3_jax.errors import UserError
from dsv3_jax.parallel.mesh import axis_sizes, batch_sharding, make_mesh, overlap_options
from dsv3_jax.plan.topology import parse_topology
from dsv3_jax.train.state import abstract_state
from dsv3_jax.train.step import make_train_step

_GPU_TARGETS = Path(__file__).with_name("targets")  # CHIP.txtpb: the limits XLA compiles for


@dataclass(frozen=True, kw_only=True)
class CompiledMemory:
    """Bytes on one device, as the compiler planned them."""

    arguments: int
    outputs: int
    aliased: int  # of the outputs, those that take the place of donated arguments
    temporaries: int
    peak: int  # most that is live at once, arguments included

    def fits(self, hbm_bytes: int, fraction: float = 0.9) -> bool:
        """Whether the peak stays under `fraction` of a device's memory.

        The rest is for the runtime, the buffers of the collectives and fragmentation.
        """
        return self.peak < fraction * hbm_bytes


def described_mesh(topology: str, parallel: ParallelConfig) -> Mesh:
    """The mesh of `make_mesh` over devices that are described, not present.

    Args:
      topology: as `parse_topology` takes it.

    Raises:
      UserError: an unknown chip or shape, a compiler that is not installed, or a mesh that does
        not use every device.
    """
    chip = parse_topology(topology).chip
    target = _GPU_TARGETS / f"{chip.name}.txtpb"
    if not target.exists() and not chip.torus_dims:
        described = ", ".join(sorted(path.stem for path in _GPU_TARGETS.glob("*.txtpb")))
        raise UserError(
            f"--topology={topology}: {chip.name} is not described to the GPU compiler; allowed: "
            f"{described}, and every TPU"
        )
    shape = topology.partition(":")[2]
    devices = _gpus(target, shape) if target.exists() else _tpus(topology)
    if parallel.num_devices != len(devices):
        axes = " x ".join(f"{name} {size}" for name, size in axis_sizes(parallel).items())
        raise UserError(
            f"topology {topology} has {len(devices)} devices but {axes} uses "
            f"{parallel.num_devices}; make them equal"
        )
    return make_mesh(parallel, devices)


def _gpus(target: Path, shape: str) -> list[jax.Device]:
    # CUDA's libraries are not needed to compile. JAX looks for them once, when it is first used.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    try:
        return topologies.get_topology_desc(
            platform="cuda",
            topology_name=target.stem,
            target_config=target.read_text(),
            topology=shape,
        ).devices
    except NotImplementedError:
        raise UserError(
            "the GPU compiler is missing; pip install 'dsv3-jax[aot]', and set JAX_PLATFORMS=cpu "
            "where JAX says that it cannot load CUDA's libraries"
        ) from None


def _tpus(topology: str) -> list[jax.Device]:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("the TPU compiler is missing; pip install 'dsv3-jax[aot]'")
    # The first keeps libtpu from asking the network what it runs on, the second lets several
    # processes (test workers) load it.
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except jax.errors.JaxRuntimeError as error:
        if "INVALID_ARGUMENT" not in str(error):
            raise
        raise UserError(f"topology {topology!r}: {str(error).splitlines()[0]}") from None


def lower_train_step(config: Config, mesh: Mesh) -> jax.stages.Lowered:
    """The step of `config` at its full batch, lowered for the mesh without making an array."""
    graphdef, state = abstract_state(config, mesh)
    step = make_train_step(config, graphdef, jax.tree.map(lambda x: x.sharding, state))
    rows = config.microbatch_sequences
    shape = (config.data.sequences_per_step // rows, rows, config.data.sequence_length + 1)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh, leading=1))
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    return step.lower(state, {"tokens": tokens}, scalar, scalar, scalar)


def compile_step(lowered: jax.stages.Lowered, mesh: Mesh) -> jax.stages.Compiled:
    """Compiles for the mesh's platform.

    Raises:
      UserError: the program needs more memory than a TPU has. A GPU's compiler only warns: look at
        `compiled_memory(...).fits`.
    """
    try:
        return lowered.compile(overlap_options(mesh) or None)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ")
        raise UserError(f"the step does not fit: {reason}") from None


def compiled_memory(compiled: jax.stages.Compiled) -> CompiledMemory:
    """What the compiler planned for one device."""
    stats = compiled.memory_analysis()
    return CompiledMemory(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        peak=stats.peak_memory_in_bytes,
    )
