"""Expert parallelism (spec §7): dispatch tokens to the owners of their experts, and combine.

Dispatch sends a token once to each destination, with its expert choices and weights; the owner
weights and sums the outputs of its own experts; combine is the plain sum of those over
destinations. Each is the transpose, hence the derivative, of the other. No token is dropped.

A back end is a sequence of hops over the `expert` axis, each an object with `plan`, `send` and
`collect`:

  padded        one padded all-to-all (`dispatch_padded.py`, or `dispatch_capped.py` with
                `buffer_factor`)
  ragged        one ragged all-to-all (`dispatch_ragged.py`)
  hierarchical  a padded hop between nodes, to the device with the sender's own place in its node,
                then one between the devices of that node: a token crosses to a node once

Letters: X own tokens, R received rows, K choices, E experts, D width.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from dsv3_jax.model.runtime import Runtime
from dsv3_jax.parallel.context import token_axes
from dsv3_jax.parallel.dispatch_capped import CappedHop
from dsv3_jax.parallel.dispatch_padded import PaddedHop
from dsv3_jax.parallel.dispatch_ragged import RaggedHop
from dsv3_jax.parallel.mesh import expert_axes

Hop = PaddedHop | RaggedHop
# (rows_RD, ids_RK, weights_RK, *weights of the experts here, max_slots=) -> y_RD
ExpertFunction = Callable[..., jax.Array]
# (x_XD, ids_XK, weights_XK, *weights of the experts here, num_experts=, hops=) -> y_XD, overflow
ShardFunction = Callable[..., tuple[jax.Array, jax.Array]]


class Choices(NamedTuple):
    """The choices of the rows that a device receives, and what it takes to send the rows."""

    ids_RK: jax.Array  # int32 expert, counted from this device's first; their number: not here
    weights_RK: jax.Array  # float32
    plans: tuple  # one a hop
    overflow: jax.Array  # int32, rows of this device that found no room


class Dispatched(NamedTuple):
    """The rows that a device received, and what combine needs to return them."""

    rows_RD: jax.Array
    ids_RK: jax.Array  # as in `Choices`
    weights_RK: jax.Array
    plans: tuple
    overflow: jax.Array


def make_hops(
    runtime: Runtime, num_tokens: int | None = None, top_k: int | None = None
) -> tuple[Hop, ...]:
    """The hops of `runtime.dispatch`; none where every device holds all experts.

    Args:
      num_tokens, top_k: X and K, from which `runtime.buffer_factor` gives the room for rows; with
        even routing a device receives min(K, positions) X of them.
    """
    size, axis = runtime.num_expert_shards, expert_axes(runtime.mesh or runtime.shard_of)
    per_node = runtime.devices_per_node
    if size == 1:
        return ()
    if runtime.dispatch == "ragged":
        return (RaggedHop(axis, size, runtime.platform),)

    def hop(positions: int, groups: tuple | None = None, reached: int = 1) -> Hop:
        """`reached`: positions that a token could be sent to before this hop."""
        where = dict(axis=axis, num_positions=positions, groups=groups)
        if runtime.buffer_factor is None:
            return PaddedHop(**where)
        factor = runtime.buffer_factor
        rows = num_tokens * min(top_k, positions * reached)  # that a device receives, if even
        return CappedHop(
            **where,
            capacity=min(num_tokens * reached, math.ceil(factor * rows / positions)),
            pairs=math.ceil(factor * num_tokens * top_k),
        )

    if runtime.dispatch == "padded" or size <= per_node:
        return (hop(size),)
    num_nodes = size // per_node
    nodes = [range(i * per_node, (i + 1) * per_node) for i in range(num_nodes)]
    same_place = tuple(zip(*nodes, strict=True))
    return hop(num_nodes, same_place), hop(per_node, tuple(map(tuple, nodes)), num_nodes)


def route(
    ids_XK: jax.Array, weights_XK: jax.Array, *, num_experts: int, hops: Sequence[Hop]
) -> Choices:
    """Plans every hop and sends the choices, without the rows. Call inside `shard_map`.

    Position p of S owns experts p E / S .. (p + 1) E / S - 1.

    Args:
      ids_XK: int32 experts, different within a row; `num_experts`: none.
      weights_XK: float32.
      num_experts: E, of the whole `expert` axis.
    """
    ids_RK, weights_RK, plans = ids_XK, weights_XK, []
    overflow = jnp.zeros((), jnp.int32)
    for hop in hops:
        owned = num_experts // hop.num_positions
        plan = checkpoint_name(hop.plan(ids_RK // owned), "routing")
        # The choices travel as float32 beside the weights; 0 marks rows that nobody sent.
        table_R2K = jnp.concatenate([(ids_RK + 1).astype(jnp.float32), weights_RK], axis=-1)
        table_R2K = checkpoint_name(hop.send(table_R2K, plan), "routing")
        ids_RK, weights_RK = jnp.split(table_R2K, 2, axis=-1)
        ids_RK = ids_RK.astype(jnp.int32) - 1 - hop.position() * owned
        ids_RK = jnp.where((ids_RK >= 0) & (ids_RK < owned), ids_RK, owned)
        num_experts = owned
        plans.append(plan)
        overflow += hop.overflow(plan)
    if max_slots := room_for_pairs(hops):
        overflow += jnp.maximum(jnp.sum(ids_RK < num_experts) - max_slots, 0)
    return Choices(ids_RK, weights_RK, tuple(plans), overflow)


def room_for_pairs(hops: Sequence[Hop]) -> int | None:
    """Slots for the (row, expert) pairs of the rows received; None: for as many as there can be."""
    return hops[-1].pairs if hops and isinstance(hops[-1], CappedHop) else None


def send(x_XD: jax.Array, plans: tuple, *, hops: Sequence[Hop]) -> jax.Array:
    """Sends every token's row, of any dtype, to the owners of its experts: [X, D] -> [R, D]."""
    for hop, plan in zip(hops, plans, strict=True):
        x_XD = hop.send(x_XD, plan)
    return x_XD


