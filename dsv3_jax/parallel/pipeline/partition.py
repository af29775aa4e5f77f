"""How a model's MoE layers are divided among the stages of a pipeline."""

import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import UserError
from dsv3_jax.plan.parameters import count_parameters


def moe_layers_of_stages(model: ModelConfig, num_stages: int) -> tuple[int, ...]:
    """How many MoE layers each stage has, so that the busiest stage has the least to do.

    The embedding and the dense blocks are the first stage's; the head and the MTP modules the
    last one's. A layer goes where the parameters that a token meets are fewest so far.

    Raises:
      UserError: a stage would have nothing to do.
    """
    inner = max(0, num_stages - 2)
    if model.num_moe_layers < max(1, inner):
        raise UserError(
            f"model.num_layers={model.num_layers} leaves {model.num_moe_layers} MoE layers for "
            f"{num_stages} pipeline stages; use at least {model.num_dense_layers + max(1, inner)} "
            f"layers, or fewer stages by parallel.pipe or parallel.schedule"
        )
    size = count_parameters(model)
    layer = size.moe_block - (model.num_experts - model.experts_per_token) * size.expert
    load = np.zeros(num_stages)
    load[0] += model.num_dense_layers * size.dense_block
    load[-1] += size.head + model.mtp_depth * (size.mtp_projection + layer + size.head)
    counts = np.zeros(num_stages, int)
    for _ in range(model.num_moe_layers):
        stage = int(np.argmin(load))
        counts[stage] += 1
        load[stage] += layer
    return tuple(counts.tolist())
