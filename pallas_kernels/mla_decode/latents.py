"""How blocks of latents get from pages into shared memory, where products find them as bfloat16.

Two loaders: a warp that copies numbers, or a warpgroup that copies E4M3 codes and scales and writes
code * scale. A block lies with its first 256 columns above its second. Letters: `__init__.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mla_attention import common
from pallas_kernels.mla_decode.reference import TILE

HALF, ROPE = 256, 64
CODE_LAYOUT = (plgpu.TilingTransform((8, 128)), plgpu.SwizzleTransform(128))
# Of a thread of the three warpgroups, 504 in all: scores need more than an output alone.
COPY_REGISTERS, DEQUANTISE_REGISTERS = (24, 256, 224), (56, 240, 208)


class Pages(NamedTuple):
    """The cache, and where in it the rows are."""

    latent_YZSL: Any
    k_rope_YZSR: Any
    latent_scale_YZCS: Any  # None: latents are numbers
    layer_1: Any
    pages_BZ: Any
    length_B: Any  # int32 tokens

    def copies(self, row, block, keys: int) -> list:
        """Of a block: (place in the cache up to its token's page, tokens there, tokens here)."""
        page_tokens = self.latent_YZSL.shape[2]
        copied = min(page_tokens, keys)
        places = []
        for first in range(0, keys, copied):
            page_of_row, offset = common.divide(block * keys + first, page_tokens)
            # The last block may reach over the table's end, where nothing is seen.
            page_of_row = jnp.minimum(page_of_row, self.pages_BZ.shape[1] - 1)
            page = (self.layer_1[0], self.pages_BZ[row, page_of_row])
            places.append((page, pl.ds(offset, copied), pl.ds(first, copied)))
        return places


@dataclass(frozen=True)
class Loader:
    """How blocks get there. `move(pages, memory, row, first, end)` brings those of a part."""

    scratch: dict  # that it needs for itself
    arrivals: int  # at `full`, of a block
    registers: tuple[int, ...]  # as `common.launch` takes them
    move: Callable


def loader(pages: Pages, config, ops: common.Ops) -> Loader:
    """For a cache of this format."""
    keys = config.keys
    if pages.latent_scale_YZCS is None:
        copies = keys // min(keys, pages.latent_YZSL.shape[2])
        return Loader({}, 3 * copies, COPY_REGISTERS, lambda *args: _copy(*args, config))
    slots = config.code_stages
    scratch = {
        "codes": plgpu.SMEM((slots, 2 * keys, HALF), jnp.float8_e4m3fn, transforms=CODE_LAYOUT),
        # Of the two tiles of a half, one value a line of the codes.
        "scales": plgpu.SMEM((slots, HALF // TILE, 2 * keys), jnp.float32),
        # Halves, scales of tiles, rope keys.
        "codes_full": plgpu.Barrier(num_arrivals=2 + 2 * HALF // TILE + 1, num_barriers=slots),
    }
    return Loader(scratch, 1, DEQUANTISE_REGISTERS, lambda *args: _dequantise(*args, config, ops))


def _copy(pages: Pages, memory, row, first, end, config) -> None:
    stages = config.stages

    @pl.loop(first, end)
    def _(block):
        done = block - first
        slot = lax.rem(done, jnp.int32(stages))
        full = memory["full"].at[slot]
        pl.when(done >= stages)(lambda: plgpu.barrier_wait(memory["free"].at[slot]))
        copies = pages.copies(row, block, config.keys)
        for page, there, here in copies:
            _copy_halves(pages.latent_YZSL.at[*page, there], memory["latent"], slot, here, full)
            target = memory["rope"].at[slot, here] if len(copies) > 1 else memory["rope"].at[slot]
            plgpu.copy_gmem_to_smem(pages.k_rope_YZSR.at[*page, there], target, full)


def _copy_halves(source_SL, target, slot, here, full) -> None:
    keys = target.shape[1] // 2
    for half in range(2):
        lines = pl.ds(half * keys + here.start, here.size)
        plgpu.copy_gmem_to_smem(
            source_SL.at[:, pl.ds(half * HALF, HALF)], target.at[slot, lines], full
        )


def _dequantise(pages: Pages, memory, row, first, end, config, ops: common.Ops) -> None:
    keys, slots = config.keys, config.code_stages
    layout = plgpu.Layout.WGMMA_UPCAST_4X

    def fetch(block):
        done = block - first
        source = lax.rem(done, jnp.int32(slots))
        full = memory["codes_full"].at[source]
        ((page, there, here),) = pages.copies(row, block, keys)
        _copy_halves(pages.latent_YZSL.at[*page, there], memory["codes"], source, here, full)
        for tile in range(2 * HALF // TILE):
            half, tile_of_half = divmod(tile, HALF // TILE)
            plgpu.copy_gmem_to_smem(
                pages.latent_scale_YZCS.at[*page, tile, there],
                memory["scales"].at[source, tile_of_half, pl.ds(half * keys, keys)],
                full,
            )
        rope = memory["rope"].at[lax.rem(done, jnp.int32(config.rope_stages))]
        plgpu.copy_gmem_to_smem(pages.k_rope_YZSR.at[*page, there], rope, full)

    pl.loop(first, jnp.minimum(first + slots, end))(fetch)

    @pl.loop(first, end)
    def _(block):
        done = block - first
        source, slot = lax.rem(done, jnp.int32(slots)), lax.rem(done, jnp.int32(config.stages))
        plgpu.barrier_wait(memory["codes_full"].at[source])
        pl.when(done >= config.stages)(lambda: plgpu.barrier_wait(memory["free"].at[slot]))
        for tile in range(HALF // TILE):
            columns = pl.ds(tile * TILE, TILE)
            codes = ops.cast(memory["codes"][source, :, columns], layout).astype(jnp.float32)
            scale = ops.cast(memory["scales"][source, tile], layout.reduce(1))
            values = codes * lax.broadcast_in_dim(scale, codes.shape, [0])
            memory["latent"][slot, :, columns] = values.astype(jnp.bfloat16)
        plgpu.commit_smem()  # every warp has read the codes
        plgpu.barrier_arrive(memory["full"].at[slot])
        # A slot of rope keys is that of a block whose products `free` has announced.
        pl.when(block + slots < end)(lambda: fetch(block + slots))
