"""The latent cache of decoding: L + R numbers a token and layer, nothing per head (spec §2).

Shape letters: B batch, T new tokens, S cached tokens, L KV latent, R rope width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class LatentCache(NamedTuple):
    """What MLA keeps of a token. A stack of layers has one more leading dim."""

    latent_BSL: jax.Array  # after its norm
    k_rope_BSR: jax.Array  # rotated, shared by all heads

    def padded(self, num_tokens: int) -> "LatentCache":
        """The same cache with room for `num_tokens` tokens; the new slots hold zeros."""

        def pad(x):
            widths = [(0, 0)] * x.ndim
            widths[-2] = (0, num_tokens - x.shape[-2])
            return jnp.pad(x, widths)

        return jax.tree.map(pad, self)

    def layer(self, index: jax.Array) -> "LatentCache":
        """One layer of a stack."""
        return jax.tree.map(lambda x: x[index], self)

    def written(self, index: jax.Array, position: jax.Array, new: "LatentCache") -> "LatentCache":
        """The stack with the T tokens of `new` written to one layer from `position` on."""

        def write(x, token):
            return jax.lax.dynamic_update_slice(x, token[None], (index, 0, position, 0))

        return jax.tree.map(write, self, new)
