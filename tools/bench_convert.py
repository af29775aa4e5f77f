"""Conversion at the real size of V3: speed against the disk, peak memory, and kill -9.

    python -m tools.bench_convert --dir=DIR [--experts=160] [--kills=5] [--json=FILE]

Makes a random FP8 checkpoint with the dims of `deepseek_v3_671b`: one dense layer, one MoE layer,
the MTP layer and fewer experts. Then runs `tools.convert_checkpoint` from FP8 to BF16 and back:
once in peace, right after a plain copy of the first files of its source for the disk's rate, and
once killed at random points and given again. Needs 62 GB at DIR with 160 experts, all of which is
deleted at the end.
Exit code 1: more than 2 GB of memory, less than half of the copy rate, or another result than due.
"""

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from absl import flags

from dsv3_jax import configs
from dsv3_jax.checkpoint import hf, manifest
from dsv3_jax.checkpoint.hf_config import config_values
from dsv3_jax.checkpoint.hf_folder import NUMPY_DTYPES, open_folder
from dsv3_jax.checkpoint.hf_writer import write_folder
from dsv3_jax.errors import UserError, run_main

_DIR = flags.DEFINE_string("dir", None, "existing folder on the disk to measure")
_EXPERTS = flags.DEFINE_integer("experts", 160, "routed experts a layer; 8 divides it")
_KILLS = flags.DEFINE_integer("kills", 5, "kills of each direction", lower_bound=0)
_SEED = flags.DEFINE_integer("seed", 0, "of the weights and of the moments of the kills")
_JSON = flags.DEFINE_string("json", None, "file that receives the results")

_BUFFER_BYTES = 16 << 20
_COPIED_BYTES = 12e9  # at least, where the checkpoint has as much
_MAX_RESIDENT_BYTES = 2e9
_MIN_COPY_RATIO = 0.5


def random_chunks(tensor: hf.Tensor) -> Iterator[np.ndarray]:
    """Finite random contents of a tensor: any E4M3 codes, scales and weights of usual size."""
    rng = np.random.default_rng([_SEED.value, zlib.crc32(tensor.name.encode())])
    dtype, left = NUMPY_DTYPES[tensor.dtype], tensor.size
    while left:
        count = min(left, _BUFFER_BYTES)
        left -= count
        if tensor.dtype == "F32":
            yield rng.uniform(1e-5, 1e-4, count).astype(dtype)
            continue
        bits = np.frombuffer(rng.bytes(count * dtype.itemsize), f"u{dtype.itemsize}")
        if tensor.dtype == "F8_E4M3":
            yield (bits - ((bits & 0x7F) == 0x7F)).view(dtype)  # NaN becomes +-448
        else:
            yield (bits & 0x83FF | 0x3800).view(dtype)  # magnitudes from 2^-15 to 2^-7


def make_source(path: Path) -> None:
    model = dataclasses.replace(
        configs.get("deepseek_v3_671b").model,
        num_layers=2,
        num_dense_layers=1,
        num_experts=_EXPERTS.value,
    )
    write_folder(
        path,
        list(hf.tensors(model, "fp8").values()),
        random_chunks,
        files={"config.json": json.dumps(config_values(model, "fp8")).encode()},
        identity={"seed": _SEED.value},
        label="making the checkpoint",
    )


