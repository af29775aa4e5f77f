"""Speed of the FP8 kernels on a Hopper GPU, as a table, beside cuBLASLt's in the same run.

    python -m pallas_kernels.bench [--operations=dense,decode] [--nopeer] [--json=FILE]

Every time is the sum of what a call's kernels take by the GPU's own counters, a median over calls
that rotate among input sets; the peer's (torch's `scaled_mm`, cuBLASLt with the same block scales,
in a process of its own) is taken likewise. Every result is compared with the float32 product of the
dequantised operands. The last lines give the ceilings: a bfloat16 product and a copy.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import app, flags

from pallas_kernels import (
    fp8_matmul,
    grouped_fp8_matmul,
    grouped_fp8_weight_gradient,
    masked_fp8_matmul,
    quantize,
    specs,
)
from pallas_kernels.quantize.reference import BLOCK
from pallas_kernels.timing import microseconds

OPERATIONS = ("dense", "tiles", "decode", "grouped", "gradients", "masked", "quantize")
_OPERATIONS = flags.DEFINE_list("operations", list(OPERATIONS), "which, of all")
_PEER = flags.DEFINE_bool("peer", True, "measure torch too, where it is installed")
_JSON = flags.DEFINE_string("json", None, "file that receives the rows")

SETS = 3  # input sets: none stays in L2
MAX_ERROR = 2e-3  # of a bfloat16 result: its rounding is 1.7e-3


class Row(NamedTuple):
    """One line of the table."""

    operation: str
    shape: str
    microseconds: float
    flops: float  # 0: bytes count
    bytes: float
    error: float | None  # ||y - y_ref|| / ||y_ref||


@jax.jit
def dequantised_product(
    q_MK: jax.Array, s_MT: jax.Array, q_NK: jax.Array, s_BT: jax.Array
) -> jax.Array:
    """y_MN, in float32 from operands in float32; see `fp8_matmul` for the scales."""

    def wide(q, s):
        if len(s) != len(q):
            s = jnp.repeat(s, BLOCK, axis=0)[: len(q)]
        return q.astype(jnp.float32) * jnp.repeat(s, BLOCK, axis=1)[:, : q.shape[1]]

    return jnp.matmul(wide(q_MK, s_MT), wide(q_NK, s_BT).T, precision="highest")


@jax.jit
def relative_error(y: jax.Array, expected: jax.Array) -> jax.Array:
    """||y - expected|| / ||expected||, on the device."""
    y, expected = y.astype(jnp.float32), expected.astype(jnp.float32)
    return jnp.linalg.norm(y - expected) / jnp.linalg.norm(expected)


def _time(function: Callable, operand_sets: list[tuple]) -> tuple[float, Any]:
    """Microseconds, and the result for the first operands."""
    compiled = jax.jit(function).lower(*operand_sets[0]).compile()
    return microseconds(compiled, operand_sets), compiled(*operand_sets[0])


def dense_rows(operation: str, shapes: tuple[specs.Dense, ...]) -> Iterator[Row]:
    """`fp8_matmul`; scales come as the quantisation kernels leave them, along rows."""
    for spec in shapes:
        by_tile = spec.scales == "tiles"
        out_dtype = jnp.float32 if by_tile else jnp.bfloat16  # float32: as gradients leave

        def run(q_MK, s_TM, q_NK, s, by_tile=by_tile, out_dtype=out_dtype):
            return fp8_matmul(q_MK, s_TM.T, q_NK, s.T if by_tile else s, out_dtype)

        operands = [spec.operands(seed) for seed in range(SETS)]
        given = [(q, s.T.copy(), w, t.T.copy() if by_tile else t) for q, s, w, t in operands]
        time, y_MN = _time(run, given)
        error = float(relative_error(y_MN, dequantised_product(*operands[0])))
        num_bytes = (spec.M + spec.N) * spec.K + spec.M * spec.N * jnp.dtype(out_dtype).itemsize
        yield Row(operation, spec.name, time, spec.flops, num_bytes, error)


def grouped_rows() -> Iterator[Row]:
    for spec in specs.GROUPED:
        q_MK, s_MT, q_GNK, s_GBT, sizes_G = spec.operands(0)
        time, y_MN = _time(
            lambda q, s, w, t, n: grouped_fp8_matmul(q, s.T, w, t, n),
            [(q_MK, s_MT.T.copy(), q_GNK, s_GBT, sizes_G)],
        )
        errors, start = [], 0
        for group, size in enumerate(spec.sizes):
            rows = slice(start, start + size)
            if size and group % 8 == 0:
                expected = dequantised_product(q_MK[rows], s_MT[rows], q_GNK[group], s_GBT[group])
                errors.append(float(relative_error(y_MN[rows], expected)))
            start += size
        yield Row("grouped", spec.name, time, spec.flops, q_GNK.size, max(errors))


def gradient_rows() -> Iterator[Row]:
    for spec in specs.GROUPED_GRADIENTS:
        q_IM, s_IR, q_OM, s_OR, sizes_G = spec.operands(0)
        time, dw_GIO = _time(
            lambda q, s, p, t, n: grouped_fp8_weight_gradient(q, s.T, p, t.T, n),
            [(q_IM, s_IR.T.copy(), q_OM, s_OR.T.copy(), sizes_G)],
        )
        size = spec.sizes[0]
        first = q_IM[:, :size], s_IR[:, : size // BLOCK], q_OM[:, :size], s_OR[:, : size // BLOCK]
        error = float(relative_error(dw_GIO[0], dequantised_product(*first))) if size else 0.0
        yield Row("gradients", spec.name, time, spec.flops, 4 * dw_GIO.size, error)


def masked_rows() -> Iterator[Row]:
    for spec in specs.MASKED:
        q_GMK, s_GMT, q_GNK, s_GBT, num_rows_G = spec.operands(0)
        time, y_GMN = _time(
            lambda q, s, w, t, n: masked_fp8_matmul(q, jnp.swapaxes(s, 1, 2), w, t, n),
            [(q_GMK, jnp.swapaxes(s_GMT, 1, 2).copy(), q_GNK, s_GBT, num_rows_G)],
        )
        group = max(range(len(spec.num_rows)), key=spec.num_rows.__getitem__)
        rows = slice(0, spec.num_rows[group])
        expected = dequantised_product(
            q_GMK[group, rows], s_GMT[group, rows], q_GNK[group], s_GBT[group]
        )
        error = float(relative_error(y_GMN[group, rows], expected))
        yield Row("masked", spec.name, time, spec.flops, q_GNK.size, error)


def quantize_rows() -> Iterator[Row]:
    """Bytes are those read and written once."""

    def along_rows(results):  # scales as the kernels write them: no copy
        return [x.T if i % 2 else x for i, x in enumerate(results)]

    for spec in specs.QUANTIZE:
        x_sets = [spec.operands(seed) for seed in range(SETS)]
        codes = [quantize.quantize_tiles(x_MK) for (x_MK,) in x_sets]
        codes = [(q_MK, s_MT.T.copy()) for q_MK, s_MT in codes]
        gates = [(jnp.concatenate([x_MK, x_MK[::-1]], axis=1),) for (x_MK,) in x_sets]
        for name, function, operand_sets, bytes_each in (
            ("quantize_tiles", quantize.quantize_tiles, x_sets, 3),
            ("quantize_columns", quantize.quantize_columns, x_sets, 3),
            ("quantize_tiles_and_columns", quantize.quantize_tiles_and_columns, x_sets, 4),
            ("retile", lambda q_MK, s_TM: quantize.retile(q_MK, s_TM.T), codes, 2),
            ("swiglu_quantize_tiles", quantize.swiglu_quantize_tiles, gates, 5),
        ):
            time, _ = _time(lambda *x, function=function: along_rows(function(*x)), operand_sets)
            yield Row(name, spec.name, time, 0, bytes_each * spec.M * spec.K, None)


def rows_of(operations: list[str]) -> Iterator[Row]:
    by_operation = {
        "dense": lambda: dense_rows("dense", (*specs.V3, specs.SQUARE)),
        "tiles": lambda: dense_rows("tiles", (*specs.V3_TILES, *specs.WEIGHT_GRADIENTS)),
        "decode": lambda: dense_rows("decode", specs.DECODE[-12:]),  # M = 64 and 128
        "grouped": grouped_rows,
        "gradients": gradient_rows,
        "masked": masked_rows,
        "quantize": quantize_rows,
    }
    for operation in operations:
        yield from by_operation[operation]()


def ceilings() -> tuple[float, float]:
    """TFLOP/s of a bfloat16 product, TB/s of a copy that is read and written."""
    shape = specs.SQUARE
    a, b = (jax.random.normal(jax.random.key(i), (shape.M, shape.K), jnp.bfloat16) for i in (0, 1))
    product, _ = _time(lambda a, b: a @ b.T, [(a, b)])
    x = jax.random.normal(jax.random.key(2), (2**30,), jnp.bfloat16)
    scaled, _ = _time(lambda x: 1.5 * x, [(x,)])
    return shape.flops / product / 1e6, 2 * x.nbytes / scaled / 1e6


def peer_times(operations: list[str]) -> dict[str, float]:
    """Microseconds of torch's products by operation and shape; empty where torch is missing."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "times.json"
        command = [sys.executable, "-m", "pallas_kernels.bench_peer", str(result), *operations]
        done = subprocess.run(command, check=False)
        if done.returncode != 0:
            print("the peer could not be measured (is torch installed?)", file=sys.stderr)
            return {}
        return json.loads(result.read_text())


