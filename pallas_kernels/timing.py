"""Time that kernels spend on a GPU, as its own counters tell: no launch gaps, no host clock."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import jax


def kernel_times(
    function: Callable[..., Any], operand_sets: Sequence[tuple], calls: int = 20
) -> dict[str, float]:
    """Microseconds a call that each kernel takes, medians over the calls, by the kernel's name.

    Args:
      function: compiled; called with the operand sets in turn, so that L2 holds none of them for
        long. Every call launches the same kernels.
      calls: of which the times are taken, after one warm-up with each set.

    Raises:
      RuntimeError: there is no NVIDIA GPU, or its counters cannot be read.
    """
    try:
        from jax._src.lib import mosaic_gpu

        counters = mosaic_gpu._mosaic_gpu_ext
    except ImportError as missing:
        raise RuntimeError(
            "device times are read from an NVIDIA GPU; jax has no plugin"
        ) from missing
    for operands in operand_sets:
        jax.block_until_ready(function(*operands))
    counters._cupti_init()
    for call in range(calls):
        result = function(*operand_sets[call % len(operand_sets)])
    jax.block_until_ready(result)
    times = counters._cupti_get_timings(True)  # (name, milliseconds), in the order of launches
    if not times or len(times) % calls:
        raise RuntimeError(f"{len(times)} kernels were seen in {calls} calls")
    launches = len(times) // calls
    medians: dict[str, float] = defaultdict(float)
    for i in range(launches):
        of_launch = times[i::launches]
        medians[of_launch[0][0]] += 1e3 * statistics.median(time for _, time in of_launch)
    return dict(medians)


def microseconds(
    function: Callable[..., Any], operand_sets: Sequence[tuple], calls: int = 20
) -> float:
    """All kernels of a call together; see `kernel_times`."""
    return sum(kernel_times(function, operand_sets, calls).values())
