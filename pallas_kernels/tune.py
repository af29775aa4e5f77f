"""Finds the fastest `Config` of the dense product for the named shapes, on a Hopper GPU.

    python -m pallas_kernels.tune [--shapes=v3,square,decode,tiles] [--output=FILE]

Writes what `hopper_configs` reads from `tuned/hopper.json`: entries that are there already and
were not measured now stay. A candidate that does not compile or whose result is wrong is left out.
"""

import json
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import app, flags

from pallas_kernels import specs
from pallas_kernels.bench import MAX_ERROR, SETS, dequantised_product, relative_error
from pallas_kernels.fp8_matmul.gpu import fp8_matmul_hopper
from pallas_kernels.hopper_gemm import Config
from pallas_kernels.timing import microseconds

_GROUPS = {
    "v3": specs.V3,
    "square": (specs.SQUARE,),
    "decode": specs.DECODE[-12:],
    "tiles": (*specs.V3_TILES, *specs.WEIGHT_GRADIENTS),
}
_SHAPES = flags.DEFINE_list("shapes", list(_GROUPS), "groups of shapes")
_OUTPUT = flags.DEFINE_string(
    "output", str(Path(__file__).parent / "tuned" / "hopper.json"), "file that is updated"
)
_THREADS = 12  # that compile


def candidates(spec: specs.Dense) -> Iterable[Config]:
    if spec.scales == "tiles":
        yield from (Config(overlap=True, stages=4, snake=snake) for snake in (4, 8, 16))
        yield Config(columns=96, warpgroups=3, stages=3)
    elif spec.M <= 128:
        warpgroups = 1 if spec.M <= 64 else 2
        for columns in (16, 32, 64, 128):
            stages = 8 if columns < 128 else 5
            yield Config(columns=columns, warpgroups=warpgroups, stages=stages)
            for unroll in (2, 4):
                yield Config(
                    columns=columns,
                    warpgroups=warpgroups,
                    stages=stages,
                    overlap=True,
                    unroll=unroll,
                )
    else:
        for snake in ({}, {"snake": 16}, {"snake_columns": True}):
            yield Config(columns=192, **snake)
            yield Config(stages=5, **snake)
            yield Config(warpgroups=3, **snake)
            yield Config(overlap=True, unroll=4, **snake)


def fastest(spec: specs.Dense) -> tuple[Config, float]:
    """The best candidate and its microseconds."""
    by_tile = spec.scales == "tiles"
    operands = [spec.operands(seed) for seed in range(SETS)]
    given = [(q, s.T.copy(), w, t.T.copy() if by_tile else t) for q, s, w, t in operands]
    expected = dequantised_product(*operands[0])

    def run(config, q_MK, s_TM, q_NK, s):
        out_dtype = jnp.float32 if by_tile else jnp.bfloat16
        s = s.T if by_tile else s
        return fp8_matmul_hopper(q_MK, s_TM.T, q_NK, s, out_dtype, config=config)

    def compiled(config):
        try:
            return config, jax.jit(partial(run, config)).lower(*given[0]).compile()
        except (ValueError, NotImplementedError) as refused:  # e.g. too much shared memory
            print(f"  {config}: {str(refused)[:90]}")
            return config, None

    with ThreadPoolExecutor(_THREADS) as pool:
        programs = list(pool.map(compiled, candidates(spec)))
    times = {
        config: microseconds(program, given)
        for config, program in programs
        if program and relative_error(program(*given[0]), expected) <= MAX_ERROR
    }
    best = min(times, key=times.get)
    return best, times[best]


def main(argv: list[str]) -> None:
    unknown = [name for name in (*argv[1:], *_SHAPES.value) if name not in _GROUPS]
    if unknown or jax.default_backend() != "gpu":
        problem = f"unknown shapes {unknown[0]!r}" if unknown else "needs an NVIDIA GPU"
        print(f"tune: {problem}; allowed: {', '.join(_GROUPS)}", file=sys.stderr)
        sys.exit(2)
    output = Path(_OUTPUT.value)
    table = json.loads(output.read_text()) if output.exists() else {}
    defaults = {field.name: field.default for field in fields(Config)}
    for name in _SHAPES.value:
        for spec in _GROUPS[name]:
            config, time = fastest(spec)
            changed = {k: v for k, v in asdict(config).items() if v != defaults[k]}
            operation = "fp8_matmul by tile" if spec.scales == "tiles" else "fp8_matmul"
            table.setdefault(operation, {})[f"{spec.M}x{spec.N}x{spec.K}"] = changed
            rate = spec.flops / time / 1e6
            print(f"{spec.name}: {time:.1f} us, {rate:.0f} TFLOP/s, {changed}", flush=True)
            output.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    app.run(main)
