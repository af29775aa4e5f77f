"""What equations of a jaxpr do: whether they wait for other devices, multiply, or are cheap."""

from jax.extend.core import JaxprEqn, jaxprs_in_params

# What depends on constants alone is redone, but for these and what has a body (loops, kernels).
_COSTLY = frozenset(
    "dot_general ragged_dot_general conv_general_dilated sort top_k gather scatter scatter-add "
    "cumsum".split()
)
_MATMULS = frozenset("dot_general ragged_dot_general conv_general_dilated".split())
_KERNELS = frozenset({"pallas_call", "core_map", "mpmd_map"})


def is_costly(eqn: JaxprEqn) -> bool:
    return eqn.primitive.name in _COSTLY or _has_body(eqn) or bool(collectives(eqn))


def multiplies(eqn: JaxprEqn) -> bool:
    """Whether it may hide a collective: a matrix product, a kernel or a loop."""
    return eqn.primitive.name in _MATMULS or _has_body(eqn)


def collectives(eqn: JaxprEqn) -> set[str]:
    """Primitives that wait for other devices, in the equation and its bodies."""
    names = set()
    if eqn.primitive.name in _KERNELS:  # its axes are its own threads
        return names
    for body in jaxprs_in_params(eqn.params):
        names.update(*map(collectives, body.eqns))
    named = any(type(effect).__name__ == "NamedAxisEffect" for effect in eqn.effects)
    if named and eqn.primitive.name != "axis_index" and not names:
        names.add(eqn.primitive.name)
    return names


def _has_body(eqn: JaxprEqn) -> bool:
    return any(True for _ in jaxprs_in_params(eqn.params))
