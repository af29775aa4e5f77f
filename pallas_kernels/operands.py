"""Checks of operands, before any implementation sees them: mistakes are one-line ValueErrors.

`operation` and `name` are what the text calls them; -1 in a shape stands for any length. Letters: K
the width that a product reduces over, T its tiles of 128; before K come rows, N or M, and G groups
before those; B blocks of 128 along N.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.quantize.reference import BLOCK

Shape = tuple[int, ...]

# How operands are made.
TILES = "make it with quantize_tiles(x_MK)"
COLUMNS = "make it with quantize_columns(x_MK)"
BLOCKS = "make it with quantize_blocks(w_NK)"

_RESULTS = (jnp.bfloat16, jnp.float16, jnp.float32)


def check_codes(operation: str, name: str, q: jax.Array, shape: Shape, remedy: str) -> None:
    """E4M3 codes.

    Raises:
      ValueError: another dtype or shape; `remedy` says how such codes are made.
    """
    if q.dtype != jnp.float8_e4m3fn or not _fits(q, shape):
        raise ValueError(
            f"{operation}: {name} is {_describe(q)}; allowed: float8_e4m3fn{_text(shape)}; {remedy}"
        )


def check_scales(operation: str, name: str, s: jax.Array, remedy: str, *allowed: Shape) -> None:
    """float32 scales of one of the shapes allowed.

    Raises:
      ValueError: another dtype or shape; `remedy` says how such scales are made.
    """
    if s.dtype != jnp.float32 or s.shape not in allowed:
        shapes = " or ".join(_text(shape) for shape in dict.fromkeys(allowed))
        raise ValueError(
            f"{operation}: {name} is {_describe(s)}; allowed: float32{shapes}; {remedy}"
        )


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


def check_floats(operation: str, name: str, x: jax.Array, shape: Shape) -> None:
    """Values to quantise.

    Raises:
      ValueError: another shape, or no float of 16 bits or more.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize < 2 or not _fits(x, shape):
        raise ValueError(
            f"{operation}: {name} is {_describe(x)}; allowed: bfloat16, float16 or "
            f"float32{_text(shape)}; cast or reshape it"
        )


def check_float32(operation: str, name: str, x: jax.Array, shape: Shape) -> None:
    """Gradients to add to, or weights of rows.

    Raises:
      ValueError: another dtype or shape.
    """
    if x.dtype != jnp.float32 or not _fits(x, shape):
        raise ValueError(f"{operation}: {name} is {_describe(x)}; allowed: float32{_text(shape)}")


def check_flag(operation: str, name: str, flag: Any) -> None:
    """A setting that is known when the program is traced.

    Raises:
      ValueError: anything but True or False.
    """
    if not isinstance(flag, bool | np.bool_):
        kind = "traced" if isinstance(flag, jax.core.Tracer) else repr(flag)
        raise ValueError(
            f"{operation}: {name} is {kind}; allowed: True or False, a static argument under jit"
        )


def check_out_dtype(operation: str, out_dtype: Any) -> None:
    """The format of a product.

    Raises:
      ValueError: not one of bfloat16, float16 and float32.
    """
    if out_dtype not in _RESULTS:
        raise ValueError(
            f"{operation}: out_dtype is {jnp.dtype(out_dtype).name}; allowed: "
            f"{', '.join(jnp.dtype(dtype).name for dtype in _RESULTS)}"
        )


def checked_counts(
    operation: str,
    name: str,
    n_G: jax.Array,
    num_groups: int,
    limit: int,
    *,
    each: bool = False,
    step: int = 1,
) -> jax.Array:
    """int32 rows of every group, safe to address memory by.

    Values are refused where they are known. Under `jit` nobody can: what lies past the limit is
    cut off there, negative counts are taken as 0, and others rounded down to a multiple of `step`.

    Args:
      num_groups: at least 1; or -1, any number.
      limit: the most rows there may be, in `each` group or in all of them together.
      step: every count is a multiple of it.

    Raises:
      ValueError: another dtype or shape, or counts that are not allowed.
    """
    if n_G.dtype != jnp.int32 or not _fits(n_G, (num_groups,)) or n_G.shape == (0,):
        raise ValueError(
            f"{operation}: {name} is {_describe(n_G)}; allowed: int32{_text((num_groups,))}, the "
            "rows of each group, of which there is at least one"
        )
    if isinstance(n_G, jax.core.Tracer):
        n_G = jnp.clip(n_G, 0, limit) // step * step
        if each:
            return n_G
        end_G = jnp.minimum(jnp.cumsum(n_G), limit // step * step)
        return jnp.diff(end_G, prepend=jnp.zeros(1, jnp.int32))
    counts_G = np.asarray(n_G, np.int64)
    wrong_G = (counts_G < 0) | (counts_G % step != 0)
    if wrong_G.any():
        raise ValueError(
            f"{operation}: {name} holds {counts_G[wrong_G][0]}; allowed: "
            + (f"multiples of {step}; pad every group with rows of zeros" if step > 1 else ">= 0")
        )
    most = counts_G.max() if each else counts_G.sum()
    if most > limit:
        held, of = ("holds", "a group has room for") if each else ("sums to", "there are")
        raise ValueError(
            f"{operation}: {name} {held} {most}; allowed: at most {limit}, the rows that {of}"
        )
    return n_G


def _fits(x: jax.Array, shape: Shape) -> bool:
    return x.ndim == len(shape) and all(n in (-1, m) for n, m in zip(shape, x.shape, strict=True))


def _describe(x: jax.Array) -> str:
    return f"{x.dtype}{_text(x.shape)}"


def _text(shape: Shape) -> str:
    return f"[{', '.join('*' if n == -1 else str(n) for n in shape)}]"
