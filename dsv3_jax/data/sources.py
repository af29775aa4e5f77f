"""Corpora as sequences of documents: fixed order, fixed length, random access.

A source reads nothing but names and offsets when it is opened, so a document can be read twice
(filter, then tokenise) without a corpus ever lying in memory.
"""

import abc
import bisect
import glob
import itertools
import json
import os
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax.config import SourceConfig
from dsv3_jax.errors import UserError, did_you_mean

# A text file longer than this becomes several documents, cut at line ends.
TEXT_DOCUMENT_BYTES = 1 << 16

_SUFFIXES = {"jsonl": ".jsonl", "parquet": ".parquet", "arrayrecord": ".arrayrecord"}


def list_files(config: SourceConfig) -> list[Path]:
    """The files of a corpus, in the order in which they are read.

    Raises:
      UserError: nothing matches the path.
    """
    if config.kind == "python":
        return _installed_python_files(packages=config.path == "packages")
    return _find_files(config)


def open_source(config: SourceConfig) -> "Source":
    """Opens the corpus that a `SourceConfig` describes.

    Raises:
      UserError: nothing matches the path, a file cannot be read, or a text column is missing.
    """
    paths = list_files(config)
    if config.kind == "python":
        return PythonSource(paths)
    if config.kind == "text":
        return TextSource(paths)
    if config.kind == "jsonl":
        return JsonlSource(paths, config.text_key)
    if config.kind == "parquet":
        return ParquetSource(paths, config.text_key)
    assert config.kind == "arrayrecord", config.kind
    return ArrayRecordSource(paths)


class Source(abc.ABC, Sequence[str]):
    """Documents (str) in a fixed order; `source[i]` raises UserError on a broken record."""

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, index: int) -> str: ...

    @abc.abstractmethod
    def label(self, index: int) -> str:
        """Names a document to a person: a file, with the record's number where it holds many."""


class TextSource(Source):
    """UTF-8 text files; a long one is cut into documents of about TEXT_DOCUMENT_BYTES."""

    def __init__(self, paths: list[Path], max_bytes: int | None = TEXT_DOCUMENT_BYTES):
        self._spans: list[tuple[Path, int, int]] = []  # file, first byte, end
        for path in paths:
            cuts = _line_cuts(path, max_bytes)
            self._spans += [(path, *span) for span in itertools.pairwise(cuts)]

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> str:
        path, start, stop = self._spans[index]
        try:
            return _read_bytes(path, start, stop).decode()
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path} is not UTF-8 (byte {start + error.start}); convert it or leave it out"
            ) from error

    def label(self, index: int) -> str:
        return "/".join(self._spans[index][0].parts[-2:])


class PythonSource(TextSource):
    """Source files, one document each; bytes that are not UTF-8 (a handful) become U+FFFD."""

    def __init__(self, paths: list[Path]):
        super().__init__(paths, max_bytes=None)

    def __getitem__(self, index: int) -> str:
        return _read_bytes(*self._spans[index]).decode(errors="replace")


class JsonlSource(Source):
    """One JSON object a line; blank lines are skipped."""

    def __init__(self, paths: list[Path], text_key: str):
        self._paths, self._text_key = paths, text_key
        spans = []  # file number, first byte, end, line number from 1
        for number, path in enumerate(paths):
            end = 0
            with _open(path) as file:
                for line_number, line in enumerate(file, 1):
                    start, end = end, end + len(line)
                    if not line.isspace():
                        spans.append((number, start, end, line_number))
        self._spans = np.array(spans, np.int64).reshape(-1, 4)

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> str:
        number, start, stop, _ = self._spans[index].tolist()
        line = _read_bytes(self._paths[number], start, stop)
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else error
            raise UserError(
                f"{self.label(index)}: malformed record ({reason}); every line must be a JSON "
                f"object, mend or delete the line"
            ) from error
        if not isinstance(record, dict):
            raise UserError(
                f"{self.label(index)}: malformed record ({type(record).__name__}); every line "
                f"must be a JSON object, mend or delete the line"
            )
        text = _field(record, self._text_key, self.label(index))
        # JSON can escape half of a surrogate pair, which no UTF-8 text may hold.
        return text.encode(errors="replace").decode() if b"\\u" in line else text

    def label(self, index: int) -> str:
        return f"{self._paths[self._spans[index, 0]]}:{self._spans[index, 3]}"


class ParquetSource(Source):
    """One row a document, read a row group at a time."""

    def __init__(self, paths: list[Path], text_key: str):
        import pyarrow.parquet as parquet

        self._paths, self._text_key = paths, text_key
        self._groups: list[tuple[int, int]] = []  # file number, row group
        self._starts = [0]  # first document of each row group, and the total
        self._held: tuple[int, list[Any]] = (-1, [])  # the row group read last
        for number, path in enumerate(paths):
            try:
                file = parquet.ParquetFile(path)
            except Exception as error:  # pyarrow raises many types; all mean the same here
                raise UserError(f"{path} is not a readable parquet file: {error}") from error
            with file:
                _check_key(file.schema_arrow.names, text_key, path)
                for group in range(file.num_row_groups):
                    self._groups.append((number, group))
                    rows = file.metadata.row_group(group).num_rows
                    self._starts.append(self._starts[-1] + rows)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> str:
        group = self._group_of(index)
        if self._held[0] != group:
            self._held = (group, self._read_group(group))
        row = index - self._starts[group]
        return _field({self._text_key: self._held[1][row]}, self._text_key, self.label(index))

    def label(self, index: int) -> str:
        number = self._groups[self._group_of(index)][0]
        first = next(i for i, (file, _) in enumerate(self._groups) if file == number)
        return f"{self._paths[number]} row {index - self._starts[first]}"

    def _group_of(self, index: int) -> int:
        return bisect.bisect_right(self._starts, index) - 1

    def _read_group(self, group: int) -> list[Any]:
        import pyarrow.parquet as parquet

        number, row_group = self._groups[group]
        try:
            with parquet.ParquetFile(self._paths[number]) as file:
                return file.read_row_group(row_group, columns=[self._text_key])[0].to_pylist()
        except Exception as error:
            raise UserError(
                f"{self._paths[number]}: row group {row_group} cannot be read: {error}"
            ) from error


