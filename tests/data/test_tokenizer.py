"""Tokenizer: exact round trips, V3's control tokens and pre-tokenizer, splitting of merges."""

import gzip
import sysconfig
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.data import tokenizer as tk
from dsv3_jax.data.tokenizer import PunctuationSplits, load_tokenizer, train_tokenizer
from dsv3_jax.errors import UserError

RELEASED = Path(__file__).parents[2].parent / "shared/data/deepseek/tokenizer.json.gz"
CONTROL = (tk.BOS, tk.EOS, tk.PAD, tk.FIM_HOLE, tk.FIM_BEGIN, tk.FIM_END)
VOCAB_SIZE = 1500


def _corpus():
    root = Path(sysconfig.get_path("stdlib"))
    names = ("json/decoder.py", "random.py", "ast.py", "typing.py", "argparse.py", "heapq.py")
    return [(root / name).read_text() for name in names]


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer(_corpus(), VOCAB_SIZE)


@pytest.fixture(scope="module")
def released():
    if not RELEASED.exists():
        pytest.skip("the released tokenizer is not on this machine")
    return load_tokenizer(RELEASED)


def _texts():
    pieces = st.sampled_from([*CONTROL, "\r\n", "):\n", "漢字カナ", "12345", "é", "\u0301", "\x00"])
    return st.lists(st.one_of(st.text(), pieces)).map("".join)


def _check_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    control = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, *tokenizer.fim}
    assert not control & set(ids)  # written names are plain text
    assert tokenizer.encode_batch([text, text]) == [ids, ids]


@settings(max_examples=300, deadline=None)
@given(_texts())
def test_trained_round_trip(trained, text):
    _check_round_trip(trained, text)


@settings(max_examples=200, deadline=None)
@given(_texts())
def test_released_round_trip(released, text):
    _check_round_trip(released, text)


def test_trained_ids(trained):
    assert trained.vocab_size == VOCAB_SIZE
    assert (trained.bos_id, trained.eos_id, trained.pad_id) == (0, 1, 2)
    first = VOCAB_SIZE - len(tk.LAST_TOKENS)
    assert (trained.fim.hole, trained.fim.begin, trained.fim.end) == (first, first + 1, first + 2)
    assert trained.control_ids["<｜User｜>"] == first + 3
    assert trained.control_ids["<｜Assistant｜>"] == first + 4
    assert trained.decode([0, *trained.encode("x"), 1]) == f"{tk.BOS}x{tk.EOS}"
    text = _corpus()[0]
    assert len(trained.encode(text)) < len(text) / 2.2  # it learned something
    assert trained.fim is not None and max(trained.encode(text)) < first


def test_control_token_spelling():
    for name in CONTROL:
        assert name.startswith("<\uff5c") and name.endswith("\uff5c>")
        assert "\u2581" in name and not {"|", "_", " "} & set(name)


def test_training_is_deterministic(trained):
    assert train_tokenizer(iter(_corpus()), VOCAB_SIZE).sha256 == trained.sha256


def test_last_tokens_are_in_the_order_of_the_released_ones(trained, released):
    theirs = [released.control_ids[name] for name in tk.LAST_TOKENS]
    assert theirs == sorted(theirs) and len(set(theirs)) == len(theirs)
    for name, i in trained.control_ids.items():
        assert trained.decode([i]) == name


def test_released_ids(released):
    assert (released.bos_id, released.eos_id, released.pad_id) == (0, 1, 2)
    assert (released.fim.hole, released.fim.begin, released.fim.end) == (128800, 128801, 128802)
    assert released.vocab_size == 128815
    released.check_fits(129280)
    with pytest.raises(UserError, match=r"ids up to 128814 .* set model.vocab_size=128896 or data"):
        released.check_fits(128814)


def test_released_encoding_equals_the_library(released):
    backend = tokenizers.Tokenizer.from_str(gzip.decompress(RELEASED.read_bytes()).decode())
    text = _corpus()[0] + "学习 12345 カタカナ!\r\n\r\n"
    assert released.encode(text) == backend.encode(text, add_special_tokens=False).ids


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.one_of(st.text(), st.sampled_from(["漢字かな", "123456", ".foo", " \n\n", "٣٤٥٦"])))
)
def test_pre_tokenizer_equals_the_released_one(trained, released, pieces):
    ours, theirs = trained._backend.pre_tokenizer, released._backend.pre_tokenizer
    text = "".join(pieces)
    assert ours.pre_tokenize_str(text) == theirs.pre_tokenize_str(text)


