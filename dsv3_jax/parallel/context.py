"""Sequences split over the mesh axis `context` (spec §9): which device holds which tokens.

Everything that looks at one token at a time needs no more than a sharding of T. Attention gathers
the latents of the whole sequence (`model/attention_context.py`). For experts, losses and balance
`context` is one more data axis.

Queries late in a sequence see more keys than early ones. So that all devices have as much to do,
tokens are in *balanced order* from the embedding to the final states: of 2C chunks, position d of C
holds the chunks 2d and 2C-1-2d. Chunk c sees c chunks of keys and half of itself, which makes 2C
for the two, whatever d is. Against the natural order only every second chunk moves, to the mirrored
position. So the permutation is its own inverse, and costs an exchange of half a device's tokens
between pairs of devices where the blocks begin and where they end. Outside, and so for targets,
losses and whoever calls the model, the order is the natural one.

Shape letters: `shapes.md`; C positions of `context`.
"""

import math

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from dsv3_jax.parallel.mesh import BATCH_AXES, CONTEXT_AXIS


def num_context_shards(mesh: Mesh | AbstractMesh | None, num_tokens: int) -> int:
    """C, the devices that share a sequence of so many tokens.

    1 without the axis, and for sequences that are not 2C equal chunks (of `generate`, say): those
    stay whole, in natural order.
    """
    size = 1 if mesh is None else mesh.shape.get(CONTEXT_AXIS, 1)
    return 1 if num_tokens % (2 * size) else size


def token_axes(mesh: Mesh, num_tokens: int | None = None) -> tuple[str, ...]:
    """The axes that the tokens [B * T] of a batch are split over.

    Args:
      num_tokens: T; None: of tokens that belong to no sequence, which are split over all axes.
    """
    split = (
        CONTEXT_AXIS in mesh.axis_names
        if num_tokens is None
        else num_context_shards(mesh, num_tokens) > 1
    )
    return (*BATCH_AXES, CONTEXT_AXIS) if split else BATCH_AXES


def token_spec(mesh: Mesh, num_tokens: int) -> PartitionSpec:
    """Of an array [B, T, ...]: rows over the batch axes, tokens over `context`."""
    is_split = num_context_shards(mesh, num_tokens) > 1
    return PartitionSpec(BATCH_AXES, CONTEXT_AXIS) if is_split else PartitionSpec(BATCH_AXES)


def mirrored(x_BT: jax.Array, num_shards: int) -> jax.Array:
    """[B, T, ...] in balanced order from natural order, or back."""
    x = x_BT.reshape(x_BT.shape[0], num_shards, 2, -1, *x_BT.shape[2:])
    return jnp.concatenate([x[:, :, :1], x[:, ::-1, 1:]], axis=2).reshape(x_BT.shape)


def balanced(x_BT: jax.Array, mesh: Mesh | None) -> jax.Array:
    """As `mirrored`, and split; sequences that are not split stay as they are.

    B may be 1 where all rows are alike.
    """
    num_shards = num_context_shards(mesh, x_BT.shape[1])
    if num_shards == 1:
        return x_BT
    x_BT = mirrored(x_BT, num_shards)
    has_rows = x_BT.shape[0] % math.prod(mesh.shape[axis] for axis in BATCH_AXES) == 0
    return shard_tokens(x_BT, mesh) if has_rows else x_BT


def shard_tokens(x_BT: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Keeps [B, T, ...] split over the batch axes and, where it can be, `context`."""
    if mesh is None:
        return x_BT
    return jax.lax.with_sharding_constraint(
        x_BT, NamedSharding(mesh, token_spec(mesh, x_BT.shape[1]))
    )


def whole_sequences(x_BT: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Undoes the split over `context`, where there is one."""
    if mesh is None or CONTEXT_AXIS not in mesh.axis_names:
        return x_BT
    return jax.lax.with_sharding_constraint(x_BT, NamedSharding(mesh, PartitionSpec(BATCH_AXES)))


def flat_tokens(x_BT: jax.Array, mesh: Mesh | None) -> jax.Array:
    """[B, T, ...] -> [B * T, ...], every device keeping the tokens that it has.

    So the order of tokens is another one where sequences are split; `unflat_tokens` undoes it.
    """
    if num_context_shards(mesh, x_BT.shape[1]) == 1:
        return x_BT.reshape(-1, *x_BT.shape[2:])
    spec, axes = token_spec(mesh, x_BT.shape[1]), token_axes(mesh, x_BT.shape[1])
    return jax.shard_map(
        lambda x: x.reshape(-1, *x.shape[2:]),
        mesh=mesh,
        in_specs=spec,
        out_specs=PartitionSpec(axes),
        check_vma=False,
    )(x_BT)


def unflat_tokens(x_XD: jax.Array, num_tokens: int, mesh: Mesh | None) -> jax.Array:
    """[B * T, D] -> [B, T, D], the inverse of `flat_tokens`.

    Args:
      num_tokens: T.
    """
    num_shards = num_context_shards(mesh, num_tokens)
    if num_shards == 1:
        return x_XD.reshape(-1, num_tokens, *x_XD.shape[1:])
    spec, axes = token_spec(mesh, num_tokens), token_axes(mesh, num_tokens)
    return jax.shard_map(
        lambda x: x.reshape(-1, num_tokens // num_shards, *x.shape[1:]),
        mesh=mesh,
        in_specs=PartitionSpec(axes),
        out_specs=spec,
        check_vma=False,
    )(x_XD)
