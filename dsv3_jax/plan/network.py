"""How long dispatch and combine take, from the routing's combinatorics and the links (spec §7).

Routing is taken as uniform: every set of kept groups is as likely as any other, then every set of
K experts in them. Real routers keep the groups with the best experts, so a token reaches somewhat
more nodes than that (never more than the kept groups).
"""

import functools
import itertools
import math
from collections import Counter
from dataclasses import dataclass

from dsv3_jax.config import ModelConfig
from dsv3_jax.plan.chips import Chip


@dataclass(frozen=True, kw_only=True)
class RowsSent:
    """Rows that one token makes a device send, on average."""

    between: float  # to other nodes
    within: float  # over the links of a node, those to the own device included


def expected_positions(model: ModelConfig, num_positions: int) -> float:
    """Positions that hold one of a token's experts, on average.

    Args:
      num_positions: nodes or devices that the routed experts are split over, in order; it divides
        their number.

    Returns:
      E.g. 3.63 of 8 nodes for V3, which allows 4.
    """
    return _expected_positions(
        model.num_experts,
        model.experts_per_token,
        model.num_groups,
        model.num_groups_kept,
        num_positions,
    )


@functools.cache
def _expected_positions(
    num_experts: int, top_k: int, num_groups: int, kept: int, num_positions: int
) -> float:
    per_position, per_group = num_experts // num_positions, num_experts // num_groups
    layouts: Counter[tuple[int, ...]] = Counter()  # experts of each group on a position
    for first in range(0, num_experts, per_position):
        groups = Counter(e // per_group for e in range(first, first + per_position))
        layouts[tuple(sorted(groups.values()))] += 1
    candidates = kept * per_group
    expected = 0.0
    for held, count in layouts.items():
        for is_kept in itertools.product((False, True), repeat=len(held)):
            if sum(is_kept) > kept:
                continue
            ways = math.comb(num_groups - len(held), kept - sum(is_kept))
            here = sum(itertools.compress(held, is_kept))
            reached = 1 - math.comb(candidates - here, top_k) / math.comb(candidates, top_k)
            expected += count * ways / math.comb(num_groups, kept) * reached
    return expected


def node_shape(chip: Chip, num_devices: int) -> tuple[int, int]:
    """(nodes, devices of each) that an expert-parallel group spans."""
    if num_devices <= chip.devices_per_node:
        return 1, num_devices
    per_node = math.gcd(num_devices, chip.devices_per_node)
    return num_devices // per_node, per_node


def rows_two_hop(model: ModelConfig, num_nodes: int, per_node: int) -> RowsSent:
    """One copy a node, to the device with the sender's place, then one a device there (spec §7)."""
    nodes = expected_positions(model, num_nodes)
    devices = expected_positions(model, num_nodes * per_node)
    return RowsSent(between=nodes * (1 - 1 / num_nodes), within=devices)


def rows_one_hop(model: ModelConfig, num_nodes: int, per_node: int) -> RowsSent:
    """One copy for each device straight from the source."""
    devices = expected_positions(model, num_nodes * per_node)
    return RowsSent(between=devices * (1 - 1 / num_nodes), within=devices / num_nodes)


def rows_padded(
    model: ModelConfig, num_nodes: int, per_node: int, buffer_factor: float | None, two_hop: bool
) -> RowsSent:
    """As above, where whole buffers travel (`parallel.dispatch` 'padded' and 'hierarchical').

    Args:
      buffer_factor: `parallel.buffer_factor`; None: a buffer holds every token of its sender.
    """

    def slots(positions: int) -> float:
        if buffer_factor is None:
            return positions
        return min(positions, buffer_factor * min(model.experts_per_token, positions))

    devices = slots(num_nodes * per_node)
    crossing = slots(num_nodes) if two_hop else devices
    return RowsSent(
        between=crossing * (1 - 1 / num_nodes), within=devices if two_hop else devices / num_nodes
    )


def exchange_seconds(
    chip: Chip, num_devices: int, rows: RowsSent, num_tokens: int, row_bytes: float
) -> float:
    """Time of one dispatch or combine, every device sending at once; hops run as a stream.

    On a torus the exchange is even between all devices, and the busiest links are those across the
    middle of its longest side: s devices in a ring, each sending a row to all, put s / 8 rows on
    every link and direction.

    Args:
      num_tokens: of each device.
      row_bytes: of one row on the wire.
    """
    sent = num_tokens * row_bytes
    if chip.torus_dims:
        side = _longest_side(num_devices, chip.torus_dims)
        return sent * (rows.between + rows.within) * side / (8 * chip.link_bandwidth)
    return sent * max(
        rows.between / chip.between_node_bandwidth, rows.within / chip.in_node_bandwidth
    )


def row_bytes(width: int, *, fp8: bool, itemsize: int = 2) -> float:
    """A row on the wire: E4M3 with a float32 scale for 128 numbers, or `itemsize` a number."""
    return width * (1 + 4 / 128) if fp8 else width * itemsize


def _longest_side(num_devices: int, dims: int) -> int:
    """Of the most cubic torus with so many devices, e.g. 4 of 64 in three dimensions."""
    if dims == 1:
        return num_devices
    shortest = next(
        s for s in range(int(num_devices ** (1 / dims) + 1e-9), 0, -1) if num_devices % s == 0
    )
    return max(shortest, _longest_side(num_devices // shortest, dims - 1))
