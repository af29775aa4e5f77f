"""The decoding kernel in the engine: what it is given, and what a row that breaks leaves to others.

The engine's programs run with the kernel's definition in its place; the kernel itself, interpreted,
stands against plain XLA.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_engine import CONFIG, GREEDY, OPTIONS, make_model, requests_of, run

from dsv3_jax.model import decode_hopper, mla, rope
from dsv3_jax.model.cache import LatentCache
from dsv3_jax.model.paged_cache import PagedCache, Paging
from dsv3_jax.model.runtime import Runtime
from dsv3_jax.serve import programs
from dsv3_jax.serve.engine import Engine
from dsv3_jax.serve.requests import Request
from pallas_kernels.checking import relative_error
from pallas_kernels.mla_decode.gpu import mla_decode_hopper
from pallas_kernels.mla_decode.reference import mla_decode_reference

try:
    from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams
except ImportError:  # jax < 0.11, whose interpreter lacks what the kernel uses
    InterpretGPUParams = None


@pytest.fixture
def kernel(monkeypatch):
    """Calls of the kernel's definition, which stands in for the kernel."""
    calls = []

    def reference(*operands, implementation, **scales):
        calls.append(implementation)
        return mla_decode_reference(*operands, **scales)

    programs.decode.clear_cache()
    monkeypatch.setattr(decode_hopper, "refuse", lambda *operands: None)
    monkeypatch.setattr(decode_hopper, "mla_decode", reference)
    yield calls
    programs.decode.clear_cache()


def make_engine(model=None, **options) -> Engine:
    return Engine(model or make_model(), dataclasses.replace(OPTIONS, **options))


@pytest.mark.parametrize("cache_dtype", ["float32", "fp8"])
def test_text_is_that_of_plain_xla(cache_dtype, request):
    options = dict(cache_dtype=cache_dtype, num_draft_tokens=1)
    requests = requests_of(seed=int(np.random.default_rng().integers(1 << 30)), count=6)
    expected = run(make_engine(**options), requests)
    calls = request.getfixturevalue("kernel")
    assert run(make_engine(**options), requests) == expected
    assert set(calls) == {"hopper"}


def with_a_broken_token(token: int):
    """The model, whose embedding of one token is no number."""
    graphdef, state = nnx.split(make_model())
    table = state["embed"]["table"]
    state["embed"]["table"] = table.replace(table[...].at[token].set(jnp.nan))
    return nnx.merge(graphdef, state)


@pytest.mark.parametrize("cache_dtype", ["float32", "fp8"])
def test_pages_of_a_broken_row_do_no_harm_to_the_next(kernel, cache_dtype):
    """Each request, in pages that others left full of NaN, says what it says in new ones."""
    prompts = np.random.default_rng().integers(0, 63, size=(4, 9)).tolist()
    prompts[1][:4] = prompts[0][:4]  # they share a page
    requests = [Request(prompt=tuple(p), max_tokens=6, sampling=GREEDY) for p in prompts]
    broken = Request(prompt=(1, 63, *range(2, 24)), max_tokens=20, sampling=GREEDY)
    options = dict(max_rows=2, num_pages=24, cache_dtype=cache_dtype)
    model = with_a_broken_token(63)
    expected = run(make_engine(model, **options), requests)
    engine = make_engine(model, **options)
    run(engine, [broken, broken])
    caches = engine._state.caches["dense_blocks"].values()
    assert all(jnp.isnan(x.astype(jnp.float32)).any() for x in caches if x is not None)
    found = run(engine, [requests[0], broken, *requests[1:], broken])
    assert found[1] == found[-1] == []
    if all(63 not in text for text in expected):  # which a row may say, and then breaks too
        assert all(len(text) == 6 for text in expected)
    assert [found[0], *found[2:-1]] == expected
    assert engine.statistics().reused_tokens >= 4


def test_idle_rows_and_padding_see_nothing(monkeypatch):
    """Of padding the kernel reads nothing: neither the page that nobody has, nor a draft's slot."""
    seen = []

    def spied(*operands, implementation, **scales):
        seen.append(operands[6])
        return mla_decode_reference(*operands, **scales)

    monkeypatch.setattr(decode_hopper, "mla_decode", spied)
    cache, paging, layer = filled_cache("float32", lengths=[5, 3], num_new=2, widths=(12, 4))
    paging = paging._replace(mask_BT=jnp.array([[True, False], [False, False]]))
    queries = jnp.ones((2, 2, 3, 12)), jnp.ones((2, 2, 3, 4))
    o_BTNL = decode_hopper.attend(*queries, cache, layer, paging, 0.1)
    assert seen[0].tolist() == [[3, -1], [-1, -1]]
    assert (o_BTNL[0, 0] != 0).all() and (o_BTNL[0, 1] == 0).all() and (o_BTNL[1] == 0).all()


