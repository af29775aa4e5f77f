"""Bytes that attention keeps of a token while decoding (spec §12)."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from dsv3_jax.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class CacheShape:
    """What a token leaves in the cache."""

    num_layers: int
    numbers_per_layer: int

    def bytes_per_token(self, itemsize: int = 2) -> int:
        """Bytes of all layers; BF16 unless `itemsize` says otherwise."""
        return self.num_layers * self.numbers_per_layer * itemsize


def latent_cache(model: ModelConfig) -> CacheShape:
    """MLA: the latent and the shared rope key, nothing per head (spec §2)."""
    return CacheShape(
        num_layers=model.num_layers,
        numbers_per_layer=model.kv_latent_dim + model.qk_rope_head_dim,
    )


def per_head_cache(num_layers: int, num_kv_heads: int, head_dim: int) -> CacheShape:
    """A key and a value for each KV head: grouped-query or, with every head, multi-head."""
    return CacheShape(num_layers=num_layers, numbers_per_layer=2 * num_kv_heads * head_dim)


# The models that spec §12 compares. 70.272, 69.120, 31.104, 327.680, 516.096 and 3,997.696 kB.
PUBLISHED_CACHES: Mapping[str, CacheShape] = MappingProxyType(
    {
        "DeepSeek-V3": CacheShape(num_layers=61, numbers_per_layer=512 + 64),
        "DeepSeek-V2": CacheShape(num_layers=60, numbers_per_layer=512 + 64),
        "DeepSeek-V2-Lite": CacheShape(num_layers=27, numbers_per_layer=512 + 64),
        "Qwen-2.5-72B": per_head_cache(80, 8, 128),
        "LLaMA-3.1-405B": per_head_cache(126, 8, 128),
        "V3 with multi-head attention": per_head_cache(61, 128, 128),
    }
)
