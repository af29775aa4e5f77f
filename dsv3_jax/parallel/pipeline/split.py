"""Forward, input gradient and weight gradient of a layer as three programs (spec §6.1).

A layer and its derivative are traced together, inner calls are inlined, and every equation goes to
the first program that needs it: F for the layer's outputs, B for the gradient of its input, W for
the gradients of its parameters. What depends on parameters alone goes to a program of its own,
which runs once a step. So what crosses from F to B is what the layer's checkpoint policy keeps, and
nothing is computed twice, but elementwise maths and changes of shape where that keeps fewer bytes.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from typing import Any

import jax
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from dsv3_jax.parallel.pipeline.equations import collectives, is_costly
from dsv3_jax.parallel.pipeline.interleave import Chunk, cut, cut_weights, make_pieces, run_in_order

Atom = Var | Literal

_INLINED = frozenset(
    "jit pjit closed_call core_call checkpoint remat remat2 custom_jvp_call custom_vjp_call".split()
)
_RESHAPES = frozenset("reshape squeeze expand_dims broadcast_in_dim".split())  # inputs no larger
_CUTS = frozenset("slice split rev pad concatenate".split())
# What a value may be redone by to save the memory that would keep it.
_CHEAP = _CUTS | frozenset(
    "abs add add_any and clamp convert_element_type copy cos div eq exp ge gt integer_pow le log "
    "logistic lt max min mul ne neg not or pow reduce_precision rsqrt select_n sign sin sqrt "
    "square sub tanh xor".split()
)


@dataclass(frozen=True, kw_only=True)
class SplitLayer:
    """A layer in pieces: pure functions, called under the axis names that the trace had.

    Shapes are those of `residuals` (from F to B and W) and `weight_residuals` (from B to W).
    """

    prepare: Callable  # (params) -> derived: casts and codes of weights, and params used as such
    forward: Callable  # (derived, constants, x) -> (outputs, extra, residuals)
    backward: Callable  # (derived, constants, residuals, d_outputs) -> (dx, weight_residuals)
    weight: Callable  # (derived, constants, residuals, weight_residuals) -> d_params
    # (arguments of forward, arguments of backward) -> (results of forward, dx, d_params): all
    # three, of two micro-batches, in the order of `interleave.py`
    forward_and_backward: Callable
    residual_shapes: list[jax.ShapeDtypeStruct]
    weight_residual_shapes: list[jax.ShapeDtypeStruct]


def split_layer(layer: Callable, params: Any, constants: Any, x: Any) -> SplitLayer:
    """Splits `layer(params, constants, x) -> (outputs, extra)`.

    Args:
      layer: `outputs` is a pytree of floats, which is differentiated; `extra` has no gradient.
      params: a pytree of floats. As of all arguments, only shapes and dtypes matter.
      constants: a pytree of arrays that have no gradient.
      x: a pytree of floats.

    Returns:
      The pieces. Residuals and derived values are flat lists; dx and d_params are as x and params.
    """
    # Traced once for the shapes of the outputs, whose cotangents the second trace takes.
    outputs, extra = jax.eval_shape(layer, params, constants, x)

    def values_and_gradients(params, constants, x, d_outputs):
        def differentiated(params, x):
            return layer(params, constants, x)

        outputs, pull_back, extra = jax.vjp(differentiated, params, x, has_aux=True)
        return outputs, extra, *pull_back(d_outputs)

    args = (params, constants, x, outputs)
    closed, results = jax.make_jaxpr(values_and_gradients, return_shape=True)(*args)
    program = _Program(closed.jaxpr)
    in_params, in_constants, in_x, in_d_outputs = _like(
        args, [Var(v.aval) for v in closed.jaxpr.invars]
    )
    program.add_inputs(in_params, _Origin.PARAMETERS)
    program.add_inputs(in_constants, _Origin.CONSTANTS)
    program.add_inputs(in_x, _Origin.DATA)
    program.add_inputs(in_d_outputs, _Origin.COTANGENTS)
    inputs = (*in_params, *in_constants, *in_x, *in_d_outputs)
    out_outputs, out_extra, out_d_params, out_dx = _like(
        results, program.inline(closed.jaxpr, closed.consts, inputs)
    )

    derived: dict[Var, None] = {}
    redone: set[Var] = set()

    def part(targets, *sources):
        return _Part(program, targets, sources, derived, redone)

    f = part((*out_outputs, *out_extra))
    f_values = {*in_x, *f.results()}
    everything = part((*out_dx, *out_d_params), f_values)
    redone |= program.cheaper_to_redo(everything.taken[0])
    # What is communicated once more, for weight gradients alone, belongs to B too.
    received = [v for v in everything.received() if program.origin[v] is _Origin.DATA]
    b = part((*out_dx, *received), f_values)
    b_values = {*in_d_outputs, *b.results()}
    w = part(out_d_params, f_values, b_values)
    redone |= program.cheaper_to_redo(w.taken[1], (*b.taken[0], *w.taken[0]))
    w = part(out_d_params, f_values, b_values)
    w.assert_local()
    residuals = list(dict.fromkeys((*b.taken[0], *w.taken[0])))
    weight_residuals = list(w.taken[1])
    p = _Part(program, list(derived), (), None, set())

    common = (*derived, *in_constants)
    f_inputs, f_results = (*common, *in_x), (*out_outputs, *out_extra, *residuals)
    b_inputs, b_results = (*common, *residuals, *in_d_outputs), (*out_dx, *weight_residuals)
    w_inputs = (*common, *residuals, *weight_residuals)
    run_prepare = program.function("prepare", p.eqns, in_params, list(derived))
    run_forward = program.function("forward", f.eqns, f_inputs, f_results)
    run_backward = program.function("backward", b.eqns, b_inputs, b_results)
    run_weight = program.function("weight", w.eqns, w_inputs, out_d_params)

    def of_forward(leaves):
        count = len(out_outputs) + len(out_extra)
        structure = jax.tree.structure((outputs, extra))
        return *jax.tree.unflatten(structure, leaves[:count]), leaves[count:]

    def of_weight(leaves):
        return jax.tree.unflatten(jax.tree.structure(params), leaves)

    def forward(*args):
        return of_forward(run_forward(jax.tree.leaves(args)))

    def backward(*args):
        leaves, count = run_backward(jax.tree.leaves(args)), len(out_dx)
        return jax.tree.unflatten(jax.tree.structure(x), leaves[:count]), leaves[count:]

    def weight(*args):
        return of_weight(run_weight(jax.tree.leaves(args)))

    def pieces(name, groups, results):
        return make_pieces(groups, results, program.constants, partial(program.function, name))

    f_pieces = pieces("forward", cut(f.eqns), f_results)
    b_pieces = pieces("backward", cut(b.eqns), b_results)
    w_groups = cut_weights(w.eqns, out_d_params, b_pieces[2].outputs)
    w_pieces = pieces("weight", w_groups, out_d_params)

    def forward_and_backward(forward_args, backward_args):
        ahead = Chunk.start(f_inputs, jax.tree.leaves(forward_args), moving=in_x)
        behind = Chunk.start(b_inputs, jax.tree.leaves(backward_args), moving=in_d_outputs)
        f1, f2, f3 = ((piece, ahead) for piece in f_pieces)
        b1, b2, b3 = ((piece, behind) for piece in b_pieces)
        w1, w2 = ((piece, behind) for piece in w_pieces)
        run_in_order([[f1, b1], [b2], [w1], [f2], [b3], [w2], [f3]])
        dx = jax.tree.unflatten(jax.tree.structure(x), behind.read(out_dx))
        return of_forward(ahead.read(f_results)), dx, of_weight(behind.read(out_d_params))

    return SplitLayer(
        prepare=lambda params: run_prepare(jax.tree.leaves(params)),
        forward=forward,
        backward=backward,
        weight=weight,
        forward_and_backward=forward_and_backward,
        residual_shapes=_shapes(residuals),
        weight_residual_shapes=_shapes(weight_residuals),
    )


def in_halves(function: Callable, first: Any, second: Any) -> tuple[Any, Any]:
    """A function of two micro-batches, each one's communication beside the other's work (spec §11).

        attention(1) | attention(2) | MLP(1)        | MLP(2)
                     | dispatch(1)  | dispatch(2)   | combine(1)   combine(2)

    Args:
      function: of a pytree of arrays, with two moments of communication; may close over arrays.
      first, second: its arguments, of the same shapes.

    Returns:
      `function(first)` and `function(second)`.
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(first)
    program = _Program(closed.jaxpr)
    inputs = [Var(v.aval) for v in closed.jaxpr.invars]
    program.add_inputs(inputs, _Origin.DATA)
    results = program.inline(closed.jaxpr, closed.consts, inputs)
    steps, chunks = [], []
    for name, argument in (("first", first), ("second", second)):
        compile = partial(program.function, name)
        pieces = make_pieces(cut(program.eqns), results, program.constants, compile)
        chunks.append(Chunk.start(inputs, jax.tree.leaves(argument), moving=inputs))
        steps.append([[(piece, chunks[-1])] for piece in pieces])
    run_in_order([step for both in zip(*steps, strict=True) for step in both])
    structure = jax.tree.structure(shapes)
    return tuple(jax.tree.unflatten(structure, chunk.read(results)) for chunk in chunks)


