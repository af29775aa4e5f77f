"""From sources to a corpus folder: tokenised ArrayRecord shards, a tokenizer and an index.

A corpus folder holds
  index.json          sources, filter reports, and for each shard its documents, tokens, crc32;
                      sealed with its own crc32 (sealed.py)
  tokenizer.json
  SPLIT-SOURCE-SHARD.arrayrecord    a record is one document: token ids, no BOS, no EOS
It is written beside its place and moved there whole.
"""

import contextlib
import dataclasses
import itertools
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax.config import Config
from dsv3_jax.data.filters import NearDuplicates, select_documents
from dsv3_jax.data.sources import Source, open_source
from dsv3_jax.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from dsv3_jax.errors import UserError
from dsv3_jax.sealed import seal

FORMAT = 2  # raise it when the folder's layout or the meaning of its records changes
INDEX, TOKENIZER = "index.json", "tokenizer.json"
SHARD_DOCUMENTS = 16384
SPLITS = ("train", "validation")

# Text that the tokenizer is trained on; more changes few merges.
TRAIN_CHARACTERS_PER_TOKEN = 2000
# At most this share of a source is held out, however many documents were asked for.
MAX_HELD_OUT_SHARE = 0.25
_BATCH_CHARACTERS = 1 << 23  # tokenised at a time

Progress = Callable[[str, int, int], None]  # stage, done, total


def silent(stage: str, done: int, total: int) -> None:
    """Reports nothing."""


@contextlib.contextmanager
def progress_bar() -> Iterator[Progress]:
    """A progress report on the console: one bar a stage, shown while the context is open."""
    from rich import progress as rich_progress
    from rich.console import Console

    columns = (
        rich_progress.TextColumn("{task.description:<20}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeRemainingColumn(),
    )
    bar = rich_progress.Progress(*columns, console=Console(stderr=True))
    tasks: dict[str, rich_progress.TaskID] = {}

    def report(stage: str, done: int, total: int) -> None:
        bar.start()  # on the first report: nothing is shown when nothing is done
        if stage not in tasks:
            tasks[stage] = bar.add_task(stage)
        bar.update(tasks[stage], completed=done, total=total)

    try:
        yield report
    finally:
        if tasks:
            bar.stop()


def evenly_spaced(total: int, count: int) -> np.ndarray:
    """`count` distinct indices below `total` (all of them when there are no more), ascending."""
    count = min(count, total)
    return (np.arange(count, dtype=np.int64) * total) // max(count, 1)


def write_corpus(
    config: Config,
    destination: Path,
    *,
    shard_documents: int = SHARD_DOCUMENTS,
    progress: Progress = silent,
) -> None:
    """Filters, tokenises and writes the corpus of `config` as the folder `destination`.

    Raises:
      UserError: a source is missing, empty or broken, the tokenizer does not fit, or the folder
        exists or cannot be written. Nothing is left behind.
    """
    if destination.exists():
        raise UserError(f"{destination} already exists; delete it or choose another folder")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=destination.parent) as scratch:
            folder = Path(scratch) / "corpus"
            folder.mkdir()
            _write(config, folder, shard_documents, progress)
            folder.rename(destination)
    except OSError as error:
        raise UserError(
            f"cannot write {destination} ({error.strerror or error}); choose a folder that can be "
            f"written (data.cache_dir or --output) or free space"
        ) from error


def _write(config: Config, folder: Path, shard_documents: int, progress: Progress) -> None:
    data = config.data
    tokenizer = None
    if data.tokenizer != "train":  # a wrong path should fail before the long part
        tokenizer = load_tokenizer(data.tokenizer)
        tokenizer.check_fits(config.model.vocab_size)
    sources = [open_source(source) for source in data.sources]
    splits, reports = _select(config, sources, progress)
    if tokenizer is None:
        progress("training tokenizer", 0, 1)
        sample = _training_text(sources, [train for train, _ in splits], config.model.vocab_size)
        tokenizer = train_tokenizer(sample, config.model.vocab_size)
        progress("training tokenizer", 1, 1)
    tokenizer.save(folder / TOKENIZER)

    total, done = sum(len(indices) for split in splits for indices in split), 0

    def advance() -> None:
        nonlocal done
        done += 1
        progress("tokenising", done, total)

    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    entries = []
    for number, source in enumerate(sources):
        entry: dict[str, Any] = dataclasses.asdict(data.sources[number])
        entry["filter"] = reports[number]
        for name, indices in zip(SPLITS, splits[number], strict=True):
            records = _tokenise(source, indices, tokenizer, dtype, advance)
            prefix = f"{name}-{number:02d}"
            entry[name] = _write_shards(folder, prefix, records, dtype, shard_documents)
        entries.append(entry)
    index = {
        "format": FORMAT,
        "dtype": dtype.str,
        "tokenizer": {
            **_file_entry(folder / TOKENIZER),
            "origin": tokenizer.origin,
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
        },
        "sources": entries,
    }
    (folder / INDEX).write_bytes(seal(index))


