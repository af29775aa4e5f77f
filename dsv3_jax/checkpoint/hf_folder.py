"""A Hugging Face folder of safetensors, opened without reading a weight.

Headers and lengths of all files are checked first, so that a missing or cut file is an error before
anything is allocated. Reads are byte ranges: a process touches only the rows and columns it needs,
and no file is mapped into its memory.
"""

import io
import json
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dsv3_jax.checkpoint.hf import BLOCK_SIZE
from dsv3_jax.errors import UserError, some

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

# The names that the safetensors format gives to the dtypes that checkpoints hold.
NUMPY_DTYPES = {
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}
_MAX_HEADER_BYTES = 100_000_000  # the limit of the format
_SHORT_RUN_BYTES = 16 << 10  # shorter runs of a row are not worth a read of their own


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """Where the bytes of a tensor lie, row-major."""

    name: str
    dtype: str  # a key of NUMPY_DTYPES, or another name of the format
    shape: tuple[int, ...]
    file: Path
    offset: int  # of the first byte in the file

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.size * NUMPY_DTYPES[self.dtype].itemsize

    def read(self, rows: slice = slice(None), columns: slice = slice(None)) -> np.ndarray:
        """Reads a part of a matrix, or a range of a vector, or all.

        Raises:
          UserError: the file ends early or cannot be read.
        """
        dtype = NUMPY_DTYPES[self.dtype]
        num_rows = self.shape[0] if self.shape else 1
        width = math.prod(self.shape[1:])
        first, last, _ = rows.indices(num_rows)
        left, right, _ = columns.indices(width) if len(self.shape) > 1 else (0, width, 1)
        out = np.empty((last - first, right - left), dtype)
        start = self.offset + first * width * dtype.itemsize
        try:
            with self.file.open("rb", buffering=0) as file:
                if right - left == width:
                    self._read_into(out, file, start)
                elif (right - left) * dtype.itemsize >= _SHORT_RUN_BYTES:
                    for i, row in enumerate(out):
                        self._read_into(row, file, start + (i * width + left) * dtype.itemsize)
                else:  # whole rows, a few at a time
                    step = max(1, (8 << 20) // (width * dtype.itemsize))
                    for i in range(0, len(out), step):
                        whole = np.empty((min(step, len(out) - i), width), dtype)
                        self._read_into(whole, file, start + i * width * dtype.itemsize)
                        out[i : i + step] = whole[:, left:right]
        except OSError as error:
            raise UserError(f"{self.file} cannot be read ({error.strerror})") from None
        return out if len(self.shape) > 1 else out.reshape([last - first] * len(self.shape))

    def _read_into(self, out: np.ndarray, file: io.FileIO, offset: int) -> None:
        """Fills a contiguous array from the open file."""
        view = memoryview(out.reshape(-1).view(np.uint8))
        file.seek(offset)
        while view:
            count = file.readinto(view)
            if not count:
                raise UserError(f"{self.file} ends inside {self.name}; download it again")
            view = view[count:]


@dataclass(frozen=True, kw_only=True)
class Folder:
    """An opened checkpoint folder."""

    path: Path
    config: dict[str, Any]  # config.json
    tensors: dict[str, StoredTensor]

    @property
    def is_quantized(self) -> bool:
        return any(tensor.dtype == "F8_E4M3" for tensor in self.tensors.values())


def is_folder(path: str | Path) -> bool:
    """Whether a path looks like a Hugging Face folder rather than a run of ours."""
    path = Path(path)
    return path.is_dir() and (
        (path / "config.json").is_file()
        or (path / INDEX).is_file()
        or any(path.glob("*.safetensors"))
    )


def open_folder(path: str | Path) -> Folder:
    """Opens a folder and checks config.json, the index, every header and every file's length.

    Raises:
      UserError: the first thing that is wrong, and how to mend it.
    """
    path = Path(path).absolute()
    if not path.is_dir():
        raise UserError(f"{path} is not a folder; give one with config.json and *.safetensors")
    config = read_json(path / "config.json")
    if (path / INDEX).is_file():
        where = read_json(path / INDEX).get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(f, str) for f in where.values()):
            raise UserError(f"{path / INDEX} has no weight_map; download it again")
        names = sorted(set(where.values()))
    else:
        where, names = None, sorted(file.name for file in path.glob("*.safetensors"))
        if not names:
            raise UserError(f"{path} holds no *.safetensors file; give a folder that does")
    # A download must not make us read elsewhere; pathlib does not take a NUL.
    if outside := [repr(name)[:99] for name in names if Path(name).name != name or "\0" in name]:
        raise UserError(f"{INDEX} names {some(outside)}: shards must lie in the folder itself")
    # Of pathlib's, is_file() raises for a name that is too long.
    if absent := [name[:99] for name in names if not os.path.isfile(path / name)]:
        raise UserError(f"{path} lacks {some(absent)}; download the rest of the checkpoint")
    with ThreadPoolExecutor(16) as pool:
        headers = dict(zip(names, pool.map(lambda n: _read_header(path / n), names), strict=True))
    found: dict[str, StoredTensor] = {}
    for file, tensors in headers.items():
        for name, tensor in tensors.items():
            if where is None and name in found:
                raise UserError(f"{name} is both in {found[name].file.name} and in {file}")
            if where is None or where.get(name) == file:
                found[name] = tensor
    if where is not None and (lost := [name for name in where if name not in found]):
        raise UserError(
            f"{INDEX} places {some([f'{n} in {where[n]}' for n in lost])}, where it is not; "
            f"download both files again"
        )
    return Folder(path=path, config=config, tensors=found)


def row_ranges(shape: tuple[int, ...], max_numbers: int) -> Iterator[slice]:
    """Ranges of rows that together are all, of about `max_numbers` numbers, no block cut."""
    step = max(1, max_numbers // max(1, math.prod(shape[1:])) // BLOCK_SIZE) * BLOCK_SIZE
    num_rows = shape[0] if shape else 1
    for first in range(0, num_rows, step):
        yield slice(first, min(first + step, num_rows))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; UserError when it is missing or something else."""
    try:
        contents = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}; download it again") from None
    if not isinstance(contents, dict):
        raise UserError(f"{path} is not a JSON object; download it again")
    return contents


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file: 8 bytes of header length, the header as JSON, then the data."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
                raise UserError(f"{path} is cut short or not safetensors; download it again")
            header = json.loads(file.read(length))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise UserError(f"the header of {path} is damaged; download it again") from None
    tensors, end = {}, 8 + length
    try:
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, stop = entry["data_offsets"]
            shape = tuple(map(int, entry["shape"]))
            tensor = StoredTensor(
                name=name, dtype=entry["dtype"], shape=shape, file=path, offset=8 + length + begin
            )
            known = tensor.dtype in NUMPY_DTYPES
            if begin < 0 or (tensor.num_bytes if known else stop - begin) != stop - begin:
                raise ValueError
            tensors[name], end = tensor, max(end, 8 + length + stop)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"the header of {path} is damaged; download it again") from None
    if size < end:
        raise UserError(f"{path} is cut short: {size:,} of {end:,} bytes; download it again")
    return tensors
