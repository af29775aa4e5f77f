"""Whether a checkpoint is intact. Exit code 0: it is; 2: it is not, with one line saying how.

python -m tools.verify_checkpoint DIR, where DIR is
- a run's working directory or its checkpoints folder (every step is verified) or one step in it:
  every file is hashed again;
- a Hugging Face folder: names, shapes and dtypes must be those of its config.json, files those of
  its MANIFEST.json (our exports have one), scales finite and positive, all other numbers finite.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from dsv3_jax.checkpoint import hf, hf_folder, manifest
from dsv3_jax.checkpoint.hf_check import check_tensors, without_absent_mtp
from dsv3_jax.checkpoint.hf_config import read_model_config
from dsv3_jax.checkpoint.hf_folder import StoredTensor, row_ranges
from dsv3_jax.checkpoint.hf_progress import Progress
from dsv3_jax.checkpoint.reader import locate, steps_in, verify_step
from dsv3_jax.errors import UserError, run_main, some

_CHUNK_NUMBERS = 8 << 20  # of a tensor that a thread holds at a time
# The bits that are all ones in a NaN or an infinity, as an integer of the dtype's width.
_EXPONENTS = {
    "F8_E4M3": (np.uint8, 0x7F),
    "BF16": (np.uint16, 0x7F80),
    "F16": (np.uint16, 0x7C00),
    "F32": (np.uint32, 0x7F800000),
}


def wrong_values(tensor: StoredTensor) -> str | None:
    """What is wrong with the numbers of a tensor, or None."""
    integer, exponent = _EXPONENTS[tensor.dtype]
    bad = 0
    for rows in row_ranges(tensor.shape, _CHUNK_NUMBERS):
        chunk = tensor.read(rows)
        bits = np.atleast_1d(chunk).view(integer)
        wrong = (bits & exponent) == exponent
        if tensor.name.endswith(hf.SCALE_SUFFIX):
            wrong |= ~(chunk > 0)
        bad += np.count_nonzero(wrong)
    what = "not finite and positive" if tensor.name.endswith(hf.SCALE_SUFFIX) else "not finite"
    return f"{tensor.name} ({bad:,} of {tensor.size:,} {what})" if bad else None


def verify_folder(path: Path) -> None:
    """Verifies a Hugging Face folder and prints what was compared.

    Raises:
      UserError: the first kind of damage found, with a few names.
    """
    folder = hf_folder.open_folder(path)
    model = read_model_config(folder.config, str(folder.path / "config.json"))
    check_tensors(folder, without_absent_mtp(folder, model))
    tensors = folder.tensors.values()
    print(f"{len(tensors):,} tensors: names, shapes and dtypes are those of config.json")
    if (folder.path / manifest.NAME).is_file():
        try:
            files = manifest.verify(folder.path)["files"].values()
        except manifest.DamagedCheckpoint as error:
            raise UserError(f"{path} is damaged: {error}; convert or copy it again") from None
        print(f"{len(files)} files, {sum(f['bytes'] for f in files):,} bytes: crc32 ok")
    else:
        print(f"no {manifest.NAME}: there are no checksums to compare the files with")
    wrong = []
    with (
        Progress("reading", sum(tensor.num_bytes for tensor in tensors)) as progress,
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
    ):
        for tensor, found in zip(tensors, pool.map(wrong_values, tensors), strict=True):
            progress.advance(tensor.num_bytes)
            wrong += [found] if found else []
    if wrong:
        raise UserError(f"{path} holds bad numbers: {some(wrong)}; download or convert it again")
    print("all scales finite and positive, all other numbers finite")


def main(argv: list[str]) -> None:
    if len(argv) != 2:
        raise UserError("give one directory: python -m tools.verify_checkpoint DIR")
    if hf_folder.is_folder(argv[1]):
        return verify_folder(Path(argv[1]))
    directory, only = locate(argv[1])
    damaged = []
    for step in steps_in(directory) if only is None else [only]:
        try:
            files = verify_step(directory / str(step))["files"].values()
            print(f"step {step}: {len(files)} files, {sum(f['bytes'] for f in files):,} bytes, ok")
        except manifest.DamagedCheckpoint as error:
            damaged.append(f"step {step} is damaged: {error}")
    if damaged:
        raise UserError(f"{' | '.join(damaged)}; restoring skips it, so delete it or copy it again")


if __name__ == "__main__":
    run_main(main)
