"""DeepSeek-V3 in JAX: the few names a notebook needs.

    from dsv3_jax import DeepSeekV3, configs
    model = DeepSeekV3.from_pretrained("runs/tiny")

`configs.get(name)` gives a whole run; `ModelConfig` is its architecture.
"""

from dsv3_jax import configs
from dsv3_jax.config import Config, ModelConfig

__all__ = ["Config", "DeepSeekV3", "ModelConfig", "configs"]


def __getattr__(name: str):
    # The model needs JAX: imported on first use, so that `--help` and a user's mistake stay fast.
    if name == "DeepSeekV3":
        from dsv3_jax.model.transformer import DeepSeekV3

        return DeepSeekV3
    raise AttributeError(f"module 'dsv3_jax' has no attribute {name!r}")
