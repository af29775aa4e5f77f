"""Where two checkpoints differ, tensor by tensor under their released names.

python -m tools.diff_checkpoints A B, where each is a Hugging Face folder or a run of ours (its
working directory, checkpoints folder or one step), in any dtypes: FP8 weights are compared as what
they stand for. Exit code 0: all numbers are equal; 1: they are not; 2: a user's mistake.

Of a folder a few rows are in memory at a time, of a run one leaf of our tree.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from dsv3_jax.checkpoint import hf, hf_folder
from dsv3_jax.checkpoint.hf_folder import NUMPY_DTYPES, row_ranges
from dsv3_jax.checkpoint.reader import locate, open_checkpoint
from dsv3_jax.errors import UserError, run_main, some
from dsv3_jax.overrides import from_dict
from dsv3_jax.precision.block_scaled import dequantize_on_host

_CHUNK_NUMBERS = 4 << 20  # compared at a time: 16 MiB of float32 from either side
_NUM_WORST = 10  # tensors that are shown


class Folder:
    """The weights of a Hugging Face folder."""

    def __init__(self, path: Path):
        self._tensors = hf_folder.open_folder(path).tensors
        for name, tensor in self._tensors.items():
            if tensor.dtype not in NUMPY_DTYPES:
                raise UserError(f"{name} is {tensor.dtype}; allowed: {', '.join(NUMPY_DTYPES)}")
            if tensor.dtype == "F8_E4M3" and name + hf.SCALE_SUFFIX not in self._tensors:
                raise UserError(f"{name} in {path} has no scales; download the folder again")
        self.shapes = {
            name: tensor.shape
            for name, tensor in self._tensors.items()
            if not name.endswith(hf.SCALE_SUFFIX)
            or name.removesuffix(hf.SCALE_SUFFIX) not in self._tensors
        }

    def order(self, name: str) -> str:
        """Tensors that are cheap to read one after the other have keys that sort together."""
        return ""

    def rows(self, name: str, rows: slice) -> np.ndarray:
        """Rows of a weight, float32."""
        tensor = self._tensors[name]
        part = tensor.read(rows)
        if tensor.dtype != "F8_E4M3":
            return part.astype(np.float32)
        scales = self._tensors[name + hf.SCALE_SUFFIX].read()
        if scales.shape != hf.scale_shape(tensor.shape):
            raise UserError(
                f"{name} of shape {tensor.shape} has scales of shape {scales.shape} instead of "
                f"{hf.scale_shape(tensor.shape)}; download the folder again"
            )
        return dequantize_on_host(part, scales, np.dtype(np.float32), rows.start)


class Run:
    """The weights of the newest step of a run, under their released names."""

    def __init__(self, path: Path):
        directory, step = locate(path)
        self._checkpoint = open_checkpoint(directory, step)
        model = from_dict(self._checkpoint.extra["config"]).model
        table = hf.tensors(model, "f32").values()
        self._slots = {tensor.name: tensor.slot for tensor in table}
        self.shapes = {tensor.name: tensor.shape for tensor in table}
        self._path, self._leaf = "", np.empty(0)  # read last

    def order(self, name: str) -> str:
        return self._slots[name].path

    def rows(self, name: str, rows: slice) -> np.ndarray:
        slot = self._slots[name]
        if slot.path != self._path:
            self._leaf = np.empty(0)  # not two at a time
            group = "router_bias" if slot.path.endswith("router.bias") else "params"
            key = f"{group}.{slot.path}"
            saved = self._checkpoint.contents["arrays"][key]
            template = {key: jax.ShapeDtypeStruct(saved["shape"], np.dtype(saved["dtype"]))}
            self._leaf = self._checkpoint.restore(template, partial=True)[key]
            self._path = slot.path
        part = self._leaf[slot.index]
        if slot.half is not None:
            part = np.split(part, 2, axis=-1)[slot.half]
        return (part.T if slot.transposed else part)[rows].astype(np.float32)


def open_source(path: str) -> Folder | Run:
    return Folder(Path(path)) if hf_folder.is_folder(path) else Run(Path(path))


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How a tensor differs."""

    name: str
    numbers: int  # that differ
    absolute: float  # max |a - b|; inf where one is not a number
    relative: float  # that, over max |b|
    position: tuple[int, ...]  # of the largest difference
    a: float
    b: float


def compare(a: Folder | Run, b: Folder | Run, name: str) -> Difference | None:
    """None when all numbers of a tensor are equal, NaN counting as equal to NaN."""
    numbers, largest, worst = 0, 0.0, None
    for rows in row_ranges(a.shapes[name], _CHUNK_NUMBERS):
        x, y = a.rows(name, rows), b.rows(name, rows)
        largest = max(largest, np.nanmax(np.abs(y), initial=0.0))
        differ = (x != y) & ~(np.isnan(x) & np.isnan(y))
        if not differ.any():
            continue
        numbers += np.count_nonzero(differ)
        with np.errstate(invalid="ignore"):  # infinity - infinity
            distance = np.where(differ, np.abs(x - y), 0.0)
        distance[np.isnan(distance)] = np.inf
        place = np.unravel_index(np.argmax(distance), distance.shape)
        if worst is None or distance[place] > worst[0]:
            position = tuple(int(i) for i in place)
            position = (position[0] + rows.start, *position[1:]) if position else ()
            worst = float(distance[place]), position, float(x[place]), float(y[place])
    if worst is None:
        return None
    absolute, position, a_value, b_value = worst
    return Difference(
        name=name,
        numbers=numbers,
        absolute=absolute,
        relative=absolute / largest if 0 < largest < math.inf else math.inf,
        position=position,
        a=a_value,
        b=b_value,
    )


def main(argv: list[str]) -> int:
    if len(argv) != 3:
        raise UserError("give two checkpoints: python -m tools.diff_checkpoints A B")
    a, b = open_source(argv[1]), open_source(argv[2])
    for here, one, other in (("A", a, b), ("B", b, a)):
        if only := sorted(one.shapes.keys() - other.shapes.keys()):
            print(f"only in {here}: {len(only):,} tensors: {some(only)}")
    common = a.shapes.keys() & b.shapes.keys()
    shapes = sorted(name for name in common if a.shapes[name] != b.shapes[name])
    if shapes:
        told = [f"{name} {a.shapes[name]} and {b.shapes[name]}" for name in shapes]
        print(f"of different shape: {len(shapes):,} tensors: {some(told)}")
    names = sorted(common - set(shapes), key=lambda name: (a.order(name), b.order(name), name))
    differences = [found for name in names if (found := compare(a, b, name))]
    differences.sort(key=lambda found: -found.relative)
    for found in differences[:_NUM_WORST]:
        print(
            f"{found.name}: |a - b| up to {found.absolute:.3g}, {found.relative:.3g} of max |b|, "
            f"at {list(found.position)}: {found.a:.9g} and {found.b:.9g}; {found.numbers:,} differ"
        )
    if len(differences) > _NUM_WORST:
        print(f"and {len(differences) - _NUM_WORST:,} tensors that differ less")
    total = sum(math.prod(a.shapes[name]) for name in names)
    print(
        f"compared {len(names):,} tensors, {total:,} numbers: {len(names) - len(differences):,} "
        f"are equal, {len(differences):,} differ in {sum(d.numbers for d in differences):,} numbers"
    )
    same = a.shapes == b.shapes and not differences
    print("the checkpoints are equal" if same else "the checkpoints differ")
    return 0 if same else 1


if __name__ == "__main__":
    run_main(main)
