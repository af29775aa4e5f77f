"""Experts that move to where an engine's load wants them (spec §11.1), between two steps."""

import numpy as np

from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.serve import placement
from dsv3_jax.serve.requests import EngineOptions


class Balancer:
    """A model whose experts are in slots; `model` is the current one, of the same shapes always.

    Args:
      options: `redundant_experts` more slots than experts a layer; drafts, for the layers.

    Raises:
      UserError: see `placement.plan`.
    """

    def __init__(self, model: DeepSeekV3, options: EngineOptions):
        # Of an MTP module that does not draft, or of a further one, no load is known.
        drafts = options.num_draft_tokens > 0 and model.config.mtp_depth == 1
        self._num_layers = model.config.num_moe_layers + drafts
        even_LE = np.ones((self._num_layers, model.config.num_experts))
        num_slots = model.config.num_experts + options.redundant_experts
        self._placement = placement.plan(even_LE, model, num_slots)
        self.model = placement.expanded(model, self._placement)
        self._load_LE = np.zeros_like(even_LE)  # at the last rebalancing

    def rebalance(self, load_LE: np.ndarray) -> bool:
        """Moves experts after the load since the last call; False: they are where they should be.

        Args:
          load_LE: tokens sent to each expert so far, by MoE layer.
        """
        load_LE = load_LE[: self._num_layers]
        newer_LE, self._load_LE = load_LE - self._load_LE, load_LE
        planned = placement.rebalanced(newer_LE, self._placement, self.model)
        if all(map(np.array_equal, planned, self._placement)):
            return False
        self.model, self._placement = placement.moved(self.model, planned), planned
        return True
