"""Folders written as a stream: layout, size limits, continuing after a stop, what is refused."""

import errno
import json
import os
import shutil
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from dsv3_jax.checkpoint import hf, hf_writer, manifest
from dsv3_jax.checkpoint.hf_folder import NUMPY_DTYPES, open_folder
from dsv3_jax.errors import UserError

IDENTITY = {"source": "somewhere", "dtype": "fp8"}
FILES = {"config.json": b"{}", "tokenizer.json": b"[1]"}


def tensor(name, shape, dtype, scale=False):
    path = name.removesuffix(hf.SCALE_SUFFIX)
    return hf.Tensor(name=name, shape=shape, dtype=dtype, slot=hf.Slot(path=path), is_scale=scale)


TENSORS = [
    tensor("embed", (40, 30), "BF16"),
    tensor("a", (200, 130), "F8_E4M3"),
    tensor("a_scale_inv", (2, 2), "F32", scale=True),
    tensor("norm", (30,), "BF16"),
    tensor("b", (131, 3), "F8_E4M3"),  # odd: what follows it is not aligned
    tensor("b_scale_inv", (2, 1), "F32", scale=True),
    tensor("bias", (7,), "F32"),
]
BYTES = {"embed": 2400, "a": 26000 + 16, "norm": 60, "b": 393 + 8, "bias": 28}


@pytest.fixture
def contents():
    rng = np.random.default_rng()
    return {
        t.name: np.frombuffer(rng.bytes(t.size * NUMPY_DTYPES[t.dtype].itemsize), np.uint8)
        .view(NUMPY_DTYPES[t.dtype])
        .reshape(t.shape)
        for t in TENSORS
    }


def in_pieces(contents, rows=17):
    def chunks(t):
        for first in range(0, t.shape[0], rows):
            yield contents[t.name][first : first + rows]

    return chunks


def write(destination, chunks, **changes):
    settings = {"files": FILES, "identity": IDENTITY} | changes
    hf_writer.write_folder(destination, TENSORS, chunks, **settings)


def assert_holds(folder, contents):
    """Read by the library that everyone else reads with, every byte and no other file."""
    safetensors = pytest.importorskip("safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert index["metadata"] == {"total_size": sum(array.nbytes for array in contents.values())}
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [*shards, *FILES, "MANIFEST.json", "model.safetensors.index.json"]
    )
    assert all((folder / name).read_bytes() == content for name, content in FILES.items())
    found = {}
    for shard in shards:
        for name, entry in safetensors.deserialize((folder / shard).read_bytes()):
            assert index["weight_map"][name] == shard
            found[name] = entry
    assert found.keys() == contents.keys()
    for t in TENSORS:
        assert found[t.name]["dtype"] == t.dtype
        assert tuple(found[t.name]["shape"]) == t.shape
        assert bytes(found[t.name]["data"]) == contents[t.name].tobytes()
    manifest.verify(folder)
    assert not hf_writer.incomplete_path(folder).exists()


def all_bytes(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("limit", "groups"),
    [
        (10**9, [["embed", "a", "norm", "b", "bias"]]),
        (BYTES["embed"] + BYTES["a"], [["embed", "a"], ["norm", "b", "bias"]]),
        (BYTES["embed"] + BYTES["a"] - 1, [["embed"], ["a", "norm", "b", "bias"]]),
        (1, [["embed"], ["a"], ["norm"], ["b"], ["bias"]]),
    ],
)
def test_files_are_filled_in_order_and_a_scale_stays_with_its_weight(
    tmp_path, contents, limit, groups
):
    destination = tmp_path / "out"
    write(destination, in_pieces(contents), max_shard_bytes=limit)
    assert_holds(destination, contents)
    index = json.loads((destination / "model.safetensors.index.json").read_text())
    for i, group in enumerate(groups):
        shard = f"model-{i + 1:05}-of-{len(groups):05}.safetensors"
        expected = [t.name for t in TENSORS if t.name.removesuffix(hf.SCALE_SUFFIX) in group]
        assert [name for name, file in index["weight_map"].items() if file == shard] == expected
        assert (
            (destination / shard).read_bytes()[8:40].startswith(b'{"__metadata__":{"format":"pt"}')
        )
    for name, stored in open_folder(destination).tensors.items():
        np.testing.assert_array_equal(stored.read().view(np.uint8), contents[name].view(np.uint8))


