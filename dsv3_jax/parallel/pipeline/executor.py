"""Runs a schedule: one scan over the ticks of its table, inside one `shard_map` (spec §6).

Every rank runs the same program and the table says what it does in a tick. Work is chosen by loops
over layers whose trip count the table gives, zero where there is nothing to do: a conditional would
have to copy the buffers. A forward and a full backward chunk share a loop: layer l of one beside
layer n - 1 - l of the other, so that the compiler hides the all-to-alls of each under the matmuls
of the other. Exchanges over `pipe` happen in every tick on all ranks; those over `expert` sit in
the loops, whose trip counts are alike for all ranks of an expert group.

Letters: S stages of a rank, L layers of a stage, A micro-batches, B T D as in the model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.parallel.pipeline.split import SplitLayer, split_layer
from dsv3_jax.parallel.pipeline.stages import AXIS
from dsv3_jax.parallel.pipeline.tables import Table

Tree = Any


@dataclass(frozen=True, kw_only=True)
class Model:
    """What the executor runs; every function is as `split_layer` takes it.

    Attributes:
      entry: (params, constants, ()) -> (x_BTD, ()): embedding and what the first stage has before
        its layers.
      layer: (params, constants, x_BTD) -> ((y_BTD, loss), statistics).
      exit: (params, constants, x_BTD) -> (loss, statistics): what follows the last stage's layers.
      constants: micro-batch number -> constants of its layers.
      layer_constants: stage slot, layer -> further constants, of the layer alone; the layer is
        given both as a pair.
      end_constants: micro-batch number -> constants of entry and exit.
      loss_weight: of a layer's `loss` in the total.
    """

    entry: Callable
    layer: Callable
    exit: Callable
    constants: Callable
    layer_constants: Callable
    end_constants: Callable
    loss_weight: float


@dataclass(frozen=True, kw_only=True)
class Weights:
    """float32 parameters: `layers` [S, L, ...], and those of the two ends by name."""

    layers: Tree
    entry: dict[str, Tree]
    exit: dict[str, Tree]  # a name that is also in `entry` is the same parameter

    @property
    def ends(self) -> dict[str, Tree]:
        return self.entry | self.exit


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Sums:
    """Sums over the micro-batches that this rank has seen, on this device's tokens."""

    layers: Tree  # gradients [S, L, ...] float32
    ends: dict[str, Tree]  # gradients
    layer_loss: jax.Array  # before `loss_weight`
    layer_statistics: Tree  # [S, L, ...]
    exit_loss: jax.Array
    exit_statistics: Tree


def run_table(
    table: Table,
    num_layers: np.ndarray,
    model: Model,
    weights: Weights,
    x_like: jax.ShapeDtypeStruct,
) -> Sums:
    """Runs all micro-batches forward and backward. Call inside `shard_map`.

    Args:
      num_layers: int32 [ranks, S].
      x_like: [B, T, D] of what flows between stages, this device's part.
    """
    program = _Program(table, num_layers, model, weights, x_like)
    rows = {name: jnp.asarray(column) for name, column in table.columns.items()}
    return jax.lax.scan(program.tick, program.initial_state(), rows)[0]["sums"]