def _like(trees: Sequence[Any], leaves: Sequence[Any]) -> list[list[Any]]:
    """`leaves` cut into as many as each tree has."""
    leaves = iter(leaves)
    return [[next(leaves) for _ in jax.tree.leaves(tree)] for tree in trees]


def _shapes(variables: Sequence[Var]) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in variables]


class _Origin(Enum):
    """What the value of a variable depends on."""

    NOTHING = auto()
    CONSTANTS = auto()
    PARAMETERS = auto()
    DATA = auto()  # x, or several of these
    COTANGENTS = auto()  # d_outputs, and whatever else


def _mixture(origins: set[_Origin]) -> _Origin:
    origins = origins - {_Origin.NOTHING}
    if len(origins) == 1:
        return origins.pop()
    if _Origin.COTANGENTS in origins:
        return _Origin.COTANGENTS
    return _Origin.DATA if origins else _Origin.NOTHING


class _Program:
    """Equations without inner calls, in order."""

    def __init__(self, jaxpr: Jaxpr):
        self._jaxpr = jaxpr  # of which parts are made
        self.eqns: list[JaxprEqn] = []
        self.definition: dict[Var, int] = {}  # the number of the equation; inputs have none
        self.origin: dict[Var, _Origin] = {}
        self.constants: dict[Var, Any] = {}  # values that the trace closed over
        self._known: dict[Any, list[Var]] = {}

    def add_inputs(self, variables: Iterable[Var], origin: _Origin) -> None:
        self.origin.update(dict.fromkeys(variables, origin))

    def inline(
        self, jaxpr: Jaxpr, constants: Sequence[Any], inputs: Sequence[Atom], scope: Any = None
    ) -> list[Atom]:
        """Adds the equations of `jaxpr`, and of what it calls; returns its outputs.

        Args:
          scope: the name stack of the call.
        """
        env: dict[Var, Atom] = {v: Var(v.aval) for v in jaxpr.constvars}
        self.constants.update(zip(env.values(), constants, strict=True))
        self.add_inputs(env.values(), _Origin.NOTHING)
        env.update(zip(jaxpr.invars, inputs, strict=True))

        def read(atom):
            return atom if isinstance(atom, Literal) else env[atom]

        for eqn in jaxpr.eqns:
            arguments = [read(atom) for atom in eqn.invars]
            stack = eqn.source_info.name_stack
            stack = stack if scope is None else scope + stack
            if eqn.primitive.name in _INLINED:
                inner = eqn.params["jaxpr" if "jaxpr" in eqn.params else "call_jaxpr"]
                closed_over = getattr(inner, "consts", ())  # a plain Jaxpr has none
                inner = getattr(inner, "jaxpr", inner)
                results = self.inline(inner, closed_over, arguments, stack)
            elif eqn.primitive.name == "name":  # the policies have been at work already
                results = arguments
            else:
                results = self._add(eqn, arguments, stack)
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _add(self, eqn: JaxprEqn, arguments: list[Atom], stack: Any) -> list[Var]:
        origin = _mixture({self.origin[a] for a in arguments if isinstance(a, Var)})
        if origin in (_Origin.NOTHING, _Origin.CONSTANTS) and is_costly(eqn):
            origin = _Origin.DATA
        key = None
        if origin not in (_Origin.DATA, _Origin.COTANGENTS):
            # A layer that is recomputed casts its weights in F and in B: one cast for both.
            key = _key(eqn, arguments)
            if key in self._known:
                return self._known[key]
        results = [Var(v.aval) for v in eqn.outvars]
        source_info = eqn.source_info.replace(name_stack=stack)
        self.definition.update(dict.fromkeys(results, len(self.eqns)))
        self.origin.update(dict.fromkeys(results, origin))
        self.eqns.append(eqn.replace(invars=arguments, outvars=results, source_info=source_info))
        if key is not None:
            self._known[key] = results
        return results

    def function(
        self,
        name: str,
        eqns: Sequence[JaxprEqn],
        inputs: Sequence[Var],
        outputs: Sequence[Atom],
    ) -> Callable[[list], list]:
        """Some of the equations as a function; `name` scopes its operations."""
        jaxpr = self._jaxpr.replace(
            constvars=list(self.constants), invars=list(inputs), outvars=list(outputs), eqns=eqns
        )
        constants = list(self.constants.values())

        def run(values):
            with jax.named_scope(name):
                return jax.core.eval_jaxpr(jaxpr, constants, *values)

        return run

    def is_redone(self, variable: Var) -> bool:
        """Whether programs that need it compute it from its inputs, instead of passing it on."""
        if variable not in self.definition:
            return False
        eqn, origin = self.eqns[self.definition[variable]], self.origin[variable]
        if origin in (_Origin.NOTHING, _Origin.CONSTANTS):
            return True
        name, itemsize = eqn.primitive.name, variable.aval.dtype.itemsize
        if name == "convert_element_type":
            return eqn.invars[0].aval.dtype.itemsize <= itemsize
        if origin is _Origin.PARAMETERS and itemsize == 1:  # products take codes as they lie
            return False
        if name == "transpose":
            return itemsize > 1
        return name in _RESHAPES or (origin is _Origin.PARAMETERS and name in _CUTS)

    def cheaper_to_redo(self, kept: Iterable[Var], others: Iterable[Var] = ()) -> set[Var]:
        """Variables that elementwise equations make of the rest of `kept`, `others`, or of less.

        Args:
          kept: to be kept, if nothing is redone.
          others: kept anyway.
        """
        available, redone = {*kept, *others}, set()
        # Later ones first: what they are redone from may be redone in turn.
        for v in sorted(kept, key=lambda v: self.definition.get(v, -1), reverse=True):
            available.remove(v)
            way, leaves = self._way_back(v, available)
            # On a tie rather the origin, of which other values may be redone too.
            if v in way and (sum(map(_num_bytes, leaves)), len(leaves)) <= (_num_bytes(v), 1):
                available |= leaves
                redone |= way
            else:
                available.add(v)
        return redone

    def _way_back(self, variable: Var, available: set[Var]) -> tuple[set[Var], set[Var]]:
        """What is elementwise on the way back to available variables, and what else it needs."""
        way, leaves, pending = set(), set(), [variable]
        while pending:
            v = pending.pop()
            if isinstance(v, Literal) or v in way or v in available:
                continue
            if self.origin[v] not in (_Origin.DATA, _Origin.COTANGENTS):
                continue
            eqn = self.eqns[self.definition[v]] if v in self.definition else None
            if self.is_redone(v) or (eqn and eqn.primitive.name in _CHEAP):
                way.add(v)
                pending.extend(eqn.invars)
            else:
                leaves.add(v)
        return way, leaves


