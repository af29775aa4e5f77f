"""Digest of a state in memory, independent of the mesh; names and bytes of its leaves."""

import hashlib
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def named_leaves(tree: Any) -> dict[str, Any]:
    """Every leaf of a tree under its dotted path, e.g. 'params.dense_blocks.norm_a.gain'."""
    paths_and_leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in paths_and_leaves
    }
    assert len(named) == len(paths_and_leaves), "two leaves share one dotted path"
    return named


def as_bytes(array: np.ndarray) -> np.ndarray:
    """The bytes of a host array in row-major order, as uint8 [array.nbytes]."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def is_on_host(leaf: Any) -> bool:
    """Whether this process can read the whole leaf without the others."""
    return not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated


def state_hash(tree: Any) -> str:
    """sha256 (hex) over path, dtype, shape and bytes of every leaf, whatever its sharding.

    Leaves are fetched to the host one at a time. With several processes every one must call it.
    """
    digest = hashlib.sha256()
    for name, leaf in sorted(named_leaves(tree).items()):
        if not is_on_host(leaf):
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        array = np.asarray(leaf)
        digest.update(f"{name} {array.dtype.name} {array.shape}\n".encode())
        digest.update(as_bytes(array))
    return digest.hexdigest()
