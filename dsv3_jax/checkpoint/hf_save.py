"""From a model to a Hugging Face folder, one piece of one weight at a time.

Pieces are cut on the devices, gathered to the host, turned ([in, out] to [out, in]) and converted.
FP8 weights that were loaded and not trained since come out byte for byte as they were.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from jax.experimental import multihost_utils

from dsv3_jax.checkpoint import hf
from dsv3_jax.checkpoint.hf_config import config_values
from dsv3_jax.checkpoint.hf_folder import NUMPY_DTYPES
from dsv3_jax.checkpoint.hf_load import Source
from dsv3_jax.checkpoint.hf_tokenizer import tokenizer_files
from dsv3_jax.checkpoint.hf_writer import write_folder
from dsv3_jax.checkpoint.on_cpu import on_cpu
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.errors import UserError, did_you_mean
from dsv3_jax.model.router import RouterBias
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.overrides import to_dict
from dsv3_jax.parallel.rules import Box, boxes
from dsv3_jax.precision.block_scaled import BlockScaled, requantize_blocks
from pallas_kernels import dequantize_blocks, quantize_blocks

_PIECE_NUMBERS = 8 << 20  # on the host at a time; a piece is whole rows of blocks


def save_folder(
    model: DeepSeekV3,
    path: str | Path,
    dtype: str,
    tokenizer: Tokenizer | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes the released layout: shards, index, config.json, tokenizer files, the MTP layer.

    An interrupted save of the same weights continues. Every process of the model's mesh must call
    this; they share the writing, to a file system that all of them see.

    Args:
      path: a folder that does not exist yet.
      dtype: 'fp8': projections E4M3 with one float32 scale a 128x128 block (spec §5.1), the rest
        bfloat16; a block that was loaded from FP8 and not trained keeps its codes and its scale.
        'bf16' or 'f32': all weights, FP8 ones dequantised. The router bias is always float32.
      tokenizer: None: the files of the folder or run that the model was loaded from.
      max_shard_bytes: of the tensors of one file.

    Raises:
      UserError: the dtype is unknown, the model cannot be described by a config.json, a weight is
        NaN or infinite where FP8 is wanted, or the folder exists or cannot be written.
    """
    if dtype not in hf.DTYPES:
        hint = did_you_mean(dtype, hf.DTYPES)
        raise UserError(f"dtype={dtype!r} is unknown; allowed: {', '.join(hf.DTYPES)};{hint}")
    values = config_values(model.config, dtype)
    source = model.source or Source()
    values |= source.token_ids
    files = dict(source.files)
    if tokenizer is None and "tokenizer.json" in files and "tokenizer_config.json" not in files:
        tokenizer = Tokenizer(files["tokenizer.json"].decode(), "the run's tokenizer.json")
    if tokenizer is not None:
        tokenizer.check_fits(model.config.vocab_size)
        length = values["max_position_embeddings"]
        files |= tokenizer_files(tokenizer, model_max_length=length)
        values |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    elif not files:
        logging.warning("%s gets no tokenizer; give one with tokenizer=", path)
    files["config.json"] = (json.dumps(values, indent=2) + "\n").encode()
    weights = _Weights(model, source, dtype)
    write_folder(
        Path(path),
        list(hf.tensors(model.config, dtype).values()),
        weights.chunks,
        files=files,
        identity={"model": to_dict(model.config), "dtype": dtype, "weights": weights.digest()},
        max_shard_bytes=max_shard_bytes,
        label="saving",
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        barrier=lambda: multihost_utils.sync_global_devices("save_pretrained"),
    )