def _num_bytes(variable: Var) -> int:
    return variable.aval.size * variable.aval.dtype.itemsize


def _key(eqn: JaxprEqn, arguments: Sequence[Atom]) -> Any:
    """Equal for equations of equal results; None where that cannot be told."""
    atoms = [(str(a.aval), repr(a.val)) if isinstance(a, Literal) else a for a in arguments]
    key = (eqn.primitive, tuple(sorted(eqn.params.items())), tuple(atoms))
    try:
        hash(key)
    except TypeError:
        return None
    return key


class _Part:
    """The equations that some targets need, beyond what other parts hand over."""

    def __init__(
        self,
        program: _Program,
        targets: Iterable[Atom],
        sources: Sequence[set[Var]],
        derived: dict[Var, None] | None,
        redone: set[Var],
    ):
        """`taken` becomes what is needed of each of the sources.

        Args:
          derived: gains what is needed and depends on parameters alone; None: compute that too.
          redone: to be computed, even if a source has it.
        """
        self.program = program
        self.taken: list[dict[Var, None]] = [{} for _ in sources]
        numbers, seen, pending = set(), set(), list(targets)[::-1]
        while pending:
            v = pending.pop()
            if isinstance(v, Literal) or v in seen:
                continue
            seen.add(v)
            if not (v in redone or program.is_redone(v)):
                if derived is not None and program.origin[v] is _Origin.PARAMETERS:
                    derived[v] = None
                    continue
                source = next((i for i, values in enumerate(sources) if v in values), None)
                if source is not None:
                    self.taken[source][v] = None
                    continue
            if v in program.definition:
                number = program.definition[v]
                numbers.add(number)
                pending.extend(program.eqns[number].invars)
        self.eqns = [program.eqns[number] for number in sorted(numbers)]

    def results(self) -> list[Var]:
        return [v for eqn in self.eqns for v in eqn.outvars]

    def received(self) -> list[Var]:
        """What comes from other devices."""
        return [v for eqn in self.eqns if collectives(eqn) for v in eqn.outvars]

    def assert_local(self) -> None:
        names = set().union(*map(collectives, self.eqns))
        assert not names, f"a weight gradient waits for other devices: {', '.join(sorted(names))}"
