"""Run by test_checkpoint_kill.py: saves one step after another and dies where it is told to.

python saver.py DIRECTORY POINT: POINT 'none' saves until killed from outside; otherwise three steps
are saved and the process kills itself at that point of the fourth.
"""

import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np

from dsv3_jax.checkpoint import manager as manager_module
from dsv3_jax.checkpoint import manifest
from dsv3_jax.checkpoint.manager import CheckpointManager

SHAPE = (300, 1000)


def state_of(step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    return {"w": rng.normal(size=SHAPE), "step": np.array(step)}


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def arm(point: str) -> None:
    write, rename, rmtree = manifest.write, Path.rename, shutil.rmtree

    def write_then_die(*args):
        write(*args)
        die()

    def rename_then_die(self, target):
        result = rename(self, target)
        if Path(target).name.startswith(("replaced", "4")):
            die()
        return result

    def delete_one_file_then_die(path, **kwargs):
        if Path(path).name.startswith("deleting"):
            next(p for p in Path(path).rglob("*") if p.is_file()).unlink()
            die()
        rmtree(path, **kwargs)

    if point == "before_manifest":
        manifest.write = die
    elif point == "after_manifest":
        manifest.write = write_then_die
    elif point in ("after_rename", "between_renames"):
        Path.rename = rename_then_die
    else:
        assert point == "in_deletion", point
        manager_module.shutil.rmtree = delete_one_file_then_die


def main(directory: str, point: str) -> None:
    manager = CheckpointManager(directory, keep=2)
    first = (manager.latest_step() or 0) + 1
    for step in range(first, first + 1000):
        if point != "none" and step == 4:
            arm(point)
            if point == "between_renames":
                step = 3  # saved again, so it replaces itself
        manager.save(step, state_of(step), {"step": step})
        if point != "none":
            manager.wait()
        print(manager.latest_step(), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
