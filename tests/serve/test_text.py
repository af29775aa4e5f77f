"""Text of tokens as they arrive: the tokenizer's own text, however it is cut, up to a stop."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.serve.text import TextStream, TokenBytes

CORPUS = ["naïve café, größer 中文字符 テスト 🙂🙃 👩‍👩‍👧 def f(x):\n    return x\n"] * 20


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(CORPUS, 340)


def stream_text(parts, stops=()):
    """The pieces that a stream gives, up to its stop."""
    stream, pieces = TextStream(stops), []
    for part in parts:
        pieces.append(stream.push(part))
        if stream.stopped:
            break
    return stream, [*pieces, stream.finish()]


def test_any_ids_read_as_the_tokenizer_reads_them(tokenizer):
    token_bytes, rng = TokenBytes(tokenizer), np.random.default_rng(0)
    for length in range(1, 60):  # most of them are not UTF-8
        ids = rng.integers(0, tokenizer.vocab_size + 5, length)
        _, pieces = stream_text([token_bytes[i] for i in ids])
        assert "".join(pieces) == tokenizer.decode(ids)
    text = CORPUS[0]
    _, pieces = stream_text([token_bytes[i] for i in tokenizer.encode(text)])
    assert "".join(pieces) == text


@given(st.binary(max_size=40), st.data())
@settings(deadline=None, max_examples=300)
def test_bytes_may_be_cut_anywhere(data, draw):
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(data)), max_size=6)))
    parts = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    stream, pieces = stream_text(parts)
    assert "".join(pieces) == data.decode("utf-8", "replace")
    assert stream.num_characters == len("".join(pieces)) and not stream.stopped


def test_a_character_waits_for_its_last_byte():
    stream = TextStream()
    assert [stream.push(bytes([byte])) for byte in "é🙂".encode()] == ["", "é", "", "", "", "🙂"]


def first_stop(text, stops):
    """The text before the stop string that is complete first, read by characters."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return None


@given(
    st.text("abé", max_size=14),
    st.lists(st.text("abé", min_size=1, max_size=4), max_size=3),
    st.data(),
)
@settings(deadline=None, max_examples=500)
def test_a_stop_string_cuts_the_same_text_in_any_parts(text, stops, draw):
    data = text.encode()
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(data)), max_size=8)))
    parts = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    stream, pieces = stream_text(parts, stops)
    expected = first_stop(text, stops)
    assert stream.stopped == (expected is not None)
    assert "".join(pieces) == (text if expected is None else expected)


def test_only_what_may_begin_a_stop_waits():
    stream = TextStream(["\n\nEnd", "###"])
    assert stream.push(b"one\n") == "one"
    assert stream.push(b"two #") == "\ntwo "
    assert stream.push(b" three\n\nEn") == "# three"
    assert stream.finish() == "\n\nEn" and not stream.stopped
