"""TPU kernel: the queries of a row (heads, and new tokens) against its pages, block after block.

Pages are copied by hand: a block of them, as many as the row still has, while blocks before it are
multiplied, over the end of a row into the next. A block of latents is read once, as keys and as
values. Rows are split between the cores of a chip that joins two in one device.

Letters: `__init__.py`; M queries of a row, T N of them in whole registers; Q and K queries and
tokens of a step; V visits, of a block of a row's tokens each; X visits of all rows.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mla_attention.tpu_common import LOG2E, MASKED, Softmax, multiply
from pallas_kernels.tpu_gemm import LANES

WIDTHS = (512, 64)  # latent, rope
SUBLANES = 16  # rows of bfloat16 in a register
LARGEST_PAGE = 1024  # tokens: a few of them fill what a kernel may have
LARGEST_TABLE = 2**17  # numbers of pages: they lie in scalar memory, of a megabyte
VMEM_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Config:
    tokens: int = 512  # of a block, where pages are not larger: whole pages, and a multiple of 128
    stages: int = 3  # blocks in memory, all but one of them on their way


DEFAULT = Config()


class Visits(NamedTuple):
    """int32, in scalar memory; the visits of a row are consecutive, rows in their order."""

    first: jax.Array  # [B + 1] number of a row's first visit; then their count
    row: jax.Array  # of every visit
    num_pages: jax.Array  # [B] of a row: those that its queries see


def refuse(q_latent_BTNL, q_rope_BTNR, latent_YZSL, k_rope_YZSR, pages_BZ) -> None:
    """Raises NotImplementedError for operands that the kernel does not take."""
    arrays = (q_latent_BTNL, q_rope_BTNR, latent_YZSL, k_rope_YZSR)
    if any(x.dtype != jnp.bfloat16 for x in arrays):
        raise NotImplementedError("takes bfloat16 alone")
    widths = (q_latent_BTNL.shape[-1], q_rope_BTNR.shape[-1])
    if widths != WIDTHS:
        raise NotImplementedError(f"takes widths (latent, rope) {WIDTHS}, not {widths}")
    page_tokens = latent_YZSL.shape[2]
    if page_tokens & (page_tokens - 1) or not SUBLANES <= page_tokens <= LARGEST_PAGE:
        raise NotImplementedError(
            f"takes pages of a power of two from {SUBLANES} to {LARGEST_PAGE} tokens, "
            f"not {page_tokens}"
        )
    if pages_BZ.size > LARGEST_TABLE:
        raise NotImplementedError(f"takes tables of {LARGEST_TABLE} pages, not {pages_BZ.size}")


def mla_decode_tpu(
    q_latent_BTNL: jax.Array,
    q_rope_BTNR: jax.Array,
    latent_YZSL: jax.Array,
    k_rope_YZSR: jax.Array,
    layer: jax.Array,
    pages_BZ: jax.Array,
    position_BT: jax.Array,
    scale: float,
    config: Config = DEFAULT,
    interpret: bool = False,
) -> jax.Array:
    """As `mla_decode_reference`; weights are rounded to bfloat16.

    Raises:
      NotImplementedError: other operands.
    """
    refuse(q_latent_BTNL, q_rope_BTNR, latent_YZSL, k_rope_YZSR, pages_BZ)
    B, T, N, L = q_latent_BTNL.shape
    R, page_tokens, stages = q_rope_BTNR.shape[-1], latent_YZSL.shape[2], config.stages
    M = pl.cdiv(T * N, SUBLANES) * SUBLANES
    copies = max(1, config.tokens // page_tokens)  # pages of a block
    tokens = copies * page_tokens
    cores = 1 if B % 2 else 2
    rows = B // cores
    position_BT = position_BT.astype(jnp.int32)
    visits = _visits(position_BT, page_tokens, copies, B * pl.cdiv(pages_BZ.shape[1], copies))

    def kernel(
        first, row_of, num_pages, layer, pages, positions, q_latent, q_rope, latent, k_rope, o,
        latents, ropes, full, maximum, total, o_sum,
    ):  # fmt: skip
        core, row_of_core = pl.program_id(0), pl.program_id(1)
        row = core * rows + row_of_core
        core_begin, core_end = first[core * rows], first[(core + 1) * rows]

        def each_copy(visit, do):
            """do(copy) for those of a visit."""
            row, slot = row_of[visit], lax.rem(visit, jnp.int32(stages))
            done = (visit - first[row]) * copies

            @pl.loop(0, jnp.minimum(num_pages[row] - done, copies))
            def _(i):
                here = (layer[0], pages[row, done + i])
                for source, target in ((latent, latents), (k_rope, ropes)):
                    there = target.at[slot, i]
                    do(pltpu.make_async_copy(source.at[*here], there, full.at[slot]))

        def start(visit):
            pl.when(visit < core_end)(lambda: each_copy(visit, lambda copy: copy.start()))

        @pl.when(row_of_core == 0)
        def _():
            # What no page ever fills is multiplied by zero, so it must be finite.
            latents[...] = jnp.zeros(latents.shape, latents.dtype)
            ropes[...] = jnp.zeros(ropes.shape, ropes.dtype)
            for ahead in range(stages - 1):
                start(core_begin + ahead)

        softmax = Softmax(maximum, total, o_sum)
        softmax.start()
        query, key = (lax.broadcasted_iota(jnp.int32, (M, tokens), dim) for dim in (0, 1))
        last_QK = jnp.full((M, tokens), positions[row, T - 1], jnp.int32)
        for new in reversed(range(T - 1)):  # tokens before the last
            last_QK = jnp.where(query < (new + 1) * N, positions[row, new], last_QK)

        @pl.loop(first[row], first[row + 1])
        def _(visit):
            start(visit + stages - 1)
            each_copy(visit, lambda copy: copy.wait())
            slot = lax.rem(visit, jnp.int32(stages))
            latent_KL = latents[slot].reshape(tokens, L)
            rope_KR = ropes[slot].reshape(tokens, R)
            s_QK = multiply(q_latent[...], latent_KL, (1, 1))
            s_QK += multiply(q_rope[...], rope_KR, (1, 1))
            visible_QK = key + (visit - first[row]) * tokens <= last_QK
            softmax.add(jnp.where(visible_QK, s_QK * (scale * LOG2E), MASKED), latent_KL)

        o[...] = softmax.output()[0].astype(o.dtype)

    def flat(x_BTNX):
        x_BMX = x_BTNX.reshape(B, T * N, -1)
        return jnp.pad(x_BMX, ((0, 0), (0, M - T * N), (0, 0)))

    def of_row(width):
        return pl.BlockSpec((None, M, width), lambda core, row, *_: (core * rows + row, 0, 0))

    scalars = (*visits, jnp.reshape(layer, (1,)), pages_BZ)
    o_BML = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((B, M, L), q_latent_BTNL.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars) + 1,
            grid=(cores, rows),
            in_specs=[of_row(L), of_row(R), *[pl.BlockSpec(memory_space=pl.ANY)] * 2],
            out_specs=of_row(L),
            scratch_shapes=[
                pltpu.VMEM((stages, copies, page_tokens, L), jnp.bfloat16),
                pltpu.VMEM((stages, copies, page_tokens, R), jnp.bfloat16),
                pltpu.SemaphoreType.DMA((stages,)),
                *(pltpu.VMEM((M, width), jnp.float32) for width in (LANES, LANES, L)),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=interpret,
        name="mla_decode",
    )(
        *(x.astype(jnp.int32) for x in scalars),
        *(position_BT, flat(q_latent_BTNL), flat(q_rope_BTNR), latent_YZSL, k_rope_YZSR),
    )
    return o_BML[:, : T * N].reshape(B, T, N, L)


def _visits(position_BT: jax.Array, page_tokens: int, copies: int, limit: int) -> Visits:
    """Of blocks of `copies` pages; `limit`: at least as many as there are."""
    num_pages_B = position_BT.max(axis=1) // page_tokens + 1
    end_B = jnp.cumsum(pl.cdiv(num_pages_B, copies))
    first = jnp.concatenate([jnp.zeros(1, end_B.dtype), end_B])
    row_X = jnp.sum(jnp.arange(limit)[:, None] >= end_B, axis=1)
    return Visits(first, jnp.minimum(row_X, len(end_B) - 1), num_pages_B)