def main(argv: list[str]) -> None:
    operations = _OPERATIONS.value
    unknown = [name for name in (*argv[1:], *operations) if name not in OPERATIONS]
    if unknown or jax.default_backend() != "gpu":
        problem = f"unknown operation {unknown[0]!r}" if unknown else "needs an NVIDIA GPU"
        print(f"bench: {problem}; allowed: {', '.join(OPERATIONS)}", file=sys.stderr)
        sys.exit(2)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    peer = peer_times(operations) if _PEER.value else {}
    compute, memory = ceilings()
    print("| operation | shape | us | rate | of cuBLASLt | of the ceiling | error |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for row in rows_of(operations):
        rate = f"{row.flops / row.microseconds / 1e6:.0f} TFLOP/s" if row.flops else ""
        of_ceiling = row.flops / row.microseconds / 1e6 / compute
        bandwidth = row.bytes / row.microseconds / 1e6
        if not row.flops or bandwidth / memory > of_ceiling / 2:
            rate, of_ceiling = f"{rate} {bandwidth:.2f} TB/s".strip(), bandwidth / memory
        theirs = peer.get(f"{row.operation} {row.shape}")
        ratio = f"{theirs / row.microseconds:.2f}" if theirs else ""
        error = "" if row.error is None else f"{row.error:.1e}"
        if row.error is not None and not row.error <= MAX_ERROR:
            error += " WRONG"
        print(
            f"| {row.operation} | {row.shape} | {row.microseconds:.1f} | {rate} | {ratio} "
            f"| {of_ceiling:.2f} | {error} |",
            flush=True,
        )
        rows.append({**row._asdict(), "peer_microseconds": theirs})
    print(f"\nceilings in this run: bfloat16 8192^3 {compute:.0f} TFLOP/s, copy {memory:.2f} TB/s")
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps(rows, indent=1) + "\n")
    if any(row["error"] is not None and not row["error"] <= MAX_ERROR for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    app.run(main)
