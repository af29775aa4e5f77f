"""Writes a Hugging Face folder of safetensors as a stream; a killed write continues where it was.

Work happens in `<destination>.incomplete`: there lie `plan.json`, which says what is being written
from what, a digest beside each whole shard, and the folder itself, which is renamed to the
destination as the very last step. So whatever exists at the destination is complete.
"""

import fcntl
import json
import os
import shutil
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from dsv3_jax.checkpoint import hf, manifest
from dsv3_jax.checkpoint.hf_folder import INDEX, NUMPY_DTYPES
from dsv3_jax.checkpoint.hf_progress import Progress
from dsv3_jax.errors import UserError, some

Chunks = Callable[[hf.Tensor], Iterator[np.ndarray]]

_CHUNKS_WAITING = 3  # for the writing thread
_FLUSH_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One safetensors file."""

    name: str
    tensors: tuple[hf.Tensor, ...]
    header: bytes
    num_bytes: int  # of the file


def write_folder(
    destination: Path,
    tensors: Sequence[hf.Tensor],
    chunks: Chunks,
    *,
    files: Mapping[str, bytes],
    identity: dict[str, Any],
    max_shard_bytes: int = 5_000_000_000,
    label: str = "writing",
    process_index: int = 0,
    process_count: int = 1,
    barrier: Callable[[], None] = lambda: None,
) -> None:
    """Writes shards, index, `files` and a manifest; continues an earlier call with the same plan.

    Every process asks for the chunks of all tensors in order, since making them may take all of
    them together, and drops those of the files that are not its own.

    Args:
      destination: must not exist yet; its parent must.
      tensors: in file order, each scale right after its weight: they share a file.
      chunks: consecutive row-major pieces of a tensor, in its stored dtype. A piece must keep its
        contents after it was handed over: it is written later, by a thread.
      files: contents of the small files, by name: config.json, tokenizer.json ...
      identity: JSON-safe description of what is written. Continuing takes an equal one.
      max_shard_bytes: of the tensors of one file; a single larger tensor gets a file of its own.
      label: what is going on, for the progress line.
      process_index, process_count: of processes that share the file system; file i belongs to
        process i % process_count.
      barrier: returns when every process has called it.

    Raises:
      UserError: the destination exists or cannot be written, something else is unfinished there,
        or the disk is too small; found before the first byte. A disk that fills up later too: what
        is whole by then is kept for the next call.
    """
    destination = destination.absolute()
    shards = plan_shards(tensors, max_shard_bytes)
    plan = {
        **identity,
        "max_shard_bytes": max_shard_bytes,
        "tensors": f"{zlib.crc32(b''.join(shard.header for shard in shards)):08x}",
        "files": {name: f"{zlib.crc32(content):08x}" for name, content in sorted(files.items())},
    }
    work = incomplete_path(destination)
    folder = work / "folder"
    if os.path.lexists(destination):
        if _read_plan(work) == _as_json(plan) and not folder.exists():
            shutil.rmtree(work)  # killed right after the last rename
            return
        raise UserError(f"{destination} exists; delete it or give another destination")
    _check_unfinished(work, plan)
    missing = {i: s for i, s in enumerate(shards) if not (folder / s.name).exists()}
    total, left = (sum(s.num_bytes for s in group) for group in (shards, missing.values()))
    _check_space(destination, left + sum(map(len, files.values())))
    barrier()  # so far nobody has changed anything
    try:
        if process_index == 0:
            folder.mkdir(parents=True, exist_ok=True)
            lock = _lock(work)
            _write_file(work / "plan.json", json.dumps(plan, indent=1).encode())
        barrier()
        with (
            ThreadPoolExecutor(1) as thread,
            Progress(label, total, quiet=process_index > 0) as progress,
        ):
            progress.skip(total - left)
            jobs = _Jobs(thread)
            for i, shard in missing.items():
                is_own = i % process_count == process_index
                file = _ShardFile(folder, work, shard) if is_own else None
                for tensor in shard.tensors:
                    num_bytes = 0
                    for chunk in chunks(tensor):
                        assert chunk.dtype == NUMPY_DTYPES[tensor.dtype], (tensor, chunk.dtype)
                        if file:
                            jobs.add(file.write, chunk)
                        num_bytes += chunk.nbytes
                        progress.advance(chunk.nbytes)
                    assert num_bytes == _num_bytes(tensor), (tensor, num_bytes)
                if file:
                    jobs.add(file.commit)
            jobs.finish()
        barrier()
        if process_index == 0:
            _finish(work, destination, shards, files)
            lock.close()
        barrier()
    except OSError as error:
        raise UserError(
            f"{destination} cannot be written ({error.strerror}); mend that and run the same "
            f"again: it continues after the last whole file"
        ) from None


def incomplete_path(destination: Path) -> Path:
    """Where a folder lies until it is complete."""
    return destination.with_name(destination.name + ".incomplete")


def plan_shards(tensors: Sequence[hf.Tensor], max_shard_bytes: int) -> list[Shard]:
    """Fills files in order; a weight and its scale stay together."""
    units: list[list[hf.Tensor]] = []
    for tensor in tensors:
        if tensor.is_scale:
            assert units[-1][-1].slot == tensor.slot, tensor
            units[-1].append(tensor)
        else:
            units.append([tensor])
    groups: list[list[hf.Tensor]] = []
    free = 0
    for unit in units:
        needed = sum(map(_num_bytes, unit))
        if needed > free or not groups:
            groups.append([])
            free = max_shard_bytes
        groups[-1] += unit
        free -= needed
    shards = []
    for i, group in enumerate(groups):
        header = _header(group)
        shards.append(
            Shard(
                name=f"model-{i + 1:05}-of-{len(groups):05}.safetensors",
                tensors=tuple(group),
                header=header,
                num_bytes=len(header) + sum(map(_num_bytes, group)),
            )
        )
    return shards


def _num_bytes(tensor: hf.Tensor) -> int:
    return tensor.size * NUMPY_DTYPES[tensor.dtype].itemsize


def _header(tensors: Sequence[hf.Tensor]) -> bytes:
    """The start of a safetensors file: length of the JSON that follows, padded to 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + _num_bytes(tensor)
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class _Jobs:
    """Work for the writing thread, in order; adding waits while too much is undone."""

    def __init__(self, thread: ThreadPoolExecutor):
        self._thread = thread
        self._undone: deque[Future] = deque()

    def add(self, function: Callable[..., None], *args: Any) -> None:
        self._undone.append(self._thread.submit(function, *args))
        if len(self._undone) > _CHUNKS_WAITING:
            self._undone.popleft().result()  # raises what went wrong there

    def finish(self) -> None:
        while self._undone:
            self._undone.popleft().result()


