"""`CHIP:SHAPE` without a compiler: which chip, how many devices, and the meshes that use them."""

import dataclasses
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dsv3_jax.config import Config
from dsv3_jax.errors import UserError
from dsv3_jax.parallel.mesh import axis_sizes
from dsv3_jax.plan.chips import Chip, get_chip
from dsv3_jax.validate import validate

_DEVICES_PER_CHIP = {"tpu7x": 2}  # as JAX counts them


@dataclass(frozen=True)
class Topology:
    """Devices of one kind."""

    name: str  # 'h200:256x1x8'
    chip: Chip
    num_devices: int


def parse_topology(name: str) -> Topology:
    """Reads a topology.

    Args:
      name: of GPUs slices x hosts of a slice x GPUs of a host, of TPUs the chips along each side of
        the torus, e.g. 'h200:256x1x8' or 'v5p:8x8x16'.

    Raises:
      UserError: no such chip, or no such shape of it.
    """
    chip_name, _, shape = name.partition(":")
    try:
        chip = get_chip(chip_name)
    except UserError as error:
        raise UserError(f"--topology={name}: {error}") from None
    sides = chip.torus_dims or 3
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) or shape.count("x") != sides - 1:
        meaning = "chips along each side" if chip.torus_dims else "slices x hosts x GPUs"
        example = {2: "16x16", 3: "8x8x16"}[sides] if chip.torus_dims else "256x1x8"
        raise UserError(
            f"--topology={name}: {shape!r} is no shape of {chip.name}; give {sides} numbers, "
            f"{meaning}, e.g. {chip.name}:{example}"
        )
    chips = math.prod(map(int, shape.split("x")))
    return Topology(name, chip, chips * _DEVICES_PER_CHIP.get(chip_name, 1))


def check_mesh(config: Config, topology: Topology) -> None:
    """Checks that the mesh uses every device.

    Raises:
      UserError: it does not; the error names the nearest meshes that do.
    """
    parallel = config.parallel
    if parallel.num_devices == topology.num_devices:
        return
    mesh = parallel.pipe, parallel.data, parallel.expert

    def distance(other: tuple[int, int, int]) -> float:
        return sum(abs(math.log(a / b)) for a, b in zip(mesh, other, strict=True))

    near = sorted(meshes(config, topology.num_devices), key=distance)
    configs = (with_mesh(config, *other) for other in near)
    found = [changes(config, c) for c, _ in zip(filter(None, configs), range(3), strict=False)]
    hints = "; or ".join(" ".join(f"--set {change}" for change in sets) for sets in found)
    axes = " x ".join(f"{name} {size}" for name, size in axis_sizes(parallel).items())
    raise UserError(
        f"--topology={topology.name} has {topology.num_devices:,} devices but {axes} uses "
        f"{parallel.num_devices:,}; "
        + (
            f"the nearest meshes that do: {hints}"
            if found
            else "no mesh of this model uses them all"
        )
    )


def meshes(config: Config, num_devices: int) -> Iterator[tuple[int, int, int]]:
    """(pipe, data, expert) that multiply to the devices, with equal experts on all.

    `parallel.context` stays as it is, and takes its share of the devices.
    """
    num_devices, rest = divmod(num_devices, config.parallel.context)
    if rest:
        return
    for pipe in _divisors(num_devices):
        if pipe > config.model.num_moe_layers + 2:
            return
        for expert in _divisors(math.gcd(num_devices // pipe, config.model.num_experts)):
            yield pipe, num_devices // pipe // expert, expert


def with_mesh(
    config: Config, pipe: int, data: int, expert: int, *, sequences: int | None = None, **parallel
) -> Config | None:
    """The config on another mesh, its other keys adapted where the mesh needs it.

    Args:
      sequences: of a micro-batch on a device; None: as many as before.
      parallel: further fields of `config.parallel`.

    Returns:
      A valid config, or None where there is none: micro-batches are too few or do not divide the
      batch, or stages would be empty.
    """
    old, data_config = config.parallel, config.data
    if sequences is None:
        sequences = max(1, config.microbatch_sequences // (old.data * old.expert))
    microbatch = sequences * data * expert
    new = dataclasses.replace(old, pipe=pipe, data=data, expert=expert, **parallel)
    if pipe == 1:
        new = dataclasses.replace(new, max_deferred=None)
    if expert == 1:
        new = dataclasses.replace(new, buffer_factor=None)
    # A batch ramp may start with too few micro-batches for so many ranks: it starts higher then.
    starts = [data_config.sequences_per_step_start]
    if starts[0] is not None:
        starts.append(2 * pipe * microbatch)
    for start in starts:
        batch = dataclasses.replace(
            data_config, microbatch_sequences=microbatch, sequences_per_step_start=start
        )
        candidate = dataclasses.replace(config, parallel=new, data=batch)
        try:
            validate(candidate)
        except UserError:
            continue
        return candidate
    return None


def changes(before: Config, after: Config) -> list[str]:
    """What `--set` makes one of the other, of keys in `parallel`, `data` and `precision`."""

    def text(value: Any) -> str:
        return "none" if value is None else str(value)

    return [
        f"{group}.{item.name}={text(getattr(getattr(after, group), item.name))}"
        for group in ("parallel", "data", "precision")
        for item in dataclasses.fields(getattr(after, group))
        if getattr(getattr(before, group), item.name) != getattr(getattr(after, group), item.name)
    ]


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
