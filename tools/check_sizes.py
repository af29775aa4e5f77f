"""Fails when a hand-written Python file outgrows its budget: 600 lines, kernels 800; median 200.

Command: python tools/check_sizes.py
"""

import statistics
import subprocess
import sys
from pathlib import Path

LIMIT, KERNEL_LIMIT, MEDIAN_LIMIT = 600, 800, 200


def main() -> int:
    listed = subprocess.run(
        ["git", "ls-files", "*.py"], capture_output=True, text=True, check=True
    ).stdout.split()
    sizes = {name: len(Path(name).read_text().splitlines()) for name in listed}
    too_long = {
        name: size
        for name, size in sizes.items()
        if size > (KERNEL_LIMIT if name.startswith("pallas_kernels/") else LIMIT)
    }
    for name, size in too_long.items():
        print(f"{name}: {size} lines; split it")
    median = statistics.median(size for size in sizes.values() if size)
    print(f"{len(sizes)} files, {sum(sizes.values())} lines, median {median:.0f}")
    return 1 if too_long or median > MEDIAN_LIMIT else 0


if __name__ == "__main__":
    sys.exit(main())
