"""Every damage of a checkpoint and of prepared data is noticed, and the file named."""

import random

from dsv3_jax.data.pipeline import load_corpus
from dsv3_jax.overrides import load_config
from tools.bench_damage import CUT, DELETE, FLIP, Table, damage_all, run


def test_every_damage_is_noticed_and_named(tmp_path):
    table = run(tmp_path, 300, seed=random.randrange(1 << 30))
    assert table.tried.total() == 300
    assert table.noticed == table.tried, f"\n{table}"
    for what, files in {
        "checkpoint": {"MANIFEST.json", "array data", "manifest.ocdbt", "_METADATA"},
        "data": {"index.json", "tokenizer.json", "*.arrayrecord"},
    }.items():
        for damage in (FLIP, CUT, DELETE):
            assert files <= {file for w, file, d in table.tried if (w, d) == (what, damage)}
    # The last trial's file was mended too.
    load_corpus(tmp_path / "corpus", load_config("tiny", ["model.vocab_size=300"]), "")


def test_what_goes_unseen_is_told(tmp_path):
    (tmp_path / "a").write_bytes(b"some bytes")
    table = Table()
    damage_all("data", tmp_path, lambda name: False, 6, random.Random(0), table)
    assert table.noticed != table.tried and "0 of 6 damages noticed" in str(table)
