"""Named shapes: the published ones that benchmarks report, and small ones that tests go through.

A spec is data; `operands(seed)` makes what the operation of its kind takes. The magnitude of values
differs from row to row and from tile to tile, so that a scale read from the wrong place shows.
Letters: M rows, N and K of a weight, T tiles of 128 along K, G groups; I and O widths of a weight.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.quantize.reference import (
    BLOCK,
    quantize_blocks_reference,
    quantize_columns_reference,
    quantize_tiles_reference,
)

Operands = tuple[jax.Array, ...]


@dataclass(frozen=True, kw_only=True)
class Dense:
    """Of `fp8_matmul`: (q_MK, s_MT, q_NK, s_BT)."""

    M: int
    N: int
    K: int
    scales: str = "blocks"  # of the right operand: 128x128 'blocks', or 1x128 'tiles' as in Wgrad

    @property
    def name(self) -> str:
        return f"{self.M}x{self.N}x{self.K}" + (" tiles" if self.scales == "tiles" else "")

    @property
    def flops(self) -> int:
        return 2 * self.M * self.N * self.K

    def operands(self, seed: int) -> Operands:
        left, right = jax.random.split(jax.random.key(seed))
        quantize = _blocks if self.scales == "blocks" else _tiles
        return *_tiles(left, self.M, self.K), *quantize(right, self.N, self.K)


@dataclass(frozen=True, kw_only=True)
class Grouped:
    """Of `grouped_fp8_matmul`: (q_MK, s_MT, q_GNK, s_GBT, group_sizes_G)."""

    name: str
    sizes: tuple[int, ...]
    N: int
    K: int
    spare: int = 0  # rows after the last group

    @property
    def flops(self) -> int:
        return 2 * sum(self.sizes) * self.N * self.K

    def operands(self, seed: int) -> Operands:
        left, right = jax.random.split(jax.random.key(seed))
        rows = _tiles(left, sum(self.sizes) + self.spare, self.K)
        return *rows, *_weights(right, len(self.sizes), self.N, self.K), _int32(self.sizes)


@dataclass(frozen=True, kw_only=True)
class GroupedGradient:
    """Of `grouped_fp8_weight_gradient`: (q_IM, s_IR, q_OM, s_OR, group_sizes_G)."""

    name: str
    sizes: tuple[int, ...]  # multiples of 128
    I: int
    O: int
    spare: int = 0  # rows after the last group

    @property
    def flops(self) -> int:
        return 2 * sum(self.sizes) * self.I * self.O

    def operands(self, seed: int) -> Operands:
        left, right = jax.random.split(jax.random.key(seed))
        rows = sum(self.sizes) + self.spare
        return *_columns(left, rows, self.I), *_columns(right, rows, self.O), _int32(self.sizes)


@dataclass(frozen=True, kw_only=True)
class Masked:
    """Of `masked_fp8_matmul`: (q_GMK, s_GMT, q_GNK, s_GBT, num_rows_G)."""

    name: str
    M: int  # rows that a group has room for
    num_rows: tuple[int, ...]
    N: int
    K: int

    @property
    def flops(self) -> int:
        return 2 * sum(self.num_rows) * self.N * self.K

    def operands(self, seed: int) -> Operands:
        left, right = jax.random.split(jax.random.key(seed))
        num_groups = len(self.num_rows)
        q_XK, s_XT = _tiles(left, num_groups * self.M, self.K)
        rows = (x.reshape(num_groups, self.M, -1) for x in (q_XK, s_XT))
        return *rows, *_weights(right, num_groups, self.N, self.K), _int32(self.num_rows)


@dataclass(frozen=True, kw_only=True)
class Quantize:
    """Of every quantisation: x_MK bfloat16."""

    M: int
    K: int

    @property
    def name(self) -> str:
        return f"{self.M}x{self.K}"

    def operands(self, seed: int) -> Operands:
        return (_values(jax.random.key(seed), self.M, self.K),)


def zipf_sizes(
    num_groups: int, num_rows: int, num_empty: int, multiple: int = 1
) -> tuple[int, ...]:
    """Sizes that fall like 1 / rank and sum to `num_rows`, in an order that is mixed but fixed.

    Args:
      num_empty: groups without rows, of `num_groups`.
      multiple: of every size and of `num_rows`.
    """
    shares_G = 1 / np.arange(1, num_groups - num_empty + 1)
    units = num_rows // multiple
    ends_G = np.round(np.cumsum(shares_G) / shares_G.sum() * units).astype(int)
    sizes_G = np.concatenate([np.diff(ends_G, prepend=0), np.zeros(num_empty, int)]) * multiple
    return tuple(map(int, np.random.default_rng(0).permutation(sizes_G)))


# Widths [N, K] of the six products that are published for V3, and of its experts' two.
V3_WEIGHTS = (
    (2112, 7168),
    (24576, 1536),
    (32768, 512),
    (7168, 16384),
    (4096, 7168),
    (7168, 2048),
)
EXPERT_WEIGHTS = ((4096, 7168), (7168, 2048))

V3 = tuple(Dense(M=4096, N=N, K=K) for N, K in V3_WEIGHTS)
SQUARE = Dense(M=8192, N=8192, K=8192)
DECODE = tuple(Dense(M=2**i, N=N, K=K) for i in range(8) for N, K in V3_WEIGHTS)
# The shapes of V3 with tiles on both sides, and the gradients of its weights over 4096 tokens.
V3_TILES = tuple(Dense(M=4096, N=N, K=K, scales="tiles") for N, K in V3_WEIGHTS)
WEIGHT_GRADIENTS = tuple(Dense(M=K, N=N, K=4096, scales="tiles") for N, K in V3_WEIGHTS)

_EQUAL, _ROWS = (1024,) * 32, 32 * 1024
_UNEVEN = zipf_sizes(32, _ROWS, num_empty=4)
_PADDED = zipf_sizes(32, _ROWS, num_empty=4, multiple=BLOCK)
GROUPED = tuple(
    Grouped(name=f"32 groups, {how}, {N}x{K}", sizes=sizes, N=N, K=K)
    for how, sizes in (("equal", _EQUAL), ("uneven, padded to 128", _PADDED), ("uneven", _UNEVEN))
    for N, K in EXPERT_WEIGHTS
)
GROUPED_GRADIENTS = tuple(
    GroupedGradient(name=f"32 groups, {how}, {K}x{N}", sizes=sizes, I=K, O=N)
    for how, sizes in (("equal", _EQUAL), ("uneven", _PADDED))
    for N, K in EXPERT_WEIGHTS
)
MASKED = tuple(
    Masked(name=f"32 groups of {M}, {N}x{K}", M=M, num_rows=zipf_sizes(32, 3 * M, 4), N=N, K=K)
    for M in (64, 128)
    for N, K in EXPERT_WEIGHTS
)
QUANTIZE = tuple(
    Quantize(M=M, K=K)
    for M, K in (
        (4096, 7168),
        (16384, 7168),
        (32768, 2048),
        (4096, 16384),
        (4096, 1536),
    )
)

# For tests: one row, less than a tile, ragged rows and widths, several tiles.
SMALL = tuple(
    Dense(M=M, N=N, K=K, scales=scales)
    for M, N, K in ((1, 128, 128), (5, 24, 96), (130, 129, 256), (64, 192, 300), (200, 1, 400))
    for scales in ("blocks", "tiles")
)
SMALL_GROUPED = (
    Grouped(name="ragged", sizes=(70, 0, 1, 129, 64), N=136, K=200, spare=9),
    Grouped(name="aligned", sizes=(128, 0, 256), N=128, K=256),
    Grouped(name="no rows in any group", sizes=(0, 0), N=32, K=128, spare=20),
)
SMALL_GROUPED_GRADIENTS = (
    GroupedGradient(name="spare rows", sizes=(128, 0, 256), I=72, O=130, spare=50),
    GroupedGradient(name="no rows in any group", sizes=(0, 0), I=32, O=16, spare=128),
)
SMALL_MASKED = (Masked(name="ragged", M=24, num_rows=(24, 0, 7), N=136, K=200),)
SMALL_QUANTIZE = tuple(Quantize(M=M, K=K) for M, K in ((1, 1), (5, 96), (130, 300), (256, 256)))


@partial(jax.jit, static_argnums=(1, 2))
def _values(key: jax.Array, rows: int, columns: int) -> jax.Array:
    """bfloat16, whose scales differ by a few powers of two."""
    normal, of_rows, of_tiles = jax.random.split(key, 3)
    x = jax.random.normal(normal, (rows, columns))
    sizes_M1 = jnp.exp(jax.random.normal(of_rows, (rows, 1)))
    sizes_T = jnp.exp(jax.random.normal(of_tiles, (-(-columns // BLOCK),)))
    return (x * sizes_M1 * jnp.repeat(sizes_T, BLOCK)[:columns]).astype(jnp.bfloat16)


@partial(jax.jit, static_argnums=(1, 2))
def _tiles(key: jax.Array, rows: int, columns: int) -> Operands:
    return quantize_tiles_reference(_values(key, rows, columns))


@partial(jax.jit, static_argnums=(1, 2))
def _columns(key: jax.Array, rows: int, columns: int) -> Operands:
    return quantize_columns_reference(_values(key, rows, columns))


@partial(jax.jit, static_argnums=(1, 2))
def _blocks(key: jax.Array, rows: int, columns: int) -> Operands:
    return quantize_blocks_reference(_values(key, rows, columns))


@partial(jax.jit, static_argnums=(1, 2, 3))
def _weights(key: jax.Array, num_groups: int, rows: int, columns: int) -> Operands:
    """A matrix a group, one after another: all of them in float32 would be four times as large."""
    keys_G = jax.random.split(key, num_groups)
    return jax.lax.map(lambda key: _blocks(key, rows, columns), keys_G)


def _int32(sizes: tuple[int, ...]) -> jax.Array:
    return jnp.asarray(sizes, jnp.int32)