def drop_from_memory(folder: Path) -> None:
    """Makes the next read come from the disk, as far as a user can."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def copy_rate(source: Path, copy: Path) -> float:
    """Bytes a second of a plain copy, each file synchronised."""
    drop_from_memory(source)
    copy.mkdir()
    buffer = memoryview(bytearray(_BUFFER_BYTES))
    start, copied = time.monotonic(), 0
    for path in sorted(source.glob("*.safetensors")):
        if copied >= _COPIED_BYTES:
            break
        with path.open("rb", 0) as file, (copy / path.name).open("wb", 0) as out:
            while count := file.readinto(buffer):
                assert out.write(buffer[:count]) == count
            os.fsync(out.fileno())
            copied += out.tell()
    seconds = time.monotonic() - start
    shutil.rmtree(copy)
    return copied / seconds


def start_conversion(source: Path, destination: Path, dtype: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "tools.convert_checkpoint", "--to=hf", f"--dtype={dtype}"]
    return subprocess.Popen(
        [*command, f"--src={source}", f"--dst={destination}"], stdout=subprocess.DEVNULL
    )


def convert(source: Path, destination: Path, dtype: str) -> tuple[float, int]:
    """Seconds of a conversion from a cold start, and the most memory that its process held."""
    drop_from_memory(source)
    start = time.monotonic()
    process = start_conversion(source, destination, dtype)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(f"the conversion of {source} ended with exit code {process.returncode}")
    return time.monotonic() - start, usage.ru_maxrss * 1024


def convert_with_kills(source: Path, destination: Path, dtype: str, seconds: float) -> list[float]:
    """Kills the conversion at random moments, then lets it finish; returns the moments."""
    chance = random.Random(_SEED.value)
    moments = []
    for _ in range(_KILLS.value):
        process = start_conversion(source, destination, dtype)
        moments.append(round(chance.uniform(0.1, seconds / _KILLS.value), 2))
        try:
            process.wait(moments[-1])
        except subprocess.TimeoutExpired:
            process.kill()
        if process.wait() != -9 or destination.exists():
            raise UserError(f"{destination} was complete before the kill; take more --experts")
    convert(source, destination, dtype)
    return moments


def measure(source: Path, destination: Path, dtype: str) -> dict:
    """One direction: the disk, then in peace, then with kills."""
    copied = copy_rate(source, destination)
    seconds, resident = convert(source, destination, dtype)
    files = manifest.verify(destination)["files"]
    read, written = num_bytes(source), num_bytes(destination)
    result = {
        "to": dtype,
        "copy_bytes_per_second": copied,
        "seconds": seconds,
        "read_bytes": read,
        "written_bytes": written,
        "read_bytes_per_second": read / seconds,
        "written_bytes_per_second": written / seconds,
        "total_bytes_per_second": (read + written) / seconds,
        "written_ratio_to_copy": written / seconds / copied,
        "total_ratio_to_copy": (read + written) / seconds / (2 * copied),
        "peak_resident_bytes": resident,
    }
    if _KILLS.value:
        shutil.rmtree(destination)
        result["killed_after_seconds"] = convert_with_kills(source, destination, dtype, seconds)
        result["kills_identical"] = manifest.verify(destination)["files"] == files
    print(json.dumps(result, indent=1), flush=True)
    return result


def digests(folder: Path) -> tuple[dict[str, int], dict[str, np.ndarray]]:
    """crc32 of every tensor's bytes, scales apart, and the scales."""
    crcs, scales = {}, {}
    for name, tensor in open_folder(folder).tensors.items():
        if name.endswith(hf.SCALE_SUFFIX):
            scales[name] = tensor.read()
            continue
        crcs[name] = 0
        for first in range(0, tensor.shape[0], 1024):
            rows = tensor.read(slice(first, first + 1024))
            crcs[name] = zlib.crc32(rows.view(np.uint8), crcs[name])
    return crcs, scales


def main(argv: list[str]) -> int | None:
    del argv
    if not _DIR.value or not Path(_DIR.value).is_dir():
        raise UserError("give --dir=DIR, an existing folder on the disk to measure")
    with tempfile.TemporaryDirectory(dir=_DIR.value, prefix="bench_convert_") as name:
        source, middle, back = (Path(name) / part for part in ("fp8", "bf16", "back"))
        make_source(source)
        runs = [measure(source, middle, "bf16")]
        codes, scales = digests(source)
        shutil.rmtree(source)  # there may be no room for three
        runs.append(measure(middle, back, "fp8"))
        codes_back, scales_back = digests(back)
    errors = [np.abs(scales_back[name] / scales[name] - 1).max() for name in scales]
    report = {
        "experts": _EXPERTS.value,
        "runs": runs,
        "codes_identical_after_round_trip": codes == codes_back,
        "largest_scale_error_after_round_trip": float(max(errors)),
    }
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps(report, indent=1))
    bars = {
        "memory": all(run["peak_resident_bytes"] < _MAX_RESIDENT_BYTES for run in runs),
        "speed": all(run["total_ratio_to_copy"] >= _MIN_COPY_RATIO for run in runs),
        "kills": all(run.get("kills_identical", True) for run in runs),
        "round trip": report["codes_identical_after_round_trip"] and max(errors) <= 2**-8,
    }
    print(", ".join(f"{bar}: {'ok' if met else 'FAILED'}" for bar, met in bars.items()))
    return None if all(bars.values()) else 1


if __name__ == "__main__":
    run_main(main)