def dispatch(
    x_XD: jax.Array,
    ids_XK: jax.Array,
    weights_XK: jax.Array,
    *,
    num_experts: int,
    hops: Sequence[Hop],
) -> Dispatched:
    """Sends every token to the owners of its experts: `route` and `send`."""
    choices = route(ids_XK, weights_XK, num_experts=num_experts, hops=hops)
    return Dispatched(send(x_XD, choices.plans, hops=hops), *choices)


def combine(y_RD: jax.Array, plans: tuple, *, hops: Sequence[Hop]) -> jax.Array:
    """Returns the experts' outputs to the tokens' owners and adds them up: [R, D] -> [X, D]."""
    for hop, plan in zip(reversed(hops), reversed(plans), strict=True):
        y_RD = hop.collect(y_RD, plan)
    return y_RD


def apply_experts_on_shard(
    function: ExpertFunction,
    x_XD: jax.Array,
    ids_XK: jax.Array,
    weights_XK: jax.Array,
    *parameters: jax.Array,
    num_experts: int,
    hops: Sequence[Hop],
) -> tuple[jax.Array, jax.Array]:
    """What one device does: dispatch, its own experts, combine. Call inside `shard_map`.

    Args:
      parameters: this device's shard of the expert weights, experts first.

    Returns:
      y_XD, and the int32 number of rows and pairs that found no room on this device.
    """
    received = dispatch(x_XD, ids_XK, weights_XK, num_experts=num_experts, hops=hops)
    rows = received.rows_RD, received.ids_RK, received.weights_RK
    y_RD = function(*rows, *parameters, max_slots=room_for_pairs(hops))
    return combine(y_RD, received.plans, hops=hops), received.overflow


