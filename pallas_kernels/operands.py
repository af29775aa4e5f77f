"""Checks of FP8 operands, before any implementation sees them: mistakes are one-line ValueErrors.

`operation` and `name` are what the text calls them. Letters: K the width that a product reduces
over, T its tiles of 128; before K come rows, and groups before those.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.quantize.reference import BLOCK

Shape = tuple[int, ...]


def check_codes(operation: str, name: str, q: jax.Array, shape: Shape, remedy: str) -> None:
    """E4M3 codes of `shape`, where -1 stands for any length.

    Raises:
      ValueError: another dtype or shape; `remedy` says how such codes are made.
    """
    fits = q.ndim == len(shape) and all(n in (-1, m) for n, m in zip(shape, q.shape, strict=False))
    if q.dtype != jnp.float8_e4m3fn or not fits:
        raise ValueError(
            f"{operation}: {name} is {_describe(q)}; allowed: float8_e4m3fn{_text(shape)}; {remedy}"
        )


def check_scales(
    operation: str, name: str, s: jax.Array, allowed: tuple[Shape, ...], remedy: str
) -> None:
    """float32 scales of one of the shapes allowed.

    Raises:
      ValueError: another dtype or shape; `remedy` says how such scales are made.
    """
    if s.dtype != jnp.float32 or s.shape not in allowed:
        shapes = " or ".join(_text(shape) for shape in dict.fromkeys(allowed))
        raise ValueError(
            f"{operation}: {name} is {_describe(s)}; allowed: float32{shapes}; {remedy}"
        )


def check_tiles(operation: str, letters: str, q: jax.Array, s: jax.Array, remedy: str) -> None:
    """Scales that belong to codes [..., K] in tiles of 1x128: [..., ceil(K / 128)]."""
    check_scales(operation, f"s_{letters}", s, (tile_scales(q),), remedy)


def tile_scales(q: jax.Array) -> Shape:
    """Shape of the scales of codes [..., K] in tiles of 1x128."""
    return (*q.shape[:-1], tiles(q.shape[-1]))


def block_scales(q: jax.Array) -> Shape:
    """Shape of the scales of codes [..., N, K] in blocks of 128x128."""
    *groups, N, K = q.shape
    return (*groups, tiles(N), tiles(K))


def tiles(length: int) -> int:
    """Tiles of 128 that cover a length."""
    return -(-length // BLOCK)


def check_counts(
    operation: str, name: str, n_G: jax.Array, num_groups: int, limit: int, each: bool, step: int
) -> None:
    """int32 rows of every group. Their values are checked where they are known: not under `jit`.

    Args:
      limit: the most rows there may be, in `each` group or in all of them together.
      step: every count is a multiple of it.

    Raises:
      ValueError: another dtype or shape, or counts that are not allowed.
    """
    if n_G.dtype != jnp.int32 or n_G.shape != (num_groups,):
        raise ValueError(
            f"{operation}: {name} is {_describe(n_G)}; allowed: int32[{num_groups}], the rows of "
            f"each of the {num_groups} groups of weights"
        )
    if isinstance(n_G, jax.core.Tracer):
        return
    counts = np.asarray(n_G, np.int64)
    if (counts < 0).any() or (counts % step).any():
        raise ValueError(
            f"{operation}: {name} holds {counts[(counts < 0) | (counts % step != 0)][0]}; allowed: "
            + (f"multiples of {step}; pad every group with rows of zeros" if step > 1 else ">= 0")
        )
    most = counts.max(initial=0) if each else counts.sum()
    if most > limit:
        of = "the rows of a group" if each else "all rows together"
        raise ValueError(f"{operation}: {name} reaches {most}; allowed: at most {limit}, {of}")
