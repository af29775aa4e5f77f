"""The corpus of a run and the rows it is trained on, with an exact position.

The first use of a corpus filters, tokenises and stores it in a cache folder named after
everything its contents depend on; later runs verify and reuse that folder. What may differ from
epoch to epoch happens on the fly: splitting of merged punctuation, fill-in-the-middle, BOS and
EOS, packing (spec §8).
"""

import dataclasses
import fcntl
import hashlib
import json
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import numpy as np

from dsv3_jax.config import Config
from dsv3_jax.data import prepare
from dsv3_jax.data.fim import fill_in_the_middle
from dsv3_jax.data.mixture import mix
from dsv3_jax.data.pack import InterleaveDataset, PackDataset
from dsv3_jax.data.sources import ShardedRecords, list_files
from dsv3_jax.data.tokenizer import LAST_TOKENS, PunctuationSplits, Tokenizer, load_tokenizer
from dsv3_jax.errors import UserError
from dsv3_jax.sealed import unseal

DEFAULT_CACHE = "~/.cache/dsv3_jax"
_TOKENS_AHEAD = 1 << 20  # packed in the background while a step runs
_STREAMS = 64  # documents that a process reads side by side


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A tokenised corpus on disk.

    Attributes:
      train, validation: for each source, the token ids of its documents (no BOS, no EOS).
      weights: for each source, its share of the training tokens, relative to the others.
      tokens: for each source, its training tokens.
      digest: changes with any token of the corpus.
      reports: for each source, one line on what the filters left out.
    """

    folder: Path
    tokenizer: Tokenizer
    train: tuple["TokenShards", ...]
    validation: tuple["TokenShards", ...]
    weights: tuple[float, ...]
    tokens: tuple[int, ...]
    digest: str
    reports: tuple[str, ...]

    def __str__(self) -> str:
        """One line for the console."""
        documents, held_out = sum(map(len, self.train)), sum(map(len, self.validation))
        return (
            f"{documents:,} documents, {sum(self.tokens):,} tokens, {held_out:,} documents held "
            f"out, vocabulary {self.tokenizer.vocab_size:,} ({self.folder})"
            + "".join(f"; {report}" for report in self.reports if " malformed (" in report)
        )


class TokenShards:
    """Random access to the documents of some shards, as integer arrays of token ids."""

    def __init__(self, paths: list[Path], dtype: str, remedy: str):
        self._records, self._dtype = ShardedRecords(paths, remedy), dtype

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> np.ndarray:
        return np.frombuffer(self._records[index], self._dtype).astype(np.int32)


def prepare_corpus(config: Config, *, progress: prepare.Progress = prepare.silent) -> Corpus:
    """Returns the corpus of a config, preparing it unless the cache holds it.

    Args:
      progress: called with (stage, done, total) while the corpus is prepared; see
        `prepare.progress_bar`.

    Raises:
      UserError: a source or the tokenizer is missing, empty, broken or does not fit, the cache
        folder cannot be written, or a stored shard is damaged.
    """
    if config.data.prepared:
        folder = Path(config.data.prepared).expanduser()
        return load_corpus(folder, config, "prepare it again with tools/prepare_data")
    cache = Path(config.data.cache_dir or DEFAULT_CACHE).expanduser()
    folder = cache / f"corpus-{_cache_key(config)}"
    if not folder.exists():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            lock = open(folder.with_suffix(".lock"), "w")
        except OSError as error:
            raise UserError(
                f"data.cache_dir: cannot write {cache} ({error.strerror}); "
                f"set data.cache_dir to a folder that can be written"
            ) from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # a second process waits for the first one's work
            if not folder.exists():
                prepare.write_corpus(config, folder, progress=progress)
    corpus = load_corpus(folder, config, f"delete the folder {folder}; it is then built afresh")
    return dataclasses.replace(corpus, weights=tuple(s.weight for s in config.data.sources))


def load_corpus(folder: Path, config: Config, remedy: str) -> Corpus:
    """Opens a corpus folder after verifying the size and crc32 of every shard.

    Raises:
      UserError: names the missing or damaged file and ends with `remedy`.
    """
    try:
        index = _read_index(folder / prepare.INDEX, remedy)
        dtype, sources = index["dtype"], index["sources"]
        splits = {name: [source[name] for source in sources] for name in prepare.SPLITS}
        shards = [shard for split in splits.values() for source in split for shard in source]
        entries = [index["tokenizer"], *shards]
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda entry: _verify(folder, entry, remedy), entries))
        tokenizer = load_tokenizer(folder / index["tokenizer"]["file"])
        tokenizer.check_fits(config.model.vocab_size)
        train, validation = (
            tuple(TokenShards([folder / x["file"] for x in s], dtype, remedy) for s in split)
            for split in splits.values()
        )
        return Corpus(
            folder=folder,
            tokenizer=tokenizer,
            train=train,
            validation=validation,
            weights=tuple(float(source["weight"]) for source in sources),
            tokens=tuple(sum(x["tokens"] for x in source) for source in splits["train"]),
            digest=_digest([dtype, [entry["crc32"] for entry in entries]]),
            reports=tuple(source["filter"] for source in sources),
        )
    except UserError:
        raise
    except OSError as error:
        raise UserError(
            f"{folder} is not a corpus folder ({error.strerror}: {error.filename}); {remedy}"
        ) from error
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / prepare.INDEX} is damaged ({error!r}); {remedy}") from error


def _read_index(path: Path, remedy: str) -> dict[str, Any]:
    """The index of a corpus folder, as it was written and in today's format."""
    try:
        index = unseal(path.read_bytes())
    except ValueError as error:  # format 1 was not sealed
        raise UserError(f"{path} is damaged ({error}) or of format 1; {remedy}") from None
    if index["format"] != prepare.FORMAT:
        raise UserError(f"{path} has format {index['format']}, not {prepare.FORMAT}; {remedy}")
    return index


