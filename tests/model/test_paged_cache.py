"""The paged cache: what is written is read, formats, and attention over pages against `MLA`."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.configs.tiny import tiny
from dsv3_jax.model import paged_cache, rope
from dsv3_jax.model.cache import LatentCache
from dsv3_jax.model.mla import MLA
from dsv3_jax.model.paged_cache import PagedCache, Paging
from dsv3_jax.model.runtime import Runtime

CONFIG = dataclasses.replace(
    tiny().model,
    width=24,
    num_heads=3,
    qk_nope_head_dim=8,
    qk_rope_head_dim=6,
    v_head_dim=5,
    q_latent_dim=10,
    kv_latent_dim=130,  # two scales of 128
    init_std=0.3,
)
L, R, PAGE, LAYERS = 130, 6, 4, 2
LENGTHS = (23, 9, 0, 16)  # of a row each; the third is idle
B, T = len(LENGTHS), max(LENGTHS)
NUM_PAGES = 1 + sum(-(-length // PAGE) for length in LENGTHS)


# All bits set are not a number in bfloat16 and in E4M3.
NAN = {"float32": np.nan, "uint16": 2**16 - 1, "uint8": 2**8 - 1}


def tables(rng):
    """Random pages for each row; 0 beyond its tokens."""
    free = rng.permutation(np.arange(1, NUM_PAGES))
    pages_BZ, used = np.zeros((B, -(-T // PAGE)), np.int32), 0
    for row, length in enumerate(LENGTHS):
        count = -(-length // PAGE)
        pages_BZ[row, :count] = free[used : used + count]
        used += count
    return pages_BZ


def paging_of(pages_BZ, start_B, count_B, num_tokens):
    step_T = np.arange(num_tokens)
    position_BT = (np.asarray(start_B)[:, None] + step_T).astype(np.int32)
    mask_BT = step_T < np.asarray(count_B)[:, None]
    return Paging(jnp.asarray(pages_BZ), jnp.asarray(position_BT), jnp.asarray(mask_BT))


def dirty(dtype):
    """A cache whose pages hold what must never be seen."""
    cache = PagedCache.zeros(LAYERS, NUM_PAGES, PAGE, L, R, dtype)
    return jax.tree.map(lambda x: jnp.full_like(x, NAN[x.dtype.name]), cache)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "fp8"])
def test_what_is_written_is_read_and_nothing_else_changes(dtype):
    rng = np.random.default_rng(0)
    latent = rng.standard_normal((B, T, L)).astype(np.float32) * np.exp(rng.normal(0, 3, (B, T, 1)))
    k_rope = rng.standard_normal((B, T, R)).astype(np.float32)
    latent = latent.astype(np.float32)
    pages_BZ, cache = tables(rng), dirty(dtype)
    for start in range(0, T, 5):  # chunks that do not end with pages
        count_B = np.clip(np.array(LENGTHS) - start, 0, 5)
        end = min(start + 5, T)
        chunk = LatentCache(latent[:, start:end], k_rope[:, start:end])
        paging = paging_of(pages_BZ, np.full(B, start), count_B, end - start)
        cache = cache.written(jnp.int32(1), paging, jax.tree.map(jnp.asarray, chunk))
    read = cache.read(jnp.int32(1), jnp.asarray(pages_BZ), jnp.float32)
    for row, length in enumerate(LENGTHS):
        want = latent[row, :length]
        if dtype == "fp8":
            tiles = np.pad(want, ((0, 0), (0, -L % 128))).reshape(length, 2, 128)
            scale = np.maximum(np.abs(tiles).max(-1, keepdims=True), 1e-4) / np.float32(448)
            codes = (tiles / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
            want = (codes * scale).reshape(length, 256)[:, :L]
        elif dtype == "bfloat16":
            want = want.astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(read.latent_BSL[row, :length], want)
        want = k_rope[row, :length]
        if dtype != "float32":
            want = want.astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(read.k_rope_BSR[row, :length], want)
    for other, before in zip(jax.tree.leaves(cache), jax.tree.leaves(dirty(dtype)), strict=True):
        np.testing.assert_array_equal(other[0], before[0])  # the other layer


def test_numbers_a_token():
    """Spec §2: L + R numbers; in FP8 656 bytes for 576 of them."""
    for dtype, expected in (("bfloat16", 576 * 2), ("float32", 576 * 4), ("fp8", 512 + 16 + 128)):
        cache = jax.eval_shape(lambda dtype=dtype: PagedCache.zeros(1, 1, 1, 512, 64, dtype))
        assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache)) == expected


@pytest.fixture(scope="module")
def attended():
    """An MLA, random inputs, and its output on each row alone."""
    mla = MLA(CONFIG, runtime=Runtime(), rngs=nnx.Rngs(0))
    x_BTD = np.random.default_rng(1).standard_normal((B, T, CONFIG.width)).astype(np.float32)
    expected = mla(x_BTD, cos_sin=rope.cos_sin(rope.positions(T), CONFIG))
    return mla, x_BTD, np.asarray(expected)


@pytest.mark.parametrize("form", ["naive_paged", "absorbed_paged"])
@pytest.mark.parametrize("block_tokens", [4, 8, 512])
def test_attention_over_pages_equals_attention_over_rows(form, block_tokens, attended, monkeypatch):
    monkeypatch.setattr(paged_cache, "block_tokens", lambda num_new: block_tokens)
    mla, x_BTD, expected = attended
    pages_BZ, cache = tables(np.random.default_rng(2)), dirty("float32")
    graphdef, weights = nnx.split(mla)

    @jax.jit
    def step(x_BTD, cache, paging):
        mla = nnx.merge(graphdef, weights)
        cos_sin = rope.cos_sin(paging.position_BT, CONFIG)
        cache = cache.written(1, paging, mla.latents(x_BTD, cos_sin))
        return getattr(mla, form)(x_BTD, cache, 1, paging, cos_sin), cache

    start_B, size = np.zeros(B, int), 6
    sizes = np.random.default_rng(3)
    while (start_B < LENGTHS).any():  # rows go on by different numbers of tokens
        count_B = np.minimum(sizes.integers(0, size + 1, B), np.array(LENGTHS) - start_B)
        chunk = np.zeros((B, size, CONFIG.width), np.float32)
        for row, (start, count) in enumerate(zip(start_B, count_B, strict=True)):
            chunk[row, :count] = x_BTD[row, start : start + count]
        y_BTD, cache = step(chunk, cache, paging_of(pages_BZ, start_B, count_B, size))
        for row, (start, count) in enumerate(zip(start_B, count_B, strict=True)):
            want = expected[row, start : start + count]
            np.testing.assert_allclose(y_BTD[row, :count], want, atol=2e-5)
        start_B += count_B


def test_blocks_are_larger_for_few_new_tokens():
    assert [paged_cache.block_tokens(n) for n in (1, 16, 32, 64, 256)] == [
        2048,
        2048,
        1024,
        512,
        512,
    ]