def _first(tree: Tree) -> Tree:
    """Shapes of one layer out of stacked ones."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[2:], a.dtype), tree)


def _zeros(shapes: Tree, *leading: int) -> Tree:
    return jax.tree.map(lambda s: jnp.zeros((*leading, *s.shape), s.dtype), shapes)


def _read(buffers: Tree, *index: jax.Array) -> Tree:
    return jax.tree.map(lambda buffer: buffer[index], buffers)


def _write(buffers: Tree, values: Tree, *index: jax.Array) -> Tree:
    return jax.tree.map(lambda buffer, value: buffer.at[index].set(value), buffers, values)


def _add(sums: Tree, values: Tree, *index: jax.Array) -> Tree:
    if not index:
        return jax.tree.map(jnp.add, sums, values)
    return jax.tree.map(lambda total, value: total.at[index].add(value), sums, values)


def _add_named(sums: dict[str, Tree], values: dict[str, Tree]) -> dict[str, Tree]:
    """`sums` with `values` added to those of the same names."""
    return sums | {name: _add(sums[name], value) for name, value in values.items()}


class _Program:
    """One tick, and the state that it carries: a dict of buffers and `Sums`."""

    def __init__(self, table, num_layers, model: Model, weights: Weights, x_like):
        self.table, self.model, self.x_like = table, model, x_like
        self.rank = jax.lax.axis_index(AXIS)
        self.num_layers = jnp.asarray(num_layers)[self.rank]
        self.layers_of_stage = jax.tree.leaves(weights.layers)[0].shape[1]
        self.weights = weights

        zero = jnp.zeros((), jnp.int32)
        ends = model.end_constants(zero)
        constants = (model.constants(zero), model.layer_constants(zero, zero))
        self.layer = split_layer(model.layer, _first(weights.layers), constants, x_like)
        self.entry = split_layer(model.entry, weights.entry, ends, ())
        self.exit = split_layer(model.exit, weights.exit, ends, x_like)
        # Once a step: the casts and codes of all weights, a layer at a time.
        self.layer_weights = jax.lax.map(
            lambda stage: jax.lax.map(self.layer.prepare, stage), weights.layers
        )
        self.entry_weights = self.entry.prepare(weights.entry)
        self.exit_weights = self.exit.prepare(weights.exit)
        (_, self.loss_like), self.statistics_like = jax.eval_shape(
            model.layer, _first(weights.layers), constants, x_like
        )
        self.exit_loss_like, self.exit_statistics_like = jax.eval_shape(
            model.exit, weights.exit, ends, x_like
        )

    def initial_state(self) -> dict[str, Any]:
        table, L = self.table, self.layers_of_stage
        sums = Sums(
            layers=jax.tree.map(jnp.zeros_like, self.weights.layers),
            ends=jax.tree.map(jnp.zeros_like, self.weights.ends),
            layer_loss=_zeros(self.loss_like),
            layer_statistics=_zeros(self.statistics_like, table.slots_per_rank, L),
            exit_loss=_zeros(self.exit_loss_like),
            exit_statistics=_zeros(self.exit_statistics_like),
        )
        return {
            # One slot more than needed, for what arrives and nobody wants.
            "activations": _zeros(self.x_like, table.num_activation_slots + 1),
            "gradients": _zeros(self.x_like, table.num_gradient_slots + 1),
            "residuals": _zeros(self.layer.residual_shapes, table.num_residual_slots, L),
            "queue": _zeros(self.layer.weight_residual_shapes, table.num_weight_slots, L),
            "sums": sums,
        }

    def tick(self, state: dict[str, Any], row: dict[str, jax.Array]) -> tuple[dict[str, Any], None]:
        entry = {name: column[self.rank] for name, column in row.items()}
        c = _Chunks(self, entry)
        carry = {
            "x": self._embed(c, state["activations"]),
            "dy": state["gradients"][jnp.maximum(entry["b_input"], 0)],
            "residuals": state["residuals"],
            "queue": state["queue"],
            "sums": state["sums"],
        }
        shared = c.shared_layers
        for is_used, count, body in (
            (self.table.has_pairs, shared, c.forward_and_backward),
            (True, c.forward_layers - shared, lambda i, carry: c.forward(shared + i, carry)),
            (True, c.backward_layers - shared, lambda i, carry: c.backward(shared + i, carry)),
            (self.table.has_queue, c.weight_layers, c.weight),
        ):
            if is_used:
                carry = jax.lax.fori_loop(0, count, body, carry)
        gradients, sums = self._exit(c, carry["x"], state["gradients"], carry["sums"])
        sums = self._embedding_gradient(c, carry["dy"], sums)
        return {
            "activations": self._exchange(entry, "a", carry["x"], state["activations"]),
            "gradients": self._exchange(entry, "g", carry["dy"], gradients),
            "residuals": carry["residuals"],
            "queue": carry["queue"],
            "sums": sums,
        }, None

    def _embed(self, c: "_Chunks", activations: jax.Array) -> jax.Array:
        """What the forward chunk starts from: the embedding on the first stage, else an arrival."""
        entry = c.entry
        is_first = (entry["f_slot"] >= 0) & (entry["f_input"] < 0)

        def embed(_, x_BTD):
            constants = self.model.end_constants(entry["f_microbatch"])
            return self.entry.forward(self.entry_weights, constants, ())[0]

        x_BTD = activations[jnp.maximum(entry["f_input"], 0)]
        return jax.lax.fori_loop(0, is_first.astype(jnp.int32), embed, x_BTD)

    def _exit(self, c: "_Chunks", x_BTD, gradients, sums: Sums) -> tuple[jax.Array, Sums]:
        """On the last stage: the loss, its gradient, and the backward chunk's first input."""
        slot, exit, derived = c.entry["f_exit"], self.exit, self.exit_weights

        def differentiate(_, carry):
            gradients, total, loss, statistics = carry
            constants = self.model.end_constants(c.entry["f_microbatch"])
            own_loss, own_statistics, residuals = exit.forward(derived, constants, x_BTD)
            seed = jnp.ones_like(own_loss)
            dx_BTD, weight_residuals = exit.backward(derived, constants, residuals, seed)
            own = exit.weight(derived, constants, residuals, weight_residuals)
            gradients = gradients.at[slot].set(dx_BTD)
            return (
                gradients,
                _add_named(total, own),
                loss + own_loss,
                _add(statistics, own_statistics),
            )

        carry = (gradients, sums.ends, sums.exit_loss, sums.exit_statistics)
        count = (slot >= 0).astype(jnp.int32)
        gradients, total, loss, statistics = jax.lax.fori_loop(0, count, differentiate, carry)
        return gradients, _replace(sums, ends=total, exit_loss=loss, exit_statistics=statistics)

    def _embedding_gradient(self, c: "_Chunks", dx_BTD, sums: Sums) -> Sums:
        """On the first stage: the backward of `entry`, which is recomputed from the tokens."""
        entry, derived = self.entry, self.entry_weights

        def differentiate(_, total):
            constants = self.model.end_constants(c.entry["b_microbatch"])
            _, _, residuals = entry.forward(derived, constants, ())
            _, weight_residuals = entry.backward(derived, constants, residuals, dx_BTD)
            own = entry.weight(derived, constants, residuals, weight_residuals)
            return _add_named(total, own)

        return _replace(
            sums, ends=jax.lax.fori_loop(0, c.entry["b_entry"], differentiate, sums.ends)
        )

    def _exchange(self, entry, letter: str, value_BTD, buffer):
        """Sends to both neighbours, and keeps what the table says arrived."""
        ranks = self.table.ranks
        right = [(i, i + 1) for i in range(ranks - 1)]
        left = [(i + 1, i) for i in range(ranks - 1)]
        two_ways = self.table.slots_per_rank == 2
        if two_ways or letter == "a":
            arrived = jax.lax.ppermute(value_BTD, AXIS, right)
            buffer = buffer.at[entry[f"{letter}_left"]].set(arrived)
        if two_ways or letter == "g":
            arrived = jax.lax.ppermute(value_BTD, AXIS, left)
            buffer = buffer.at[entry[f"{letter}_right"]].set(arrived)
        if (self.table.columns[f"{letter}_own"] < len(buffer) - 1).any():  # the turn of dualpipev
            buffer = buffer.at[entry[f"{letter}_own"]].set(value_BTD)
        return buffer