def test_unknown_ids_decode_to_nothing(trained):
    assert trained.decode([VOCAB_SIZE + 5, *trained.encode("ab")]) == "ab"


def test_small_corpus_gives_a_small_vocabulary_and_all_bytes():
    tokenizer = train_tokenizer(["aaaa bbbb"], 5000)
    assert tk.MIN_VOCAB_SIZE < tokenizer.vocab_size < 300
    text = "".join(map(chr, range(0x300))) + "😀"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    with pytest.raises(UserError, match=r"model.vocab_size=272 is too small .* at least 273"):
        train_tokenizer(["x"], 272)


def test_save_and_load(trained, tmp_path):
    trained.save(tmp_path / "tokenizer.json")
    packed = tmp_path / "tokenizer.json.gz"
    packed.write_bytes(gzip.compress((tmp_path / "tokenizer.json").read_bytes()))
    for path in (tmp_path / "tokenizer.json", packed):
        loaded = load_tokenizer(path)
        assert loaded.sha256 == trained.sha256 and loaded.fim == trained.fim
        assert loaded.encode(_corpus()[1]) == trained.encode(_corpus()[1])


def test_broken_tokenizers(trained, tmp_path):
    with pytest.raises(UserError, match=r"tokenizer .*nowhere\.json cannot be read \(No such"):
        load_tokenizer(tmp_path / "nowhere.json")
    path = tmp_path / "tokenizer.json"
    for text in ("{", '{"added_tokens": []}', "[]"):
        path.write_text(text)
        with pytest.raises(UserError, match=r"tokenizer\.json is not a readable tokenizer\.json"):
            load_tokenizer(path)
    trained.save(path)
    path.write_text(path.read_text().replace(tk.PAD, "<pad>"))
    assert load_tokenizer(path).pad_id == trained.eos_id  # V2's tokenizer has no PAD
    path.write_text(path.read_text().replace(tk.EOS, "<eos>"))
    with pytest.raises(UserError, match=f"lacks the tokens {tk.EOS}"):
        load_tokenizer(path)
    packed = tmp_path / "t.json.gz"
    packed.write_bytes(gzip.compress(b"{}" * 100)[:-12])
    with pytest.raises(UserError, match=r"t\.json\.gz cannot be read"):
        load_tokenizer(packed)


def _is_merged(text):
    head = text.rstrip("\r\n")
    marks = head[1:] if head.startswith(" ") else head
    classes = {unicodedata.category(c)[0] for c in marks}
    return bool(marks) and classes <= {"P", "S"} and head != text


@pytest.mark.parametrize("which", ["trained", "released"])
def test_punctuation_splits(which, request):
    tokenizer = request.getfixturevalue(which)
    splits = PunctuationSplits(tokenizer)
    rng = np.random.default_rng(0)
    merged = np.flatnonzero(splits.lengths_V > 1)
    assert len(merged) > 15
    assert all(_is_merged(tokenizer.decode([i])) for i in merged)
    plain = rng.choice(np.flatnonzero(splits.lengths_V == 1), 3000)
    assert not any(_is_merged(tokenizer.decode([i])) for i in plain)

    ids = rng.permutation(np.concatenate([plain, rng.choice(merged, 3000)])).astype(np.int32)
    text = tokenizer.decode(ids)
    none = splits.random_split(ids, 0.0, rng)
    np.testing.assert_array_equal(none, ids)
    every = splits.random_split(ids, 1.0, rng)
    assert every.dtype == ids.dtype and tokenizer.decode(every) == text
    expected = []
    for i in ids.tolist():
        token = tokenizer.decode([i])
        head = token.rstrip("\r\n")
        pieces = tokenizer.encode(head) + tokenizer.encode(token[len(head) :])
        expected += pieces if i in set(merged.tolist()) else [i]
    assert every.tolist() == expected
    assert not np.isin(every, merged).any()
    some = splits.random_split(ids, 0.3, np.random.default_rng(1))
    assert tokenizer.decode(some) == text
    assert abs(np.isin(some, merged).sum() / 3000 - 0.7) < 0.05
    again = splits.random_split(ids, 0.3, np.random.default_rng(1))
    np.testing.assert_array_equal(some, again)