class ArrayRecordSource(Source):
    """ArrayRecord files whose records are documents in UTF-8."""

    def __init__(self, paths: list[Path]):
        self._records = ShardedRecords(paths, "replace the file")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> str:
        try:
            return self._records[index].decode()
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.label(index)} is not UTF-8 text; write documents as UTF-8 bytes (tokenised "
                f"folders are read with data.prepared)"
            ) from error

    def label(self, index: int) -> str:
        return self._records.label(index)


class ShardedRecords(Sequence[bytes]):
    """Records of several ArrayRecord files in order; a damaged one raises a UserError."""

    def __init__(self, paths: list[Path], remedy: str):
        """`remedy` ends the message about a damaged file: what its reader should do."""
        import grain

        self._paths, self._remedy = paths, remedy
        self._readers, starts = [], [0]
        for path in paths:
            try:
                reader = grain.sources.ArrayRecordDataSource([str(path)])
                starts.append(starts[-1] + len(reader))
            except Exception as error:  # grain raises several types; all mean the same here
                raise self._damaged(path, error) from error
            self._readers.append(reader)
        self._starts = starts

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> bytes:
        shard, record = self._locate(index)
        try:
            return self._readers[shard][record]
        except Exception as error:
            raise self._damaged(self._paths[shard], error) from error

    def label(self, index: int) -> str:
        shard, record = self._locate(index)
        return f"{self._paths[shard]} record {record}"

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = bisect.bisect_right(self._starts, index) - 1
        return shard, index - self._starts[shard]

    def _damaged(self, path: Path, error: Exception) -> UserError:
        return UserError(f"{path} is not a readable ArrayRecord file ({error}); {self._remedy}")


def _find_files(config: SourceConfig) -> list[Path]:
    """The sorted files of a path that is a file, a folder or a glob."""
    pattern = os.path.expanduser(config.path)
    suffix = _SUFFIXES.get(config.kind, "")
    if os.path.isdir(pattern):
        found = sorted(p for p in Path(pattern).rglob(f"*{suffix}") if not _is_hidden(p, pattern))
        what = f"{suffix or 'visible'} files in the folder {config.path}"
    else:
        found = [Path(p) for p in sorted(glob.glob(pattern, recursive=True))]
        what = f"files at {config.path}"
    files = [path for path in found if path.is_file()]
    if not files:
        raise UserError(
            f"data.sources: no {what}; check the path of the {config.kind} corpus "
            f"(a file, a folder or a glob)"
        )
    return files


def _is_hidden(path: Path, root: str) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _installed_python_files(packages: bool) -> list[Path]:
    """The .py files of this installation: the standard library, then what is installed beside."""
    names = ["stdlib", "purelib", "platlib"] if packages else ["stdlib"]
    found: dict[Path, None] = {}
    for root in dict.fromkeys(sysconfig.get_path(name) for name in names):
        found.update(dict.fromkeys(_python_files(root)))
    if not found:
        raise UserError(
            "this Python installation holds no .py files; name another corpus, "
            "e.g. --set data.sources=text:/data/books"
        )
    return list(found)


def _python_files(root: str) -> list[Path]:
    """Sorted .py files under a folder; installed packages inside the standard library left out."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if f not in ("site-packages", "dist-packages")]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(found)


def _line_cuts(path: Path, max_bytes: int | None) -> list[int]:
    """Byte offsets 0 = c_0 < c_1 < ... = size, each inner one just after a line end."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if size == 0:
        return []
    cuts = [0]
    if max_bytes is not None and size > max_bytes:
        with _open(path) as file:
            while cuts[-1] + max_bytes < size:
                file.seek(cuts[-1] + max_bytes)
                file.readline()
                cuts.append(min(file.tell(), size))
    return cuts if cuts[-1] == size else [*cuts, size]


def _open(path: Path):
    try:
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; mend or leave it out") from error


def _read_bytes(path: Path, start: int, stop: int) -> bytes:
    with _open(path) as file:
        file.seek(start)
        return file.read(stop - start)


def _check_key(keys: Sequence[str], text_key: str, where: object) -> None:
    if text_key not in keys:
        raise UserError(
            f"{where}: no field {text_key!r};{did_you_mean(text_key, keys)} it holds "
            f"{', '.join(keys) or 'nothing'}; set text_key (data.sources=KIND:PATH#TEXT_KEY)"
        )


def _field(record: dict[str, Any], text_key: str, where: str) -> str:
    _check_key(list(record), text_key, where)
    text = record[text_key]
    if not isinstance(text, str):
        raise UserError(
            f"{where}: field {text_key!r} holds {type(text).__name__}, not text; "
            f"mend the record or choose another text_key"
        )
    return text
