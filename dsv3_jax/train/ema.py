"""Exponential moving average of the weights, kept in host memory and updated off the step."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding

Region = tuple[tuple[int, int], ...]  # [start, stop) of a shard in every dim


class HostEma:
    """`ema <- decay * ema + (1 - decay) * params` in float32 after each step (spec §5.7).

    The copy to the host starts when `update` is called and runs beside the next step; one thread
    applies updates in order, at most one waiting. A process keeps one copy of each distinct shard
    that its devices hold, so a replicated weight is stored once a process.
    """

    def __init__(self, params: Any, decay: float) -> None:
        """Starts the average at the given weights.

        Args:
          params: pytree of float32 `jax.Array` on the mesh.
          decay: in [0, 1).
        """
        leaves, self._structure = jax.tree.flatten(params)
        self._shapes = [leaf.shape for leaf in leaves]
        self._shardings = [leaf.sharding for leaf in leaves]
        self._decay = np.float32(decay)
        self._shards = [
            {region: np.array(data, np.float32) for region, data in _distinct_shards(leaf).items()}
            for leaf in leaves
        ]
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="ema")
        self._pending: Future | None = None

    def update(self, params: Any) -> None:
        """Takes in the weights after a step. They may be donated as soon as it returns."""
        self._flush()
        copies = [
            {region: _start_copy_to_host(data) for region, data in _distinct_shards(leaf).items()}
            for leaf in jax.tree.leaves(params)
        ]
        self._pending = self._worker.submit(self._apply, copies)

    def value(self) -> Any:
        """The average after every update so far, in the structure of the weights.

        A leaf that this process holds whole is a numpy array, otherwise a `jax.Array` in pinned
        host memory, sharded as the weight is. The leaves are copies: checkpoints may write them
        while updates go on.
        """
        self._flush()
        values = []
        for i, shards in enumerate(self._shards):
            if _is_whole(self._shardings[i]):
                whole = np.empty(self._shapes[i], np.float32)
                for region, shard in shards.items():
                    whole[_index(region)] = shard
                values.append(whole)
            else:
                values.append(
                    jax.make_array_from_callback(
                        self._shapes[i],
                        _on_host(self._shardings[i]),
                        lambda index, i=i: self._shards[i][_region(index, self._shapes[i])].copy(),
                    )
                )
        return jax.tree.unflatten(self._structure, values)

    def restore(self, tree: Any) -> None:
        """Continues from a saved `value()`, read into `ema_template` of the weights."""
        self._flush()
        for leaf, shards in zip(jax.tree.leaves(tree), self._shards, strict=True):
            saved = _distinct_shards(leaf) if isinstance(leaf, jax.Array) else None
            for region, shard in shards.items():
                shard[...] = leaf[_index(region)] if saved is None else saved[region]

    def _flush(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _apply(self, copies: list[dict[Region, jax.Array]]) -> None:
        for shards, copy in zip(self._shards, copies, strict=True):
            for region, shard in shards.items():
                shard *= self._decay
                shard += (np.float32(1) - self._decay) * np.asarray(copy[region])


def ema_template(params: Any) -> Any:
    """What to restore a saved `HostEma.value()` into: shapes, with shardings where it is sharded.

    `params` are the weights or only their shapes and shardings.
    """

    def leaf(param):
        sharding = None if _is_whole(param.sharding) else _on_host(param.sharding)
        return jax.ShapeDtypeStruct(param.shape, np.float32, sharding=sharding)

    return jax.tree.map(leaf, params)


def _is_whole(sharding: NamedSharding) -> bool:
    """Whether this process holds whole arrays of that sharding."""
    return sharding.is_fully_addressable or sharding.is_fully_replicated


def _region(index: tuple[slice, ...], shape: tuple[int, ...]) -> Region:
    return tuple(s.indices(dim)[:2] for s, dim in zip(index, shape, strict=True))


def _index(region: Region) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in region)


def _distinct_shards(array: jax.Array) -> dict[Region, jax.Array]:
    """This process's shards without repetition, each on one device."""
    shards: dict[Region, jax.Array] = {}
    for shard in array.addressable_shards:
        shards.setdefault(_region(shard.index, array.shape), shard.data)
    return shards


def _start_copy_to_host(data: jax.Array) -> jax.Array:
    """A copy that does not block and that outlives the donation of its source."""
    (device,) = data.devices()
    return jax.device_put(data, SingleDeviceSharding(device, memory_kind="pinned_host"))


def _on_host(sharding: NamedSharding) -> NamedSharding:
    return sharding.with_memory_kind("pinned_host")