@pytest.mark.parametrize("stop_at", [t.name for t in TENSORS])
def test_a_stopped_write_continues_after_the_last_whole_file(tmp_path, contents, stop_at):
    """Stopped in the middle of a tensor; what was whole is neither made nor written again."""
    write(tmp_path / "whole", in_pieces(contents), max_shard_bytes=1)
    destination = tmp_path / "out"
    asked = []

    def stopping(t):
        for i, chunk in enumerate(in_pieces(contents, 1)(t)):
            if t.name == stop_at and i == t.shape[0] // 2:
                raise KeyboardInterrupt
            yield chunk

    def watched(t):
        asked.append(t.name)
        return in_pieces(contents)(t)

    with pytest.raises(KeyboardInterrupt):
        write(destination, stopping, max_shard_bytes=1)
    assert not destination.exists()
    write(destination, watched, max_shard_bytes=1)
    names = [t.name for t in TENSORS]
    assert asked == names[names.index(stop_at.removesuffix(hf.SCALE_SUFFIX)) :]
    assert all_bytes(destination) == all_bytes(tmp_path / "whole")


def test_leftovers_of_a_write_killed_in_its_last_steps_do_not_stay(tmp_path, contents, monkeypatch):
    """Before, between and after: index, manifest, rename, deletion of the working folder."""
    write(tmp_path / "whole", in_pieces(contents))
    for module, function in (
        (hf_writer.os, "replace"),
        (hf_writer.manifest, "write"),
        (hf_writer.shutil, "rmtree"),
    ):
        for call in range(8):
            destination = tmp_path / f"{function}{call}"
            real, calls = getattr(module, function), []

            def killed(*args, _real=real, _calls=calls, _call=call, **kwargs):
                _calls.append(args)
                if len(_calls) > _call:
                    raise KeyboardInterrupt
                return _real(*args, **kwargs)

            with monkeypatch.context() as patch:
                patch.setattr(module, function, killed)
                try:
                    write(destination, in_pieces(contents))
                except KeyboardInterrupt:
                    pass
            if len(calls) <= call:  # it was never called so often
                assert destination.exists()
                break
            write(destination, in_pieces(contents))
            assert all_bytes(destination) == all_bytes(tmp_path / "whole")
            assert not hf_writer.incomplete_path(destination).exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"identity": IDENTITY | {"dtype": "bf16"}},
        {"max_shard_bytes": 10},
        {"files": FILES | {"config.json": b"{ }"}},
    ],
)
def test_something_else_that_is_unfinished_is_not_continued(tmp_path, contents, changes):
    destination = tmp_path / "out"
    with pytest.raises(ZeroDivisionError):
        write(destination, lambda t: 1 / 0)
    before = all_paths(tmp_path)
    with pytest.raises(UserError, match=r"out\.incomplete is an unfinished .*; delete it"):
        write(destination, in_pieces(contents), **changes)
    assert all_paths(tmp_path) == before


def all_paths(folder):
    return {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}


def nothing_is_asked(t):
    raise AssertionError(f"{t} was made before the destination was checked")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.mkdir(), "exists; delete it"),
        (lambda path: path.symlink_to("nowhere"), "exists; delete it"),
        (lambda path: path.with_name("out.incomplete").mkdir(), None),
        (lambda path: path.with_name("out.incomplete").write_text(""), "out.incomplete is an"),
        (lambda path: (path.parent / "out.incomplete/mine").mkdir(parents=True), "incomplete is"),
    ],
)
def test_destinations_in_the_way(tmp_path, contents, make, message):
    destination = tmp_path / "out"
    make(destination)
    if message is None:
        write(destination, in_pieces(contents))
        return
    before = all_paths(tmp_path)
    with pytest.raises(UserError, match=message):
        write(destination, nothing_is_asked)
    assert all_paths(tmp_path) == before


