"""The device mesh: axes `pipe`, `data`, `expert`, and the batch sharded over the last two."""

import os

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from dsv3_jax.config import ParallelConfig
from dsv3_jax.errors import UserError

AXES = ("pipe", "data", "expert")
BATCH_AXES = ("data", "expert")  # every device holds its own sequences: EP is inside DP (spec §7)


def emulate_cpu_devices(parallel: ParallelConfig) -> None:
    """Asks for this process's share of the emulated CPU devices of the mesh, before JAX starts.

    An `--xla_force_host_platform_device_count` the user already set in XLA_FLAGS is kept. The flag
    touches the CPU platform only, so it is harmless where an accelerator is found.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    needed = parallel.pipe * parallel.data * parallel.expert // _processes_by_hand()
    if "xla_force_host_platform_device_count" not in flags and needed <= 64:
        flag = f"--xla_force_host_platform_device_count={needed}"
        os.environ["XLA_FLAGS"] = f"{flags} {flag}".strip()


def make_mesh(parallel: ParallelConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Returns the mesh [pipe, data, expert] with Auto axes over the first devices.

    Raises:
      UserError: fewer devices than the axes multiply to, or a multi-process mesh that would leave
        some process without a device.
    """
    devices = jax.devices() if devices is None else devices
    shape = (parallel.pipe, parallel.data, parallel.expert)
    needed = int(np.prod(shape))
    if needed > len(devices):
        raise UserError(
            f"the mesh pipe {shape[0]} x data {shape[1]} x expert {shape[2]} needs {needed} "
            f"devices but {len(devices)} {devices[0].platform} device(s) exist; lower "
            f"parallel.data or parallel.expert, e.g. --set parallel.data=1 --set parallel.expert=1"
        )
    if jax.process_count() > 1 and needed != len(devices):
        raise UserError(
            f"{jax.process_count()} processes have {len(devices)} devices but the mesh uses "
            f"{needed}; make pipe*data*expert equal {len(devices)}"
        )
    return Mesh(np.array(devices[:needed]).reshape(shape), AXES)


def abstract_mesh(parallel: ParallelConfig) -> AbstractMesh:
    """The mesh without devices, for shapes and traces alone."""
    shape = (parallel.pipe, parallel.data, parallel.expert)
    return AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Sharding of a [B, ...] array, or [A, B, ...] with `leading=1`."""
    return NamedSharding(mesh, PartitionSpec(*([None] * leading), BATCH_AXES))


def initialize_processes() -> None:
    """Joins the other processes of a job, when the environment shows one of several.

    Call before JAX's first use. JAX itself recognises Slurm, Open MPI and Cloud TPU; elsewhere set
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Raises:
      UserError: JAX_NUM_PROCESSES is set but the other two are not.
    """
    if _processes_by_hand() > 1:
        if missing := {"JAX_COORDINATOR_ADDRESS", "JAX_PROCESS_ID"} - set(os.environ):
            raise UserError(f"JAX_NUM_PROCESSES is set; set {' and '.join(sorted(missing))} too")
        jax.distributed.initialize(
            num_processes=_processes_by_hand(), process_id=int(os.environ["JAX_PROCESS_ID"])
        )
        return
    several = any(
        int(os.environ.get(name) or 1) > 1 for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
    )
    if several or "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
        jax.distributed.initialize()


def _processes_by_hand() -> int:
    return int(os.environ.get("JAX_NUM_PROCESSES") or 1)
