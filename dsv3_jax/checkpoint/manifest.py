"""MANIFEST.json: what a checkpoint must consist of, byte for byte.

Orbax does not notice a flipped bit in array data, so every file's size and crc32 are written down
when a save has committed and compared before a restore. The manifest guards itself (sealed.py).
"""

import os
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dsv3_jax.sealed import seal, unseal

NAME = "MANIFEST.json"
_READ_BYTES = 8 << 20


class DamagedCheckpoint(Exception):
    """Why a checkpoint cannot be trusted: the files and what is wrong with each."""


def entry(num_bytes: int, crc: int) -> dict[str, Any]:
    """What a manifest says about one file."""
    return {"bytes": num_bytes, "crc32": f"{crc:08x}"}


def write(
    directory: Path, body: dict[str, Any], known: Mapping[str, dict[str, Any]] | None = None
) -> None:
    """Hashes every file of a committed checkpoint and writes its manifest by rename.

    Args:
      directory: the checkpoint of one step.
      body: JSON-safe contents beside `files`: step, config_digest, arrays, extra.
      known: entries of files that were hashed as they were written, by name.
    """
    content = seal({**body, "files": _hash_files(directory, known)})
    temporary = directory / f"{NAME}.tmp"
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(directory / NAME)


def read(directory: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, its own crc32 checked, the other files untouched.

    Raises:
      DamagedCheckpoint: there is none, or it is not what was written.
    """
    try:
        content = (directory / NAME).read_bytes()
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{NAME} is missing, so nothing can be verified") from None
    except OSError as error:
        raise DamagedCheckpoint(f"{NAME} cannot be read ({error})") from None
    try:
        return unseal(content)
    except ValueError:
        raise DamagedCheckpoint(f"{NAME} is damaged") from None


def verify(directory: Path) -> dict[str, Any]:
    """Re-hashes every file of a checkpoint and returns its manifest.

    Raises:
      DamagedCheckpoint: names every file that is missing, unexpected or changed.
    """
    body = read(directory)
    expected = body["files"]
    try:
        found = _hash_files(directory)
    except OSError as error:
        raise DamagedCheckpoint(f"{error.filename} cannot be read ({error.strerror})") from None
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} does not belong to it" for name in found if name not in expected]
    for name in sorted(expected.keys() & found.keys()):
        want, have = expected[name], found[name]
        if have["bytes"] != want["bytes"]:
            problems.append(f"{name} has {have['bytes']} bytes instead of {want['bytes']}")
        elif have["crc32"] != want["crc32"]:
            problems.append(f"{name} is altered (crc32 {have['crc32']}, was {want['crc32']})")
    if problems:
        raise DamagedCheckpoint("; ".join(problems))
    return body


def _hash_files(
    directory: Path, known: Mapping[str, dict[str, Any]] | None = None
) -> dict[str, dict[str, Any]]:
    paths = [p for p in sorted(directory.rglob("*")) if not p.is_dir()]
    names = [p.relative_to(directory).as_posix() for p in paths if p != directory / NAME]

    def hashed(name: str) -> dict[str, Any]:
        if known and name in known:
            return known[name]
        path = directory / name
        return entry(path.stat().st_size, _crc32_of_file(path))

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # crc32 releases the GIL
        return dict(zip(names, pool.map(hashed, names), strict=True))


def _crc32_of_file(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            crc = zlib.crc32(block, crc)
    return crc