def _verify(folder: Path, entry: dict[str, Any], remedy: str) -> None:
    """Compares a file, which must lie in the folder itself, with its index entry."""
    if Path(entry["file"]).name != entry["file"]:
        raise UserError(f"{folder / prepare.INDEX} names {entry['file']!r}, outside; {remedy}")
    path = folder / entry["file"]
    if path.stat().st_size != entry["bytes"] or prepare.file_crc32(path) != entry["crc32"]:
        raise UserError(f"{path} is corrupt: its checksum differs from the index; {remedy}")


def _cache_key(config: Config) -> str:
    """A digest of everything that the tokens depend on."""
    data = config.data
    sources = []
    for source in data.sources:
        # Weights are read from the config, so that changing them keeps the tokens.
        described = source.kind, source.path, source.text_key
        sources.append((described, [_fingerprint(path) for path in list_files(source)]))
    tokenizer: Any = (config.model.vocab_size, LAST_TOKENS)
    if data.tokenizer != "train":
        tokenizer = load_tokenizer(data.tokenizer).sha256
    filters = (data.deduplicate, data.filter_quality, data.max_documents, data.validation_documents)
    if data.on_bad_record == "skip":  # one that skipped records is none that had to have all
        filters += ("skip",)
    return _digest((prepare.FORMAT, sources, tokenizer, filters))


def _fingerprint(path: Path) -> tuple[str, int, int]:
    status = path.stat()
    return str(path.absolute()), status.st_size, status.st_mtime_ns


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


