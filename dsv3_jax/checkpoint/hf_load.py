"""From a Hugging Face folder to a model: every process reads the bytes that its devices hold.

Our tree is filled leaf by leaf. For every part of a leaf that this process's devices hold, the rows
and columns of the stored tensors that fall in it are read, turned ([out, in] to [in, out]) and put
on those devices; then the buffer is freed. Experts land stacked, on their shard of the mesh.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from dsv3_jax.checkpoint import hf
from dsv3_jax.checkpoint.hf_check import check_tensors, without_absent_mtp
from dsv3_jax.checkpoint.hf_config import read_model_config
from dsv3_jax.checkpoint.hf_folder import Folder, StoredTensor, open_folder
from dsv3_jax.checkpoint.hf_tokenizer import source_files
from dsv3_jax.errors import UserError, some
from dsv3_jax.model.router import RouterBias
from dsv3_jax.model.runtime import Runtime
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.parallel.rules import Box, boxes, weight_sharding
from dsv3_jax.plan.parameters import Weight, weights
from dsv3_jax.precision.block_scaled import BlockScaled, dequantize_on_host

FP8 = jnp.dtype(jnp.float8_e4m3fn)
_DTYPES = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16), FP8)
_THREADS = 8  # that read and convert
_PIECE_NUMBERS = 4 << 20  # that a thread reads at a time, as float32 16 MiB


@dataclass(frozen=True, eq=False)
class Source:
    """What a loaded model remembers of where it came from, so that an export can give it back."""

    files: Mapping[str, bytes] = field(default_factory=dict)  # tokenizer and other small files
    # By name of the weight, as stored: the float32 scales of FP8 weights that were dequantised.
    scales: Mapping[str, np.ndarray] = field(default_factory=dict)
    token_ids: Mapping[str, int] = field(default_factory=dict)  # of config.json: 'bos_token_id' ...


def check_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype to load weights in; UserError when it is none that we compute in."""
    try:
        dtype = jnp.dtype(dtype)
    except TypeError:
        pass
    if dtype not in _DTYPES:
        allowed = ", ".join(d.name for d in _DTYPES)
        raise UserError(f"dtype={dtype} is not supported; allowed: {allowed}")
    return dtype


