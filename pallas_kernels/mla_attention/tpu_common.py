"""What the TPU kernels of attention and decoding compute with: products, and the online softmax.

Letters: `reference.py`, and L lanes of a register, over which a number of a query is repeated, so
that it meets scores and sums without a move across lanes.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.tpu_gemm import LANES

LOG2E = math.log2(math.e)
VMEM_BYTES = 32 * 2**20  # that a kernel may take; every chip has 64 MiB or more
MASKED = -1e30  # a score nobody sees
LOWEST = MASKED / 2  # where a maximum starts: far above, so that masked scores weigh nothing


def multiply(x: jax.Array, y: jax.Array, dims: tuple[int, int]) -> jax.Array:
    """Float32 product over dim `dims[0]` of x and `dims[1]` of y."""
    # A default of the user's for products of float32 must not reach these.
    return lax.dot_general(
        x,
        y,
        (((dims[0],), (dims[1],)), ((), ())),
        precision=lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def wide(x_QL: jax.Array, width: int) -> jax.Array:
    """A number of every query, over `width` lanes instead of 128."""
    return jnp.concatenate([x_QL] * (width // LANES), axis=1)


def column(row_1Q: jax.Array) -> jax.Array:
    """[Q, L]: numbers of queries that lie along the lanes, a query a row."""
    return jnp.broadcast_to(row_1Q, (LANES, row_1Q.shape[1])).T


def row(x_QL: jax.Array) -> jax.Array:
    """[1, Q]: `column` undone."""
    return x_QL.T[:1]


class Softmax(NamedTuple):
    """The online softmax of some queries, in VMEM; scores come in powers of two."""

    maximum_QL: jax.Ref  # float32, so far
    total_QL: jax.Ref  # float32 sums of weights; those of a query are spread over its lanes
    o_QH: jax.Ref  # float32 sums of weighted values

    def start(self) -> None:
        self.maximum_QL[...] = jnp.full(self.maximum_QL.shape, LOWEST, jnp.float32)
        self.total_QL[...] = jnp.zeros(self.total_QL.shape, jnp.float32)
        self.o_QH[...] = jnp.zeros(self.o_QH.shape, jnp.float32)

    def add(self, s_QK: jax.Array, v_KH: jax.Array) -> None:
        """Takes in a block of keys, of which those that a query does not see score MASKED."""
        before_QL = self.maximum_QL[...]
        maximum_QL = jnp.maximum(before_QL, s_QK.max(axis=1, keepdims=True))
        p_QK = jnp.exp2(s_QK - wide(maximum_QL, s_QK.shape[1]))
        factor_QL = jnp.exp2(before_QL - maximum_QL)
        sums = [p_QK[:, k : k + LANES] for k in range(0, s_QK.shape[1], LANES)]
        self.maximum_QL[...] = maximum_QL
        self.total_QL[...] = self.total_QL[...] * factor_QL + sum(sums)
        o_QH = multiply(p_QK.astype(v_KH.dtype), v_KH, (1, 0))
        self.o_QH[...] = self.o_QH[...] * wide(factor_QL, o_QH.shape[1]) + o_QH

    def output(self) -> tuple[jax.Array, jax.Array]:
        """float32 o_QH, and lse_QL: the natural log of the softmax's sum."""
        total_Q1 = self.total_QL[...].sum(axis=1, keepdims=True)
        return self.o_QH[...] / total_Q1, self.maximum_QL[...] / LOG2E + jnp.log(total_Q1)