class _ShardFile:
    """A shard on its way: under a temporary name until every byte is on disk."""

    def __init__(self, folder: Path, work: Path, shard: Shard):
        self._shard = shard
        self._path, self._digest_path = folder / shard.name, _digest_path(work, shard)
        self._file = self._path.with_name(f"{shard.name}.tmp").open("wb", buffering=0)
        self._done = self._flushed = self._crc = 0
        self._write(memoryview(shard.header))

    def write(self, chunk: np.ndarray) -> None:
        self._write(memoryview(np.ascontiguousarray(chunk).reshape(-1).view(np.uint8)))

    def _write(self, view: memoryview) -> None:
        self._crc = zlib.crc32(view, self._crc)
        while view:
            count = self._file.write(view)
            self._done += count
            view = view[count:]
        if self._done - self._flushed >= _FLUSH_BYTES:
            # Starts writing back at once, so that the final fsync is short, and keeps a large
            # checkpoint from pushing everything else out of memory.
            os.posix_fadvise(self._file.fileno(), 0, self._done, os.POSIX_FADV_DONTNEED)
            self._flushed = self._done

    def commit(self) -> None:
        assert self._done == self._shard.num_bytes, "an earlier write failed"
        os.fsync(self._file.fileno())
        self._file.close()
        entry = manifest.entry(self._done, self._crc)
        _write_file(self._digest_path, json.dumps(entry).encode())
        os.replace(self._file.name, self._path)


def _finish(
    work: Path, destination: Path, shards: Sequence[Shard], files: Mapping[str, bytes]
) -> None:
    folder = work / "folder"
    index = {
        "metadata": {"total_size": sum(_num_bytes(t) for s in shards for t in s.tensors)},
        "weight_map": {tensor.name: shard.name for shard in shards for tensor in shard.tensors},
    }
    for leftover in folder.glob("*.tmp"):  # of an earlier call that was killed
        leftover.unlink()
    for name, content in files.items():
        _write_file(folder / name, content)
    _write_file(folder / INDEX, (json.dumps(index, indent=2) + "\n").encode())
    digests = {s.name: json.loads(_digest_path(work, s).read_bytes()) for s in shards}
    manifest.write(folder, {}, known=digests)
    _sync_directory(folder)
    os.replace(folder, destination)
    _sync_directory(destination.parent)
    shutil.rmtree(work)


def _digest_path(work: Path, shard: Shard) -> Path:
    return work / f"{shard.name}.json"


def _write_file(path: Path, content: bytes) -> None:
    """Writes a whole file, by rename."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _sync_directory(path: Path) -> None:
    """Makes renames in it last through a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _as_json(value: Any) -> Any:
    """The value as it comes back from a file: tuples become lists."""
    return json.loads(json.dumps(value))


def _lock(work: Path) -> IO[str]:
    """Keeps two commands from writing the same folder; ends with the process, however it ends."""
    file = (work / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process is writing {work}; wait for it or end it") from None
    return file


def _read_plan(work: Path) -> dict[str, Any] | None:
    try:
        return json.loads((work / "plan.json").read_bytes())
    except (OSError, ValueError):
        return None


def _check_unfinished(work: Path, plan: dict[str, Any]) -> None:
    if not os.path.lexists(work):
        return
    found, plan = _read_plan(work), _as_json(plan)
    if found is None and work.is_dir():
        contents = {str(path.relative_to(work)) for path in work.rglob("*")}
        if contents <= {"folder", "lock", "plan.json.tmp"}:
            return  # killed before the plan was written
    if found != plan:
        different = [key for key in plan if not found or found.get(key) != plan[key]]
        raise UserError(
            f"{work} is an unfinished folder of something else ({some(different)} differ); delete "
            f"it, or give another destination"
        )


def _check_space(destination: Path, needed: int) -> None:
    parent, work = destination.parent, incomplete_path(destination)
    if not parent.is_dir():
        raise UserError(f"{parent} is not a folder; make it, or give another destination")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{parent} may not be written; give another destination")
    try:
        free = shutil.disk_usage(parent).free
        free += sum(path.stat().st_blocks * 512 for path in work.glob("folder/*.tmp"))
    except OSError as error:
        raise UserError(f"{parent} cannot be written ({error.strerror})") from None
    if needed > free:
        raise UserError(
            f"{destination} needs {needed / 1e9:,.1f} GB more, but its disk has {free / 1e9:,.1f} "
            f"GB free; free some, or give another destination"
        )
