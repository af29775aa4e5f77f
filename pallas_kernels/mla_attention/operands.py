"""What the kernels of every chip take, and the tokens that they add."""

import jax
import jax.numpy as jnp

WIDTHS = (128, 64, 128)  # nope, rope, value: DeepSeek's, for which the kernels are laid out


def refuse_operands(inputs: tuple[jax.Array, ...]) -> None:
    """Raises NotImplementedError for inputs that no kernel takes."""
    q_nope_BTNP, q_rope_BTNR, k_nope_BTNP, _, v_BTNH = inputs
    if any(x.dtype != jnp.bfloat16 for x in inputs):
        raise NotImplementedError("takes bfloat16 alone")
    widths = tuple(x.shape[-1] for x in (q_nope_BTNP, q_rope_BTNR, v_BTNH))
    if widths != WIDTHS:
        raise NotImplementedError(f"takes widths (nope, rope, value) {WIDTHS}, not {widths}")
    if k_nope_BTNP.shape[1] != q_nope_BTNP.shape[1]:
        raise NotImplementedError("takes as many keys as queries")


def whole_tiles(tokens: int, *arrays_BT):
    """Arrays [B, T, ...] or None with zeros up to a multiple of `tokens`.

    Padded keys come after every real query. Padded queries see something: their outputs are cut
    off, and their gradients are zero.
    """
    padding = [(0, 0), (0, -arrays_BT[0].shape[1] % tokens)]
    return jax.tree.map(lambda x: jnp.pad(x, padding + [(0, 0)] * (x.ndim - 2)), list(arrays_BT))


def output_products(o_BTNH: jax.Array, do_BTNH: jax.Array) -> jax.Array:
    """delta_BNT: of every query, the sum of output times gradient, which backward passes take."""
    return jnp.einsum("BTNH,BTNH->BNT", o_BTNH, do_BTNH, preferred_element_type=jnp.float32)