class _Finish:
    """Turns stored ids into what is trained on: BOS, the document, EOS (spec §8)."""

    def __init__(self, config: Config, tokenizer: Tokenizer):
        data = config.data
        self._fim_rate, self._split_rate = data.fim_rate, data.punctuation_split_rate
        if data.fim_rate and tokenizer.fim is None:
            raise UserError(
                f"{tokenizer.origin} has no fill-in-the-middle tokens; set data.fim_rate=0"
            )
        self._fim = tokenizer.fim
        self._splits = PunctuationSplits(tokenizer)
        self._bos_id, self._eos_id = tokenizer.bos_id, tokenizer.eos_id

    def __call__(self, ids_X: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if self._split_rate:
            ids_X = self._splits.random_split(ids_X, self._split_rate, rng)
        if self._fim is not None and rng.random() < self._fim_rate:
            ids_X = fill_in_the_middle(ids_X, self._fim, rng)
        return _delimit(ids_X, self._bos_id, self._eos_id)


def _delimit(ids_X: np.ndarray, bos_id: int, eos_id: int) -> np.ndarray:
    return np.concatenate([[bos_id], ids_X, [eos_id]]).astype(np.int32)


def train_dataset(
    config: Config, corpus: Corpus, *, process_index: int = 0, process_count: int = 1
) -> grain.IterDataset:
    """The endless dataset of training rows; `train_iterator` adds reading ahead.

    The documents of all processes form one order, from which process p takes every
    process_count-th. Those it deals to streams that are packed one by one and take turns: the rows
    of a batch come from different documents. A document's random choices depend on the seed and
    its place in the order.
    """
    order_seed, document_seed = np.random.SeedSequence(config.run.seed).generate_state(2)
    documents = mix(
        [grain.MapDataset.source(shards) for shards in corpus.train],
        corpus.weights,
        [t / len(s) for t, s in zip(corpus.tokens, corpus.train, strict=True)],
        int(order_seed),
    )
    finish = _Finish(config, corpus.tokenizer)
    documents = documents.random_map(finish, seed=int(document_seed))
    own = documents[process_index::process_count]
    # The thread that packs also reads: a read is a fraction of the packing.
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    data = config.data
    return InterleaveDataset(
        [
            PackDataset(
                own[i::_STREAMS].to_iter_dataset(options),
                data.sequence_length,
                data.separate_documents,
            )
            for i in range(_STREAMS)
        ]
    )


class RowIterator:
    """Endless training rows, read ahead in a background thread, with an exact position."""

    def __init__(
        self, dataset: grain.IterDataset, order: dict[str, Any], folder: Path, tokens_per_row: int
    ):
        """`order` is what a saved position is meaningful for; `folder` is the corpus."""
        ahead = max(2, _TOKENS_AHEAD // tokens_per_row)
        dataset = grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=ahead)
        self._order, self._folder = order, str(folder)
        # The reading thread must end before the interpreter takes its modules apart.
        self._held = [iter(dataset)]
        self._finalizer = weakref.finalize(self, _close, self._held)

    def next_rows(self, count: int) -> dict[str, np.ndarray]:
        """The next rows: int32 [count, T+1] "tokens" and, for separate documents, "segments"."""
        rows = [next(self._rows) for _ in range(count)]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def get_state(self) -> dict[str, Any]:
        """The position after the rows returned so far, as JSON values."""
        position = self._rows.get_state()
        return {"order": self._order, "folder": self._folder, "position": position}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from a position; the rows that follow are bit-identical.

        Raises:
          UserError: the position belongs to another corpus, seed, mixture or process.
        """
        saved = state["order"]
        if saved["corpus"] != self._order["corpus"]:
            raise UserError(
                f"the text, filters or tokenizer changed since the checkpoint was saved; read its "
                f"corpus with data.prepared={state['folder']}, or set checkpoint.restore=false"
            )
        for key, value in self._order.items():
            if saved[key] != value:
                raise UserError(
                    f"the saved data position has {key}={saved[key]} but this run has {value}; "
                    f"restore the setting, or start over with checkpoint.restore=false"
                )
        self._rows.set_state(state["position"])

    def close(self) -> None:
        """Ends the background thread."""
        self._finalizer()

    @property
    def _rows(self) -> grain.DatasetIterator:
        return self._held[0]


def _close(held: list[grain.DatasetIterator]) -> None:
    held.pop().close()


def train_iterator(
    config: Config, corpus: Corpus, *, process_index: int = 0, process_count: int = 1
) -> RowIterator:
    """This process's training rows. Processes take disjoint documents of one common order.

    A position belongs to one process and one number of processes; the sequence length and the
    rates of `data` may change between saving and restoring it.
    """
    dataset = train_dataset(
        config, corpus, process_index=process_index, process_count=process_count
    )
    order = {
        "corpus": corpus.digest,
        "mixture": list(corpus.weights),
        "seed": config.run.seed,
        "process_index": process_index,
        "process_count": process_count,
    }
    return RowIterator(dataset, order, corpus.folder, config.data.sequence_length)


def validation_rows(config: Config, corpus: Corpus, count: int) -> dict[str, np.ndarray]:
    """`count` fixed rows of the held-out documents, evenly spaced over all of them.

    No fill-in-the-middle, no random splitting, the same on every process. Rows repeat when the
    held-out documents fill fewer than `count`.

    Returns:
      int32 [count, T+1] arrays as of `RowIterator.next_rows`.

    Raises:
      UserError: nothing is held out, or it does not fill one row.
    """
    tokenizer = corpus.tokenizer
    documents = [
        _delimit(shards[i], tokenizer.bos_id, tokenizer.eos_id)
        for shards in corpus.validation
        for i in range(len(shards))
    ]
    rows: Sequence[dict[str, np.ndarray]] = []
    if documents:
        rows = list(
            PackDataset(
                grain.MapDataset.source(documents).to_iter_dataset(),
                config.data.sequence_length,
                config.data.separate_documents,
            )
        )
    if not rows:
        raise UserError(
            f"the {len(documents)} held-out documents do not fill one row of data.sequence_length="
            f"{config.data.sequence_length}; raise data.validation_documents or add text"
        )
    places = [i * len(rows) // count if count <= len(rows) else i % len(rows) for i in range(count)]
    return {name: np.stack([rows[place][name] for place in places]) for name in rows[0]}
