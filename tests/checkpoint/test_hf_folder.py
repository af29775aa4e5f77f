"""Reading safetensors folders: byte ranges against numpy, and every way a folder can be broken."""

import json

import ml_dtypes
import numpy as np
import pytest
from checkpoint.hf_random import write_random_folder

from dsv3_jax.checkpoint.hf_folder import INDEX, is_folder, open_folder
from dsv3_jax.errors import UserError

DTYPES = {
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "BF16": ml_dtypes.bfloat16,
    "F16": np.float16,
    "F32": np.float32,
}


def write_file(path, arrays, *, gap=0):
    """One safetensors file, `gap` unused bytes before every tensor."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, (dtype, array) in arrays.items():
        data += b"\xa5" * gap
        raw = array.tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": offsets}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def random_array(rng, dtype, shape):
    """Any bits at all, NaNs included."""
    item = np.dtype(DTYPES[dtype]).itemsize
    return rng.integers(0, 256, (*shape, item), np.uint8).view(DTYPES[dtype])[..., 0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_byte_ranges_equal_numpy_slices(tmp_path, dtype):
    rng = np.random.default_rng(sorted(DTYPES).index(dtype))
    shapes = {
        "scalar": (),
        "vector": (301,),
        "narrow": (700, 33),
        "wide": (9, 70_000),
        "tall": (40_000, 300),
        "empty": (0, 7),
    }
    arrays = {name: random_array(rng, dtype, shape) for name, shape in shapes.items()}
    write_file(tmp_path / "model.safetensors", {n: (dtype, a) for n, a in arrays.items()}, gap=3)
    (tmp_path / "config.json").write_text('{"a": 1}')
    folder = open_folder(tmp_path)
    assert folder.config == {"a": 1} and folder.is_quantized == (dtype == "F8_E4M3")

    def same(found, expected):
        assert found.dtype == expected.dtype and found.shape == expected.shape
        assert found.tobytes() == expected.tobytes()

    for name, array in arrays.items():
        tensor = folder.tensors[name]
        assert (tensor.shape, tensor.dtype) == (array.shape, dtype)
        assert (tensor.size, tensor.num_bytes) == (array.size, array.nbytes)
        same(tensor.read(), array)
        for _ in range(8 if array.ndim and array.size else 0):
            first, last = np.sort(rng.integers(0, len(array) + 1, 2))
            same(tensor.read(slice(first, last)), array[first:last])
            same(tensor.read(slice(last, None)), array[last:])
        for _ in range(8 if array.ndim == 2 and array.size else 0):
            (first, last), (left, right) = (
                np.sort(rng.integers(0, length + 1, 2)) for length in array.shape
            )
            rows, columns = slice(first, last), slice(left, right)
            same(tensor.read(rows, columns), array[rows, columns])
            same(tensor.read(columns=columns), array[:, columns])
            # one column, and all but one: the narrow and the wide way of reading
            same(tensor.read(rows, slice(left, left + 1)), array[rows, left : left + 1])
            same(tensor.read(rows, slice(1, None)), array[rows, 1:])


@pytest.mark.parametrize("num_shards", [1, 4])
def test_a_folder_holds_every_tensor_that_was_written(tmp_path, num_shards):
    expected = write_random_folder(tmp_path / "a", num_shards=num_shards, seed=num_shards)
    folder = open_folder(str(tmp_path / "a"))
    assert folder.tensors.keys() == expected.keys()
    for name, array in expected.items():
        assert folder.tensors[name].read().tobytes() == array.tobytes(), name


def test_what_counts_as_a_folder(tmp_path):
    assert not is_folder(tmp_path) and not is_folder(tmp_path / "absent")
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    (tmp_path / "run.json").touch()
    assert not is_folder(tmp_path)
    for name in ("config.json", INDEX, "some.safetensors"):
        (tmp_path / name).touch()
        assert is_folder(tmp_path)
        assert not is_folder(tmp_path / name)
        (tmp_path / name).unlink()


def rewrite(file, change):
    """Applies a change to the header of a safetensors file."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def break_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


FIRST, SECOND = (f"model-0000{i}-of-000003.safetensors" for i in (1, 2))
NORM = "model.norm.weight"


def cut(count):
    def damage(folder):
        raw = (folder / FIRST).read_bytes()
        (folder / FIRST).write_bytes(raw[:count] if count >= 0 else raw[: len(raw) + count])

    return damage


