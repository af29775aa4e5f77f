"""Named runs. `get('tiny')` returns the whole typed `Config` of that run."""

from dsv3_jax.config import Config
from dsv3_jax.configs.deepseek_v3_671b import deepseek_v3_671b
from dsv3_jax.configs.small import small
from dsv3_jax.configs.tiny import tiny
from dsv3_jax.configs.tiny_posttrain import tiny_extend, tiny_grpo, tiny_sft
from dsv3_jax.configs.v2_lite_16b import v2_lite_16b
from dsv3_jax.errors import UserError, did_you_mean

_RUNS = (tiny, tiny_extend, tiny_sft, tiny_grpo, small, v2_lite_16b, deepseek_v3_671b)
CONFIGS = {function.__name__: function for function in _RUNS}


def get(name: str) -> Config:
    """Returns the config called `name`; `UserError` lists the names otherwise."""
    if name not in CONFIGS:
        raise UserError(
            f"--config={name} is unknown;{did_you_mean(name, CONFIGS)} "
            f"allowed: {', '.join(CONFIGS)}"
        )
    return CONFIGS[name]()
