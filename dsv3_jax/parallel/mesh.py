"""The device mesh: axes `pipe`, `data`, `expert`, and the batch sharded over the last two.

Where sequences are split there is an axis `context` too, before `expert`: see `context.py`.
"""

import os

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from dsv3_jax.config import ParallelConfig
from dsv3_jax.errors import UserError

AXES = ("pipe", "data", "expert")
CONTEXT_AXIS = "context"
HEARTBEAT_SECONDS = 30  # a process that is silent so long is dead, and its peers end too
BATCH_AXES = ("data", "expert")  # every device holds its own sequences: EP is inside DP (spec §7)


def emulate_cpu_devices(parallel: ParallelConfig) -> None:
    """Asks for this process's share of the emulated CPU devices of the mesh, before JAX starts.

    An `--xla_force_host_platform_device_count` the user already set in XLA_FLAGS is kept. The flag
    touches the CPU platform only, so it is harmless where an accelerator is found.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    needed = parallel.num_devices // _processes_by_hand()
    if "xla_force_host_platform_device_count" not in flags and needed <= 64:
        flag = f"--xla_force_host_platform_device_count={needed}"
        os.environ["XLA_FLAGS"] = f"{flags} {flag}".strip()


def make_mesh(parallel: ParallelConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Returns the mesh [pipe, data, expert] with Auto axes over the first devices.

    With `parallel.context` above 1 it is [pipe, data, context, expert].

    Raises:
      UserError: fewer devices than the axes multiply to, or a multi-process mesh that would leave
        some process without a device.
    """
    devices = jax.devices() if devices is None else devices
    sizes = axis_sizes(parallel)
    needed = parallel.num_devices
    if needed > len(devices):
        axes = " x ".join(f"{name} {size}" for name, size in sizes.items())
        *keys, last = (f"parallel.{name}" for name in sizes)
        raise UserError(
            f"the mesh {axes} needs {needed} "
            f"devices but {len(devices)} {devices[0].platform} device(s) exist; lower one of "
            f"{', '.join(keys)} and {last}, e.g. --set parallel.data=1"
        )
    if jax.process_count() > 1 and needed != len(devices):
        raise UserError(
            f"{jax.process_count()} processes have {len(devices)} devices but the mesh uses "
            f"{needed}; make {'*'.join(sizes)} equal {len(devices)}"
        )
    return Mesh(np.array(devices[:needed]).reshape(tuple(sizes.values())), tuple(sizes))


def axis_sizes(parallel: ParallelConfig) -> dict[str, int]:
    """Names and sizes of the axes, outermost first. `context` is there only where it is above 1."""
    context = {CONTEXT_AXIS: parallel.context} if parallel.context > 1 else {}
    return {"pipe": parallel.pipe, "data": parallel.data, **context, "expert": parallel.expert}


def serving_mesh(
    parallel: ParallelConfig, tensor: int, devices: list[jax.Device] | None = None
) -> Mesh:
    """The mesh with a last axis `tensor`, which splits heads and experts at inference (spec §11).

    Raises:
      UserError: fewer devices than the axes multiply to.
    """
    devices = jax.devices() if devices is None else devices
    sizes = axis_sizes(parallel) | {"tensor": tensor}
    shape = tuple(sizes.values())
    needed = int(np.prod(shape))
    if needed > len(devices):
        raise UserError(
            f"data {parallel.data} x expert {parallel.expert} x tensor {tensor} needs {needed} "
            f"devices but {len(devices)} {devices[0].platform} device(s) exist; lower one of them"
        )
    return Mesh(np.array(devices[:needed]).reshape(shape), tuple(sizes))


def expert_axes(mesh: Mesh | AbstractMesh | None) -> str | tuple[str, str]:
    """The axes that experts are split over: on a mesh for serving, `tensor` too."""
    has_tensor = mesh is not None and "tensor" in mesh.axis_names
    return ("expert", "tensor") if has_tensor else "expert"


def abstract_mesh(parallel: ParallelConfig) -> AbstractMesh:
    """The mesh without devices, for shapes and traces alone."""
    sizes = axis_sizes(parallel)
    return AbstractMesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)
    )


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Sharding of a [B, ...] array, or [A, B, ...] with `leading=1`."""
    return NamedSharding(mesh, PartitionSpec(*([None] * leading), BATCH_AXES))


def overlap_options(mesh: Mesh | AbstractMesh) -> dict[str, bool | int]:
    """Compiler options by which all-to-alls run beside other work, and beside each other."""
    platform = mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else None
    if platform == "tpu":  # a GPU's are asynchronous anyway
        kinds = "all_to_all", "ragged_all_to_all"
        return {f"xla_tpu_enable_async_{kind}": True for kind in kinds}
    if platform == "gpu":
        # Rows and choices of both chunks of a pipeline; with one at a time, choices of 4 MiB take
        # the matmuls that the rows need.
        return {"xla_gpu_experimental_parallel_collective_overlap_limit": 4}
    return {}


def data_process(mesh: Mesh) -> tuple[int, int]:
    """This process's part of the batch: (index, count) among the processes with different rows.

    Processes that hold other stages, or other tokens, of the same sequences read the same data.

    Raises:
      UserError: two processes hold some of their sequences in common, but not all.
    """
    sizes = [size if name in BATCH_AXES else 1 for name, size in mesh.shape.items()]
    part = np.broadcast_to(np.arange(np.prod(sizes)).reshape(sizes), mesh.devices.shape)
    held: dict[int, set[int]] = {}
    for device, position in zip(mesh.devices.flat, part.flat, strict=True):
        held.setdefault(device.process_index, set()).add(int(position))
    different = sorted(map(sorted, {frozenset(parts) for parts in held.values()}))
    if sum(map(len, different)) != np.prod(sizes):
        raise UserError(
            f"parallel.context={mesh.shape.get(CONTEXT_AXIS, 1)} with parallel.expert="
            f"{mesh.shape['expert']} gives processes parts of each other's sequences; make the "
            f"devices of a process a multiple or a divisor of parallel.expert"
        )
    return different.index(sorted(held[jax.process_index()])), len(different)


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
            num_processes=_processes_by_hand(),
            process_id=int(os.environ["JAX_PROCESS_ID"]),
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
        return
    several = any(
        int(os.environ.get(name) or 1) > 1 for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
    )
    if several or "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS)


def _processes_by_hand() -> int:
    return int(os.environ.get("JAX_NUM_PROCESSES") or 1)