def test_parents_that_cannot_be_written(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="absent is not a folder"):
        write(tmp_path / "absent/out", nothing_is_asked)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is not a folder"):
        write(tmp_path / "file/out", nothing_is_asked)
    monkeypatch.setattr(hf_writer.os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match="may not be written"):
        write(tmp_path / "out", nothing_is_asked)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_too_little_space_is_noticed_first(tmp_path, contents, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=28_000)  # less than `a` and `embed`
    monkeypatch.setattr(hf_writer.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="needs 0.0 GB more, but its disk has 0.0 GB free"):
        write(tmp_path / "out", nothing_is_asked)
    assert not any(tmp_path.iterdir())
    monkeypatch.undo()
    with pytest.raises(ZeroDivisionError):  # two files done: the rest fits
        chunks = in_pieces(contents)
        write(
            tmp_path / "out",
            lambda t: chunks(t) if t.name[0] in "ea" else 1 / 0,
            max_shard_bytes=1,
        )
    monkeypatch.setattr(hf_writer.shutil, "disk_usage", lambda path: usage)
    write(tmp_path / "out", in_pieces(contents), max_shard_bytes=1)


@pytest.mark.parametrize("room", [20_000, 28_800])  # within `a`, in the header of a later file
def test_a_disk_that_fills_up_is_one_line_and_can_be_continued(
    tmp_path, contents, monkeypatch, room
):
    destination = tmp_path / "out"
    write(tmp_path / "whole", in_pieces(contents), max_shard_bytes=1)
    write_once = hf_writer._ShardFile._write
    left = [room]

    def full(self, view):
        left[0] -= len(view)
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_once(self, view)

    monkeypatch.setattr(hf_writer._ShardFile, "_write", full)
    with pytest.raises(UserError, match="No space left on device.* run the same again"):
        write(destination, in_pieces(contents), max_shard_bytes=1)
    assert not destination.exists()
    folder = hf_writer.incomplete_path(destination) / "folder"
    assert (folder / "model-00001-of-00005.safetensors").exists()
    assert not (folder / "model-00004-of-00005.safetensors").exists()
    assert not (folder / "config.json").exists()
    monkeypatch.undo()
    write(destination, in_pieces(contents), max_shard_bytes=1)
    assert all_bytes(destination) == all_bytes(tmp_path / "whole")


def test_two_commands_do_not_write_the_same_folder(tmp_path, contents):
    def another(t):
        with pytest.raises(UserError, match="another process is writing"):
            write(tmp_path / "out", nothing_is_asked)
        return in_pieces(contents)(t)

    write(tmp_path / "out", another)
    assert_holds(tmp_path / "out", contents)


def test_processes_share_the_files_and_write_the_same_bytes(tmp_path, contents):
    """Each process makes every chunk, in step with the others, as collectives demand."""
    write(tmp_path / "alone", in_pieces(contents), max_shard_bytes=1)
    destination, count = tmp_path / "out", 3
    barrier = threading.Barrier(count, timeout=30)
    errors = []

    def process(index):
        def chunks(t):
            for chunk in in_pieces(contents)(t):
                barrier.wait()
                yield chunk

        try:
            write(
                destination,
                chunks,
                max_shard_bytes=1,
                process_index=index,
                process_count=count,
                barrier=barrier.wait,
            )
            assert destination.exists()
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=process, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert all_bytes(destination) == all_bytes(tmp_path / "alone")


def test_a_flipped_bit_is_found(tmp_path, contents):
    write(tmp_path / "out", in_pieces(contents))
    victim = next(Path(tmp_path / "out").glob("*.safetensors"))
    data = bytearray(victim.read_bytes())
    data[-100] ^= 4
    victim.write_bytes(data)
    with pytest.raises(manifest.DamagedCheckpoint, match=f"{victim.name} is altered"):
        manifest.verify(tmp_path / "out")


def test_bfloat16_bytes_are_little_endian(tmp_path):
    ones = np.ones(3, ml_dtypes.bfloat16)
    hf_writer.write_folder(
        tmp_path / "out",
        [tensor("x", (3,), "BF16")],
        lambda t: iter([ones]),
        files={},
        identity={},
    )
    data = (tmp_path / "out/model-00001-of-00001.safetensors").read_bytes()
    assert data.endswith(b"\x80\x3f" * 3)
