"""Layouts: tables from logical to mesh axes, one a preset, and the specs they give.

`zero1_ep` is the paper's (spec §8): dense weights replicated, experts on their `expert` shard,
optimizer state further split over every axis a weight leaves free. `fsdp_ep` also splits the
weights.
"""

from collections.abc import Mapping
from functools import lru_cache
from itertools import chain, combinations
from types import MappingProxyType

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from dsv3_jax.parallel.mesh import CONTEXT_AXIS

MeshAxes = str | tuple[str, ...] | None
Box = tuple[tuple[int, int], ...]  # first and last (excluded) position in each dim

_REPLICATED = dict.fromkeys(
    ("layer", "vocab", "embed", "q_latent", "kv_latent", "heads", "up_heads", "ffn",
     "expert_embed", "expert_ffn")
)  # fmt: skip

TOKEN_AXES = ("data", CONTEXT_AXIS, "expert")  # what tokens are split over, as the mesh orders it

# An axis that a mesh does not have splits nothing.
LAYOUTS: Mapping[str, Mapping[str, MeshAxes]] = MappingProxyType(
    {
        "zero1_ep": {**_REPLICATED, "expert": "expert"},
        "fsdp_ep": {
            **_REPLICATED,
            "expert": "expert",
            "embed": TOKEN_AXES,
            # Heads that come up from a latent: their weights have no width of the model to split.
            "up_heads": TOKEN_AXES,
            "expert_embed": ("data", CONTEXT_AXIS),
        },
    }
)


def _as_tuple(axes: MeshAxes) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def logical_to_spec(axes: tuple[str | None, ...], rules: Mapping[str, MeshAxes]) -> PartitionSpec:
    """Mesh axes of a weight from its logical axes.

    Raises:
      ValueError: two dims of one weight would use the same mesh axis, or an unknown logical axis.
    """
    used: dict[str, str | None] = {}
    entries: list[MeshAxes] = []
    for name in axes:
        if name is not None and name not in rules:
            raise ValueError(f"logical axis {name!r} is not in the layout: {', '.join(rules)}")
        mesh_axes = _as_tuple(rules[name] if name is not None else None)
        for mesh_axis in mesh_axes:
            if mesh_axis in used:
                raise ValueError(
                    f"logical axes {used[mesh_axis]!r} and {name!r} of {axes} both map to mesh "
                    f"axis {mesh_axis!r}"
                )
            used[mesh_axis] = name
        entries.append(mesh_axes[0] if len(mesh_axes) == 1 else mesh_axes or None)
    return PartitionSpec(*entries)


def _fitting(mesh: Mesh, dim: int, axes: tuple[str, ...]) -> tuple[str, ...]:
    """The longest prefix of those axes that the mesh has whose product divides a dim."""
    axes = tuple(axis for axis in axes if axis in mesh.shape)
    while axes and dim % int(np.prod([mesh.shape[a] for a in axes])):
        axes = axes[:-1]
    return axes


def weight_sharding(
    mesh: Mesh, shape: tuple[int, ...], axes: tuple[str | None, ...], layout: str
) -> NamedSharding:
    """Sharding of a weight; a stacked one has leading dims that `axes` does not name.

    A dim that its mesh axes do not divide is split over fewer of them, down to replicated. The
    first width of a layer that is free and divisible is split over `pipe`: a rank's stages get
    their layers whole at the start of a step (`pipeline/stages.py`).
    """
    num_leading = len(shape) - len(axes)
    axes = ("layer",) * num_leading + tuple(axes)
    spec = logical_to_spec(axes, LAYOUTS[layout])
    entries = [
        _fitting(mesh, dim, _as_tuple(entry)) for dim, entry in zip(shape, spec, strict=True)
    ]
    pipe = mesh.shape["pipe"]
    for i in range(num_leading, len(shape)) if pipe > 1 else ():
        if not entries[i] and shape[i] % pipe == 0:
            entries[i] = ("pipe",)
            break
    return NamedSharding(mesh, PartitionSpec(*(entry or None for entry in entries)))


def optimizer_sharding(weight: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """ZeRO-1 (spec §8): optimizer state also split over the token axes its weight leaves free.

    As many of them as can go to the first unsharded dim that they divide; with none, the state
    stays as the weight is.
    """
    mesh = weight.mesh
    entries = [_as_tuple(e) for e in weight.spec] + [()] * (len(shape) - len(weight.spec))
    used = {axis for entry in entries for axis in entry}
    free = [a for a in TOKEN_AXES if a not in used and mesh.shape.get(a, 1) > 1]
    for axes in chain(*(combinations(free, count) for count in range(len(free), 0, -1))):
        size = int(np.prod([mesh.shape[a] for a in axes]))
        for i, (dim, entry) in enumerate(zip(shape, entries, strict=True)):
            if not entry and dim % size == 0:
                entries[i] = axes
                return NamedSharding(mesh, PartitionSpec(*(e or None for e in entries)))
    return weight


@lru_cache(maxsize=256)
def boxes(sharding: Sharding, shape: tuple[int, ...]) -> Mapping[Box, tuple[jax.Device, ...]]:
    """The distinct shards of an array, and the devices that hold each: alike in every process."""
    found: dict[Box, tuple[jax.Device, ...]] = {}
    for device, index in sharding.devices_indices_map(shape).items():
        box = tuple(s.indices(dim)[:2] for s, dim in zip(index, shape, strict=True))
        found[box] = (*found.get(box, ()), device)
    return found
