"""Where copies of experts live, from their load: the published balancer (spec §11.1), in numpy.

Experts under load get more than one of the R physical slots, and slots are packed onto devices so
that these carry about the same load. Letters: L layers, E experts, R slots, C copies of an expert,
N items, S bins or nodes.
"""

from typing import NamedTuple

import numpy as np

from dsv3_jax.errors import UserError


class Placement(NamedTuple):
    """Which expert each slot holds, and the reverse. Device d of U holds slots d R/U .. -1.

    C is R - E + 1, the most copies there can be: shapes do not depend on the load.
    """

    slot_to_expert_LR: np.ndarray  # int32
    replicas_LEC: np.ndarray  # int32 slots of each expert, -1 after the last
    counts_LE: np.ndarray  # int32 copies of each expert, at least 1


def place(
    load_LE: np.ndarray, *, num_slots: int, num_groups: int, num_nodes: int, num_devices: int
) -> Placement:
    """Balances the load of every layer by itself.

    Where `num_nodes` divides `num_groups` a group of experts stays in one node (for prefill, whose
    tokens then reach few nodes); else slots go anywhere (for decode; one group and one node do it).

    Args:
      load_LE: tokens routed to each expert, of any real dtype; used in float32.
      num_slots: R.
      num_groups: of the router.
      num_nodes, num_devices: of the whole `expert` axis.

    Raises:
      UserError: slots, devices, nodes or groups do not divide as they must.
    """
    num_layers, num_experts = load_LE.shape
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    if num_slots < num_experts or num_slots % num_devices:
        raise UserError(
            f"{num_slots} slots for {num_experts} experts on {num_devices} devices; there must be "
            f"a slot for each expert and as many on every device, e.g. "
            f"{-(-num_experts // num_devices) * num_devices}"
        )
    if num_devices % num_nodes or num_experts % num_groups:
        raise UserError(
            f"{num_devices} devices in {num_nodes} nodes and {num_experts} experts in {num_groups} "
            "groups; nodes must divide devices, and groups must divide experts"
        )
    sizes = num_slots, num_groups, num_nodes, num_devices
    layers = [_place_layer(load_E, *sizes) for load_E in np.asarray(load_LE, np.float32)]
    slot_to_expert_LR = np.stack(layers).astype(np.int32)
    replicas_LEC = np.full((num_layers, num_experts, num_slots - num_experts + 1), -1, np.int32)
    counts_LE = np.zeros((num_layers, num_experts), np.int32)
    for layer, (slot_to_expert_R, copy_R) in enumerate(slot_to_expert_LR.swapaxes(1, 2)):
        replicas_LEC[layer, slot_to_expert_R, copy_R] = np.arange(num_slots)
        np.add.at(counts_LE[layer], slot_to_expert_R, 1)
    return Placement(slot_to_expert_LR[..., 0], replicas_LEC, counts_LE)


def _place_layer(
    load_E: np.ndarray, num_slots: int, num_groups: int, num_nodes: int, num_devices: int
) -> np.ndarray:
    """[R, 2]: the expert in each slot, and which of its copies, in the order they were made."""
    group_size = len(load_E) // num_groups
    groups_SN = _pack(load_E.reshape(num_groups, group_size).sum(-1), num_nodes)
    slots = []
    for groups in groups_SN:
        experts = (groups[:, None] * group_size + np.arange(group_size)).reshape(-1)
        expert_R, copy_R, counts = _replicate(load_E[experts], num_slots // num_nodes)
        load_R = (load_E[experts] / counts.astype(np.float32))[expert_R]
        order = _pack(load_R, num_devices // num_nodes).reshape(-1)
        slots.append(np.stack([experts[expert_R], copy_R], axis=-1)[order])
    return np.concatenate(slots)


def _pack(load_N: np.ndarray, num_bins: int) -> np.ndarray:
    """int [S, N/S]: the items of each bin, in the order they came.

    The heaviest goes first, into the lightest bin with room, the first of equals.
    """
    room = len(load_N) // num_bins
    if room == 1:
        return np.arange(num_bins)[:, None]
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    weights = np.zeros(num_bins, np.float32)
    for item in np.argsort(-load_N, kind="stable"):
        full = np.array([len(items) == room for items in bins])
        lightest = int(np.argmin(np.where(full, np.inf, weights)))
        bins[lightest].append(int(item))
        weights[lightest] += load_N[item]
    return np.array(bins)


def _replicate(load_E: np.ndarray, num_slots: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gives each spare slot to the expert with the most load a copy, the first of equals.

    Returns:
      The expert of each slot, which of its copies that is, and the copies of each expert.
    """
    experts, copies = list(range(len(load_E))), [0] * len(load_E)
    counts_E = np.ones(len(load_E), np.int32)
    while len(experts) < num_slots:
        heaviest = int(np.argmax(load_E / counts_E.astype(np.float32)))
        experts.append(heaviest)
        copies.append(int(counts_E[heaviest]))
        counts_E[heaviest] += 1
    return np.array(experts), np.array(copies), counts_E


def slot_load(load_LE: np.ndarray, placement: Placement) -> np.ndarray:
    """float64 [L, R]: what each slot carries if the copies of an expert share its load evenly."""
    share_LE = np.asarray(load_LE, np.float64) / placement.counts_LE
    return np.take_along_axis(share_LE, placement.slot_to_expert_LR, axis=-1)


def device_load(load_LE: np.ndarray, placement: Placement, num_devices: int) -> np.ndarray:
    """float64 [L, U]: what each device of the `expert` axis carries, see `slot_load`."""
    load_LR = slot_load(load_LE, placement)
    return load_LR.reshape(len(load_LR), num_devices, -1).sum(-1)


def imbalance(load_LU: np.ndarray) -> np.ndarray:
    """[L]: largest over mean load; 1 is perfect, and what an idle layer has."""
    mean_L = load_LU.mean(-1)
    return np.where(mean_L > 0, load_LU.max(-1) / np.where(mean_L > 0, mean_L, 1.0), 1.0)
