"""The corpus of a run: cache, verification, held-out documents, and exact training rows."""

import dataclasses
import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import grain
import numpy as np
import pytest

from dsv3_jax.config import DataConfig, SourceConfig
from dsv3_jax.configs.tiny import tiny
from dsv3_jax.data import pipeline, prepare
from dsv3_jax.data.pipeline import (
    prepare_corpus,
    train_dataset,
    train_iterator,
    validation_rows,
)
from dsv3_jax.errors import UserError
from dsv3_jax.sealed import seal, unseal

DOCUMENTS = 120
ROOT = Path(__file__).parents[2]


def _texts(name, count=DOCUMENTS):
    """Distinct documents that pass the filters; each starts with its own name."""
    rng = np.random.default_rng(list(name.encode()))
    words = ["".join(rng.choice(list("abcdefghij"), n)) for n in rng.integers(2, 8, 500)]
    sizes = rng.integers(40, 120, count)
    return [f"{name}{i}):\n" + " ".join(rng.choice(words, sizes[i])) + ");\n" for i in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two jsonl corpora."""
    folder = tmp_path_factory.mktemp("corpus")
    for name in ("alpha", "beta"):
        lines = [json.dumps({"text": text}) for text in _texts(name)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def _config(folder, *names, cache=None, seed=0, weights=(1.0, 1.0), **data):
    config = tiny()
    sources = tuple(
        SourceConfig(kind="jsonl", path=str(folder / f"{name}.jsonl"), weight=weight)
        for name, weight in zip(names, weights, strict=False)
    )
    settings = dict(
        sources=sources,
        cache_dir=str(cache or folder / "cache"),
        sequence_length=32,
        validation_documents=20,
    )
    return dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, seed=seed),
        model=dataclasses.replace(config.model, vocab_size=512),
        data=DataConfig(**settings | data),
    )


@pytest.fixture(scope="module")
def one(folder):
    """A config with one source and nothing random but the order, and its corpus."""
    config = _config(folder, "alpha", fim_rate=0.0, punctuation_split_rate=0.0)
    return config, prepare_corpus(config)


@pytest.fixture(scope="module")
def two(folder):
    config = _config(folder, "alpha", "beta", fim_rate=0.3, separate_documents=True)
    return config, prepare_corpus(config)


def _decoded(corpus, split):
    return [corpus.tokenizer.decode(shards[i]) for shards in split for i in range(len(shards))]


def _documents(config, corpus, count, **processes):
    """The texts of the first `count` documents of the order, which is dealt to the streams."""
    tokenizer, num_streams = corpus.tokenizer, pipeline._STREAMS
    held, streams = ([[] for _ in range(num_streams)] for _ in range(2))
    for i, row in enumerate(train_dataset(config, corpus, **processes)):
        ids, documents = held[i % num_streams], streams[i % num_streams]
        for token in row["tokens"][:-1].tolist():
            ids.append(token)
            if token == tokenizer.eos_id:
                assert ids[0] == tokenizer.bos_id  # BOS document EOS
                documents.append(tokenizer.decode(ids[1:-1]))
                ids.clear()
        if sum(map(len, streams)) >= count:
            places = [divmod(n, num_streams) for n in range(count)]
            if all(turn < len(streams[stream]) for turn, stream in places):
                return [streams[stream][turn] for turn, stream in places]
    raise AssertionError("the stream ended")


def test_corpus_holds_every_document_once(one):
    _, corpus = one
    train, held_out = _decoded(corpus, corpus.train), _decoded(corpus, corpus.validation)
    assert len(held_out) == 20 and not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(_texts("alpha"))
    # Held-out documents are spread over the corpus.
    places = [_texts("alpha").index(text) for text in held_out]
    assert places == sorted(places) and max(np.diff(places)) <= 6 and places[0] < 6
    assert corpus.tokens == (sum(len(corpus.train[0][i]) for i in range(100)),)


def test_training_never_sees_held_out_documents(one):
    config, corpus = one
    n = len(corpus.train[0])
    stream = _documents(config, corpus, 3 * n)
    assert not set(stream) & set(_decoded(corpus, corpus.validation))
    epochs = [stream[i * n : (i + 1) * n] for i in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(_decoded(corpus, corpus.train))
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != epochs[2]
    other = dataclasses.replace(config, run=dataclasses.replace(config.run, seed=1))
    assert _documents(other, corpus, n) != epochs[0]


def test_processes_share_one_order_without_overlap(one):
    config, corpus = one
    data = dataclasses.replace(config.data, fim_rate=0.3, punctuation_split_rate=0.5)
    config = dataclasses.replace(config, data=data)
    everything = _documents(config, corpus, len(corpus.train[0]))
    assert len(set(everything)) == len(everything)
    for count in (2, 4):
        parts = [
            _documents(
                config, corpus, len(everything) // count, process_index=i, process_count=count
            )
            for i in range(count)
        ]
        for i, part in enumerate(parts):
            assert part == everything[i::count]


def test_rows_side_by_side_come_from_different_documents(one):
    config, corpus = one
    rows = train_iterator(config, corpus).next_rows(pipeline._STREAMS)["tokens"]
    assert all(rows[:, 0] == corpus.tokenizer.bos_id)
    texts = [corpus.tokenizer.decode(row[1:]) for row in rows]
    assert len({text.partition(")")[0] for text in texts}) == len(texts)


def test_fim_and_splits_differ_by_epoch_and_keep_the_text(folder):
    config = _config(folder, "alpha", fim_rate=0.25, punctuation_split_rate=0.5)
    corpus = prepare_corpus(config)
    tokenizer, n = corpus.tokenizer, len(corpus.train[0])
    hole, begin, end = (tokenizer.decode([i]) for i in (tokenizer.fim.hole, *tokenizer.fim[::2]))
    stream = _documents(config, corpus, 20 * n)
    plain, used = [], Counter()
    for i, text in enumerate(stream):
        if text.startswith(begin):
            used[i // n] += 1
            prefix, _, rest = text.removeprefix(begin).partition(hole)
            suffix, _, middle = rest.partition(end)
            text = prefix + middle + suffix
        plain.append(text)
    assert set(plain) == set(_decoded(corpus, corpus.train))
    assert abs(sum(used.values()) / len(stream) - 0.25) < 0.04
    assert len(set(used.values())) > 3  # the choice is made anew in each epoch
    # Half of the merged tokens are split: `):` and the line break are then two tokens.
    merged = [t for t in (tokenizer.encode(s) for s in ("):\n", ");\n")) if len(t) == 1]
    assert merged, "the tokenizer merged no punctuation with a line break"
    rows = train_iterator(config, corpus).next_rows(3000)["tokens"]
    stored = np.concatenate([corpus.train[0][i] for i in range(n)])
    rate = np.isin(rows, merged).mean() / np.isin(stored, merged).mean()
    assert 0.4 < rate < 0.6


def test_position_is_exact_at_every_step(two):
    dataset = grain.experimental.LimitIterDataset(train_dataset(*two), count=60)
    grain.experimental.assert_equal_output_after_checkpoint(dataset)


def test_iterator_continues_bit_identically_while_reading_ahead(two):
    config, corpus = two
    assert len(corpus.train) == 2
    iterator = train_iterator(config, corpus)
    states, batches = [], []
    for count in (1, 7, 64, 3, 200, 5):
        states.append(json.loads(json.dumps(iterator.get_state())))
        batches.append(iterator.next_rows(count))
        assert set(batches[-1]) == {"tokens", "segments"}
        for rows in batches[-1].values():
            assert rows.shape == (count, 33) and rows.dtype == np.int32
    for start, state in enumerate(states):
        for resumed in (train_iterator(config, corpus), iterator):  # fresh, and wound back
            resumed.set_state(state)
            assert resumed.get_state() == state
            for batch in batches[start:]:
                rows = resumed.next_rows(len(batch["tokens"]))
                np.testing.assert_equal(rows, batch)
        iterator.set_state(states[-1])
    iterator.close()


def test_position_of_something_else_is_refused(one, two):
    config, corpus = one
    state = train_iterator(config, corpus).get_state()
    reseeded = dataclasses.replace(config, run=dataclasses.replace(config.run, seed=3))
    with pytest.raises(UserError, match="has seed=0 but this run has 3; restore the setting"):
        train_iterator(reseeded, corpus).set_state(state)
    with pytest.raises(UserError, match="process_count=1 but this run has 2"):
        train_iterator(config, corpus, process_count=2).set_state(state)
    with pytest.raises(UserError, match=f"data.prepared={corpus.folder}"):
        train_iterator(*two).set_state(state)


def test_validation_rows(one):
    config, corpus = one
    rows = validation_rows(config, corpus, 6)["tokens"]
    assert rows.shape == (6, 33) and rows.dtype == np.int32
    noisy = dataclasses.replace(
        config, data=dataclasses.replace(config.data, fim_rate=1.0, punctuation_split_rate=1.0)
    )
    np.testing.assert_array_equal(validation_rows(noisy, corpus, 6)["tokens"], rows)
    bos, eos = corpus.tokenizer.bos_id, corpus.tokenizer.eos_id
    stream = [t for i in range(20) for t in [bos, *corpus.validation[0][i].tolist(), eos]]
    total = (len(stream) - 1) // 32
    for i, row in enumerate(rows):
        start = (i * total // 6) * 32
        assert row.tolist() == stream[start : start + 33]
    many = validation_rows(config, corpus, total + 2)["tokens"]
    np.testing.assert_array_equal(many[total:], many[:2])
    long = dataclasses.replace(config, data=dataclasses.replace(config.data, sequence_length=9**6))
    with pytest.raises(UserError, match=r"the 20 held-out documents do not fill one row"):
        validation_rows(long, corpus, 1)


def test_small_corpora_keep_three_quarters_for_training(folder, tmp_path):
    config = _config(folder, "alpha", cache=tmp_path, max_documents=8, validation_documents=64)
    corpus = prepare_corpus(config)
    assert (len(corpus.train[0]), len(corpus.validation[0])) == (6, 2)
    assert {t.partition(")")[0] for t in _decoded(corpus, corpus.train + corpus.validation)} == {
        f"alpha{i * DOCUMENTS // 8}" for i in range(8)
    }
    config = _config(folder, "alpha", cache=tmp_path, max_documents=8, validation_documents=0)
    corpus = prepare_corpus(config)
    assert (len(corpus.train[0]), len(corpus.validation[0])) == (8, 0)
    with pytest.raises(UserError, match=r"the 0 held-out documents .* data.validation_documents"):
        validation_rows(config, corpus, 1)


def test_cache_is_reused_exactly_when_the_tokens_are_the_same(one, folder, monkeypatch, tmp_path):
    config, corpus = one

    def change(**data):
        return dataclasses.replace(config, data=dataclasses.replace(config.data, **data))

    monkeypatch.setattr(prepare, "write_corpus", lambda *a, **k: pytest.fail("not reused"))
    same = [
        config,
        change(fim_rate=0.7, sequence_length=99),
        change(sources=(dataclasses.replace(config.data.sources[0], weight=9.0),)),
    ]
    for variant in same:
        reused = prepare_corpus(variant)
        assert reused.digest == corpus.digest and reused.folder == corpus.folder
        assert reused.weights == (variant.data.sources[0].weight,)
    other = tmp_path / "alpha.jsonl"
    other.write_text((folder / "alpha.jsonl").read_text())
    model = dataclasses.replace(config.model, vocab_size=600)
    different = [
        change(max_documents=50),
        change(validation_documents=21),
        change(deduplicate=False),
        change(filter_quality=False),
        change(sources=(dataclasses.replace(config.data.sources[0], path=str(other)),)),
        dataclasses.replace(config, model=model),
    ]
    keys = [pipeline._cache_key(variant) for variant in [config, *different]]
    other.write_text(other.read_text() + "\n" + json.dumps({"text": "more"}))
    keys.append(pipeline._cache_key(different[4]))
    assert len(set(keys)) == len(keys)


def _damage(path, **how):
    data = bytearray(path.read_bytes())
    if "flip" in how:
        data[how["flip"] % len(data)] ^= 1 << (how["flip"] % 8)
    path.write_bytes(data[: how.get("keep", len(data))])


def test_every_flipped_bit_of_a_shard_is_detected(folder, tmp_path):
    config = _config(folder, "alpha", cache=tmp_path, max_documents=40)
    corpus = prepare_corpus(config)
    shard = corpus.folder / "train-00-00000.arrayrecord"
    good = shard.read_bytes()
    message = rf"{shard.name} is corrupt.*delete the folder {corpus.folder}"
    for flip in np.random.default_rng(0).integers(0, len(good), 30).tolist():
        _damage(shard, flip=flip)
        with pytest.raises(UserError, match=message):
            prepare_corpus(config)
        shard.write_bytes(good)
    _damage(shard, keep=100)
    with pytest.raises(UserError, match=message):
        prepare_corpus(config)
    shard.unlink()
    with pytest.raises(UserError, match=rf"No such file .*{shard.name}\); delete the folder"):
        prepare_corpus(config)


@pytest.mark.parametrize("name", [prepare.INDEX, prepare.TOKENIZER])
def test_damaged_index_or_tokenizer(folder, tmp_path, name):
    config = _config(folder, "alpha", cache=tmp_path, max_documents=40)
    path = prepare_corpus(config).folder / name
    good = path.read_text()
    path.write_text(good.replace('"', "'", 1))
    with pytest.raises(UserError, match=rf"{name}.*delete the folder"):
        prepare_corpus(config)
    path.unlink()
    with pytest.raises(UserError, match=rf"No such file.*{name}"):
        prepare_corpus(config)


def test_an_index_may_not_name_files_elsewhere(folder, tmp_path):
    config = _config(folder, "alpha", cache=tmp_path, max_documents=40)
    path = prepare_corpus(config).folder / prepare.INDEX
    index = unseal(path.read_bytes())
    for name in ("../secret", str(tmp_path / "secret")):
        index["sources"][0]["train"][0]["file"] = name
        path.write_bytes(seal(index))
        with pytest.raises(UserError, match=rf"index.json names .*{name}.*outside"):
            prepare_corpus(config)


def test_damage_after_verification_stops_with_the_shard(folder, tmp_path):
    config = _config(folder, "alpha", cache=tmp_path, max_documents=40)
    corpus = prepare_corpus(config)
    shard = corpus.folder / "train-00-00000.arrayrecord"
    data = shard.read_bytes()
    third = len(data) // 3
    shard.write_bytes(data[:third] + bytes(third) + data[2 * third :])
    iterator = train_iterator(config, corpus)
    with pytest.raises(UserError, match=rf"{shard.name} is not a readable .*delete the folder"):
        iterator.next_rows(5000)


@pytest.mark.parametrize("text", ["{", '{"text": "short"}'])
def test_failure_leaves_nothing_behind(tmp_path, text):
    lines = [json.dumps({"text": t}) for t in _texts("alpha", 3)] + [text]
    broken = text == "{"
    (tmp_path / "bad.jsonl").write_text("\n".join(lines if broken else [text]))
    config = _config(tmp_path, "bad", cache=tmp_path / "cache")
    message = r"bad\.jsonl:4: malformed" if broken else r"leaves too little .* 1 too short"
    with pytest.raises(UserError, match=message):
        prepare_corpus(config)
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".lock"]


def test_bad_settings(folder, tmp_path):
    (tmp_path / "file").write_text("")
    config = _config(folder, "alpha", cache=tmp_path / "file" / "cache")
    with pytest.raises(UserError, match=r"data\.cache_dir: cannot write .*; set data\.cache_dir"):
        prepare_corpus(config)
    config = _config(folder, "alpha", cache=tmp_path, tokenizer=str(tmp_path / "none.json"))
    with pytest.raises(UserError, match=r"tokenizer .*none\.json cannot be read"):
        prepare_corpus(config)
    config = _config(folder, "alpha", prepared=str(tmp_path / "none"))
    with pytest.raises(
        UserError, match=r"none is not a corpus folder \(No such .*tools/prepare_data"
    ):
        prepare_corpus(config)


def test_tokenizer_of_another_vocabulary(one, folder, tmp_path):
    config, corpus = one
    path = tmp_path / "tokenizer.json"
    corpus.tokenizer.save(path)
    config = _config(folder, "alpha", cache=tmp_path / "cache", tokenizer=str(path))
    again = prepare_corpus(config)
    assert again.tokenizer.sha256 == corpus.tokenizer.sha256
    np.testing.assert_array_equal(again.train[0][3], corpus.train[0][3])
    small = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=300))
    start = time.time()
    with pytest.raises(UserError, match=r"tokenizer\.json has ids up to 511 but .*=300"):
        prepare_corpus(small)
    assert time.time() - start < 2
    vocab = json.loads(path.read_text())
    vocab["added_tokens"] = [t for t in vocab["added_tokens"] if "fim" not in t["content"]]
    path.write_text(json.dumps(vocab))
    corpus = prepare_corpus(config)
    with pytest.raises(UserError, match=r"no fill-in-the-middle tokens; set data\.fim_rate=0"):
        train_iterator(config, corpus)
    quiet = dataclasses.replace(config, data=dataclasses.replace(config.data, fim_rate=0.0))
    assert train_iterator(quiet, corpus).next_rows(2)["tokens"].shape == (2, 33)


def test_duplicates_across_sources_are_dropped(folder, tmp_path):
    (tmp_path / "beta.jsonl").write_text(
        (folder / "alpha.jsonl").read_text()
        + "\n"
        + "\n".join(json.dumps({"text": t}) for t in _texts("gamma", 5))
    )
    (tmp_path / "alpha.jsonl").write_text((folder / "alpha.jsonl").read_text())
    corpus = prepare_corpus(_config(tmp_path, "alpha", "beta"))
    assert "120 documents read, 120 kept" in corpus.reports[0]
    assert "5 kept; left out: 120 near-duplicate" in corpus.reports[1]


@pytest.mark.slow
def test_throughput(one):
    """More than 400k tokens a second, here of very short documents and rows."""
    config, corpus = one
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, fim_rate=0.1, sequence_length=1024)
    )
    dataset, rows = iter(train_dataset(config, corpus)), 0
    start = time.process_time()
    while time.process_time() - start < 0.5:
        next(dataset)
        rows += 1
    assert rows * 1024 / 0.5 > 400_000


def _prepare_data(*arguments):
    command = [sys.executable, "-m", "tools.prepare_data", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_prepare_data_tool(folder, tmp_path):
    sources = f"--set=data.sources=jsonl:{folder}/alpha.jsonl*3,jsonl:{folder}/beta.jsonl"
    settings = [sources, "--set=data.validation_documents=20", "--set=model.vocab_size=512"]
    output = tmp_path / "new" / "corpus"
    run = _prepare_data(*settings, f"--output={output}", "--shard_documents=30")
    assert run.returncode == 0, run.stderr
    assert "120 documents read, 120 kept" in run.stdout and "20 documents held out" in run.stdout
    index = unseal((output / prepare.INDEX).read_bytes())
    assert [len(s["train"]) for s in index["sources"]] == [4, 4]
    assert [shard["documents"] for shard in index["sources"][0]["train"]] == [30, 30, 30, 20]
    config = _config(folder, "alpha", prepared=str(output), cache=tmp_path / "unused")
    corpus = prepare_corpus(config)
    assert corpus.weights == (3.0, 1.0) and not (tmp_path / "unused").exists()
    texts = _texts("alpha") + _texts("beta")
    assert sorted(_decoded(corpus, corpus.train + corpus.validation)) == sorted(texts)
    assert train_iterator(config, corpus).next_rows(3)["tokens"].shape == (3, 33)

    run = _prepare_data(*settings, f"--output={output}")
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.splitlines()[-1].startswith(f"error: {output} already exists")
    assert "Traceback" not in run.stderr


def test_a_malformed_record_stops_or_is_counted_and_left_out(folder, tmp_path):
    lines = (folder / "alpha.jsonl").read_text().split("\n")
    (tmp_path / "bad.jsonl").write_text("\n".join([*lines[:50], '{"text": 1', *lines[50:]]))
    (tmp_path / "good.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"bad\.jsonl.*51.*malformed record"):
        prepare_corpus(_config(tmp_path, "bad"))
    with pytest.raises(UserError, match=r"1 of 121 .* more than data\.max_bad_fraction=0\.0001"):
        prepare_corpus(_config(tmp_path, "bad", on_bad_record="skip"))
    config = _config(tmp_path, "bad", on_bad_record="skip", max_bad_fraction=0.01)
    corpus, good = prepare_corpus(config), prepare_corpus(_config(tmp_path, "good"))
    assert "left out: 1 malformed (" in str(corpus) and "left out" not in str(good)
    assert corpus.tokens == good.tokens and len(corpus.train[0]) == len(good.train[0])
    for split, other in ((corpus.train, good.train), (corpus.validation, good.validation)):
        for i in range(len(split[0])):
            np.testing.assert_array_equal(split[0][i], other[0][i])
    assert prepare_corpus(config).digest == corpus.digest  # from the cache, the same
    with pytest.raises(UserError, match="malformed record"):  # which 'stop' does not use
        prepare_corpus(_config(tmp_path, "bad"))
