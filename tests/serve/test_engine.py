"""What an engine says, against teacher forcing; and how it treats its rows, pages and queue."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_engine import (
    CONFIG,
    CONTEXT,
    GREEDY,
    OPTIONS,
    differing_tokens,
    eight_devices,
    forced_logits,
    make_model,
    requests_of,
    run,
    seeded,
)

from dsv3_jax.config import ParallelConfig
from dsv3_jax.configs.deepseek_v3_671b import deepseek_v3_671b
from dsv3_jax.configs.tiny import tiny
from dsv3_jax.errors import UserError
from dsv3_jax.parallel.mesh import serving_mesh
from dsv3_jax.parallel.pipeline import split
from dsv3_jax.serve import batches, programs
from dsv3_jax.serve.checks import check_tensor
from dsv3_jax.serve.engine import Engine
from dsv3_jax.serve.requests import Overloaded, Request, Sampling


def make_engine(model=None, **options) -> Engine:
    return Engine(model or make_model(), dataclasses.replace(OPTIONS, **options))


@cache
def greedy_case():
    requests = requests_of(seed=0, count=24)
    return requests, run(make_engine(), requests)


def test_greedy_tokens_are_the_argmax_of_teacher_forcing():
    requests = requests_of(seed=0, count=24)
    engine = make_engine()
    outputs = run(engine, requests)
    assert [len(output) for output in outputs] == [r.max_tokens for r in requests]
    assert differing_tokens(make_model(), requests, outputs) == 0
    statistics = engine.statistics()
    assert statistics.reused_tokens > 0 and statistics.num_pages == 24
    total = sum(len(r.prompt) for r in requests)
    assert statistics.prefilled_tokens + statistics.reused_tokens == total
    assert statistics.decoded_tokens == sum(map(len, outputs))
    assert statistics.decode_passes == statistics.decoded_tokens - len(requests)
    assert statistics.rows_used == statistics.pages_used == statistics.queued == 0
    # Padding and idle rows are in no expert's load.
    computed = statistics.prefilled_tokens + statistics.decode_passes
    expected = computed * CONFIG.experts_per_token
    assert (statistics.expert_load.sum(-1) == expected).all() and len(statistics.expert_load) == 2


@pytest.mark.parametrize("mistake", ["swapped", "of another", "late", "early", "missing"])
def test_one_wrong_entry_changes_the_text(mistake, monkeypatch):
    """The comparison with teacher forcing sees what it is there to see."""
    requests, expected = greedy_case()
    original = batches.decode_inputs

    def wrong(rows, scheduler):
        inputs = original(rows, scheduler)
        for row in rows:
            pages = inputs.pages_BZ[row.index]
            newest = (len(row.tokens) - 1) // scheduler.options.page_tokens
            if mistake == "swapped":  # two full pages may be: keys know their positions
                pages[[0, newest]] = pages[[newest, 0]]
            elif mistake == "of another":
                pages[0] = 1 + pages[0] % scheduler.pools[0].num_pages
            elif mistake == "late":
                inputs.position_B[row.index] += 1
                inputs.limit_B[row.index] += 1
            elif mistake == "early":
                inputs.position_B[row.index] -= 1
            else:
                pages[newest] = 0
        return inputs

    monkeypatch.setattr(batches, "decode_inputs", wrong)
    outputs = run(make_engine(prefix_reuse=False), requests)
    assert sum(a != b for a, b in zip(outputs, expected, strict=True)) >= 3


def test_a_wrong_shared_page_changes_the_text(monkeypatch):
    engine, prompt = make_engine(), tuple(range(1, 18))
    request = Request(prompt=prompt, max_tokens=20, sampling=GREEDY)
    (expected,) = run(engine, [request])
    assert run(engine, [request]) == [expected] and engine.statistics().reused_tokens == 16
    pool = engine._scheduler.pools[0]
    match = pool.match
    monkeypatch.setattr(pool, "match", lambda tokens: match(tokens)[:1] * 4)
    assert run(engine, [request]) != [expected]


def test_eight_devices_with_drafts_and_moving_experts():
    requests, expected = greedy_case()
    engine = make_engine(
        make_model(eight_devices()),
        max_rows=16,
        num_pages=None,
        num_draft_tokens=1,
        redundant_experts=8,
        rebalance_steps=8,
    )
    outputs = run(engine, requests)
    outputs += run(engine, requests)  # rows meet pages of the first time
    assert outputs == expected * 2
    statistics = engine.statistics()
    assert statistics.rebalances > 0 and statistics.reused_tokens > 0
    assert statistics.drafts_accepted > 0.3 * statistics.drafts_proposed
    assert statistics.pages_used == 0


def test_a_step_takes_in_several_prompts():
    rng = np.random.default_rng(11)
    prompts = [tuple(rng.integers(0, CONFIG.vocab_size, n).tolist()) for n in (8, 3, 17, 1)]
    requests = [Request(prompt=prompt, max_tokens=4, sampling=GREEDY) for prompt in prompts]
    expected = run(make_engine(), requests)
    engine = make_engine(prefill_rows=3, num_draft_tokens=1)
    ids = [engine.submit(request) for request in requests]
    begun = [[output.request_id for output in engine.step()] for _ in range(3)]
    # The third prompt takes three steps; the fourth gets the place of an earlier one.
    assert [ids[i] in begun[0] for i in range(4)] == [True, True, False, False]
    assert ids[3] in begun[1] and ids[2] not in begun[1] and ids[2] in begun[2]
    assert run(make_engine(prefill_rows=3, num_draft_tokens=1), requests) == expected


def test_halves_of_a_prefill_say_the_same(monkeypatch):
    calls = []

    def in_halves(function, first, second):
        calls.append(first.x_BTD.shape)
        return split.in_halves(function, first, second)

    monkeypatch.setattr(programs, "in_halves", in_halves)
    requests, expected = greedy_case()
    options = {"max_rows": 32, "num_pages": None, "layers_apart": True}
    engine = make_engine(make_model(eight_devices()), prefill_rows=4, **options)
    assert run(engine, requests) == expected
    shape = 2, OPTIONS.prefill_chunk, CONFIG.width
    assert calls == [shape] * CONFIG.num_moe_layers


def test_heads_on_several_devices_say_the_same():
    """Heads, experts and tokens split over `tensor`; drafts, halves and moving experts too."""
    model = make_model(serving_mesh(ParallelConfig(data=2, expert=2), 2))
    requests, expected = greedy_case()
    engine = make_engine(
        model,
        max_rows=8,
        num_pages=None,
        prefill_rows=2,
        num_draft_tokens=1,
        redundant_experts=4,
        rebalance_steps=8,
    )
    assert run(engine, requests) == expected
    assert engine.statistics().rebalances > 0
    attention = engine._weights["params"]["moe_blocks"]["attn"]
    whole = {name: attention[name]["kernel"].shape for name in ("wq_b", "wkv_b", "wo", "wq_a")}
    own = {name: attention[name]["kernel"].sharding.shard_shape(whole[name]) for name in whole}
    fractions = {name: np.divide(own[name], whole[name]).tolist() for name in whole}
    assert fractions == {
        "wq_b": [1, 1, 0.5],
        "wkv_b": [1, 1, 0.5],
        "wo": [1, 0.5, 1],
        "wq_a": [1, 1, 1],
    }


def test_heads_and_experts_must_divide_over_tensor():
    for changes, tensor, message in (
        ({"num_heads": 3}, 2, "tensor=2 does not divide the model's 3 heads"),
        ({"num_experts": 8, "num_heads": 8}, 4, "8 experts do not divide over expert=4 x tensor=4"),
    ):
        with pytest.raises(UserError, match=message):
            check_tensor(dataclasses.replace(CONFIG, **changes), 4, tensor, fp8=False)
    with pytest.raises(UserError, match="tensor=2 cuts FP8 weights inside"):
        check_tensor(CONFIG, 1, 2, fp8=True)
    check_tensor(deepseek_v3_671b().model, 8, 4, fp8=True)
    with pytest.raises(UserError, match="data 2 x expert 2 x tensor 4 needs 16 devices but 8"):
        serving_mesh(ParallelConfig(data=2, expert=2), 4)


def test_layers_apart_say_the_same():
    requests, expected = greedy_case()
    assert run(make_engine(layers_apart=True), requests) == expected


def test_the_same_seed_gives_the_same_text_alone_and_in_a_batch():
    requests = seeded(requests_of(seed=1, count=12), temperature=1.3, top_p=0.9)
    engine = make_engine()
    together = run(engine, requests)
    alone = [run(engine, [request])[0] for request in requests[:4]]
    assert alone == together[:4]
    other = [
        dataclasses.replace(r, sampling=dataclasses.replace(r.sampling, seed=99 + i))
        for i, r in enumerate(requests)
    ]
    assert run(engine, other) != together


@pytest.mark.slow
def test_the_same_seed_gives_the_same_text_in_engines_of_1_and_32_rows():
    requests = seeded(requests_of(seed=1, count=48), temperature=1.0)
    assert run(make_engine(max_rows=1), requests) == run(make_engine(max_rows=32), requests)


def test_a_request_must_fit_the_pages():
    too_long = Request(prompt=(1,), max_tokens=CONTEXT - 1, sampling=GREEDY)
    with pytest.raises(UserError, match="need 12 pages of 4 tokens; this engine has 8"):
        make_engine(num_pages=8).submit(too_long)


def test_cancelling_frees_a_row_and_harms_nobody():
    requests, expected = greedy_case()
    engine = make_engine()
    ids = [engine.submit(request) for request in requests]
    cancelled, texts, reasons = set(ids[::3]), {i: [] for i in ids}, {}
    for step in range(2000):
        if step == 5:
            before = engine.statistics()
            started = ids[: len(ids) - before.queued]
            running = cancelled & set(started) - set(reasons)
            for request_id in cancelled:
                engine.cancel(request_id)
            after = engine.statistics()
            assert len(running) > 0 and after.rows_used == before.rows_used - len(running)
            assert after.queued == len(set(ids) - set(started) - cancelled)
            assert after.pages_used < before.pages_used
        for output in engine.step():
            assert output.request_id not in reasons
            texts[output.request_id] += output.tokens
            if output.finish_reason:
                reasons[output.request_id] = output.finish_reason
        if not engine.has_work:
            break
        if step == 5:  # others go in within the step
            assert engine.statistics().queued < after.queued
    assert set(reasons) == set(ids)
    ended = {i for i in ids if reasons[i] == "cancelled"}
    assert ended <= cancelled and len(ended) >= 6
    for request_id, text in zip(ids, expected, strict=True):
        if request_id not in ended:
            assert texts[request_id] == text
    engine.cancel(ids[0])  # once more, and of nothing
    engine.cancel(12345)
    assert not engine.has_work and engine.statistics().pages_used == 0


def test_a_full_queue_refuses():
    engine = make_engine(max_queue=3)
    requests = requests_of(seed=2, count=4)
    ids = [engine.submit(request) for request in requests[:3]]
    with pytest.raises(Overloaded):
        engine.submit(requests[3])
    engine.step()
    assert engine.submit(requests[3]) not in ids  # the others have rows now


def test_stop_tokens_and_logprobs():
    requests, expected = greedy_case()
    chosen = [i for i, output in enumerate(expected) if len(output) > 6][:4]
    stopping = [
        dataclasses.replace(
            requests[i], stop_ids=frozenset({expected[i][3], 63}), num_logprobs=count
        )
        for i, count in zip(chosen, (0, 1, 5, 20), strict=True)
    ]
    engine = make_engine()
    ids = [engine.submit(request) for request in stopping]
    tokens, logprobs, reasons = ({i: [] for i in ids} for _ in range(3))
    while engine.has_work:
        for output in engine.step():
            tokens[output.request_id] += output.tokens
            logprobs[output.request_id] += output.logprobs
            reasons[output.request_id].append(output.finish_reason)
    outputs = [tokens[i] for i in ids]
    for i, request, output in zip(chosen, stopping, outputs, strict=True):
        end = next(n for n, token in enumerate(expected[i]) if token in request.stop_ids)
        assert output == expected[i][: end + 1]
    assert all(set(reasons[i][:-1]) <= {None} and reasons[i][-1] == "stop" for i in ids)
    forced = forced_logits(make_model(), stopping, outputs)
    for request, logits, given, output in zip(
        stopping, forced, (logprobs[i] for i in ids), outputs, strict=True
    ):
        want = np.asarray(jax.nn.log_softmax(logits, axis=-1))
        assert [one.token for one in given] == output
        for n, one in enumerate(given):
            np.testing.assert_allclose(one.logprob, want[n, one.token], atol=1e-4)
            assert len(one.top) == request.num_logprobs
            best = np.sort(want[n])[::-1][: len(one.top)]
            np.testing.assert_allclose([p for _, p in one.top], best, atol=1e-4)
            np.testing.assert_allclose([want[n, t] for t, _ in one.top], best, atol=1e-4)


def test_a_row_that_is_not_a_number_ends_alone():
    """Token 63 has no number for an embedding; later rows get the pages it wrote."""
    graphdef, state = nnx.split(make_model())
    table = state["embed"]["table"]
    state["embed"]["table"] = table.replace(table[...].at[63].set(jnp.nan))
    engine = make_engine(nnx.merge(graphdef, state))
    requests, expected = greedy_case()
    clean = [
        (request, output)
        for request, output in zip(requests, expected, strict=True)
        if 63 not in request.prompt and 63 not in output
    ]
    bad = Request(prompt=(1, 2, 3, 4, 5, 63, 7, 8, 9, 10), max_tokens=5, sampling=GREEDY)
    texts, reasons, good = {}, {}, {}
    for request, output in clean:
        for one in (bad, request):
            request_id = engine.submit(one)
            texts[request_id] = []
            if one is not bad:
                good[request_id] = output
    while engine.has_work:
        for output in engine.step():
            texts[output.request_id] += output.tokens
            reasons[output.request_id] = output.finish_reason
    assert {i: text for i, text in texts.items() if i in good} == good
    assert all(reasons[i] == ("length" if i in good else "error") for i in texts)
    assert len(good) >= 5


def test_a_row_moves_between_engines():
    requests, expected = greedy_case()
    first, second = (make_engine(num_draft_tokens=2) for _ in range(2))
    chosen = [i for i, output in enumerate(expected) if len(output) > 10][:5]
    texts = {}

    def step(engine):
        for output in engine.step():
            texts[engine, output.request_id] += output.tokens

    moved = {}
    for i in chosen:
        here = first.submit(requests[i])
        with pytest.raises(UserError, match="not past its prompt"):
            first.export(here)
        texts[first, here] = []
        while not texts[first, here]:
            step(first)
        exported = first.export(here)
        while i not in moved:
            try:
                moved[i] = second.admit(exported)
            except Overloaded:
                step(second)
        texts[second, moved[i]] = texts.pop((first, here))
        step(second)  # it decodes between the arrivals
    assert not first.has_work and first.statistics().pages_used == 0
    while second.has_work:
        step(second)
    assert [texts[second, moved[i]] for i in chosen] == [expected[i] for i in chosen]
    assert second.statistics().prefilled_tokens == 0
    # What was handed over serves later prompts too, the last ones if not evicted.
    chosen.reverse()
    assert run(second, [requests[i] for i in chosen]) == [expected[i] for i in chosen]
    assert second.statistics().reused_tokens > 0


def test_a_row_moves_only_to_an_engine_of_its_kind():
    first, request = make_engine(), Request(prompt=(1, 2), max_tokens=5, sampling=GREEDY)
    request_id = first.submit(request)
    first.step()
    exported = first.export(request_id)
    for options, message in (
        ({"page_tokens": 8}, "page_tokens is 4 there and 8 here"),
        ({"cache_dtype": "bfloat16"}, "cache_dtype is float32 there and bfloat16 here"),
        ({"num_draft_tokens": 1}, "num_draft_tokens is 0 there and 1 here"),
    ):
        with pytest.raises(UserError, match=message):
            make_engine(**options).admit(exported)
    full = make_engine(max_rows=1)
    full.admit(exported)
    with pytest.raises(Overloaded):
        full.admit(exported)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prompt": ()}, "the prompt is empty"),
        ({"prompt": (1, 64)}, r"token 64 is outside the vocabulary 0\.\.63"),
        ({"prompt": (-1,)}, "token -1 is outside"),
        ({"prompt": (0.5,)}, "token 0.5 is outside"),
        ({"max_tokens": 0}, "max_tokens=0 must be an integer of 1 or more"),
        ({"max_tokens": CONTEXT}, "49 together; this engine has room for 48"),
        ({"num_logprobs": 21}, "num_logprobs=21 must lie in 0..20"),
        ({"sampling": Sampling(temperature=-0.1)}, "temperature=-0.1 must be at least 0"),
        ({"sampling": Sampling(temperature=float("nan"))}, "temperature=nan"),
        ({"sampling": Sampling(top_p=0.0)}, "top_p=0.0 must be above 0 and at most 1"),
        ({"sampling": Sampling(top_k=-1)}, "top_k=-1"),
        ({"sampling": Sampling(min_p=1.5)}, "min_p=1.5"),
        ({"sampling": Sampling(repetition_penalty=0)}, "repetition_penalty=0 must be above 0"),
        ({"sampling": Sampling(presence_penalty=float("inf"))}, "presence_penalty=inf"),
        ({"sampling": Sampling(logit_bias=((64, 1.0),))}, "token 64 is outside"),
        ({"sampling": Sampling(logit_bias=((1, float("inf")),))}, "logit_bias of token 1"),
        ({"sampling": Sampling(seed=0.5)}, "seed=0.5 must be an integer"),
    ],
)
def test_bad_requests_are_refused(changes, message):
    engine = make_engine()
    with pytest.raises(UserError, match=message):
        engine.submit(dataclasses.replace(Request(prompt=(1,), max_tokens=1), **changes))
    assert not engine.has_work


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_rows": 0}, "max_rows=0 is too small"),
        ({"page_tokens": 0}, "page_tokens=0 is too small"),
        ({"prefill_chunk": -1}, "prefill_chunk=-1 is too small"),
        ({"cache_dtype": "int8"}, "cache_dtype='int8' is unknown"),
        ({"num_draft_tokens": -1}, "num_draft_tokens=-1 is negative"),
        ({"num_pages": 0}, "num_pages=0 is too small"),
        ({"layers_apart": True, "rebalance_steps": 8}, "layers_apart=True keeps experts"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        make_engine(**options)


def test_options_must_fit_the_model_and_its_mesh():
    with pytest.raises(UserError, match="max_rows=12 does not divide over the 8 devices"):
        make_engine(make_model(eight_devices()), max_rows=12)
    config = dataclasses.replace(CONFIG, mtp_depth=0)
    with pytest.raises(UserError, match="num_draft_tokens=1 needs a model with an MTP module"):
        make_engine(make_model(config=config), num_draft_tokens=1)


@pytest.mark.slow
@pytest.mark.parametrize("drafts", [0, 2])
@pytest.mark.parametrize("devices", [1, 8])
def test_64_prompts_of_128_tokens(devices, drafts):
    """A model of the size of `tiny`, pages and chunks as a server has them."""
    config = dataclasses.replace(tiny().model, init_std=0.1)
    model = make_model(eight_devices() if devices == 8 else None, config=config)
    rng = np.random.default_rng(0)
    beginning = rng.integers(0, config.vocab_size, 150).tolist()
    requests = []
    for i in range(64):
        own = rng.integers(0, config.vocab_size, rng.integers(1, 250)).tolist()
        prompt = tuple([*beginning[: 50 * (i % 4)], *own])
        requests.append(Request(prompt=prompt, max_tokens=128, sampling=GREEDY))
    engine = make_engine(
        model,
        max_rows=16,
        context_tokens=528,
        page_tokens=32,
        num_pages=None,
        prefill_chunk=64,
        num_draft_tokens=drafts,
    )
    outputs = run(engine, requests)
    assert differing_tokens(make_model(config=config), requests, outputs, 528) == 0
    assert engine.statistics().reused_tokens > 0
