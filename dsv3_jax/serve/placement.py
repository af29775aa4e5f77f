"""Copies of experts in a model, and their moves while it serves (spec §11).

    placement = plan(load_LE, model, num_slots)        # ones before there are statistics
    model = expanded(model, placement)                 # once: E experts become R slots
    placement = rebalanced(load_LE, placement, model)  # later, from newer statistics
    model = moved(model, placement)

Of a model, the weights [R, ...] and the tables of replicas change, never a shape, so that compiled
programs stay. Layers are those with experts, in the order of `hidden_states`' statistics: the main
ones and then, if the placement has rows for them, MTP's. Letters: L layers, E experts, R slots, C
copies, U devices of the `expert` axis.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv3_jax.errors import UserError
from dsv3_jax.model.moe import MoE, Replicas
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.parallel.mesh import expert_axes
from dsv3_jax.serve import eplb
from dsv3_jax.serve.eplb import Placement


def plan(load_LE: np.ndarray, model: DeepSeekV3, num_slots: int) -> Placement:
    """Balances load over the devices of the model's `expert` axis.

    With hierarchical dispatch the groups of the router stay together in a node, else slots go
    anywhere.

    Args:
      load_LE: tokens routed to each expert, `RouterStats.counts_E` summed over steps.
      num_slots: R, a multiple of the devices.

    Raises:
      UserError: see `eplb.place`; or the experts without spare slots do not divide over devices.
    """
    runtime, num_devices = model.runtime, model.runtime.num_expert_shards
    if load_LE.shape[1] % num_devices:
        raise UserError(
            f"{load_LE.shape[1]} experts on an 'expert' axis of {num_devices} devices; "
            "the devices must divide the experts"
        )
    hierarchical = runtime.dispatch == "hierarchical"
    return eplb.place(
        load_LE,
        num_slots=num_slots,
        num_groups=model.config.num_groups if hierarchical else 1,
        num_nodes=max(num_devices // runtime.devices_per_node, 1) if hierarchical else 1,
        num_devices=num_devices,
    )


def rebalanced(load_LE: np.ndarray, current: Placement, model: DeepSeekV3) -> Placement:
    """`plan` of the layers whose devices' largest load it lowers, and the current one of others."""
    planned = plan(load_LE, model, current.slot_to_expert_LR.shape[1])
    largest_L, current_L = (
        eplb.device_load(load_LE, placement, model.runtime.num_expert_shards).max(-1)
        for placement in (planned, current)
    )
    better = np.nonzero(largest_L < current_L)[0]

    def taken(current_L, planned_L):
        result = np.array(current_L)
        result[better] = planned_L[better]
        return result

    return Placement(*map(taken, current, planned))


def expanded(model: DeepSeekV3, placement: Placement) -> DeepSeekV3:
    """A copy of a model with one set of weights for each slot; `model` stays as it is."""
    return _placed(model, placement, donate=False)


def moved(model: DeepSeekV3, placement: Placement) -> DeepSeekV3:
    """An expanded model in another placement of as many slots. Takes the weights of `model`.

    They are moved layer by layer in place, over the `expert` axis; no unexpanded copy is needed.
    """
    return _placed(model, placement, donate=True)


def _placed(model: DeepSeekV3, placement: Placement, *, donate: bool) -> DeepSeekV3:
    model = nnx.clone(model)  # with variables of its own
    stacks = [] if model.moe_blocks is None else [model.moe_blocks.ffn]
    if len(placement.counts_LE) > model.config.num_moe_layers:
        stacks.append(model.mtp.block.ffn)
    first = 0
    for ffn in stacks:
        last = first + ffn.experts.w13.shape[0]
        _place_stack(ffn, Placement(*(x[first:last] for x in placement)), donate)
        first = last
    assert first == len(placement.counts_LE), (first, placement.counts_LE.shape)
    return model


def _place_stack(ffn: MoE, placement: Placement, donate: bool) -> None:
    mesh, num_devices = ffn.runtime.mesh, ffn.runtime.num_expert_shards
    sources_LR = _sources(ffn, placement, num_devices)
    for weight in (ffn.experts.w13, ffn.experts.w2):
        leaves, treedef = jax.tree.flatten(weight[...])
        leaves = [_mover(mesh, _spec(leaf), donate)(leaf, sources_LR) for leaf in leaves]
        weight.set_value(jax.tree.unflatten(treedef, leaves))
    everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    tables = (placement.replicas_LEC, placement.counts_LE)
    tables = (jax.device_put(jnp.asarray(x), everywhere) for x in tables)
    ffn.replicas = nnx.data(Replicas(*tables))


def _sources(ffn: MoE, placement: Placement, num_devices: int) -> np.ndarray:
    """int32 [L, R]: a slot that holds each slot's next expert now; on the same device if any does.

    Experts that are not in slots yet are the first of their device's R/U.
    """
    num_layers, num_slots = placement.slot_to_expert_LR.shape
    num_experts = placement.counts_LE.shape[1]
    per_device = num_slots // num_devices
    if ffn.replicas is None:
        device_E, place_E = np.divmod(np.arange(num_experts), num_experts // num_devices)
        slots_LEC = np.tile((device_E * per_device + place_E)[:, None], (num_layers, 1, 1))
    else:
        slots_LEC = np.asarray(ffn.replicas.slots[...])
    layer_L1 = np.arange(num_layers)[:, None]
    slots_LRC = slots_LEC[layer_L1, placement.slot_to_expert_LR]
    device_R1 = np.arange(num_slots)[:, None] // per_device
    # Of the copies elsewhere the first is taken: -1 is on no device, and never first.
    copy_LR = np.argmax(slots_LRC // per_device == device_R1, axis=-1)
    return np.take_along_axis(slots_LRC, copy_LR[..., None], axis=-1)[..., 0].astype(np.int32)


def _spec(leaf: jax.Array) -> PartitionSpec:
    sharding = leaf.sharding
    return sharding.spec if isinstance(sharding, NamedSharding) else PartitionSpec(None, "expert")


@cache
def _mover(mesh: Mesh | None, spec: PartitionSpec, donate: bool):
    """A compiled (w_LE or w_LR, sources_LR) -> w_LR."""
    axes = expert_axes(mesh)
    num_devices = 1 if mesh is None else mesh.shape["expert"] * mesh.shape.get("tensor", 1)

    def move(w_LE, sources_LR):
        per_device = sources_LR.shape[1] // num_devices
        spare = per_device - w_LE.shape[1]
        w_LR = jnp.pad(w_LE, ((0, 0), (0, spare), *((0, 0),) * (w_LE.ndim - 2)))

        def slots_of(w_R, source_R):
            if num_devices == 1:
                return w_R[source_R]

            def slot(source_U):  # one of each device's slots
                owner_U, place_U = jnp.divmod(source_U, per_device)
                offered = jax.lax.all_to_all(w_R[place_U], axes, 0, 0)
                return offered[owner_U[jax.lax.axis_index(axes)]]

            return jax.lax.map(slot, source_R.reshape(num_devices, per_device).T)

        def layer(index, w_LR):
            return w_LR.at[index].set(slots_of(w_LR[index], sources_LR[index]))

        return jax.lax.fori_loop(0, len(w_LR), layer, w_LR)

    if mesh is not None:
        specs = (spec, PartitionSpec())
        move = jax.shard_map(move, mesh=mesh, in_specs=specs, out_specs=spec, check_vma=False)
    return jax.jit(move, donate_argnums=0 if donate else ())
