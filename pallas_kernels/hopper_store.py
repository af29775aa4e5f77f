"""Stores from registers, some of them left out: what the copy engine cannot do (Hopper).

A tile at the end of a group holds rows that belong to the next group, which another
multiprocessor may have written already.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu


def store_pairs(ref: jax.Array, x_MC: jax.Array, offset_MC: jax.Array) -> None:
    """Writes x where its offset is not negative.

    Args:
      ref: the array in global memory.
      x_MC: bfloat16 or float32 in the layout of tensor core results.
      offset_MC: int32, elements from the start of `ref`, even for even columns. A column and the
        next are written together, or not at all.
    """
    _emitter(x_MC.dtype)(ref, x_MC, offset_MC)


def _emitter(dtype: jnp.dtype) -> Callable[..., None]:
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm, vector

    itemsize = np.dtype(dtype).itemsize
    layout = plgpu.Layout.WGMMA

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout, layout))
    def emit(_, ref, x, offsets):
        i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
        start = llvm.ptrtoint(i64, utils.memref_ptr(ref))
        words = ir.VectorType.get((itemsize // 2,), i32)
        for pair, pair_offsets in zip(x.registers.flat, offsets.registers.flat, strict=True):
            offset = vector.extract(pair_offsets, [], [0])
            address = arith.addi(
                start, arith.muli(arith.extsi(i64, offset), utils.c(itemsize, i64))
            )
            bits = vector.bitcast(words, pair)
            values = [vector.extract(bits, [], [i]) for i in range(itemsize // 2)]
            names = ", ".join(f"${2 + i}" for i in range(len(values)))
            kind = f"st.global.v{len(values)}.b32" if len(values) > 1 else "st.global.b32"
            llvm.inline_asm(
                ir.Type.parse("!llvm.void"),
                [offset, address, *values],
                f"{{ .reg .pred p; setp.ge.s32 p, $0, 0; @p {kind} [$1], {{{names}}}; }}",
                ",".join(["r", "l"] + ["r"] * len(values)),
                asm_dialect=0,
                has_side_effects=True,
            )

    return emit