def _replace(sums: Sums, **changes: Any) -> Sums:
    return Sums(**(vars(sums) | changes))


class _Chunks:
    """The layer loops of one rank's tick; a body takes and returns (x, dy, buffers, sums)."""

    def __init__(self, program: _Program, entry: dict[str, jax.Array]):
        self.program, self.entry = program, entry
        self.loss_weight = jnp.float32(program.model.loss_weight)

        def layers(letter, condition):
            slot = entry[f"{letter}_slot"]
            return jnp.where((slot >= 0) & condition, program.num_layers[jnp.maximum(slot, 0)], 0)

        self.at_once = (entry["b_weights"] < 0).astype(jnp.int32)
        self.forward_layers = layers("f", True)
        self.backward_layers = layers("b", True)
        self.weight_layers = layers("w", True)
        # A backward that leaves its weight gradients for later hides too little to be worth a pair.
        self.shared_layers = jnp.minimum(self.forward_layers, self.backward_layers) * self.at_once

    def _at(self, letter: str, layer: jax.Array) -> tuple[Any, Any, tuple[jax.Array, jax.Array]]:
        """Derived weights and constants of a chunk's layer, and its place in [S, L] arrays."""
        place = (self.entry[f"{letter}_slot"], layer)
        model = self.program.model
        constants = (
            model.constants(self.entry[f"{letter}_microbatch"]),
            model.layer_constants(*place),
        )
        return _read(self.program.layer_weights, *place), constants, place

    def forward_and_backward(self, i: jax.Array, carry: dict[str, Any]) -> dict[str, Any]:
        residuals, layer = self._residuals(i, carry["residuals"])
        # All reads come before the forward's write, or the compiler copies the whole buffer.
        residuals, buffer = jax.lax.optimization_barrier((residuals, carry["residuals"]))
        *ahead, place = self._at("f", i)
        *behind, b_place = self._at("b", layer)
        forward, dx_BTD, gradients = self.program.layer.forward_and_backward(
            (*ahead, carry["x"]), (*behind, residuals, (carry["dy"], self.loss_weight))
        )
        carry = self._after_forward(carry | {"residuals": buffer}, forward, place)
        sums = carry["sums"]
        sums = _replace(sums, layers=_add(sums.layers, gradients, *b_place))
        return carry | {"dy": dx_BTD, "sums": sums}

    def forward(self, layer: jax.Array, carry: dict[str, Any]) -> dict[str, Any]:
        *args, place = self._at("f", layer)
        return self._after_forward(carry, self.program.layer.forward(*args, carry["x"]), place)

    def _after_forward(self, carry, results, place) -> dict[str, Any]:
        (y_BTD, loss), statistics, residuals = results
        sums = carry["sums"]
        sums = _replace(
            sums,
            layer_loss=sums.layer_loss + loss,
            layer_statistics=_add(sums.layer_statistics, statistics, *place),
        )
        buffer = _write(carry["residuals"], residuals, self.entry["f_residual"], place[1])
        return carry | {"x": y_BTD, "residuals": buffer, "sums": sums}

    def backward(self, i: jax.Array, carry: dict[str, Any]) -> dict[str, Any]:
        """With its weight gradients, or with what they need left in the queue."""
        residuals, layer = self._residuals(i, carry["residuals"])
        dx_BTD, gradients = self._backward(layer, residuals, carry["dy"])
        sums, queue = carry["sums"], carry["queue"]
        if self.program.table.has_full_backward:
            sums = jax.lax.fori_loop(
                0, self.at_once, lambda _, sums: gradients.added_to(sums), sums
            )
        if self.program.table.has_queue:
            queue = jax.lax.fori_loop(
                0,
                1 - self.at_once,
                lambda _, queue: _write(
                    queue, gradients.weight_residuals, self.entry["b_weights"], layer
                ),
                queue,
            )
        return carry | {"dy": dx_BTD, "sums": sums, "queue": queue}

    def weight(self, layer: jax.Array, carry: dict[str, Any]) -> dict[str, Any]:
        """The weight gradients of a queued chunk."""
        derived, constants, place = self._at("w", layer)
        residuals = _read(carry["residuals"], self.entry["w_residual"], layer)
        weight_residuals = _read(carry["queue"], self.entry["w_weights"], layer)
        gradients = _WeightGradients(
            self.program.layer, derived, constants, residuals, weight_residuals, place
        )
        return carry | {"sums": gradients.added_to(carry["sums"])}

    def _residuals(self, i, buffer):
        """Of the backward chunk's i-th layer from the end, and which one that is."""
        slot = jnp.maximum(self.entry["b_slot"], 0)
        layer = self.program.num_layers[slot] - 1 - i
        return _read(buffer, self.entry["b_residual"], layer), layer

    def _backward(self, layer, residuals, dy_BTD) -> tuple[jax.Array, "_WeightGradients"]:
        derived, constants, place = self._at("b", layer)
        split = self.program.layer
        dx_BTD, weight_residuals = split.backward(
            derived, constants, residuals, (dy_BTD, self.loss_weight)
        )
        gradients = _WeightGradients(split, derived, constants, residuals, weight_residuals, place)
        return dx_BTD, gradients


@dataclass(frozen=True)
class _WeightGradients:
    """Those of one layer, not computed yet."""

    split: SplitLayer
    derived: list[jax.Array]
    constants: Tree
    residuals: list[jax.Array]
    weight_residuals: list[jax.Array]
    place: tuple[jax.Array, jax.Array]  # in [S, L]

    def added_to(self, sums: Sums) -> Sums:
        own = self.split.weight(self.derived, self.constants, self.residuals, self.weight_residuals)
        return _replace(sums, layers=_add(sums.layers, own, *self.place))