def filled_cache(dtype: str, lengths, num_new: int, widths, page_tokens: int = 64):
    """A cache of two layers whose rows' tokens in layer 1 are noise and all else NaN; where."""
    rng = np.random.default_rng()
    num_rows, num_pages = len(lengths), -(-max(lengths) // page_tokens)
    pages_BZ = 1 + rng.permutation(num_rows * num_pages).reshape(num_rows, num_pages)
    empty = PagedCache.zeros(2, 1 + num_rows * num_pages, page_tokens, *widths, dtype)
    broken = {"uint8": 0x7F, "uint16": 0x7FC0, "float32": np.nan}
    cache = jax.tree.map(lambda x: jnp.full_like(x, broken[x.dtype.name]), empty)
    position_BT = np.broadcast_to(np.arange(max(lengths)), (num_rows, max(lengths)))
    pages_BZ = jnp.asarray(pages_BZ, jnp.int32)
    written = Paging(pages_BZ, position_BT, position_BT < np.array(lengths)[:, None])
    new = LatentCache(*(jnp.asarray(rng.normal(size=(*position_BT.shape, w))) for w in widths))
    last_BT = jnp.array(lengths)[:, None] - jnp.arange(num_new, 0, -1)
    paging = Paging(pages_BZ, last_BT, jnp.ones_like(last_BT, bool))
    return cache.written(jnp.int32(1), written, new), paging, jnp.int32(1)


@pytest.mark.skipif(InterpretGPUParams is None, reason="needs the interpreter of jax 0.11")
@pytest.mark.parametrize("cache_dtype", ["bfloat16", "fp8"])
def test_attention_by_the_kernel_is_that_of_plain_xla(cache_dtype, monkeypatch):
    config = dataclasses.replace(CONFIG, kv_latent_dim=512, qk_rope_head_dim=64)
    attention = mla.MLA(
        config, runtime=Runtime(compute_dtype=jnp.dtype(jnp.bfloat16)), rngs=nnx.Rngs(0)
    )
    cache, paging, layer = filled_cache(cache_dtype, lengths=[70, 9], num_new=2, widths=(512, 64))
    x_BTD = jax.random.normal(jax.random.key(1), (2, 2, config.width), jnp.bfloat16)
    arguments = (x_BTD, cache, layer, paging, rope.cos_sin(paging.position_BT, config))
    expected = attention.absorbed_paged(*arguments)
    interpreted = partial(mla_decode_hopper, interpret=InterpretGPUParams())
    monkeypatch.setattr(Runtime, "platform", "gpu")
    monkeypatch.setattr(
        decode_hopper,
        "mla_decode",
        lambda *operands, implementation, **scales: interpreted(*operands, **scales),
    )
    found = attention.absorbed_paged(*arguments)
    assert jnp.isfinite(found).all() and not (found == expected).all()
    assert relative_error(found, np.asarray(expected, np.float64)) <= 1e-2


@pytest.mark.skipif(InterpretGPUParams is None, reason="the kernel needs jax 0.11")
@pytest.mark.parametrize(
    ("platform", "attention", "cache_dtype", "message"),
    [
        ("cpu", None, "bfloat16", "needs an NVIDIA GPU"),
        ("gpu", "blockwise", "bfloat16", "attention='blockwise' was asked for"),
        ("gpu", None, "float32", "bfloat16 alone"),
        ("gpu", "hopper", "fp8", None),
        ("gpu", None, "bfloat16", None),
    ],
)
def test_who_attends(platform, attention, cache_dtype, message, monkeypatch):
    monkeypatch.setattr(Runtime, "platform", platform)
    queries = [jnp.zeros((1, 1, 2, width), jnp.bfloat16) for width in (512, 64)]
    cache = PagedCache.zeros(1, 2, 64, 512, 64, cache_dtype)
    if message is None:
        return decode_hopper.refuse(*queries, cache, Runtime(attention=attention))
    with pytest.raises(NotImplementedError, match=message):
        decode_hopper.refuse(*queries, cache, Runtime(attention=attention))
