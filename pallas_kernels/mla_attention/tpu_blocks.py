"""Blocks of queries and keys that the TPU kernels of attention visit, and what they hold of each.

A program has a block of queries and visits the blocks of keys that they see, or the other way
round. The grid has as many steps for each as the longest has visits. A step that is none computes
nothing, and copies nothing either: its operands are those of the last visit.

Letters: `reference.py`, and X blocks along the tokens.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mla_attention.tpu_common import VMEM_BYTES
from pallas_kernels.tpu_gemm import LANES


@dataclass(frozen=True)
class Config:
    """What a step holds."""

    tokens: int = 512  # at most, of queries and of keys: a multiple of 128
    heads: int = 4  # or as many of them as divide the heads of the model

    def block(self, num_tokens: int) -> int:
        """Tokens of a block, in whole lanes: blocks of one size, with the least padding."""
        num_blocks = pl.cdiv(num_tokens, self.tokens)
        return pl.cdiv(pl.cdiv(num_tokens, num_blocks), LANES) * LANES


class Bounds(NamedTuple):
    """Which blocks see each other: int32 [B, X], in scalar memory."""

    first: jax.Array  # block of keys that any query of a block sees
    whole: jax.Array  # all queries of a block see this one and those up to the diagonal whole
    last: jax.Array  # block of queries that sees any key of a block


def bounds(starts_BT: jax.Array | None, shape: tuple[int, int], block: int) -> Bounds:
    """`shape`: (B, T) in whole blocks; the starts of documents ascend."""
    num_blocks = shape[1] // block
    if starts_BT is None:
        zeros_BX = jnp.zeros((shape[0], num_blocks), jnp.int32)
        return Bounds(zeros_BX, zeros_BX, zeros_BX + num_blocks - 1)
    first_BX = starts_BT[:, ::block] // block
    whole_BX = pl.cdiv(starts_BT[:, block - 1 :: block], block)
    sees_BXX = first_BX[:, None, :] <= jnp.arange(num_blocks)[:, None]  # [B, keys, queries]
    last_BX = sees_BXX.sum(axis=-1) - 1
    return Bounds(*(x.astype(jnp.int32) for x in (first_BX, whole_BX, last_BX)))


class Step(NamedTuple):
    """A step of the grid: where its operands are, and what it does."""

    batch: jax.Array
    heads: jax.Array  # number of a group of heads
    query: jax.Array  # block
    key: jax.Array  # block
    is_visit: jax.Array  # the blocks see each other, and it is their turn
    is_first: jax.Array  # visit of its program
    is_last: jax.Array


def keys_of_queries(batch, heads, query, step, limits: Bounds) -> Step:
    key = limits.first[batch, query] + step
    turn = key <= query, step == 0, key == query
    return Step(batch, heads, query, jnp.minimum(key, query), *turn)


def queries_of_keys(batch, key, heads, step, limits: Bounds) -> Step:
    """All heads of a block of keys one after the other: they share a rope key."""
    query, last = key + step, limits.last[batch, key]
    turn = query <= last, step == 0, query == last
    return Step(batch, heads, jnp.minimum(query, last), key, *turn)


@dataclass(frozen=True)
class Blocks:
    """The steps of a kernel, and the blocks of its operands."""

    locate: Callable[..., Step]
    shape: tuple[int, int, int]  # (B, N, T) in whole blocks
    config: Config

    @property
    def tokens(self) -> int:
        return self.config.block(self.shape[2])

    @property
    def heads(self) -> int:
        return math.gcd(self.config.heads, self.shape[1])

    def spec(self, like: jax.Array | jax.ShapeDtypeStruct, side: str) -> pl.BlockSpec:
        """Of [B, N, T, width], [B, T, width] (of all heads), or a number a token along the lanes:
        [B, N, 1, T], [B, 1, T]. `side`: 'query' or 'key'."""
        has_heads, is_row = like.ndim == 4, like.shape[-2] == 1

        def index(*indices_limits):
            step = self.locate(*indices_limits[:4], Bounds(*indices_limits[4:]))
            token = getattr(step, side)
            heads = (step.heads,) if has_heads else ()
            return step.batch, *heads, *((0, token) if is_row else (token, 0))

        heads = (self.heads,) if has_heads else ()
        block = (1, self.tokens) if is_row else (self.tokens, like.shape[-1])
        return pl.BlockSpec((None, *heads, *block), index)

    def launch(
        self,
        name: str,
        body: Callable,
        limits: Bounds,
        operands: dict[str, tuple[jax.Array, str]],
        outputs: dict[str, tuple[jax.ShapeDtypeStruct, str]],
        scratch: dict,
        interpret: Any,
    ) -> list[jax.Array]:
        """Runs body(step, bounds, references by name); operands and outputs come with sides."""

        def kernel(*refs):
            limits = Bounds(*refs[:3])
            step = self.locate(*(pl.program_id(i) for i in range(4)), limits)
            names = (*operands, *outputs, *scratch)
            body(step, limits, SimpleNamespace(**dict(zip(names, refs[3:], strict=True))))

        kernel.__name__ = name
        B, N, T = self.shape
        num_blocks, num_groups = T // self.tokens, N // self.heads
        if self.locate is keys_of_queries:
            grid, heads_order = (B, num_groups, num_blocks, num_blocks), "parallel"
        else:  # the groups of heads add up
            grid, heads_order = (B, num_blocks, num_groups, num_blocks), "arbitrary"
        return pl.pallas_call(
            kernel,
            out_shape=[out for out, _ in outputs.values()],
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(limits),
                grid=grid,
                in_specs=[self.spec(*operand) for operand in operands.values()],
                out_specs=[self.spec(*output) for output in outputs.values()],
                scratch_shapes=list(scratch.values()),
            ),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", heads_order, "arbitrary"),
                vmem_limit_bytes=VMEM_BYTES,
            ),
            interpret=interpret,
            name=name,
        )(*limits, *(array for array, _ in operands.values()))


def operands(inputs: tuple[jax.Array, ...], starts_BT: jax.Array | None) -> dict:
    """The five inputs, heads before tokens, and the starts, each with its side."""
    q_nope_BNTP, q_rope_BNTR, k_nope_BNTP, k_rope_BTR, v_BNTH = inputs
    named = {
        "q_nope": (q_nope_BNTP, "query"),
        "q_rope": (q_rope_BNTR, "query"),
        "k_nope": (k_nope_BNTP, "key"),
        "k_rope": (k_rope_BTR, "key"),
        "v": (v_BNTH, "key"),
    }
    return named if starts_BT is None else named | {"starts": (starts_BT[:, None], "query")}


def visit(step: Step, limits: Bounds, take: Callable[[bool], None]) -> None:
    """take(masked), where there is something to take: whether some scores are not to be seen."""
    is_whole = (step.key < step.query) & (step.key >= limits.whole[step.batch, step.query])
    pl.when(step.is_visit & is_whole)(lambda: take(False))
    pl.when(step.is_visit & jnp.logical_not(is_whole))(lambda: take(True))


def visible(step: Step, starts: jax.Array | None, tokens: int, query_dim: int) -> jax.Array:
    """bool [tokens, tokens]: whether a query sees a key, queries along `query_dim`.

    Args:
      starts: int32 of every query, which broadcasts to that shape; None: one document.
    """
    shape = (tokens, tokens)
    query, key = (lax.broadcasted_iota(jnp.int32, shape, dim) for dim in (query_dim, 1 - query_dim))
    seen = key + (step.key - step.query) * tokens <= query
    return seen if starts is None else seen & (key >= starts - step.key * tokens)


def joined(nope: jax.Array, rope: jax.Array) -> jax.Array:
    """Both parts side by side in registers: matrix units of 256 take them in one pass."""
    return jnp.concatenate([nope, rope], axis=1)
