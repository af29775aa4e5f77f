"""Fuzzing for a given time: DSV3_FUZZ_SECONDS a target, with other examples every time.

Unless it is set, one second and always the same examples.

DSV3_FUZZ_SECONDS=600 pytest -s tests/reliability/test_fuzz_files.py tests/serve/test_fuzz_http.py
"""

import os
import time
from collections.abc import Callable

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

SECONDS = float(os.environ.get("DSV3_FUZZ_SECONDS", "1"))
_SEED = time.time_ns() if "DSV3_FUZZ_SECONDS" in os.environ else 0
_PIECES = (b"", b"\0", b"\xff", b"-1", b"1e999", b"NaN", b"null", b"[", b"{", b'"', b"[" * 100_000)


def damaged(good: bytes) -> st.SearchStrategy[bytes]:
    """A valid file with a few stretches replaced, and perhaps cut short; or any bytes at all."""
    piece = st.binary(max_size=4) | st.sampled_from(_PIECES)
    edit = st.tuples(st.integers(0, len(good)), st.integers(0, 12), piece)

    def apply(edits: list, kept: int) -> bytes:
        content = good
        for start, length, new in edits:
            content = content[:start] + new + content[start + length :]
        return content[:kept]

    lengths = st.just(1 << 30) | st.integers(0, len(good))
    edited = st.builds(apply, st.lists(edit, min_size=1, max_size=4), lengths)
    return edited | st.binary(max_size=200)


def fuzz(target: str, examples: st.SearchStrategy, check: Callable[[object], None]) -> None:
    """Calls `check` with examples until the time is over; it raises on what must not happen."""
    tried, end = 0, time.monotonic() + SECONDS

    def counted(example: object) -> None:
        nonlocal tried
        tried += 1
        check(example)

    quiet = settings(
        max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    while time.monotonic() < end:
        seed(_SEED + tried)(quiet(given(examples)(counted)))()
    print(f"\n{target}: {tried:,} examples in {SECONDS:g} s, no crash")
    assert tried >= 20
