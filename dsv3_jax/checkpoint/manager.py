"""Asynchronous checkpoints that can be trusted.

Orbax writes the arrays into `pending.<step>`; when it has committed, a thread hashes the files,
adds MANIFEST.json and renames the folder to `<step>`. That rename is the commit: a process killed
at any moment leaves only `pending.*` or `deleting.*` behind, which the next start removes. The
directory must be on a file system that all processes share and where a rename is atomic.
"""

import json
import logging
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from dsv3_jax import faults
from dsv3_jax.checkpoint import agreement, manifest
from dsv3_jax.checkpoint.hashing import named_leaves
from dsv3_jax.checkpoint.reader import manifest_arrays, open_checkpoint, steps_in
from dsv3_jax.errors import UserError

# Orbax logs the traceback of a failed write several times; ours is one error with the path.
logging.getLogger("absl").addFilter(
    lambda record: not (record.levelno >= logging.ERROR and "orbax" in record.pathname)
)
logging.getLogger("asyncio").addFilter(
    lambda record: not ("never retrieved" in (text := record.getMessage()) and "OCDBT" in text)
)


class CheckpointManager:
    """Saves and restores the state of a run under one directory.

    An error while saving is raised by the next call, in all processes where one had it; older
    checkpoints stay as they are. Every process makes the same calls.
    """

    def __init__(self, directory: str | Path, *, keep: int, config_digest: str = "") -> None:
        """Creates the directory and removes what an interrupted save left behind.

        Args:
          directory: one folder a step is made in it. One running writer a directory.
          keep: newest checkpoints kept, at least 1.
          config_digest: recorded in every manifest.

        Raises:
          UserError: the directory cannot be created or written.
        """
        assert keep >= 1, keep
        self._directory = Path(directory).absolute()
        self._keep = keep
        self._config_digest = config_digest
        # Made in the background, a directory that cannot be made would leave Orbax's threads
        # waiting for it for minutes, and the process unable to exit.
        self._checkpointer = ocp.AsyncCheckpointer(
            ocp.PyTreeCheckpointHandler(),
            async_options=ocp.options.AsyncOptions(
                create_directories_asynchronously=False, barrier_sync_fn=self._barrier
            ),
        )
        self._step = 0  # of the save under way
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self.rejected: tuple[tuple[int, str], ...] = ()  # (step, reason) of the last restore
        self._damaged: set[int] = set()  # rejected steps not saved anew since
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            if jax.process_index() == 0:
                self._remove_leftovers()
        except OSError as error:
            raise UserError(
                f"checkpoint directory {self._directory} cannot be written ({error.strerror}); "
                f"give another --workdir"
            ) from None

    def save(self, step: int, state: Any, extra: dict[str, Any], *, wait: bool = False) -> None:
        """Starts saving a state. Blocks until the arrays are copied to the host, no longer.

        Buffers of the state may be donated as soon as it returns. A step saved before is replaced.
        A save still under way is waited for first.

        Args:
          step: names the checkpoint.
          state: pytree of jax or numpy arrays.
          extra: JSON-safe; comes back from `restore`. Process 0's is stored.
          wait: return only when the checkpoint is complete.

        Raises:
          UserError: this save cannot start, or the one before failed.
        """
        assert step >= 0, step
        self.wait()
        self._step = step
        named = named_leaves(state)
        body = {
            "step": step,
            "config_digest": self._config_digest,
            "extra": json.loads(json.dumps(extra, allow_nan=False)),
            **manifest_arrays(named),
        }
        try:
            if jax.process_index() == 0:
                self._check_space(step, named)
        except OSError as caught:
            error = self._save_error(step, caught)
            agreement.hear(str(error))
            raise error from None
        agreement.hear()
        try:
            self._checkpointer.save(
                self._pending(step), args=ocp.args.PyTreeSave(named), force=True
            )
        except (OSError, ValueError) as caught:
            if jax.process_count() > 1:
                raise  # the others wait for this process, and end when it does
            raise self._save_error(step, caught) from None
        self._thread = threading.Thread(target=self._finish, args=(step, body))
        self._thread.start()
        if wait:
            self.wait()

    def restore(
        self, template: Any, step: int | None = None
    ) -> tuple[Any, dict[str, Any], int] | None:
        """Reads the newest checkpoint that verifies, or the given step, onto any mesh.

        Args:
          template: pytree of `jax.ShapeDtypeStruct`, with shardings of the mesh to restore on.
          step: only this step.

        Returns:
          State, extra and step; None when the directory has no checkpoint. On process 0 `rejected`
          then lists the newer steps that did not verify.

        Raises:
          UserError: checkpoints exist but none verifies, or the arrays do not fit the template.
        """
        self.wait()
        checkpoint = open_checkpoint(self._directory, step)
        if checkpoint is None:
            return None
        self.rejected = checkpoint.rejected
        self._damaged = {bad_step for bad_step, _ in checkpoint.rejected}
        return checkpoint.restore(template), checkpoint.extra, checkpoint.step

    def latest_step(self) -> int | None:
        """The newest complete step (not re-hashed), or None. A save under way does not count."""
        complete = self._complete_steps()
        return complete[-1] if complete else None

    @property
    def saving(self) -> bool:
        """Whether a save is under way; `wait` would block."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Blocks until the save under way is complete; raises its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Waits and releases the writer; raises the error of the last save."""
        try:
            self.wait()
        finally:
            self._checkpointer.close()

    def _check_space(self, step: int, named: dict[str, Any]) -> None:
        """Raises OSError when the disk is too full to begin. Arrays hardly shrink on it.

        Or when it cannot be written: Orbax would make the folder on one process while others wait.
        """
        self._pending(step).mkdir(exist_ok=True)
        self._pending(step).rmdir()
        needed = sum(leaf.nbytes for leaf in named.values())
        free = shutil.disk_usage(self._directory).free
        if free < needed:
            raise OSError(f"it takes {needed / 1e9:.3g} GB and {free / 1e9:.3g} GB are free")

    def _pending(self, step: int) -> Path:
        return self._directory / f"pending.{step}"

    def _complete_steps(self) -> list[int]:
        steps = steps_in(self._directory)
        return [s for s in steps if (self._directory / str(s) / manifest.NAME).exists()]

    def _barrier(self, *, key: str, timeout_ms: int) -> None:
        """Orbax waits here for the other processes, in its thread."""
        faults.reach("after_write", self._step)
        agreement.hear()

    def _finish(self, step: int, body: dict[str, Any]) -> None:
        try:
            self._checkpointer.wait_until_finished()  # every process has written its part
            if jax.process_index() == 0:
                self._commit(step, body)
            agreement.hear()
        except agreement.OtherProcessError as error:
            self._error = error
        except Exception as error:
            self._error = error
            if isinstance(error, OSError | ValueError):  # how Orbax's writer reports a full disk
                self._error = self._save_error(step, error)
            agreement.hear(str(self._error) or repr(error))
        if self._error and jax.process_index() == 0:  # nobody writes any more
            for path in self._directory.glob(f"pending.{step}*"):
                shutil.rmtree(path, ignore_errors=True)

    def _commit(self, step: int, body: dict[str, Any]) -> None:
        faults.reach("before_manifest", step)
        manifest.write(self._pending(step), body)
        faults.reach("before_commit", step)
        self._publish(step)
        faults.reach("after_commit", step)
        self._delete_old(step)

    def _publish(self, step: int) -> None:
        final = self._directory / str(step)
        replaced = self._directory / f"replaced.{step}"
        if final.exists():
            final.rename(replaced)
        self._pending(step).rename(final)
        shutil.rmtree(replaced, ignore_errors=True)

    def _delete_old(self, saved: int) -> None:
        """Keeps the newest complete steps up to the one just saved, and every later one."""
        self._damaged.discard(saved)
        complete = [s for s in self._complete_steps() if s <= saved and s not in self._damaged]
        kept = set(complete[-self._keep :])
        for step in steps_in(self._directory):
            if step < saved and step not in kept:
                doomed = self._directory / f"deleting.{step}"
                (self._directory / str(step)).rename(doomed)
                faults.reach("in_deletion", saved)
                shutil.rmtree(doomed)

    def _remove_leftovers(self) -> None:
        for path in list(self._directory.iterdir()):
            match = re.match(r"(pending|deleting|replaced)\.(\d+)", path.name)
            if match and match[1] == "replaced" and not (self._directory / match[2]).exists():
                path.rename(self._directory / match[2])  # killed between _publish's two renames
            elif match:
                shutil.rmtree(path)

    def _save_error(self, step: int, error: Exception) -> UserError:
        text = (str(error).strip() or repr(error)).splitlines()[0]
        # Orbax's writer wraps the cause, which comes last, in the name of every layer it passed.
        reason = text.partition(" [tensorstore_spec=")[0].rpartition('": ')[2]
        return UserError(
            f"saving checkpoint {step} in {self._directory} failed: {reason}; older checkpoints "
            f"are intact; free space or give another --workdir"
        )
