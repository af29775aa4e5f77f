"""Time to gather weights, to reduce their gradients and to update them."""

from dsv3_jax.config import Config
from dsv3_jax.plan.buffers import ITEMSIZE
from dsv3_jax.plan.chips import Chip
from dsv3_jax.plan.parameters import count_parameters


def gather_seconds(config: Config, chip: Chip) -> float:
    """`fsdp_ep`: every weight a device computes with, once a pass; else they are there already.

    The backward pass gathers them again and reduces and scatters as many gradients.
    """
    parallel, counts = config.parallel, count_parameters(config.model)
    if parallel.layout != "fsdp_ep" or parallel.pipe > 1:
        return 0.0
    replicas = parallel.data * parallel.context
    everyone = replicas * parallel.expert
    experts = (config.model.num_moe_layers + config.model.mtp_depth) * counts.routed_experts
    others = counts.total + counts.mtp_unique - experts
    numbers = experts / parallel.expert * (1 - 1 / replicas) + others * (1 - 1 / everyone)
    sent = ITEMSIZE[config.precision.activations] * numbers
    return sent / _ring_bandwidth(chip, everyone)


def _ring_bandwidth(chip: Chip, num_devices: int) -> float:
    """Of an all-gather or reduce-scatter over all devices: nodes use their adapters together."""
    if num_devices <= chip.devices_per_node:
        return chip.in_node_bandwidth
    return min(chip.in_node_bandwidth, chip.devices_per_node * chip.between_node_bandwidth)


def optimizer_seconds(config: Config, chip: Chip) -> float:
    """Gradients reduced and scattered, weights updated and gathered (ZeRO-1, spec §8).

    Experts have few replicas, in different nodes; the other weights have one on every device of
    their stage, and DualPipe keeps each stage twice (spec §6.2). Weights travel in BF16.
    """
    parallel, model, counts = config.parallel, config.model, count_parameters(config.model)
    copies = 2 if parallel.pipe > 1 and parallel.schedule == "dualpipe" else 1
    total = counts.total + counts.mtp_unique
    routed = (model.num_moe_layers + model.mtp_depth) * counts.routed_experts
    experts = routed / parallel.expert * copies / parallel.pipe  # of a device
    others = (total - routed) * copies / parallel.pipe
    moved = 4 + 2  # float32 gradients, BF16 weights
    seconds = 0.0
    if parallel.layout == "zero1_ep" or parallel.pipe > 1:
        replicas = parallel.data * parallel.context * copies
        everyone = replicas * parallel.expert
        is_one_node = everyone <= chip.devices_per_node
        slow = chip.in_node_bandwidth if is_one_node else chip.between_node_bandwidth
        seconds += moved * experts * (1 - 1 / replicas) / slow
        seconds += moved * others * (1 - 1 / everyone) / _ring_bandwidth(chip, everyone)
    devices = parallel.num_devices
    moments = ITEMSIZE[config.precision.moments]
    touched = 4 + 2 * 4 + 2 * 2 * moments + 2  # gradient, master and moments in and out, weight
    return seconds + touched * total / devices / chip.hbm_bandwidth
