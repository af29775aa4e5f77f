"""Which layers a stage has, and how weights travel between the model's order and the stages'.

Outside the pipeline a stack of MoE layers is one array in the model's order, each layer split over
`pipe` along a width (`rules.py`), so that state, optimizer and checkpoints know no stages. A step
begins with one exchange over `pipe` that gives every rank the whole layers of its stages, and ends
with the reverse for their gradients.

Shapes of an array: [layers, ...] in the model's order; [S, L, ...] on a rank, S stages of at most L
layers.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

AXIS = "pipe"


@dataclass(frozen=True, eq=False)
class Stages:
    """The layers of every rank: `layer_of` int [ranks, S, L], -1 where a stage has fewer."""

    layer_of: np.ndarray

    @classmethod
    def build(cls, moe_layers: tuple[int, ...], stage_of: np.ndarray) -> "Stages":
        """From the layers of each stage and the stages of each rank, [ranks, S]."""
        most = max(1, *moe_layers)
        first = np.cumsum([0, *moe_layers])
        layer_of = np.full((*stage_of.shape, most), -1)
        for (rank, slot), stage in np.ndenumerate(stage_of):
            count = moe_layers[stage]
            layer_of[rank, slot, :count] = first[stage] + np.arange(count)
        return cls(layer_of)

    @property
    def num_layers(self) -> np.ndarray:
        """int32 [ranks, S]: the layers of each stage."""
        return (self.layer_of >= 0).sum(-1).astype(np.int32)

    def to_stages(self, leaf: jax.Array, split_dim: int | None) -> jax.Array:
        """A rank's layers, whole. Call inside `shard_map`.

        Args:
          leaf: [layers, ...], this rank's part of every layer along `split_dim`; None: whole.
        """
        ranks, *stage_shape = self.layer_of.shape
        layer_of = np.maximum(self.layer_of, 0)  # what is missing is never read
        if split_dim is None:
            return leaf[jnp.asarray(layer_of)[jax.lax.axis_index(AXIS)]]
        by_rank = leaf[layer_of.reshape(-1)]
        whole = jax.lax.all_to_all(by_rank, AXIS, 0, split_dim, tiled=True)
        return whole.reshape(*stage_shape, *whole.shape[1:])

    def to_layers(self, staged: jax.Array, split_dim: int | None) -> jax.Array:
        """The reverse, for gradients and counts: copies of a layer are added up.

        Args:
          staged: [S, L, ...] of this rank.

        Returns:
          [layers, ...], split over the ranks along `split_dim`; None: whole on all.
        """
        flat = staged.reshape(-1, *staged.shape[2:])
        if split_dim is None:
            by_rank = jax.lax.all_gather(flat, AXIS, axis=0, tiled=True)
        else:
            by_rank = jax.lax.all_to_all(flat, AXIS, split_dim, 0, tiled=True)
        place_of = [np.flatnonzero(self.layer_of.reshape(-1) == i) for i in range(self._total)]
        copies = np.stack(place_of, axis=1)  # [copies, layers]: two each in `dualpipe`
        return sum(by_rank[places] for places in copies)

    @property
    def _total(self) -> int:
        return int(self.layer_of.max()) + 1
