"""TPU kernel: the queries of a row (heads, and new tokens) against its pages, block after block.

Pages are copied by hand: a block of them while blocks before it are multiplied, over the end of a
row into the next. A block of latents is read once, as keys and as values. Rows are split between
the cores of a chip that joins two in one device.

Letters: `__init__.py`; M queries of a row, T N of them in whole registers; Q and K queries and
tokens of a step; V visits, of a block of a row's tokens each; X visits of all rows.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mla_attention.tpu_common import LOG2E, MASKED, VMEM_BYTES, Softmax, multiply
from pallas_kernels.tpu_gemm import LANES

WIDTHS = (512, 64)  # latent, rope
SUBLANES = 16  # rows of bfloat16 in a register
LARGEST_PAGE = 1024  # tokens: a few of them fill what a kernel may have
LARGEST_TABLE = 2**17  # numbers of pages: they lie in scalar memory, of a megabyte


@dataclass(frozen=True)
class Config:
    tokens: int = 1024  # of a block, where pages are not larger: whole pages, and a multiple of 128
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
    latent_scale_YZCS: jax.Array | None = None,
    config: Config = DEFAULT,
    interpret: Any = False,
) -> jax.Array:
    """As `mla_decode_reference`; weights are rounded to bfloat16.

    The kernel reads pages in rows, the last dim innermost. XLA by itself gives arrays that are 64
    wide another layout, and then copies all of `k_rope_YZSR` before every call: a caller that keeps
    a cache asks for this layout (`jax.experimental.layout.Format`).

    Raises:
      NotImplementedError: other operands.
    """
    if latent_scale_YZCS is not None:
        raise NotImplementedError("takes latents in bfloat16, no codes")
    refuse(q_latent_BTNL, q_rope_BTNR, latent_YZSL, k_rope_YZSR, pages_BZ)
    B, T, N, L = q_latent_BTNL.shape
    R, page_tokens, stages = q_rope_BTNR.shape[-1], latent_YZSL.shape[2], config.stages
    M = pl.cdiv(T * N, SUBLANES) * SUBLANES
    copies = max(1, config.tokens // page_tokens)  # pages of a block
    tokens = copies * page_tokens
    cores = 1 if B % 2 else 2
    rows = B // cores
    seen_BT = position_BT >= 0  # the kernel gives every query a token
    position_BT = jnp.maximum(position_BT, 0).astype(jnp.int32)
    visits = _visits(position_BT, page_tokens, pages_BZ.shape[1], copies)

    def kernel(
        first, row_of, num_pages, layer, pages, positions, q_latent, q_rope, latent, k_rope, o,
        latents, ropes, full, maximum, total, o_sum,
    ):  # fmt: skip
        core, row_of_core = pl.program_id(0), pl.program_id(1)
        row = core * rows + row_of_core
        core_begin, core_end = first[core * rows], first[(core + 1) * rows]

        def start(visit):
            # No branches: where a row has no more pages its last is copied again, and so is the
            # block of the core's last visit, which leaves nothing unset that is multiplied by zero.
            slot, visit = lax.rem(visit, jnp.int32(stages)), jnp.minimum(visit, core_end - 1)
            row = row_of[visit]
            for i in range(copies):
                number = (visit - first[row]) * copies + i
                here = (layer[0], pages[row, jnp.minimum(number, num_pages[row] - 1)])
                for source, target in ((latent, latents), (k_rope, ropes)):
                    there = target.at[slot, i]
                    pltpu.make_async_copy(source.at[*here], there, full.at[slot]).start()

        def wait(visit):
            slot = lax.rem(visit, jnp.int32(stages))
            for target in (latents, ropes):  # for the bytes of all their copies at once
                there = target.at[slot]
                pltpu.make_async_copy(there, there, full.at[slot]).wait()
            return slot

        @pl.when(row_of_core == 0)
        def _():
            for ahead in range(stages - 1):
                start(core_begin + ahead)

        softmax = Softmax(maximum, total, o_sum)
        softmax.start()
        query, key = (lax.broadcasted_iota(jnp.int32, (M, tokens), dim) for dim in (0, 1))
        last_QK = jnp.full((M, tokens), positions[row, T - 1], jnp.int32)
        for new in reversed(range(T - 1)):  # tokens before the last
            last_QK = jnp.where(query < (new + 1) * N, positions[row, new], last_QK)

        last_of_row = positions[row, 0]
        for new in range(1, T):
            last_of_row = jnp.maximum(last_of_row, positions[row, new])

        @pl.loop(first[row], first[row + 1])
        def _(visit):
            slot = wait(visit)
            start(visit + stages - 1)

            @pl.when(visit == first[row + 1] - 1)
            def _():
                # A weight of zero does not silence a NaN after the row's last token.
                page, token = (
                    lax.broadcasted_iota(jnp.int32, latents.shape[1:], dim) for dim in (0, 1)
                )
                token += ((visit - first[row]) * copies + page) * page_tokens
                numbers = latents[slot].astype(jnp.float32)
                numbers = jnp.where(token <= last_of_row, numbers, 0.0)
                latents[slot] = numbers.astype(latents.dtype)

            latent_KL = latents[slot].reshape(tokens, L)
            rope_KR = ropes[slot].reshape(tokens, R)
            s_QK = multiply(q_latent[...], latent_KL, (1, 1))
            s_QK += multiply(q_rope[...], rope_KR, (1, 1))
            visible_QK = key + (visit - first[row]) * tokens <= last_QK
            softmax.add(jnp.where(visible_QK, s_QK * (scale * LOG2E), MASKED), latent_KL)

        o[...] = softmax.output()[0].astype(o.dtype)

        @pl.when(row_of_core == rows - 1)
        def _():
            for ahead in range(stages - 1):
                wait(core_end + ahead)

    def flat(x_BTNX):
        x_BMX = x_BTNX.reshape(B, T * N, -1)
        return jnp.pad(x_BMX, ((0, 0), (0, M - T * N), (0, 0)))

    def of_row(width):
        return pl.BlockSpec((None, M, width), lambda core, row, *_: (core * rows + row, 0, 0))

    # The kernel checks no bounds, which would take the scalar unit longer than the copies.
    layer_1 = jnp.reshape(layer, (1,)).clip(0, latent_YZSL.shape[0] - 1)
    scalars = (*visits, layer_1, pages_BZ.clip(0, latent_YZSL.shape[1] - 1))
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
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_BYTES,
            disable_bounds_checks=True,
        ),
        interpret=interpret,
        name="mla_decode",
    )(
        *(x.astype(jnp.int32) for x in scalars),
        *(position_BT, flat(q_latent_BTNL), flat(q_rope_BTNR), latent_YZSL, k_rope_YZSR),
    )
    o_BTNL = o_BML[:, : T * N].reshape(B, T, N, L)
    return jnp.where(seen_BT[..., None, None], o_BTNL, 0)


def _visits(position_BT: jax.Array, page_tokens: int, table_pages: int, copies: int) -> Visits:
    """Of blocks of `copies` pages, of rows that have at most `table_pages`."""
    num_pages_B = jnp.minimum(position_BT.max(axis=1) // page_tokens + 1, table_pages)
    end_B = jnp.cumsum(pl.cdiv(num_pages_B, copies))
    first = jnp.concatenate([jnp.zeros(1, end_B.dtype), end_B])
    visit_X = jnp.arange(len(end_B) * pl.cdiv(table_pages, copies))
    row_X = jnp.sum(visit_X[:, None] >= end_B, axis=1)  # after the last there is no row
    return Visits(first, row_X, num_pages_B)