def _select(
    config: Config, sources: Sequence[Source], progress: Progress
) -> tuple[list[tuple[np.ndarray, np.ndarray]], list[str]]:
    """Documents of each source: (for training, held out), and what was left out in words."""
    data = config.data
    chosen = [evenly_spaced(len(s), data.max_documents or len(s)) for s in sources]
    total, done = sum(map(len, chosen)), 0
    duplicates = NearDuplicates() if data.deduplicate else None

    def advance() -> None:
        nonlocal done
        done += 1
        progress("filtering", done, total)

    bad = 0

    def malformed(error: UserError) -> None:
        nonlocal bad
        bad += 1
        if bad > data.max_bad_fraction * total:
            raise UserError(
                f"{bad:,} of {total:,} records are malformed, more than data.max_bad_fraction="
                f"{data.max_bad_fraction:g}; the last: {error}"
            )

    held_out = -(-data.validation_documents // len(sources))
    splits, reports = [], []
    for number, source in enumerate(sources):
        kept, report = select_documents(
            source,
            chosen[number].tolist(),
            quality=data.filter_quality,
            duplicates=duplicates,
            malformed=malformed if data.on_bad_record == "skip" else None,
            advance=advance,
        )
        where = f"data.sources[{number}] ({data.sources[number].kind}:{data.sources[number].path})"
        if len(kept) < 2:
            raise UserError(
                f"{where} leaves too little to train on: {report}; add text, or set "
                f"data.filter_quality=false or data.deduplicate=false"
            )
        limit = max(1, int(len(kept) * MAX_HELD_OUT_SHARE))
        validation = evenly_spaced(len(kept), min(held_out, limit))
        documents = np.array(kept, np.int64)
        splits.append((np.delete(documents, validation), documents[validation]))
        reports.append(f"{where}: {report}")
    return splits, reports


def _training_text(
    sources: Sequence[Source], indices: Sequence[np.ndarray], vocab_size: int
) -> Iterator[str]:
    """Whole documents, evenly spaced over each source, of bounded size in all."""
    budget = TRAIN_CHARACTERS_PER_TOKEN * vocab_size // len(sources)
    for source, documents in zip(sources, indices, strict=True):
        probe = [len(source[int(i)]) for i in documents[evenly_spaced(len(documents), 64)]]
        count = max(1, budget * len(probe) // max(1, sum(probe)))
        used = 0
        for i in documents[evenly_spaced(len(documents), count)]:
            if used < budget:
                text = source[int(i)][: budget - used]
                used += len(text)
                yield text


def _tokenise(
    source: Source,
    indices: np.ndarray,
    tokenizer: Tokenizer,
    dtype: np.dtype,
    advance: Callable[[], None],
) -> Iterator[bytes]:
    """Token ids of each document, as bytes, in order; many are tokenised at a time."""
    batch: list[str] = []
    size = 0
    for position, index in enumerate(indices):
        batch.append(source[int(index)])
        size += len(batch[-1])
        if size >= _BATCH_CHARACTERS or position == len(indices) - 1:
            for ids in tokenizer.encode_batch(batch):
                yield np.array(ids, dtype).tobytes()
                advance()
            batch, size = [], 0


def _write_shards(
    folder: Path, prefix: str, records: Iterator[bytes], dtype: np.dtype, shard_documents: int
) -> list[dict[str, Any]]:
    """Writes the records in shards of `shard_documents`; returns the shards' index entries."""
    from array_record.python.array_record_module import ArrayRecordWriter

    shards: list[dict[str, Any]] = []
    while True:
        path = folder / f"{prefix}-{len(shards):05d}.arrayrecord"
        # One record a group: a document is read without decompressing its neighbours.
        writer = ArrayRecordWriter(str(path), "group_size:1")
        documents = tokens = 0
        try:
            for record in itertools.islice(records, shard_documents):
                writer.write(record)
                documents += 1
                tokens += len(record) // dtype.itemsize
        finally:
            writer.close()
        if not documents:
            path.unlink()
            return shards
        shards.append({**_file_entry(path), "documents": documents, "tokens": tokens})


def _file_entry(path: Path) -> dict[str, Any]:
    """What the index keeps to recognise a damaged file."""
    return {"file": path.name, "bytes": path.stat().st_size, "crc32": file_crc32(path)}


def file_crc32(path: Path) -> int:
    """The crc32 of a whole file."""
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return checksum