class _Weights:
    """The leaves of a model as stored tensors."""

    def __init__(self, model: DeepSeekV3, source: Source, dtype: str):
        state = nnx.to_flat_state(nnx.state(model, (nnx.Param, RouterBias)))
        self._leaves = {
            ".".join(path): jax.tree.map(jnp.asarray, variable[...]) for path, variable in state
        }
        self._source, self._dtype = source, dtype
        self._scales: list[np.ndarray] = []  # of the weight handed out last

    def digest(self) -> str:
        """Tells weights apart: a sum over the bits of each leaf, and the remembered scales."""
        digest = hashlib.sha256()
        for name, leaf in sorted(self._leaves.items()):
            sums = [int(_fingerprint(x)) for x in jax.tree.leaves(leaf)]
            digest.update(f"{name} {sums}\n".encode())
        for name, scales in sorted(self._source.scales.items()):
            digest.update(name.encode() + scales.tobytes())
        return digest.hexdigest()

    def chunks(self, tensor: hf.Tensor) -> Iterator[np.ndarray]:
        """Consecutive rows of a stored tensor, in its stored dtype.

        A weight's scales are made with it, so they must be asked for right after it.
        """
        if tensor.is_scale:
            scales = np.concatenate(self._scales)
            assert scales.shape == tensor.shape, (tensor.name, scales.shape)
            yield scales
            return
        self._scales = []
        width = math.prod(tensor.shape[1:])
        step = max(1, _PIECE_NUMBERS // width // hf.BLOCK_SIZE) * hf.BLOCK_SIZE
        for first in range(0, tensor.shape[0], step):
            yield self._rows(tensor, first, min(first + step, tensor.shape[0]))

    def _rows(self, tensor: hf.Tensor, first: int, last: int) -> np.ndarray:
        dtype = NUMPY_DTYPES[tensor.dtype]
        leaf = self._leaves[tensor.slot.path]
        blocks = slice(first // hf.BLOCK_SIZE, -(-last // hf.BLOCK_SIZE))
        if isinstance(leaf, BlockScaled):
            scales = _stored(leaf.scales, tensor.slot, hf.scale_shape(tensor.shape)[0], blocks)
            codes = _stored(leaf.codes, tensor.slot, tensor.shape[0], slice(first, last))
            if tensor.dtype == "F8_E4M3":
                self._scales.append(scales)
                return codes
            return on_cpu(dequantize_blocks, codes, scales, out_dtype=dtype)
        quantized = tensor.dtype == "F8_E4M3"
        kept_dtype = leaf.dtype if quantized else dtype
        rows = _stored(leaf, tensor.slot, tensor.shape[0], slice(first, last), kept_dtype)
        if not quantized:
            return rows
        remembered = self._source.scales.get(tensor.name)
        if remembered is None:
            codes, scales = on_cpu(quantize_blocks, rows)
        else:
            codes, scales = on_cpu(requantize_blocks, rows, remembered[blocks])
        if not np.isfinite(scales).all():
            raise UserError(
                f"{tensor.name} holds NaN or infinity, which blocks of FP8 cannot express; save "
                f"an earlier checkpoint, or use dtype='bf16' or 'f32'"
            )
        self._scales.append(scales)
        return codes


def _stored(
    leaf: jax.Array, slot: hf.Slot, num_rows: int, rows: slice, dtype: np.dtype | None = None
) -> np.ndarray:
    """Rows of a stored tensor, out of the leaf that holds it.

    Args:
      num_rows: of the whole stored tensor.
      dtype: to convert to on the device; None: the leaf's.
    """
    inner = [(0, dim) for dim in leaf.shape[len(slot.index) :]]
    offset = (slot.half or 0) * num_rows
    inner[-1 if slot.transposed else 0] = (rows.start + offset, rows.stop + offset)
    box = (*((i, i + 1) for i in slot.index), *inner)
    part = _fetch(leaf, box, np.dtype(dtype or leaf.dtype)).reshape([b - a for a, b in inner])
    return np.ascontiguousarray(part.T if slot.transposed else part)


def _fetch(leaf: jax.Array, box: Box, dtype: np.dtype) -> np.ndarray:
    """A box of a leaf on the host of every process, cut out of the shards where they are."""
    out = np.zeros([last - first for first, last in box], dtype)
    here = {shard.device: shard.data for shard in leaf.addressable_shards}
    parts = []
    for place, devices in boxes(leaf.sharding, leaf.shape).items():
        common = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, place, strict=True)]
        if all(first < last for first, last in common):
            parts.append((place, devices, common))
    processes = {device.process_index for device in leaf.sharding.device_set}
    everywhere = all({d.process_index for d in devices} == processes for _, devices, _ in parts)
    for place, devices, common in parts:
        device = next((d for d in devices if d in here), None)
        if device is None or not (everywhere or device == devices[0]):
            continue  # the process of the shard's first device sends it
        starts = [first - c for (first, _), (c, _) in zip(common, place, strict=True)]
        target = tuple(slice(f - a, l - a) for (f, l), (a, _) in zip(common, box, strict=True))
        sizes = tuple(last - first for first, last in common)
        out[target] = _cut(here[device], starts, sizes, dtype)
    if everywhere:
        return out
    # A sum over processes: every number is nonzero in one of them alone.
    bits = out.reshape(-1).view(np.uint8)
    bits = multihost_utils.broadcast_one_to_all(bits, is_source=True)
    return np.asarray(bits).view(dtype).reshape(out.shape)


@partial(jax.jit, static_argnums=(2, 3))
def _cut(shard: jax.Array, starts: list[int], sizes: tuple[int, ...], dtype: np.dtype) -> jax.Array:
    # The starts are traced: one compilation serves all experts.
    return jax.lax.dynamic_slice(shard, starts, sizes).astype(dtype)


@jax.jit
def _fingerprint(leaf: jax.Array) -> jax.Array:
    """uint32: the bits of all numbers, each times an odd number of its place."""
    unsigned = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
    place = jnp.zeros(leaf.shape, jnp.uint32)
    for dim, size in enumerate(leaf.shape):
        place = place * size + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, dim)
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)
