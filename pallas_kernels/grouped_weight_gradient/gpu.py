"""Hopper kernel (Mosaic GPU): persistent, one output tile of one group at a time.

The reduction runs over rows, so a group's first and last block of rows may hold rows of its
neighbours: those are zeroed in shared memory before the tensor core reads them.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS_BLOCK = 64  # rows a pipeline stage: one 128-byte swizzle line of bfloat16
ROW_TILE = 8  # the copy engine's tiles: the number of rows is a multiple of it
STAGES = 4
SMS = 132  # streaming multiprocessors of H100 and H200
TILES = ((128, 192), (128, 128), (128, 64))  # (I, O) tiles, best first


def _tile(width_in: int, width_out: int) -> tuple[int, int]:
    for tile_in, tile_out in TILES:
        if width_in % tile_in == 0 and width_out % tile_out == 0:
            return tile_in, tile_out
    raise NotImplementedError(
        f"widths {width_in} x {width_out} are not multiples of any tile of {TILES}"
    )


def grouped_weight_gradient_hopper(
    x_MI: jax.Array, dy_MO: jax.Array, group_sizes_G: jax.Array
) -> jax.Array:
    """As `grouped_weight_gradient_reference`, for bfloat16 operands on Hopper.

    Rows past the groups must be finite: the kernel multiplies those next to a group by zero.

    Raises:
      NotImplementedError: a dtype other than bfloat16, or widths that no tile divides.
    """
    if x_MI.dtype != jnp.bfloat16 or dy_MO.dtype != jnp.bfloat16:
        raise NotImplementedError(f"operands are {x_MI.dtype} and {dy_MO.dtype}, not bfloat16")
    if missing := -x_MI.shape[0] % ROW_TILE:
        x_MI, dy_MO = (jnp.pad(a, ((0, missing), (0, 0))) for a in (x_MI, dy_MO))
    num_rows, width_in = x_MI.shape
    width_out, num_groups = dy_MO.shape[1], group_sizes_G.shape[0]
    tile_in, tile_out = _tile(width_in, width_out)
    tiles_in, tiles_out = width_in // tile_in, width_out // tile_out

    sizes_G = group_sizes_G.astype(jnp.int32)
    ends_G = jnp.cumsum(sizes_G, dtype=jnp.int32)
    starts_G = ends_G - sizes_G
    first_block_G = starts_G // ROWS_BLOCK
    blocks_G = jnp.where(sizes_G > 0, pl.cdiv(ends_G, ROWS_BLOCK) - first_block_G, 0)

    operand_layout = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    result_layout = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))

    def grouped_weight_gradient(starts, ends, first_block, blocks, x, dy, dw):
        @plgpu.nd_loop((num_groups, tiles_in * tiles_out), collective_axes="sm")
        def _(loop):
            group = loop.index[0]
            tile_i, tile_o = plgpu.planar_snake(loop.index[1], (tiles_in, tiles_out), 1, 1)
            base_row = pl.multiple_of(first_block[group] * ROWS_BLOCK, ROWS_BLOCK)

            def accumulate(acc):
                def step(index, x_smem, dy_smem):
                    row = base_row + index[0] * ROWS_BLOCK

                    @pl.when((row < starts[group]) | (row + ROWS_BLOCK > ends[group]))
                    def _():
                        rows = plgpu.layout_cast(
                            lax.broadcasted_iota(jnp.int32, (ROWS_BLOCK, tile_in), 0),
                            plgpu.Layout.WGMMA,
                        )
                        inside = (rows + row >= starts[group]) & (rows + row < ends[group])
                        block = x_smem[...]
                        x_smem[...] = jnp.where(inside, block, jnp.zeros_like(block))
                        plgpu.commit_smem()

                    plgpu.wgmma(acc, x_smem.transpose((1, 0)), dy_smem)

                @pl.when(blocks[group] > 0)
                def _():
                    # The slice may run past the last row; the pipeline never reads that part.
                    rows = pl.ds(base_row, num_rows)
                    plgpu.emit_pipeline(
                        step,
                        grid=(blocks[group],),
                        in_specs=[
                            plgpu.BlockSpec(
                                (ROWS_BLOCK, width),
                                lambda k, tile=tile: (k, tile),
                                delay_release=1,
                                transforms=operand_layout,
                            )
                            for width, tile in ((tile_in, tile_i), (tile_out, tile_o))
                        ],
                        max_concurrent_steps=STAGES,
                    )(x.at[rows], dy.at[rows])

                return acc[...]

            result = pl.run_scoped(accumulate, plgpu.ACC((tile_in, tile_out)))

            @functools.partial(
                pl.run_scoped,
                smem=plgpu.SMEM((tile_in, tile_out), jnp.float32, transforms=result_layout),
            )
            def _(smem):
                smem[...] = result
                plgpu.commit_smem()
                target = dw.at[
                    group,
                    pl.ds(tile_i * tile_in, tile_in),
                    pl.ds(tile_o * tile_out, tile_out),
                ]
                plgpu.copy_smem_to_gmem(smem, target)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    return plgpu.kernel(
        grouped_weight_gradient,  # so called in profiles
        out_type=jax.ShapeDtypeStruct((num_groups, width_in, width_out), jnp.float32),
        grid=(SMS,),
        grid_names=("sm",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )(starts_G, ends_G, first_block_G, blocks_G, x_MI, dy_MO)
