"""A layer forward beside a layer backward, in the order of the paper (spec §6.1).

Forward and backward each have two moments of communication: dispatch and combine, and their
transposes. They are cut there, and the pieces run in this order, each communication beside the
computation of the other chunk:

    attention(F) | MLP(B) | MLP(W) | MLP(F) | attention(B) | attention(W) | rest of F
                 dispatch(F)       | dispatch(B)           combine(F) |
    combine(B) |

Compilers would keep the order in which data depend alone, and a scheduler that expects matrix
products to be fast need not put any between the start and the end of a collective. So what a piece
takes passes a barrier together with what the piece before made; only what is still under way
passes no barrier before it is needed.
"""

from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass

import jax
from jax.extend.core import JaxprEqn, Literal, Var

from dsv3_jax.parallel.pipeline.equations import collectives, multiplies

Atom = Var | Literal
# (equations, inputs, outputs) -> a function of a list of values
Compile = Callable[[Sequence[JaxprEqn], Sequence[Var], Sequence[Var]], Callable[[list], list]]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Some equations as a function."""

    run: Callable[[list[jax.Array]], list[jax.Array]]
    inputs: list[Var]
    outputs: list[Var]
    ended: list[Var]  # outputs that are there when all but the communication is done


def cut(eqns: Sequence[JaxprEqn]) -> list[list[JaxprEqn]]:
    """Cuts a program into what the first communication needs, what lies between, and what needs
    the second; a communication belongs to the piece that starts it.

    First and second are told apart by the matrix products between them. Where there are not both,
    all is in the middle piece.
    """
    moments: dict[Var, int] = {}  # 1: communicated; 2: multiplied after that; 3: communicated again
    starts: dict[int, set[int]] = {}
    for i, eqn in enumerate(eqns):
        moment = max((moments.get(v, 0) for v in _variables(eqn)), default=0)
        if collectives(eqn):
            moment += 1 - moment % 2
            starts.setdefault(moment, set()).add(i)
        elif multiplies(eqn):
            moment += moment % 2
        moments.update(dict.fromkeys(eqn.outvars, moment))
    if not {1, 3} <= set(starts):
        return [[], list(eqns), []]
    first, second = _with_ancestors(eqns, starts[1]), _with_ancestors(eqns, starts[3])
    pieces = [[], [], []]
    for i, eqn in enumerate(eqns):
        is_after = i not in second and any(moments[v] >= 3 for v in eqn.outvars)
        pieces[0 if i in first else 2 if is_after else 1].append(eqn)
    return pieces


def cut_weights(
    eqns: Sequence[JaxprEqn], results: Iterable[Atom], late: Iterable[Var]
) -> list[list[JaxprEqn]]:
    """Cuts the program of weight gradients into what needs none of `late`, and the rest."""
    tainted = set(late)
    for eqn in eqns:
        if tainted.intersection(_variables(eqn)):
            tainted.update(eqn.outvars)
    results = {v for v in results if isinstance(v, Var)} - tainted
    early = _with_ancestors(
        eqns, (i for i, eqn in enumerate(eqns) if results.intersection(eqn.outvars))
    )
    pieces = [[], []]
    for i, eqn in enumerate(eqns):
        pieces[0 if i in early else 1].append(eqn)
    return pieces


def _variables(eqn: JaxprEqn) -> list[Var]:
    return [v for v in eqn.invars if isinstance(v, Var)]


def _with_ancestors(eqns: Sequence[JaxprEqn], numbers: Iterable[int]) -> set[int]:
    """The numbers of some equations and of those that they need."""
    numbers, needed = set(numbers), set()
    for i in reversed(range(len(eqns))):
        if i in numbers or needed.intersection(eqns[i].outvars):
            numbers.add(i)
            needed.update(_variables(eqns[i]))
    return numbers


def make_pieces(
    groups: Sequence[Sequence[JaxprEqn]],
    results: Iterable[Atom],
    constants: Container[Var],
    compile: Compile,
) -> list[Piece]:
    """Functions of groups of equations, in the order in which they run.

    Args:
      results: what is wanted in the end.
      constants: what `compile` has values of.
    """
    needed = {v for v in results if isinstance(v, Var)}
    pieces = []
    for eqns in reversed(groups):
        made = dict.fromkeys(v for eqn in eqns for v in eqn.outvars)
        taken = dict.fromkeys(v for eqn in eqns for v in _variables(eqn))
        taken = [v for v in taken if v not in made and v not in constants]
        arriving: set[Var] = set()
        sent: set[Var] = set()
        for eqn in eqns:
            if collectives(eqn) or arriving.intersection(_variables(eqn)):
                arriving.update(eqn.outvars)
                sent.update(_variables(eqn))
        outputs = [v for v in made if v in needed or (v in sent and v not in arriving)]
        pieces.append(
            Piece(
                run=compile(eqns, taken, outputs),
                inputs=taken,
                outputs=outputs,
                ended=[v for v in outputs if v not in arriving],
            )
        )
        needed = needed.union(taken).difference(made)
    return pieces[::-1]


@dataclass(frozen=True)
class Chunk:
    """What is known of a micro-batch at a layer."""

    values: dict[Var, jax.Array]
    moving: set[Var]  # those that make what is computed from them wait

    @classmethod
    def start(
        cls, inputs: Iterable[Var], values: Iterable[jax.Array], *, moving: Iterable[Var]
    ) -> "Chunk":
        return cls(dict(zip(inputs, values, strict=True)), set(moving))

    def read(self, results: Iterable[Atom]) -> list[jax.Array]:
        return [r.val if isinstance(r, Literal) else self.values[r] for r in results]


def run_in_order(steps: Sequence[Sequence[tuple[Piece, Chunk]]]) -> None:
    """Runs pieces, those of a step when the step before has ended all but its communication."""
    ended: list[tuple[Var, Chunk]] = []
    for step in steps:
        gates = [(v, chunk) for piece, chunk in step for v in piece.inputs if v in chunk.moving]
        if ended and gates:
            together = [*ended, *gates]
            after = jax.lax.optimization_barrier([chunk.values[v] for v, chunk in together])
            for (v, chunk), value in zip(together, after, strict=True):
                chunk.values[v] = value
        for piece, chunk in step:
            results = piece.run([chunk.values[v] for v in piece.inputs])
            chunk.values.update(zip(piece.outputs, results, strict=True))
            chunk.moving.update(piece.outputs)
        ended = [(v, chunk) for piece, chunk in step for v in piece.ended] or ended
