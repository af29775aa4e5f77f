"""Tensor core products of 128 of the reduction that start from nothing (Hopper, E4M3).

`plgpu.wgmma` adds to an accumulator, which then has to be zeroed before every product. Where each
product of 128 is taken out of the tensor cores (spec §5.2), the zeroing costs as many instructions
as half of the promotion: these products overwrite their registers instead.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 64  # of one product
DEPTH = 128  # of the reduction: four instructions of 32
# How operands lie in shared memory: rows of 128 bytes, swizzled.
OPERAND_LAYOUT = (plgpu.TilingTransform((8, DEPTH)), plgpu.SwizzleTransform(DEPTH))


def issue(columns: int) -> Callable[..., jax.Array]:
    """(a_smem [64, 128], b_smem [columns, 128]) -> [64, columns] float32, still being computed.

    Only `settle` may read the result.
    """
    from jax.experimental.mosaic import gpu as mgpu
    from jax.experimental.mosaic.gpu import fragmented_array as fa
    from jax.experimental.mosaic.gpu import mma_utils
    from jaxlib.mlir import ir

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(OPERAND_LAYOUT), plgpu.RefType(OPERAND_LAYOUT)),
        return_type=_result_type(columns),
    )
    def emit(_, a, b):
        def descriptor(operand, tile, group, k_major):
            (start, (_, (stride, *_))), *_ = mma_utils.create_descriptor(
                operand,
                swizzle=DEPTH,
                large_tile=tile,
                group_size=group,
                logical_k_major=k_major,
            )
            return start, stride >> 4  # as descriptors count: in 16 bytes

        b = mgpu.memref_transpose(b, (1, 0, 3, 2))
        a_start, a_stride = descriptor(a, (ROWS, DEPTH), (ROWS, DEPTH), False)
        b_start, b_stride = descriptor(b, (DEPTH, DEPTH), (DEPTH, columns), True)
        count = ROWS * columns // 128  # registers of a thread
        registers = "{" + ", ".join(f"${i}" for i in range(count)) + "}"
        multiply = (
            f"wgmma.mma_async.sync.aligned.m64n{columns}k32.f32.e4m3.e4m3 "
            f"{registers}, a, b, adds, 1, 1;"
        )
        advance = f"add.s64 a, a, {a_stride}; add.s64 b, b, {b_stride};"
        lines = [
            "{ .reg .pred adds; .reg .b64 a, b;",
            f"mov.b64 a, ${count}; mov.b64 b, ${count + 1};",
            "wgmma.fence.sync.aligned;",
            f"setp.ne.b32 adds, 0, 0; {multiply}",
            "setp.ne.b32 adds, 1, 0;",
            *[f"{advance} {multiply}" for _ in range(3)],
            "wgmma.commit_group.sync.aligned; }",
        ]
        zeros = fa.FragmentedArray.splat(
            mgpu.c(0, ir.F32Type.get()), (ROWS, columns), fa.WGMMA_LAYOUT_ACC_32BIT
        )
        return _assembly(lines, [a_start, b_start], ["l", "l"], zeros.registers.shape)

    return emit


def settle(columns: int, pending: int) -> Callable[[jax.Array], jax.Array]:
    """Waits until at most `pending` later products are unfinished: [64, columns] -> the same."""
    from jax.experimental.mosaic.gpu import fragmented_array as fa

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,), return_type=_result_type(columns))
    def emit(_, product):
        # Passing the registers through the wait keeps the compiler from reading them before it.
        registers = product.to_layout(fa.WGMMA_LAYOUT_ACC_32BIT).registers
        operands = list(registers.flat)
        tied = [str(i) for i in range(len(operands))]
        return _assembly(
            [f"wgmma.wait_group.sync.aligned {pending};"], operands, tied, registers.shape
        )

    return emit


def _result_type(columns):
    return plgpu.ShapeDtypeStruct((ROWS, columns), jnp.float32, layout=plgpu.Layout.WGMMA)


def _assembly(lines, operands, constraints, shape):
    """Emits PTX whose outputs are the registers of a [64, columns] array."""
    from jax.experimental.mosaic.gpu import fragmented_array as fa
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    count = int(np.prod(shape))
    register = ir.VectorType.get((1,), ir.F32Type.get())
    outputs = llvm.inline_asm(
        llvm.StructType.get_literal([register] * count),
        operands,
        "\n".join(lines),
        ",".join(["=f"] * count + constraints),
        asm_dialect=0,
        has_side_effects=True,
    )
    registers = [llvm.extractvalue(register, outputs, [i]) for i in range(count)]
    return fa.FragmentedArray(
        _registers=np.array(registers, dtype=object).reshape(shape),
        _layout=fa.WGMMA_LAYOUT_ACC_32BIT,
        _is_signed=None,
    ).to_layout(fa.WGMMA_LAYOUT)
