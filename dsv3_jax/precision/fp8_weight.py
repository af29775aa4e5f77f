"""Weights as FP8 products see them: E4M3 codes with a float32 scale a 128x128 block (spec §5.1).

Letters: I and O widths in and out of a kernel; leading dims (layer, expert) are free.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from dsv3_jax.precision.block_scaled import BlockScaled
from dsv3_jax.precision.fp8 import blocks
from dsv3_jax.precision.policy import PUBLISHED, Fp8Recipe, is_fp8
from pallas_kernels import dequantize_blocks
from pallas_kernels.quantize.reference import BLOCK


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["master", "codes_IO", "codes_OI", "scales_IO"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Fp8Weight:
    """A kernel [..., I, O] and its codes, which stand in for it in products.

    The codes are there twice, since Fprop reduces over I and Dgrad over O, and FP8 tensor cores
    want the reduced dim last.
    """

    master: Any  # float32 [..., I, O]: nothing but its gradient is used; or a `BlockScaled`
    codes_IO: jax.Array  # float8_e4m3fn [..., I, O]
    codes_OI: jax.Array  # float8_e4m3fn [..., O, I]
    scales_IO: jax.Array  # float32 [..., ceil(I/128), ceil(O/128)]; they multiply

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes_IO.shape

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(jnp.float32)

    @property
    def ndim(self) -> int:
        return self.codes_IO.ndim

    def __getitem__(self, index: Any) -> "Fp8Weight":
        """Of leading dims (layer, expert), or `[...]`: blocks cannot be cut."""
        taken = jax.tree.map(lambda x: x[index], self)
        assert taken.shape[-2:] == self.shape[-2:], index
        return taken

    def astype(self, dtype: jnp.dtype) -> jax.Array:
        """What products see: codes * scales in float32, rounded once to `dtype`."""
        return _over_leading(partial(dequantize_blocks, out_dtype=dtype), self.ndim)(
            self.codes_IO, self.scales_IO
        )


def as_fp8(kernel: jax.Array | BlockScaled | Fp8Weight, recipe: Fp8Recipe = PUBLISHED) -> Fp8Weight:
    """Quantises a kernel [..., I, O], unless it is already.

    Args:
      kernel: float32; or a `BlockScaled`, whose codes and scales are taken unchanged if its blocks
        lie where ours do.
    """
    if isinstance(kernel, Fp8Weight):
        return kernel
    aligned = kernel.shape[-1] % (getattr(kernel, "segments", 1) * BLOCK) == 0
    if isinstance(kernel, BlockScaled) and (kernel.segments == 1 or aligned):
        codes_IO, scales_IO = kernel.codes, kernel.scales
    else:
        w_IO = jax.lax.stop_gradient(kernel.astype(jnp.float32))
        codes_IO, scales_IO = _over_leading(partial(blocks, recipe=recipe), kernel.ndim)(w_IO)
    return Fp8Weight(kernel, codes_IO, jnp.swapaxes(codes_IO, -1, -2), scales_IO)


def quantize_weights(params: Any, recipe: Fp8Recipe | None, shardings: Any) -> Any:
    """A parameter tree with an `Fp8Weight` for every weight that multiplies in FP8.

    Args:
      params: nested dicts of float32 arrays.
      recipe: None: nothing does.
      shardings: of `params`; codes are placed like their master.
    """
    if recipe is None:
        return params

    def quantize(path, master, sharding):
        if not is_fp8(tuple(entry.key for entry in path)):
            return master
        weight = as_fp8(master, recipe)
        *leading, last_I, last_O = sharding.spec + (None,) * (master.ndim - len(sharding.spec))
        swapped = NamedSharding(sharding.mesh, PartitionSpec(*leading, last_O, last_I))
        return replace(
            weight,
            codes_IO=jax.lax.with_sharding_constraint(weight.codes_IO, sharding),
            codes_OI=jax.lax.with_sharding_constraint(weight.codes_OI, swapped),
        )

    return jax.tree_util.tree_map_with_path(quantize, params, shardings)


def with_masters(quantized: Any, params: Any) -> Any:
    """`quantized` from `quantize_weights`, with `params` as masters and as the other weights."""

    def put(weight, master):
        return replace(weight, master=master) if isinstance(weight, Fp8Weight) else master

    return jax.tree.map(put, quantized, params, is_leaf=lambda w: isinstance(w, Fp8Weight))


def _over_leading(function: Callable, ndim: int) -> Callable:
    """Of matrices, for arrays with leading dims."""
    for _ in range(ndim - 2):
        function = jax.vmap(function)
    return function
