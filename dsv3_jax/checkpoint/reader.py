"""Finding the newest checkpoint that verifies, and reading it onto any mesh."""

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from dsv3_jax.checkpoint import manifest
from dsv3_jax.checkpoint.hashing import as_bytes, is_on_host, named_leaves
from dsv3_jax.errors import UserError, some

_SMALL_BYTES = 1 << 16  # leaves up to this size are also compared number by number after a restore
_NO_STEP, _NO_VALID_STEP = -1, -2


def steps_in(directory: Path) -> list[int]:
    """Steps saved in a directory, ascending, verified or not."""
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if _is_step(path))


def _is_step(path: Path) -> bool:
    return path.name.isdecimal() and path.name == str(int(path.name)) and path.is_dir()


def locate(path: str | Path) -> tuple[Path, int | None]:
    """The checkpoint directory and, if the path names one, the step.

    Args:
      path: a working directory, its `checkpoints` folder, or the folder of one step.

    Raises:
      UserError: nothing of the kind is there.
    """
    path = Path(path).absolute()
    if _is_step(path):
        return path.parent, int(path.name)
    for directory in (path, path / "checkpoints"):
        if steps_in(directory):
            return directory, None
    what = "holds no checkpoint" if path.is_dir() else "does not exist"
    raise UserError(
        f"{path} {what}; give a run's working directory, its checkpoints folder or one step in it"
    )


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One step whose files all verified."""

    path: Path
    contents: dict[str, Any]  # the manifest
    rejected: tuple[tuple[int, str], ...] = ()  # newer steps that did not verify, with the reason

    @property
    def step(self) -> int:
        return self.contents["step"]

    @property
    def extra(self) -> dict[str, Any]:
        """What the saver stored beside the arrays: data position, tokens, config."""
        return self.contents["extra"]

    def restore(self, template: Any, *, partial: bool = False) -> Any:
        """Reads the arrays into the structure of a template.

        Args:
          template: pytree of `jax.ShapeDtypeStruct`; a leaf with a sharding becomes a `jax.Array`
            on that mesh, whatever mesh it was saved from, and one without becomes a numpy array.
          partial: the template may lack arrays that the checkpoint holds, e.g. for weights alone.

        Raises:
          UserError: the arrays differ in name, shape or dtype, by name; or the numbers read are
            not those that were saved.
        """
        wanted = named_leaves(template)
        self._check_names_and_shapes(wanted, partial)
        # Orbax sees a flat table: no container type has to be stored or matched.
        restored = ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).restore(
            self.path,
            args=ocp.args.PyTreeRestore(
                item=wanted,
                restore_args={name: _restore_args(leaf) for name, leaf in wanted.items()},
                partial_restore=True,
            ),
        )
        small = _small_leaf_digests(restored)
        wrong = [n for n, crc in small.items() if crc != self.contents["small_leaves"].get(n, crc)]
        if wrong:
            raise UserError(
                f"{self.path} verifies but {some(wrong)} read back as other numbers than were "
                f"saved; read it again on another host"
            )
        return jax.tree.unflatten(jax.tree.structure(template), [restored[n] for n in wanted])

    def _check_names_and_shapes(self, wanted: dict[str, Any], partial: bool) -> None:
        saved = self.contents["arrays"]
        problems = []
        if missing := [name for name in wanted if name not in saved]:
            problems.append(f"lacks {some(missing)}")
        if not partial and (extra := [name for name in saved if name not in wanted]):
            problems.append(f"also holds {some(extra)}")
        differing = [
            f"{name} {_shape_text(saved[name])} where {_shape_text(describe(leaf))} is expected"
            for name, leaf in wanted.items()
            if name in saved and saved[name] != describe(leaf)
        ]
        if differing:
            problems.append(f"holds {some(differing)}")
        if problems:
            raise UserError(
                f"checkpoint {self.path} does not fit this config: it {', and '.join(problems)}; "
                f"use the config that wrote it or another directory"
            )


def open_checkpoint(directory: str | Path, step: int | None = None) -> Checkpoint | None:
    """The newest step that verifies, or the given one. With several processes all must call it.

    Args:
      directory: a folder of steps, as `CheckpointManager` writes it.
      step: only this step.

    Returns:
      The checkpoint, with the rejected newer steps (logged too); None when there is no step at all.

    Raises:
      UserError: no step verifies, with the reason of each.
    """
    directory = Path(directory).absolute()
    chosen, contents, rejected = _NO_STEP, None, []
    if jax.process_index() == 0:
        chosen, contents, rejected = _newest_valid(directory, step)
        for bad_step, reason in rejected:
            logging.warning("checkpoint step %d is not used: %s", bad_step, reason)
    if jax.process_count() > 1:
        # One process hashes, so that all restore the same step.
        chosen = int(multihost_utils.broadcast_one_to_all(np.int32(chosen)))
    if chosen == _NO_STEP and step is None:
        return None
    if chosen < 0:
        if step is not None and not rejected:
            steps = ", ".join(map(str, steps_in(directory))) or "none"
            raise UserError(f"{directory} has no valid step {step}; steps there: {steps}")
        reasons = " | ".join(f"step {bad_step}: {reason}" for bad_step, reason in rejected)
        raise UserError(
            f"no checkpoint in {directory} verifies ({reasons or 'see process 0'}); move the "
            f"folder away to start afresh"
        )
    path = directory / str(chosen)
    if contents is None:
        contents = manifest.read(path)
    return Checkpoint(path=path, contents=contents, rejected=tuple(rejected))


def verify_step(path: Path) -> dict[str, Any]:
    """Re-hashes the checkpoint of one step and returns its manifest.

    Raises:
      manifest.DamagedCheckpoint: the files that are wrong, and how.
    """
    contents = manifest.verify(path)
    if contents["step"] != int(path.name):
        raise manifest.DamagedCheckpoint(f"it was saved as step {contents['step']}")
    return contents


def _newest_valid(
    directory: Path, step: int | None
) -> tuple[int, dict[str, Any] | None, list[tuple[int, str]]]:
    candidates = [s for s in steps_in(directory) if step in (None, s)]
    rejected = []
    for candidate in reversed(candidates):
        try:
            return candidate, verify_step(directory / str(candidate)), rejected
        except manifest.DamagedCheckpoint as error:
            rejected.append((candidate, str(error)))
    return (_NO_VALID_STEP if candidates else _NO_STEP), None, rejected


def describe(leaf: Any) -> dict[str, Any]:
    """Dtype and shape of an array or a template leaf, JSON-safe."""
    return {"dtype": np.dtype(leaf.dtype).name, "shape": list(leaf.shape)}


def manifest_arrays(named: dict[str, Any]) -> dict[str, Any]:
    """The manifest's entries about the arrays of a state, before it is saved."""
    arrays = {name: describe(leaf) for name, leaf in named.items()}
    return {"arrays": arrays, "small_leaves": _small_leaf_digests(named)}


def _small_leaf_digests(named: dict[str, Any]) -> dict[str, str]:
    """crc32 of every small leaf that this process sees whole."""
    small = {n: x for n, x in named.items() if x.nbytes <= _SMALL_BYTES and is_on_host(x)}
    return {n: f"{zlib.crc32(as_bytes(x)):08x}" for n, x in jax.device_get(small).items()}


def _restore_args(leaf: jax.ShapeDtypeStruct) -> ocp.RestoreArgs:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
    return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype)


def _shape_text(entry: dict[str, Any]) -> str:
    return f"{entry['dtype']}{entry['shape']}"
