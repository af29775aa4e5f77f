"""Filters: what they drop, what they must keep, and the report."""

import base64
import sysconfig
import time
from pathlib import Path

import numpy as np
import pytest

from dsv3_jax.config import SourceConfig
from dsv3_jax.data.filters import (
    MAX_CHARACTERS,
    MIN_CHARACTERS,
    NearDuplicates,
    quality_problem,
    select_documents,
    shingle_hashes,
)
from dsv3_jax.data.sources import TextSource, open_source

_RNG = np.random.default_rng(7)
_WORDS = ["".join(_RNG.choice(list("abcdefghijklmnop"), n)) for n in _RNG.integers(2, 9, 2000)]


def _document(rng, words=400):
    picked = rng.choice(_WORDS, words)
    return "\n".join(" ".join(picked[i : i + 8]) for i in range(0, words, 8))


def _change_words(text, rng, share):
    words = text.split(" ")
    for i in rng.choice(len(words), int(share * len(words)), replace=False):
        words[i] = rng.choice(_WORDS)
    return " ".join(words)


def test_quality_problems():
    rng = np.random.default_rng(0)
    good = _document(rng)
    noise = rng.integers(0, 256, 30_000, np.uint8).tobytes()
    assert quality_problem(good) is None
    assert quality_problem(good[: MIN_CHARACTERS - 1]) == "too short"
    assert quality_problem(good[:MIN_CHARACTERS]) is None
    long = "\n".join(_document(rng, 4000) for _ in range(60))
    assert len(long) > MAX_CHARACTERS and quality_problem(long) == "too long"
    line = good.splitlines()[0]
    assert quality_problem("\n".join([line] * 40)) == "repetitive"
    assert quality_problem(" " * 5000) == "repetitive"
    assert quality_problem("".join(f"{i:04}," for i in range(30)) * 100) == "repetitive"
    assert quality_problem(base64.b64encode(noise).decode()) == "incompressible"


def test_quality_keeps_the_standard_library_and_chinese():
    root = Path(sysconfig.get_path("stdlib"))
    for name in ("json/decoder.py", "random.py", "asyncio/events.py", "typing.py", "ast.py"):
        assert quality_problem((root / name).read_text()) is None, name
    common = [chr(c) for c in np.random.default_rng(1).integers(0x4E00, 0x5200, 500)]
    assert quality_problem("".join(np.random.default_rng(2).choice(common, 3000))) is None


@pytest.mark.parametrize("seed", range(5))
def test_near_duplicates_follow_the_jaccard_similarity(seed):
    rng = np.random.default_rng(seed)
    duplicates, original = NearDuplicates(), _document(rng)
    assert not duplicates.seen(original)
    assert duplicates.seen(original)
    assert duplicates.seen(original.replace("\n", "  \n\t"))  # blanks do not count
    for share, expected in ((0.005, True), (0.3, False)):
        changed = _change_words(original, rng, share)
        a, b = ({*shingle_hashes(t).tolist()} for t in (original, changed))
        similarity = len(a & b) / len(a | b)
        assert similarity > 0.93 if expected else similarity < 0.5
        assert duplicates.seen(changed) == expected
    assert not duplicates.seen(_document(rng))


def test_similar_documents_below_the_threshold_are_kept():
    """Where the index alone would propose several of them."""
    rng, similarities = np.random.default_rng(11), []
    for _ in range(150):
        duplicates, original = NearDuplicates(), _document(rng)
        changed = _change_words(original, rng, 0.053)
        a, b = ({*shingle_hashes(t).tolist()} for t in (original, changed))
        similarities.append(len(a & b) / len(a | b))
        assert not duplicates.seen(original) and not duplicates.seen(changed)
    assert 0.6 < np.mean(similarities) < 0.7


def test_near_duplicates_without_blanks():
    rng = np.random.default_rng(3)
    text = "".join(chr(c) for c in rng.integers(0x4E00, 0x9FA5, 2000))
    duplicates = NearDuplicates()
    assert not duplicates.seen(text)
    assert duplicates.seen(text[:1000] + "改" + text[1000:])
    assert not duplicates.seen(text[::-1])


def test_shingles_equal_a_plain_reading():
    rng = np.random.default_rng(4)
    words = list(rng.choice(["a", "bb", "c"], 60))
    runs = {tuple(words[i : i + 5]) for i in range(56)}
    hashes = shingle_hashes(" ".join(words))
    assert len(hashes) == len(runs) < 56  # equal runs have equal hashes, others differ
    for text in ("", "one", "one two three four"):
        assert len(shingle_hashes(text)) == bool(text)


def test_select_reports_every_document(tmp_path):
    rng = np.random.default_rng(5)
    first, second = _document(rng), _document(rng)
    contents = {"a": first, "b": "short", "c": first, "d": second, "e": "brief", "f": "x"}
    for name, text in contents.items():
        (tmp_path / f"{name}.txt").write_text(text)
    source = TextSource(sorted(tmp_path.iterdir()))
    seen = []
    kept, report = select_documents(
        source,
        range(6),
        quality=True,
        duplicates=NearDuplicates(),
        advance=lambda: seen.append(1),
    )
    assert kept == [0, 3] and len(seen) == 6
    assert (report.read, report.kept) == (6, 2)
    assert report.dropped == {"too short": 3, "near-duplicate": 1}
    line = str(report)
    assert line.startswith("6 documents read, 2 kept; left out: 3 too short (")
    assert "b.txt" in line and "1 near-duplicate (" in line and "\n" not in line
    kept, _ = select_documents(source, range(6), quality=False, duplicates=None)
    assert kept == list(range(6))


def test_speed():
    """5,000 documents of standard-library size in well under 20 s of one core."""
    source = open_source(SourceConfig())
    texts = [source[i] for i in range(0, len(source), 6)]
    duplicates = NearDuplicates()
    start = time.process_time()
    for text in texts:
        quality_problem(text)
        duplicates.seen(text)
    assert (time.process_time() - start) / len(texts) * 5000 < 20