def load_folder(
    path: str | Path,
    dtype: jnp.dtype = jnp.float32,
    mesh: Mesh | None = None,
    layout: str = "zero1_ep",
) -> DeepSeekV3:
    """Loads a folder of safetensors: FP8 with scales, BF16 or F32 (spec §1).

    Everything is checked before anything is allocated. MTP's copies of the embedding and the head
    are compared with the main ones and dropped; a difference is logged.

    Args:
      path: holds config.json and *.safetensors, with an index when there are several.
      dtype: float32 or bfloat16: of the weights and the arithmetic; FP8 weights are dequantised.
        float8_e4m3fn: the projections stay FP8 in memory (`BlockScaled`), the other weights and
        the arithmetic are bfloat16. The router bias is always float32.
      mesh: where the weights live; every process of it must call this. None: one device.
      layout: a key of `parallel.rules.LAYOUTS`.

    Raises:
      UserError: the folder is damaged or does not fit its config.json, or cannot come in `dtype`.
    """
    dtype = check_dtype(dtype)
    folder = open_folder(path)
    described = read_model_config(folder.config, str(folder.path / "config.json"))
    model = without_absent_mtp(folder, described)
    check_tensors(folder, model)
    table = hf.tensors(model, "bf16")
    projections = [name for name in table if hf.is_quantized(name)]
    quantized = [name for name in projections if folder.tensors[name].dtype == "F8_E4M3"]
    if dtype == FP8 and (others := set(projections) - set(quantized)):
        raise UserError(
            f"{folder.path} does not hold {some(sorted(others))} in FP8, as dtype=float8_e4m3fn "
            f"needs; convert it first: python -m tools.convert_checkpoint --to=hf --dtype=fp8"
        )
    if mesh is not None and not {"data", "expert"} <= set(mesh.axis_names):
        raise UserError(
            f"the mesh has the axes {', '.join(mesh.axis_names)}; it must have data and expert, as "
            f"parallel.mesh.make_mesh gives it"
        )
    if mesh is not None and model.num_experts % mesh.shape["expert"]:
        raise UserError(
            f"the mesh splits {model.num_experts} experts over {mesh.shape['expert']} devices; "
            f"make its axis 'expert' divide {model.num_experts}"
        )
    if model != described:
        logging.warning("%s holds no MTP weights: loaded with mtp_depth=0", folder.path)
    _compare_copies(folder, table)

    runtime = Runtime(mesh=mesh, compute_dtype=jnp.dtype(jnp.bfloat16) if dtype == FP8 else dtype)
    abstract = nnx.eval_shape(lambda: DeepSeekV3(model, runtime=runtime, rngs=nnx.Rngs(0)))
    graphdef, _, _ = nnx.split(abstract, nnx.Param, RouterBias)
    params, router_bias = {}, {}
    with ThreadPoolExecutor(_THREADS) as pool:
        read = pool.map(lambda name: folder.tensors[name + hf.SCALE_SUFFIX].read(), quantized)
        reader = _Reader(
            folder=folder,
            table=table,
            scales=dict(zip(quantized, read, strict=True)),
            pool=pool,
            mesh=mesh,
            layout=layout,
        )
        for weight in weights(model):
            if not weight.trained:
                _insert(router_bias, weight.path, reader.array(weight, jnp.dtype(jnp.float32)))
            elif dtype == FP8 and reader.is_quantized(weight):
                _insert(params, weight.path, reader.block_scaled(weight))
            else:
                _insert(params, weight.path, reader.array(weight, runtime.compute_dtype))
    loaded = nnx.merge(graphdef, params, router_bias)
    scales = {} if dtype == FP8 else reader.scales
    loaded.source = Source(
        files=source_files(folder.path),
        scales=scales,
        token_ids={key: value for key, value in folder.config.items() if key.endswith("_token_id")},
    )
    return loaded


