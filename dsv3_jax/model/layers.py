"""Parameters and the three plain layers: Linear, RMSNorm, Embedding.

A weight is one line: shape, logical axes, init. `parallel/rules.py` turns logical axes into mesh
axes; a module stacked for `lax.scan` has a leading `layer` dim that the names leave out.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from dsv3_jax.model.runtime import Runtime
from dsv3_jax.precision.fp8 import fp8_linear
from dsv3_jax.precision.fp8_weight import Fp8Weight, as_fp8
from dsv3_jax.precision.policy import LINEARS, dot


def parameter(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], std: float
) -> nnx.Param:
    """A float32 parameter ~ N(0, std^2) (spec §1) with one logical axis name a dim."""
    assert len(shape) == len(axes), (shape, axes)
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32), axes=axes)


class Linear(nnx.Module):
    """y = x W without bias (spec §1): [..., I] -> [..., O], kernel [I, O].

    `role` is a key of `policy.LINEARS`, which says in what format it multiplies.
    """

    def __init__(self, rngs, d_in, d_out, axes, std, runtime: Runtime, role: str):
        assert role in LINEARS, role
        self.kernel = parameter(rngs, (d_in, d_out), axes, std)
        self.runtime = runtime
        self.role = role

    def __call__(self, x: jax.Array) -> jax.Array:
        weight = self.fp8_weight()
        if weight is None:
            return dot(x, self.kernel[...], self.runtime.compute_dtype)
        return fp8_linear(
            x,
            weight,
            self.runtime.fp8,
            power_of_two=LINEARS[self.role].power_of_two_input,
            mesh=self.runtime.mesh,
            name=f"{self.role}_in",
        )

    def fp8_weight(self) -> Fp8Weight | None:
        """The kernel's codes; None where it multiplies in the compute dtype."""
        recipe = self.runtime.fp8
        if recipe is None or LINEARS[self.role] is None:
            return None
        return as_fp8(self.kernel[...], recipe)


class RMSNorm(nnx.Module):
    """x / rms(x) * gain over the last dim, in float32, cast back (spec §1)."""

    def __init__(self, width: int, epsilon: float):
        self.gain = nnx.Param(jnp.ones((width,), jnp.float32), axes=(None,))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        return _rms_norm(x, self.gain[...], self.epsilon)


# What lies between, in float32, would be twice the input's bytes and more; it is made again.
@partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
def _rms_norm(x: jax.Array, gain: jax.Array, epsilon: float) -> jax.Array:
    x32 = x.astype(jnp.float32)
    inverse_rms = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + epsilon)
    return (x32 * inverse_rms * gain).astype(x.dtype)


class Embedding(nnx.Module):
    """Token table [V, D]; the output is not scaled (spec §1)."""

    def __init__(self, rngs, vocab_size, width, std, runtime: Runtime):
        self.table = parameter(rngs, (vocab_size, width), ("vocab", "embed"), std)
        self.runtime = runtime

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.table[...][tokens].astype(self.runtime.compute_dtype)
