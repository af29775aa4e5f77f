"""Lists the arrays of a checkpoint from its manifest alone.

python -m tools.inspect_checkpoint DIR, where DIR is a working directory, its checkpoints folder
(the newest step is shown) or the folder of one step.
"""

import collections
import math

import numpy as np

from dsv3_jax.checkpoint import manifest
from dsv3_jax.checkpoint.reader import locate, steps_in
from dsv3_jax.errors import UserError, run_main


def table(contents: dict) -> list[str]:
    """Lines of the table: path, dtype and shape of every array, then totals by first name."""
    rows = [("array", "dtype", "shape", "numbers", "bytes")]
    groups: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0, 0])
    for name, entry in contents["arrays"].items():
        count = math.prod(entry["shape"])
        num_bytes = count * np.dtype(entry["dtype"]).itemsize
        shape = " x ".join(map(str, entry["shape"])) or "scalar"
        rows.append((name, entry["dtype"], shape, f"{count:,}", f"{num_bytes:,}"))
        for group in (name.split(".")[0], "total"):
            for i, amount in enumerate((1, count, num_bytes)):
                groups[group][i] += amount
    rows.append(("",) * 5)
    for group, (arrays, count, num_bytes) in sorted(groups.items(), key=lambda g: g[0] == "total"):
        rows.append((group, "", f"{arrays:,} arrays", f"{count:,}", f"{num_bytes:,}"))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return [
        "  ".join(
            cell.rjust(width) if i >= 3 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def main(argv: list[str]) -> None:
    if len(argv) != 2:
        raise UserError("give one directory: python -m tools.inspect_checkpoint DIR")
    directory, step = locate(argv[1])
    step = steps_in(directory)[-1] if step is None else step
    try:
        contents = manifest.read(directory / str(step))
    except manifest.DamagedCheckpoint as error:
        raise UserError(f"step {step} in {directory}: {error}; name another step") from None
    files = contents["files"].values()
    print(
        f"step {step} in {directory}: {len(files)} files, {sum(f['bytes'] for f in files):,} bytes"
    )
    print("\n".join(table(contents)))


if __name__ == "__main__":
    run_main(main)
