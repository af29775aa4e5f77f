"""Hugging Face folder to Hugging Face folder in another dtype, as a stream of rows, without a GPU.

Tensors that have the wanted dtype already pass byte for byte. Names, MTP's copies of embedding and
head included, stay as they are.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax.checkpoint import hf, hf_writer
from dsv3_jax.checkpoint.hf_check import check_tensors, without_absent_mtp
from dsv3_jax.checkpoint.hf_config import QUANTIZATION, read_model_config
from dsv3_jax.checkpoint.hf_folder import (
    NUMPY_DTYPES,
    Folder,
    StoredTensor,
    open_folder,
    row_ranges,
)
from dsv3_jax.checkpoint.hf_tokenizer import source_files
from dsv3_jax.checkpoint.on_cpu import on_cpu
from dsv3_jax.errors import UserError

_CHUNK_NUMBERS = 8 << 20  # handled at a time: at most 32 MiB


def convert_folder(
    source: Path, destination: Path, dtype: str, max_shard_bytes: int = 5_000_000_000
) -> None:
    """Writes a checkpoint in another dtype; a call that was killed is continued by the same call.

    Memory stays below 1 GB for any model. Nothing of the source is changed.

    Args:
      source: folder of FP8 weights with scales, BF16, F16 or F32.
      destination: must not exist yet.
      dtype: 'fp8' (projections E4M3 with a float32 scale a 128x128 block, the rest bfloat16),
        'bf16' or 'f32'; the router bias is float32 in all of them.
      max_shard_bytes: of the tensors of one file.

    Raises:
      UserError: the source is damaged or no checkpoint of a model of ours, holds NaN or infinity
        where FP8 is wanted, or the destination cannot be written.
    """
    if dtype not in hf.DTYPES:
        raise UserError(f"dtype={dtype} is unknown; allowed: {', '.join(hf.DTYPES)}")
    folder = open_folder(source)
    if folder.path.resolve() in (destination := destination.resolve()).parents:
        raise UserError(f"{destination} lies in the source; give a destination outside of it")
    model = read_model_config(folder.config, str(folder.path / "config.json"))
    model = without_absent_mtp(folder, model)
    check_tensors(folder, model)
    tensors = [  # MTP's copies may be absent
        tensor
        for tensor in hf.tensors(model, dtype).values()
        if tensor.name in folder.tensors or tensor.is_scale
    ]
    config = json.dumps(_config(folder.config, dtype), indent=2) + "\n"
    stats = {t.file.name: t.file.stat() for t in folder.tensors.values()}
    hf_writer.write_folder(
        destination,
        tensors,
        _Converter(folder).chunks,
        files={**source_files(folder.path), "config.json": config.encode()},
        identity={
            "source": str(folder.path),
            "source_files": {n: [s.st_size, s.st_mtime_ns] for n, s in sorted(stats.items())},
            "dtype": dtype,
        },
        max_shard_bytes=max_shard_bytes,
        label="converting",
    )


def _config(values: dict[str, Any], dtype: str) -> dict[str, Any]:
    """config.json of the converted folder: only the keys about dtypes differ."""
    values = {key: value for key, value in values.items() if key != "quantization_config"}
    key = "dtype" if "dtype" in values else "torch_dtype"  # newer and older name
    values[key] = "float32" if dtype == "f32" else "bfloat16"
    return values | ({"quantization_config": QUANTIZATION} if dtype == "fp8" else {})


class _Converter:
    """Makes the chunks of one tensor after the other."""

    def __init__(self, folder: Folder):
        self._folder = folder
        self._new_scales: dict[str, np.ndarray] = {}  # of the weight that was quantised last

    def chunks(self, tensor: hf.Tensor) -> Iterator[np.ndarray]:
        """Rows of the converted tensor, in order."""
        stored = self._folder.tensors.get(tensor.name)
        if tensor.is_scale and tensor.name in self._new_scales:
            yield self._new_scales.pop(tensor.name)
        elif stored.dtype == tensor.dtype:
            yield from map(stored.read, row_ranges(stored.shape, _CHUNK_NUMBERS))
        elif tensor.dtype == "F8_E4M3":
            yield from self._quantized(stored)
        elif stored.dtype == "F8_E4M3":
            yield from self._dequantized(stored, tensor.dtype)
        else:
            for rows in row_ranges(stored.shape, _CHUNK_NUMBERS):
                yield stored.read(rows).astype(NUMPY_DTYPES[tensor.dtype])

    def _quantized(self, stored: StoredTensor) -> Iterator[np.ndarray]:
        from pallas_kernels import quantize_blocks  # it imports JAX, after every check

        parts = []
        for rows in row_ranges(stored.shape, _CHUNK_NUMBERS):
            codes, scales = on_cpu(quantize_blocks, stored.read(rows))
            if not np.isfinite(scales).all():
                raise UserError(
                    f"{stored.name} in {stored.file} holds NaN or infinity, which blocks of FP8 "
                    f"cannot express; mend the source or choose bf16 or f32"
                )
            parts.append(scales)
            yield codes
        self._new_scales = {stored.name + hf.SCALE_SUFFIX: np.concatenate(parts)}

    def _dequantized(self, stored: StoredTensor, dtype: str) -> Iterator[np.ndarray]:
        from pallas_kernels import dequantize_blocks

        scales = self._folder.tensors[stored.name + hf.SCALE_SUFFIX].read()
        for rows in row_ranges(stored.shape, _CHUNK_NUMBERS):
            blocks = slice(rows.start // hf.BLOCK_SIZE, -(-rows.stop // hf.BLOCK_SIZE))
            yield on_cpu(
                dequantize_blocks,
                stored.read(rows),
                scales[blocks],
                out_dtype=NUMPY_DTYPES[dtype],
            )
