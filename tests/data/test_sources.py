"""Sources: order, exact text, and one-line errors for everything a corpus can get wrong."""

import json
import sysconfig
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from dsv3_jax.config import SourceConfig
from dsv3_jax.data import sources
from dsv3_jax.data.sources import list_files, open_source
from dsv3_jax.errors import UserError


def _texts(kind, path, **kwargs):
    return list(open_source(SourceConfig(kind=kind, path=str(path), **kwargs)))


def _write_jsonl(path: Path, records) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_text_file_folder_and_glob_agree_in_order(tmp_path):
    texts = {"b.txt": "bé\r\n", "a.md": "first", "sub/c.txt": "漢字\n", ".hidden": "no"}
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    assert _texts("text", tmp_path) == ["first", "bé\r\n", "漢字\n"]
    assert _texts("text", tmp_path / "*.txt") == ["bé\r\n"]
    assert _texts("text", tmp_path / "**/*.txt") == ["bé\r\n", "漢字\n"]
    assert _texts("text", tmp_path / "b.txt") == ["bé\r\n"]


def test_long_text_is_cut_at_line_ends_without_loss(tmp_path):
    rng = np.random.default_rng(0)
    lines = ["é" * int(n) + "\n" for n in rng.integers(0, 300, size=3000)]
    path = tmp_path / "long.txt"
    path.write_bytes("".join(lines).encode())
    documents = _texts("text", path)
    assert "".join(documents) == "".join(lines)
    sizes = [len(d.encode()) for d in documents]
    assert len(documents) > 5 and max(sizes) < sources.TEXT_DOCUMENT_BYTES + 700
    assert min(sizes[:-1]) >= sources.TEXT_DOCUMENT_BYTES
    assert all(d.endswith("\n") for d in documents)


def test_text_that_is_not_utf8_names_file_and_byte(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"fine \xff")
    with pytest.raises(UserError, match=r"x\.txt is not UTF-8 \(byte 5\)"):
        _texts("text", tmp_path)


def test_jsonl(tmp_path):
    records = [{"body": "one"}, {"body": "zwei\nü"}, {"body": "\ud83d\ude00 \ud800"}]
    path = _write_jsonl(tmp_path / "a.jsonl", records)
    path.write_text("\n" + path.read_text().replace("\n", "\n\n", 1))
    assert _texts("jsonl", path, text_key="body") == ["one", "zwei\nü", "😀 ?"]


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"text": "cut', r"a\.jsonl:3: malformed record .*mend or delete"),
        ("[1]", r"a\.jsonl:3: malformed record \(list\)"),
        ('{"txt": "x"}', r"a\.jsonl:3: no field 'text'; did you mean 'txt'\?.*text_key"),
        ('{"text": 5}', r"a\.jsonl:3: field 'text' holds int"),
    ],
)
def test_broken_jsonl_record_names_file_and_line(tmp_path, line, message):
    path = _write_jsonl(tmp_path / "a.jsonl", [{"text": "good"}])
    path.write_text(path.read_text() + "\n" + line + "\n")
    source = open_source(SourceConfig(kind="jsonl", path=str(path)))
    assert source[0] == "good"
    with pytest.raises(UserError, match=message):
        source[1]


def test_parquet_over_row_groups_and_files(tmp_path):
    texts = [f"document {i}" for i in range(25)]
    for name, part in (("a", texts[:14]), ("b", texts[14:])):
        table = pa.table({"id": range(len(part)), "text": part})
        parquet.write_table(table, tmp_path / f"{name}.parquet", row_group_size=5)
    source = open_source(SourceConfig(kind="parquet", path=str(tmp_path)))
    assert list(source) == texts
    order = np.random.default_rng(0).permutation(25)
    assert [source[int(i)] for i in order] == [texts[i] for i in order]
    assert source.label(20).endswith("b.parquet row 6")


def test_broken_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"txt": ["x"], "n": [1], "text_or_null": [None]}), path)
    with pytest.raises(UserError, match=r"no field 'text'; did you mean 'txt'\?"):
        _texts("parquet", path)
    with pytest.raises(UserError, match=r"row 0: field 'n' holds int"):
        _texts("parquet", path, text_key="n")
    with pytest.raises(UserError, match=r"row 0: field 'text_or_null' holds NoneType"):
        _texts("parquet", path, text_key="text_or_null")
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(UserError, match=r"a\.parquet is not a readable parquet file"):
        _texts("parquet", path)


def test_damaged_parquet_page(tmp_path):
    path = tmp_path / "a.parquet"
    text = ["".join(np.random.default_rng(0).choice(list("abcdef"), 5000))]
    parquet.write_table(pa.table({"text": text}), path, compression="zstd", use_dictionary=False)
    data = bytearray(path.read_bytes())
    data[20:60] = bytes(40)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.parquet: row group 0 cannot be read"):
        _texts("parquet", path)


def test_arrayrecord(tmp_path):
    texts = [f"dokument ü {i}" for i in range(7)]
    for name, part in (("a", texts[:3]), ("b", texts[3:])):
        writer = ArrayRecordWriter(str(tmp_path / f"{name}.arrayrecord"), "group_size:1")
        for text in part:
            writer.write(text.encode())
        writer.close()
    source = open_source(SourceConfig(kind="arrayrecord", path=str(tmp_path)))
    assert list(source) == texts and source[-1 + len(source)] == texts[-1]
    assert source.label(4).endswith("b.arrayrecord record 1")


def test_broken_arrayrecord(tmp_path):
    path = tmp_path / "a.arrayrecord"
    path.write_bytes(b"nonsense" * 100)
    with pytest.raises(UserError, match=r"a\.arrayrecord is not a readable ArrayRecord file"):
        _texts("arrayrecord", path)
    writer = ArrayRecordWriter(str(path), "group_size:1")
    writer.write(b"\xff\xfe")
    writer.close()
    with pytest.raises(UserError, match=r"a\.arrayrecord record 0 is not UTF-8"):
        _texts("arrayrecord", path)


def test_python_reads_the_standard_library():
    config = SourceConfig(kind="python")
    files = list_files(config)
    source = open_source(config)
    root = Path(sysconfig.get_path("stdlib"))
    by_name = {
        str(f.relative_to(root)): i for i, f in enumerate(f for f in files if f.stat().st_size)
    }
    assert source[by_name["json/decoder.py"]] == (root / "json/decoder.py").read_text()
    assert not any("site-packages" in f.parts for f in files)
    assert files == sorted(files)
    everything = list_files(SourceConfig(kind="python", path="packages"))
    assert everything[: len(files)] == files and len(everything) > len(files)
    assert len(set(everything)) == len(everything)
    assert Path(np.__file__) in everything


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet", "arrayrecord"])
def test_missing_and_empty_corpus(tmp_path, kind):
    for path in (tmp_path / "nowhere", tmp_path, tmp_path / "*.x"):
        with pytest.raises(UserError, match=r"data\.sources: no .* check the path"):
            open_source(SourceConfig(kind=kind, path=str(path)))
