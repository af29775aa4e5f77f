"""KV-cache bytes a token against spec §12 (kB of 1000 bytes)."""

import math

import jax
import pytest

from dsv3_jax.configs import get
from dsv3_jax.model.paged_cache import PagedCache
from dsv3_jax.plan.kv_cache import PUBLISHED_CACHES, latent_cache

PUBLISHED = {
    "DeepSeek-V3": 70_272,
    "DeepSeek-V2": 69_120,
    "DeepSeek-V2-Lite": 31_104,
    "Qwen-2.5-72B": 327_680,
    "LLaMA-3.1-405B": 516_096,
    "V3 with multi-head attention": 3_997_696,
}


@pytest.mark.parametrize("name", PUBLISHED_CACHES)
def test_published_models_are_exact(name):
    assert PUBLISHED_CACHES[name].bytes_per_token() == PUBLISHED[name]


def test_our_configs_cache_what_the_published_models_do():
    v3, lite = get("deepseek_v3_671b").model, get("v2_lite_16b").model
    assert latent_cache(v3).bytes_per_token() == 70_272
    assert latent_cache(lite).bytes_per_token() == 31_104
    assert latent_cache(v3).bytes_per_token(itemsize=4) == 140_544


@pytest.mark.parametrize(
    ("cache_dtype", "expected"), [("float32", 140_544), ("bfloat16", 70_272), ("fp8", 40_016)]
)
def test_pages_of_a_server_have_these_bytes_a_token(cache_dtype, expected):
    v3 = get("deepseek_v3_671b").model
    widths = v3.kv_latent_dim, v3.qk_rope_head_dim
    pages = jax.eval_shape(lambda: PagedCache.zeros(v3.num_layers, 3, 64, *widths, cache_dtype))
    num_bytes = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(pages))
    assert num_bytes == 3 * 64 * expected