def header(change):
    return lambda folder: rewrite(folder / FIRST, change)


def longer(entries):
    name = next(n for n in entries if n != "__metadata__")
    entries[name]["shape"][0] += 1


DAMAGE = {
    "no shard": (lambda f: (f / FIRST).unlink(), f"lacks {FIRST}"),
    "one byte short": (cut(-1), FIRST),
    "cut in the header": (cut(100), FIRST),
    "cut in the length": (cut(5), FIRST),
    "empty": (cut(0), FIRST),
    "garbage": (lambda f: (f / FIRST).write_bytes(b"\xff" * 5000), FIRST),
    "garbage header": (
        lambda f: (f / FIRST).write_bytes((64).to_bytes(8, "little") + b"\xff" * 5000),
        f"header of {FIRST}",
    ),
    "header of another kind": (
        lambda f: (f / FIRST).write_bytes((2).to_bytes(8, "little") + b"[]"),
        f"header of {FIRST}",
    ),
    "no offsets": (header(lambda h: h[max(h)].pop("data_offsets")), f"header of {FIRST}"),
    "shape and length disagree": (header(longer), f"header of {FIRST}"),
    "no config.json": (lambda f: (f / "config.json").unlink(), "config.json"),
    "config.json is no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json"),
    "config.json is a list": (lambda f: (f / "config.json").write_text("[]"), "config.json"),
    "index is no JSON": (lambda f: (f / INDEX).write_bytes(b"\x80{"), INDEX),
    "index without a map": (lambda f: (f / INDEX).write_text("{}"), "weight_map"),
    "index names another file": (
        lambda f: break_index(f, lambda m: m.update({NORM: "absent.safetensors"})),
        "lacks absent.safetensors",
    ),
    "index names the wrong file": (
        lambda f: break_index(f, lambda m: m.update({NORM: FIRST})),
        f"{NORM} in {FIRST}",
    ),
    "index names a file outside": (
        lambda f: break_index(f, lambda m: m.update({NORM: f"../{f.name}/{FIRST}"})),
        "must lie in the folder itself",
    ),
    "index names an absolute path": (
        lambda f: break_index(f, lambda m: m.update({NORM: str(f / FIRST)})),
        "must lie in the folder itself",
    ),
    "index names a NUL": (
        lambda f: break_index(f, lambda m: m.update({NORM: "a\0b"})),
        "must lie in the folder itself",
    ),
    "index is nested without end": (
        lambda f: (f / INDEX).write_text('{"weight_map":' + "[" * 200_000),
        INDEX,
    ),
    "index names a tensor that is nowhere": (
        lambda f: break_index(f, lambda m: m.update({"model.extra": SECOND})),
        f"model.extra in {SECOND}",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_broken_folder_is_one_line_that_names_the_file(tmp_path, damage):
    write_random_folder(tmp_path / "a", num_shards=3)
    open_folder(tmp_path / "a")
    spoil, expected = DAMAGE[damage]
    spoil(tmp_path / "a")
    with pytest.raises(UserError) as error:
        open_folder(tmp_path / "a")
    text = str(error.value)
    assert "\n" not in text and len(text) < 500
    assert expected in text.replace(f"{tmp_path / 'a'}/", "")


def test_without_an_index_a_name_may_not_come_twice(tmp_path):
    write_random_folder(tmp_path / "a", num_shards=3)
    (tmp_path / "a" / INDEX).unlink()
    open_folder(tmp_path / "a")
    (tmp_path / "a" / "again.safetensors").write_bytes((tmp_path / "a" / SECOND).read_bytes())
    with pytest.raises(UserError, match=f"both in .* and in .*{SECOND}|both in .* and in again"):
        open_folder(tmp_path / "a")


def test_a_file_that_shrinks_after_opening_is_an_error(tmp_path):
    write_random_folder(tmp_path / "a", num_shards=3)
    tensors = open_folder(tmp_path / "a").tensors
    last = max((t for t in tensors.values() if t.file.name == FIRST), key=lambda t: t.offset)
    cut(-1)(tmp_path / "a")
    with pytest.raises(UserError, match=f"ends inside {last.name}"):
        last.read()
    (tmp_path / "a" / FIRST).unlink()
    with pytest.raises(UserError, match="cannot be read"):
        last.read()