class _Reader:
    """Fills leaves of our tree from a folder."""

    def __init__(
        self,
        *,
        folder: Folder,
        table: Mapping[str, hf.Tensor],
        scales: Mapping[str, np.ndarray],
        pool: ThreadPoolExecutor,
        mesh: Mesh | None,
        layout: str,
    ):
        self._folder, self.scales, self._pool = folder, scales, pool
        self._mesh, self._layout = mesh, layout
        # The stored tensors of a leaf, by place in it.
        self._parts: dict[str, dict[tuple[tuple[int, ...], int | None], hf.Tensor]] = {}
        for tensor in table.values():
            if not tensor.is_copy:
                slot = tensor.slot
                self._parts.setdefault(slot.path, {})[slot.index, slot.half] = tensor

    def is_quantized(self, weight: Weight) -> bool:
        return any(hf.is_quantized(part.name) for part in self._parts[weight.path].values())

    def array(self, weight: Weight, dtype: jnp.dtype) -> jax.Array:
        """The leaf in `dtype`, dequantised where it is stored in FP8; FP8 itself: the codes."""
        sharding = self._sharding(weight)
        shards = []
        for box, devices in boxes(sharding, weight.shape).items():
            here = [d for d in devices if d.process_index == jax.process_index()]
            if not here:
                continue
            # Zeros: no file holds the router bias of a V2 model.
            buffer = np.zeros([last - first for first, last in box], dtype)
            pieces = self._pieces(weight.path, buffer, box)
            for _ in self._pool.map(lambda piece: piece(), pieces):
                pass
            shards += jax.block_until_ready([jax.device_put(buffer, d) for d in here])
        return jax.make_array_from_single_device_arrays(weight.shape, sharding, shards)

    def block_scaled(self, weight: Weight) -> BlockScaled:
        """The leaf as it is stored."""
        codes = self.array(weight, FP8)
        parts = self._parts[weight.path]
        halves = sorted({half for _, half in parts if half is not None}) or [None]
        lead = weight.shape[: len(next(iter(parts))[0])]

        def scales_of(index: tuple[int, ...]) -> np.ndarray:
            found = [self.scales[parts[index, half].name].T for half in halves]
            return np.concatenate(found, axis=1)

        stacked = np.stack([scales_of(index) for index in np.ndindex(*lead)])
        stacked = stacked.reshape(*lead, *stacked.shape[1:])
        sharding = codes.sharding
        if isinstance(sharding, NamedSharding):  # a grid of blocks is not cut
            spec = PartitionSpec(*sharding.spec[: len(lead)])
            sharding = NamedSharding(sharding.mesh, spec)
        scales = jax.make_array_from_callback(stacked.shape, sharding, lambda i: stacked[i])
        return BlockScaled(codes, scales, len(halves))

    def _sharding(self, weight: Weight) -> Sharding:
        if self._mesh is None:
            return SingleDeviceSharding(jax.local_devices()[0])
        if not weight.trained:
            return NamedSharding(self._mesh, PartitionSpec())
        return weight_sharding(self._mesh, weight.shape, weight.axes, self._layout)

    def _pieces(self, path: str, buffer: np.ndarray, box: Box) -> Iterator[Callable[[], None]]:
        """What fills a box of a leaf: jobs that each read one piece of one stored tensor."""
        for (index, half), part in self._parts.get(path, {}).items():
            lead, (*rows, columns) = box[: len(index)], box[len(index) :]
            inside = all(a <= i < b for i, (a, b) in zip(index, lead, strict=True))
            if not inside:
                continue
            out = buffer[tuple(i - a for i, (a, _) in zip(index, lead, strict=True))]
            if not rows:  # a vector
                yield _piece(self._folder.tensors[part.name], out, columns, None, None)
                continue
            (rows,) = rows
            if half is not None:  # columns of one half, counted from its first
                width = part.shape[0]
                first, last = (min(max(c - half * width, 0), width) for c in columns)
                offset = half * width - columns[0]
                out, columns = out[:, first + offset : last + offset], (first, last)
            if part.slot.transposed:
                out, rows, columns = out.T, columns, rows
            step = max(1, _PIECE_NUMBERS // max(1, columns[1] - columns[0]))
            for first in range(*rows, step):
                last = min(first + step, rows[1])
                yield _piece(
                    self._folder.tensors[part.name],
                    out[first - rows[0] : last - rows[0]],
                    (first, last),
                    columns,
                    self.scales.get(part.name),
                )


def _piece(
    stored: StoredTensor,
    out: np.ndarray,
    rows: tuple[int, int],
    columns: tuple[int, int] | None,
    scales_BT: np.ndarray | None,
) -> Callable[[], None]:
    """A job that reads rows and columns of a stored tensor into `out`, in `out`'s dtype."""

    def read() -> None:
        part = stored.read(slice(*rows), slice(*columns) if columns else slice(None))
        if scales_BT is not None and out.dtype != part.dtype:
            part = dequantize_on_host(part, scales_BT, out.dtype, rows[0], columns[0])
        out[...] = part

    return read


def _compare_copies(folder: Folder, table: Mapping[str, hf.Tensor]) -> None:
    """Logs which of MTP's copies of the embedding and the head differ from the main ones."""
    main = {t.slot.path: t.name for t in table.values() if not t.is_copy}
    for copy in table.values() if jax.process_index() == 0 else ():
        if copy.is_copy and copy.name in folder.tensors:
            name = main[copy.slot.path]
            if not _equal(folder.tensors[name], folder.tensors[copy.name]):
                logging.warning("%s differs from %s, which MTP uses in its place", copy.name, name)


def _equal(one: StoredTensor, other: StoredTensor) -> bool:
    step = max(1, _PIECE_NUMBERS // one.shape[1])
    return all(
        np.array_equal(*(stored.read(slice(first, first + step)) for stored in (one, other)))
        for first in range(0, one.shape[0], step)
    )


def _insert(tree: dict, path: str, leaf: jax.Array | BlockScaled) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[name] = leaf
