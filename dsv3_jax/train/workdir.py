"""The working directory of a run: checks before anything heavy is imported, and run.json."""

import importlib.metadata
import json
import platform
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv3_jax.config import Config
from dsv3_jax.errors import UserError
from dsv3_jax.overrides import to_dict

if TYPE_CHECKING:
    from jax.sharding import Mesh

RUN_FILE = "run.json"
CHECKPOINTS = "checkpoints"
TOKENIZER = "tokenizer.json"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def default_workdir(config: Config) -> Path:
    return Path("runs") / config.run.name


def check_workdir(config: Config, workdir: Path) -> None:
    """Checks that a run can live here, and leaves no trace. Needs neither JAX nor devices.

    Raises:
      UserError: the directory cannot be made or written, or holds checkpoints of another model.
    """
    _check_writable("--workdir", workdir)
    if not (config.checkpoint.restore and _holds_checkpoints(workdir)):
        return
    try:
        saved = json.loads((workdir / RUN_FILE).read_text())["config"]["model"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # the checkpoint itself will tell whether it fits
    model = to_dict(config)["model"]
    differing = sorted(key for key in model | saved if model.get(key) != saved.get(key))
    if differing:
        key = differing[0]
        raise UserError(
            f"{workdir} holds checkpoints of another model: model.{key} is {saved.get(key)} there "
            f"and {model.get(key)} here; give another --workdir, or start over with "
            f"--set checkpoint.restore=false"
        )


def check_inputs(config: Config, workdir: Path) -> None:
    """Checks that what a run reads is there, by names alone. Needs neither JAX nor devices.

    Raises:
      UserError: a source, the tokenizer, a prepared corpus or the first weights do not exist, or
        the cache folder cannot be made.
    """
    from dsv3_jax.data.sources import list_files

    data, inputs = config.data, {}
    if data.prepared:
        inputs["data.prepared"] = data.prepared
    else:
        for source in data.sources:
            list_files(source)
        if data.tokenizer != "train":
            inputs["data.tokenizer"] = data.tokenizer
        cache = Path(data.cache_dir).expanduser()
        if not cache.exists():  # one that exists may be read-only and hold the corpus
            _check_writable("data.cache_dir", cache)
    if not (config.checkpoint.restore and _holds_checkpoints(workdir)):
        inputs["checkpoint.initial_weights"] = config.checkpoint.initial_weights
    for key, path in inputs.items():
        if path and not Path(path).expanduser().exists():
            raise UserError(f"{key}={path} does not exist; correct the path or leave it out")


def _check_writable(key: str, path: Path) -> None:
    """Whether a folder can be made and written."""
    existing = path.absolute()
    try:
        while not existing.exists():
            existing = existing.parent
        with tempfile.TemporaryFile(dir=existing):
            pass
    except (OSError, ValueError) as error:  # ValueError: a NUL
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{key}={str(path)!r} cannot be written ({str(existing)!r}: {reason}); give another"
        ) from None


def open_workdir(config: Config, workdir: Path, mesh: "Mesh") -> None:
    """Makes the directory and writes run.json: config, versions, devices, mesh.

    With checkpoint.restore=false, checkpoints already there are moved aside.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    if not config.checkpoint.restore and _holds_checkpoints(workdir):
        aside = next(
            path
            for number in range(1, 10**6)
            if not (path := workdir / f"{CHECKPOINTS}.{number}").exists()
        )
        (workdir / CHECKPOINTS).rename(aside)
    written = workdir / f"{RUN_FILE}.tmp"
    written.write_text(json.dumps(_describe(config, mesh), indent=2) + "\n")
    written.replace(workdir / RUN_FILE)


def _holds_checkpoints(workdir: Path) -> bool:
    return (workdir / CHECKPOINTS).is_dir() and any((workdir / CHECKPOINTS).iterdir())


def _describe(config: Config, mesh: "Mesh") -> dict[str, Any]:
    import jax

    device = mesh.devices.flat[0]
    return {
        "config": to_dict(config),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "code_revision": _code_revision(),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in _PACKAGES},
        "devices": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": jax.device_count(),
            "processes": jax.process_count(),
        },
        "mesh": dict(mesh.shape),
    }


def _code_revision() -> str | None:
    """The git commit of this code, with '+' when files differ from it; None outside a clone."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "."], cwd=here, capture_output=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed else "")
