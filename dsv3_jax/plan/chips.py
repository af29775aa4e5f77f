"""Chips as data: peak arithmetic, memory and links of one device, with their sources.

A node is what the fast links join: NVLink's domain of GPUs, the pod of TPUs. Peaks are dense, as
published. Bandwidths between devices are one way and achievable, not nominal: spec §7 gives 160 of
200 GB/s for an H800's NVLink and 40 of 50 for its InfiniBand; other GPUs take the same share.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from dsv3_jax.errors import UserError, did_you_mean

_ACHIEVED = 0.8  # share of a link's nominal rate, both of spec §7's links


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One device as JAX counts them (a tpu7x chip is two). FLOP/s, bytes and bytes a second."""

    name: str
    bf16_flops: float
    fp8_flops: float  # the BF16 rate where there are no FP8 units
    hbm_bytes: int
    hbm_bandwidth: float
    in_node_bandwidth: float  # that a device sends, all its links together
    between_node_bandwidth: float
    devices_per_node: int
    torus_dims: int = 0  # of the links in the node; 0: a switch

    @property
    def link_bandwidth(self) -> float:
        """One way along one link of the torus."""
        return self.in_node_bandwidth / (2 * self.torus_dims)


def _hopper(name: str, *, hbm_bytes: int, hbm_bandwidth: float, nvlink: float) -> Chip:
    """Peaks from NVIDIA's H100 SXM data sheet, halved where it counts sparse products."""
    return Chip(
        name=name,
        bf16_flops=989.4e12,
        fp8_flops=1978.9e12,
        hbm_bytes=hbm_bytes,
        hbm_bandwidth=hbm_bandwidth,
        in_node_bandwidth=_ACHIEVED * nvlink,
        between_node_bandwidth=_ACHIEVED * 50e9,  # a 400 Gb/s adapter a GPU
        devices_per_node=8,
    )


_CHIPS = (
    # NVLink one way: H100 and H200 data sheets, half of 900 GB/s; H800: spec §7, half of 400 GB/s.
    _hopper("h100", hbm_bytes=80_000_000_000, hbm_bandwidth=3.35e12, nvlink=450e9),
    _hopper("h800", hbm_bytes=80_000_000_000, hbm_bandwidth=3.35e12, nvlink=200e9),
    _hopper("h200", hbm_bytes=141_000_000_000, hbm_bandwidth=4.8e12, nvlink=450e9),
    # NVIDIA's HGX B200 data sheet a GPU: 180 GB; NVLink 5 is 1.8 TB/s both ways.
    Chip(
        name="b200",
        bf16_flops=2250e12,
        fp8_flops=4500e12,
        hbm_bytes=180_000_000_000,
        hbm_bandwidth=7.7e12,
        in_node_bandwidth=_ACHIEVED * 900e9,
        between_node_bandwidth=_ACHIEVED * 50e9,
        devices_per_node=8,
    ),
    # NVIDIA's GB200 NVL72 data sheet, a 72nd of the rack, whose NVLink domain is all of it.
    Chip(
        name="gb200",
        bf16_flops=2500e12,
        fp8_flops=5000e12,
        hbm_bytes=186_000_000_000,
        hbm_bandwidth=8e12,
        in_node_bandwidth=_ACHIEVED * 900e9,
        between_node_bandwidth=_ACHIEVED * 50e9,
        devices_per_node=72,
    ),
    # Cloud TPU documentation, "System architecture" of each. Its interconnect figure counts both
    # directions: half of it, of which nine tenths are payload (our assumption; none is published).
    Chip(
        name="v5e",
        bf16_flops=197e12,
        fp8_flops=197e12,
        hbm_bytes=16 * 2**30,
        hbm_bandwidth=819e9,
        in_node_bandwidth=0.9 * 200e9,  # 400 GB/s both ways, 4 ports
        between_node_bandwidth=3.125e9,  # 6.4 Tb/s a pod of 256
        devices_per_node=256,
        torus_dims=2,
    ),
    Chip(
        name="v5p",
        bf16_flops=459e12,
        fp8_flops=459e12,  # the page gives one rate for both
        hbm_bytes=95 * 2**30,
        hbm_bandwidth=2765e9,
        in_node_bandwidth=0.9 * 600e9,  # 1,200 GB/s both ways, 6 ports
        between_node_bandwidth=6.25e9,  # 50 Gb/s a chip
        devices_per_node=8960,
        torus_dims=3,
    ),
    Chip(
        name="v6e",
        bf16_flops=918e12,
        fp8_flops=918e12,
        hbm_bytes=32 * 2**30,
        hbm_bandwidth=1638e9,
        in_node_bandwidth=0.9 * 400e9,  # 800 GB/s both ways, 4 ports
        between_node_bandwidth=12.5e9,  # 25.6 Tb/s a pod of 256
        devices_per_node=256,
        torus_dims=2,
    ),
    # Half of a chip: 2,307 and 4,614 TFLOP/s, 192 GiB, 7,380 GB/s, 1,200 GB/s both ways, 9,216 a
    # pod. The network between pods is taken as a v5p's chip's.
    Chip(
        name="tpu7x",
        bf16_flops=1153.5e12,
        fp8_flops=2307e12,
        hbm_bytes=96 * 2**30,
        hbm_bandwidth=3690e9,
        in_node_bandwidth=0.9 * 300e9,
        between_node_bandwidth=3.125e9,
        devices_per_node=18432,
        torus_dims=3,
    ),
)
CHIPS: Mapping[str, Chip] = MappingProxyType({chip.name: chip for chip in _CHIPS})


def get_chip(name: str) -> Chip:
    """The chip of a name.

    Raises:
      UserError: no such chip.
    """
    if name not in CHIPS:
        raise UserError(
            f"chip {name!r} is unknown;{did_you_mean(name, CHIPS)} allowed: {', '.join(CHIPS)}"
        )
    return CHIPS[name]
