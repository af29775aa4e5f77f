"""The torch side of `bench`: cuBLASLt's block-scaled FP8 products, timed by torch's profiler.

    python -m pallas_kernels.bench_peer RESULT.json OPERATION...

Runs in a process without jax's GPU back end, so that the two never share a GPU.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"  # the shapes are read from a module that imports jax

import torch
from torch.nn.functional import ScalingType, scaled_mm
from torch.profiler import ProfilerActivity, profile

from pallas_kernels import specs

SETS, CALLS = 3, 20
_SHAPES = {
    "dense": (*specs.V3, specs.SQUARE),
    "tiles": (*specs.V3_TILES, *specs.WEIGHT_GRADIENTS),
    "decode": specs.DECODE[-12:],
}


def _codes(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, device="cuda").to(torch.float8_e4m3fn)


def product(spec: specs.Dense) -> Callable[[], torch.Tensor]:
    """One call on operands of its own, laid out as cuBLASLt wants them: scales along rows."""
    tiles = -(-spec.K // 128)
    a, b = _codes(spec.M, spec.K), _codes(spec.N, spec.K).t()
    scale_a = torch.rand(tiles, spec.M, device="cuda").t()
    if spec.scales == "tiles":
        scale_b, recipe, out_dtype = (
            torch.rand(tiles, spec.N, device="cuda").t(),
            ScalingType.BlockWise1x128,
            torch.float32,
        )
    else:
        scale_b = torch.rand(-(-spec.N // 128), tiles + -tiles % 4, device="cuda").t()
        recipe, out_dtype = ScalingType.BlockWise128x128, torch.bfloat16
    return lambda: scaled_mm(
        a, b, scale_a, ScalingType.BlockWise1x128, scale_b, recipe, output_dtype=out_dtype
    )


def microseconds(calls: list[Callable[[], torch.Tensor]]) -> float:
    """Mean time of the kernels of one call."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for i in range(CALLS):
            calls[i % len(calls)]()
        torch.cuda.synchronize()
    return sum(event.device_time for event in profiled.events()) / CALLS


def main() -> None:
    result, *operations = sys.argv[1:]
    times = {}
    for operation in operations:
        for spec in _SHAPES.get(operation, ()):
            calls = [product(spec) for _ in range(SETS)]
            times[f"{operation} {spec.name}"] = microseconds(calls)
    Path(result).write_text(json.dumps(times))


if __name__ == "__main__":
    main()