def apply_experts(
    function: ExpertFunction,
    x_XD: jax.Array,
    ids_XK: jax.Array,
    weights_XK: jax.Array,
    *parameters: jax.Array,
    runtime: Runtime,
) -> tuple[jax.Array, jax.Array]:
    """sum_k weight_k expert_k(x) for all tokens of the mesh: global [X, D] -> [X, D].

    Args:
      function: the maths of the experts whose weights it is given; see `ExpertFunction`.
      ids_XK: int32 experts, different within a row.
      weights_XK: float32.
      parameters: expert weights, experts first.

    Returns:
      y_XD, and the int32 number of rows and pairs without room, which no weight was applied to.
    """
    on_shard = partial(apply_experts_on_shard, function)
    return on_every_shard(on_shard, x_XD, ids_XK, weights_XK, *parameters, runtime=runtime)


def on_every_shard(
    function: ShardFunction,
    x_XD: jax.Array,
    ids_XK: jax.Array,
    weights_XK: jax.Array,
    *parameters: Any,
    runtime: Runtime,
) -> tuple[jax.Array, jax.Array]:
    """As `apply_experts`, by a function that dispatches and combines; see `ShardFunction`.

    Args:
      parameters: arrays, or pytrees of arrays, experts first.
    """
    num_experts, num_tokens = parameters[0].shape[0], x_XD.shape[0]
    if runtime.shard_of is not None:
        num_experts *= runtime.num_expert_shards
    shards = 1
    if runtime.mesh is not None:
        shards = math.prod(runtime.mesh.shape[axis] for axis in token_axes(runtime.mesh))
    tensor = runtime.num_tensor_shards
    hops = make_hops(runtime, -(-num_tokens // (shards * tensor)), ids_XK.shape[1])
    function = partial(function, num_experts=num_experts, hops=hops)
    if tensor > 1:
        function = partial(_each_a_part, function, tensor, num_experts)
    if runtime.mesh is None:
        return function(x_XD, ids_XK, weights_XK, *parameters)
    if num_tokens % shards:  # a small batch, at inference: rows that go to no expert
        missing = ((0, -num_tokens % shards), (0, 0))
        x_XD, weights_XK = jnp.pad(x_XD, missing), jnp.pad(weights_XK, missing)
        ids_XK = jnp.pad(ids_XK, missing, constant_values=num_experts)
    rows = PartitionSpec(token_axes(runtime.mesh))
    experts = PartitionSpec(expert_axes(runtime.mesh))

    def on_shard(*args):
        y_XD, overflow = function(*args)
        return y_XD, overflow[None]

    y_XD, overflow_S = jax.shard_map(
        on_shard,
        mesh=runtime.mesh,
        in_specs=(rows, rows, rows, *(experts for _ in parameters)),
        out_specs=(rows, rows),
        check_vma=False,
    )(x_XD, ids_XK, weights_XK, *parameters)
    return y_XD[:num_tokens], jnp.sum(overflow_S)


def _each_a_part(
    function: ShardFunction,
    num_parts: int,
    num_experts: int,
    x_XD: jax.Array,
    ids_XK: jax.Array,
    weights_XK: jax.Array,
    *parameters: Any,
) -> tuple[jax.Array, jax.Array]:
    """Deals tokens that all positions of `tensor` hold out over them, and gathers what comes back.

    So each token is sent to its experts once (spec §11: TP with sequence parallelism).
    """
    num_tokens = len(x_XD)
    size = -(-num_tokens // num_parts)
    first = jax.lax.axis_index("tensor") * size

    def part(rows, fill=0):
        missing = ((0, size * num_parts - num_tokens), (0, 0))
        rows = jnp.pad(rows, missing, constant_values=fill)
        return jax.lax.dynamic_slice_in_dim(rows, first, size)

    y_XD, overflow = function(part(x_XD), part(ids_XK, num_experts), part(weights_XK), *parameters)
    y_XD = jax.lax.all_gather(y_XD, "tensor", tiled=True)[:num_tokens]
    return y_XD, jax.lax.psum(overflow, "tensor")
