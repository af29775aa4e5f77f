"""What is left out of a corpus: near-duplicates (MinHash) and documents of poor quality.

Every document left out is counted in a `FilterReport`. The thresholds are ours; the report says
only that the corpus was filtered and deduplicated.
"""

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
from datasketch import MinHash, MinHashLSH

from dsv3_jax.data.sources import Source
from dsv3_jax.errors import UserError

MIN_CHARACTERS = 128
MAX_CHARACTERS = 1_000_000
MAX_REPEATED_SHARE = 0.6  # characters in lines that already occurred in the document
MIN_COMPRESSED_SHARE = 0.08  # zlib's output over its input: below, a table or filler
MAX_COMPRESSED_SHARE = 0.7  # above, an encoded blob; base64 of random bytes gives 0.76
MIN_BLOB_BYTES = 1024  # shorter texts compress badly, whatever they say
COMPRESSED_BYTES = 1 << 18  # zlib reads at most this much of a document

SHINGLE_WORDS = 5
NUM_PERMUTATIONS = 128
SIMILARITY = 0.8  # Jaccard similarity of the shingle sets from which two documents are the same
# A text with fewer blanks than this has no words to speak of (Chinese, Japanese).
MAX_WORD_CHARACTERS = 32

_EXAMPLES = 3


@dataclass
class FilterReport:
    """How many documents were read and kept, and how many were left out for which reason."""

    read: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> documents
    examples: dict[str, list[str]] = field(default_factory=dict)  # reason -> a few labels

    def drop(self, reason: str, label: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        shown = self.examples.setdefault(reason, [])
        if len(shown) < _EXAMPLES:
            shown.append(label)

    def __str__(self) -> str:
        """One line, e.g. `400 documents read, 371 kept; left out: 20 too short (a.py, b.py)`."""
        parts = [
            f"{count} {reason} ({', '.join(self.examples[reason])})"
            for reason, count in sorted(self.dropped.items(), key=lambda item: -item[1])
        ]
        left_out = f"; left out: {', '.join(parts)}" if parts else ""
        return f"{self.read} documents read, {self.kept} kept{left_out}"


def quality_problem(text: str) -> str | None:
    """The reason to leave a document out, or None."""
    if len(text) < MIN_CHARACTERS:
        return "too short"
    if len(text) > MAX_CHARACTERS:
        return "too long"
    lines = [line for line in map(str.strip, text.splitlines()) if line]
    total = sum(map(len, lines))
    if total - sum(map(len, set(lines))) > MAX_REPEATED_SHARE * total:
        return "repetitive"
    data = text.encode()[:COMPRESSED_BYTES]
    share = len(zlib.compress(data, 1)) / len(data)
    if share < MIN_COMPRESSED_SHARE:
        return "repetitive"
    if share > MAX_COMPRESSED_SHARE and len(data) >= MIN_BLOB_BYTES:
        return "incompressible"
    return None


class NearDuplicates:
    """Remembers documents and recognises those that nearly repeat one of them."""

    def __init__(self) -> None:
        # Shingles arrive as 32-bit hashes; copying the template shares its permutations.
        self._template = MinHash(num_perm=NUM_PERMUTATIONS, hashfunc=int)
        self._index = MinHashLSH(threshold=SIMILARITY, num_perm=NUM_PERMUTATIONS)
        self._sketches: list[MinHash] = []

    def seen(self, text: str) -> bool:
        """True when a remembered document is similar; else remembers this one."""
        sketch = self._template.copy()
        sketch.update_batch(shingle_hashes(text).tolist())
        # The index answers with candidates; the sketches themselves settle it.
        for candidate in self._index.query(sketch):
            if self._sketches[candidate].jaccard(sketch) >= SIMILARITY:
                return True
        self._index.insert(len(self._sketches), sketch)
        self._sketches.append(sketch)
        return False


def shingle_hashes(text: str) -> np.ndarray:
    """Distinct uint32 hashes of all runs of SHINGLE_WORDS words (characters without blanks)."""
    words = text.encode().split()
    if len(words) * MAX_WORD_CHARACTERS < len(text):
        units_X = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    else:
        units_X = np.fromiter(map(zlib.crc32, words), np.uint32, len(words))
    # A shorter text is one run.
    size = max(1, min(SHINGLE_WORDS, len(units_X)))
    count = len(units_X) - size + 1
    hashes = np.zeros(count, np.uint32)
    for i in range(size):
        hashes = (hashes ^ (hashes >> np.uint32(15))) * np.uint32(0x9E3779B1)
        hashes = hashes + units_X[i : i + count]
    return np.unique(hashes)


def select_documents(
    source: Source,
    indices: Iterable[int],
    *,
    quality: bool,
    duplicates: NearDuplicates | None,
    malformed: Callable[[UserError], None] | None = None,
    advance: Callable[[], None] = lambda: None,
) -> tuple[list[int], FilterReport]:
    """Returns the indices of the documents to keep, in order, and what was left out.

    Args:
      indices: the documents to look at.
      quality: applies `quality_problem`.
      duplicates: what earlier sources held; extended by this one. None keeps duplicates.
      malformed: takes the error of a record that cannot be read, which is then left out; it may
        raise. None: the error is raised.
      advance: called after each document.
    """
    report, kept = FilterReport(), []
    for index in indices:
        report.read += 1
        try:
            text = source[index]
        except UserError as error:
            if malformed is None:
                raise
            malformed(error)
            report.drop("malformed", source.label(index))
            advance()
            continue
        reason = "empty" if not text else quality_problem(text) if quality else None
        if reason is None and duplicates is not None and duplicates.seen(text):
            reason = "near-duplicate"
        if reason is None:
            kept.append(index)
        else:
            report.drop(reason, source.label(index))
        advance()
    report.kept = len(kept)
    return kept, report
