"""The released tokenizer.json on 10,000 random strings of many scripts (spec §8)."""

import gzip
import random
import shutil
import unicodedata
from pathlib import Path

import pytest
import tokenizers

from dsv3_jax.data.tokenizer import load_tokenizer
from dsv3_jax.errors import UserError

RELEASED = Path(__file__).parents[2].parent / "shared/data/deepseek/tokenizer.json.gz"
pytestmark = pytest.mark.skipif(not RELEASED.exists(), reason="no released tokenizer here")

# Ranges of code points; what is unassigned in them stays in.
RANGES = {
    "ascii": (0x20, 0x7E),
    "controls": (0x00, 0x1F),
    "latin": (0xA0, 0x24F),
    "combining marks": (0x300, 0x36F),
    "greek and cyrillic": (0x370, 0x52F),
    "hebrew and arabic": (0x590, 0x6FF),
    "devanagari": (0x900, 0x97F),
    "thai": (0xE00, 0xE7F),
    "jamo and hangul": (0x1100, 0x11FF),
    "spaces and joiners": (0x2000, 0x206F),
    "symbols": (0x20A0, 0x2BFF),
    "kana": (0x3040, 0x30FF),
    "cjk": (0x4E00, 0x9FFF),
    "hangul": (0xAC00, 0xD7AF),
    "private": (0xE000, 0xF8FF),
    "half and full width": (0xFF00, 0xFFEF),
    "noncharacters": (0xFDD0, 0xFDEF),
    "emoji": (0x1F300, 0x1FAFF),
    "cjk extension": (0x20000, 0x2A6DF),
    "last planes": (0xF0000, 0x10FFFF),
}
PIECES = (
    "\U0001f469\u200d\U0001f469\u200d\U0001f467", "\U0001f3f3\ufe0f\u200d\U0001f308",
    "\U0001f1e9\U0001f1ea", "e\u0301\u0323", "क्षत्रिय", "السَّلام", "漢字かな交じり", "각", "ﬁ", "İ",
    "  ", "\t", "\n", "\r\n", "\n\n \n", " " * 17, "0123456789", "3.14159", "٣٤٥", "１２３",
    "def f(x):\n    return x\n", "if (a<=b) {c++;}\n", "https://x.org/?q=%20", "```py\n", "\ufeff",
)  # fmt: skip
CONTROL = (
    "<｜User｜>",
    "<｜end▁of▁sentence｜>",
    "<｜▁pad▁｜>",
    "</think>",
    "<|EOT|>",
    "<｜tool▁sep｜>",
)


def random_text(rng: random.Random, pieces: tuple[str, ...]) -> str:
    """A few runs, each of one script or one of the pieces, of 0 to about 100 characters."""
    out = []
    for _ in range(rng.randrange(7)):
        if rng.random() < 0.4:
            out.append(rng.choice(pieces) * rng.randint(1, 3))
        else:
            first, last = RANGES[rng.choice(list(RANGES))]
            out.append("".join(chr(rng.randint(first, last)) for _ in range(rng.randint(1, 12))))
    return "".join(out)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(RELEASED)


def test_ten_thousand_strings_round_trip_with_the_librarys_ids(tokenizer):
    rng = random.Random(random.random())  # other strings each time
    texts = [random_text(rng, PIECES) for _ in range(10_000)]
    assert {"Lo", "Mn", "So", "Co", "Cn", "Nd", "Cc"} <= {
        unicodedata.category(c) for text in texts for c in text
    }
    library = tokenizers.Tokenizer.from_str(gzip.decompress(RELEASED.read_bytes()).decode())
    expected = [e.ids for e in library.encode_batch(texts, add_special_tokens=False)]
    for text, ids, batched in zip(texts, expected, tokenizer.encode_batch(texts), strict=True):
        assert tokenizer.encode(text) == ids == batched, ascii(text)
        assert tokenizer.decode(ids) == text, ascii(text)


def test_names_of_control_tokens_round_trip_as_text(tokenizer):
    rng = random.Random(random.random())
    control = set(tokenizer.control_ids.values())
    for _ in range(1_000):
        text = random_text(rng, PIECES) + rng.choice(CONTROL) + random_text(rng, CONTROL)
        ids = tokenizer.encode(text)
        assert not control & set(ids) and tokenizer.decode(ids) == text, ascii(text)


def test_control_ids_of_the_specification(tokenizer):
    ids = tokenizer.control_ids
    assert len(ids) == 3 + (128_814 - 128_000 + 1)
    assert [ids[f"<｜{n}｜>"] for n in ("begin▁of▁sentence", "end▁of▁sentence", "▁pad▁")] == [
        0,
        1,
        2,
    ]
    assert [ids[f"<｜fim▁{name}｜>"] for name in ("hole", "begin", "end")] == [
        128800,
        128801,
        128802,
    ]
    assert (ids["<think>"], ids["</think>"], ids["<|EOT|>"]) == (128798, 128799, 128805)
    assert (ids["<｜User｜>"], ids["<｜Assistant｜>"]) == (128803, 128804)
    assert sorted(i for name, i in ids.items() if "tool" in name) == list(range(128806, 128815))
    for name, i in ids.items():
        assert tokenizer.decode([i]) == name


def test_a_folder_or_a_plain_file_gives_the_same_tokenizer(tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be read"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(gzip.decompress(RELEASED.read_bytes()))
    shutil.copy(RELEASED.with_name("tokenizer_config.json"), tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = load_tokenizer(path)
        assert loaded.sha256 == tokenizer.sha256 and loaded.control_ids == tokenizer.control_ids
