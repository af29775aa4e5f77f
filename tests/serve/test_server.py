"""The server over a socket: mistakes are 4xx, lost clients free their rows, failures stay alone."""

import asyncio
import json
import socket

import httpx
import pytest
from fake_engine import FakeEngine
from hypothesis import given, settings
from hypothesis import strategies as st
from running_server import MODEL, serving, small_tokenizer

KEYS = ("first-key", "schlüssel")


@pytest.fixture(scope="module")
def server():
    tokenizer = small_tokenizer()
    engine = FakeEngine(end=tokenizer.eos_id)
    with serving(engine, tokenizer, max_body_bytes=1 << 20, body_seconds=0.3) as running:
        yield running


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.url) as client:
        yield client


def completion(**options):
    return {"model": MODEL, "prompt": "Say it", **options}


def chat(*messages, **options):
    return {"model": MODEL, "messages": list(messages), **options}


def check_refused(answer, status=400, told=""):
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert answer.status_code == status and told in error["message"], answer.text
    return error


USER = {"role": "user", "content": "Say it"}
BAD_COMPLETIONS = {
    "prompt": (None, 5, [], [[]], [1, "a"], [True], {}, [-1], [10**6], [2**40], [[1], []], [None]),
    "model": (3, None, [MODEL]),
    "temperature": (-0.1, 2.1, "1", True, 1e999, [1]),
    "top_p": (0, -1, 1.5, "x"),
    "top_k": (-1, 1.5, 2**31),
    "min_p": (-0.1, 1.1),
    "presence_penalty": (-3, "a"),
    "frequency_penalty": (2.5, {}),
    "repetition_penalty": (0, -1),
    "logit_bias": ({"a": 1}, {"1": 101}, {"-1": 1}, {"9999999": 1}, {"1" * 5000: 1}, [1], {"²": 1}),
    "seed": (-1, 2**31, 0.5, "7"),
    "max_tokens": (0, -5, 1000, 2**80, "9", 1.5),
    "n": (0, -1, 33, 10**30, "2"),
    "stop": ("", [""], ["a"] * 17, "a" * 257, 5, [5]),
    "stream": ("true", 1),
    "stream_options": ({"include_usage": True}, {"chunks": 1}, []),
    "echo": ("yes",),
    "logprobs": (-1, 21, True),
    "best_of": (2, 0),
    "suffix": ("text",),
    "tempreature": (1,),
}
BAD_CHATS = {
    "messages": (
        *(None, [], "hi", [3], [{}], [{"role": "user"}], [{"role": "boss", "content": "a"}]),
        *([USER | {"content": 5}], [USER | {"name": "me"}], [USER, {"role": "tool"}]),
        [USER | {"content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [USER | {"tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}],
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}],
    ),
    "max_completion_tokens": (0, 2**31),
    "max_tokens": (0, 1000),
    "logprobs": (5, 1),
    "top_logprobs": (2, 21, -1),
    "response_format": ({"type": "json_object"}, "text"),
    "tools": ([], [{"type": "function"}]),
    "tool_choice": ("none",),
    "functions": ([],),
    "reasoning_effort": ("low",),
}


def test_wrong_fields_are_named(http):
    for path, valid, fields in (
        ("/v1/completions", completion(), BAD_COMPLETIONS),
        ("/v1/chat/completions", chat(USER), BAD_CHATS),
    ):
        assert http.post(path, json=valid).status_code == 200
        for name, values in fields.items():
            for value in values:
                body = json.dumps(valid | {name: value})  # Infinity too
                error = check_refused(http.post(path, content=body))
                assert name in error["message"], (name, value, error)


def test_a_null_is_a_field_left_out(http):
    nulls = dict.fromkeys((*BAD_COMPLETIONS, "suffix", "user"))
    body = nulls | {"model": MODEL, "prompt": "it"}
    answer = http.post("/v1/completions", json=body)
    assert answer.json()["choices"][0]["text"] == "it"


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"nonsense", b"[]", b"null", b'"text"', b"\xff\xfe{}", b"\x00", b"[" * 10**5]
    + [b'{"model": "tiny/test", "prompt": "\xff"}', b'{"model": "tiny/test", "prompt": "\\ud800"}']
    + [b'{"model": "tiny/test", "prompt": "a", "n": ' + b"9" * 5000 + b"}"],
)
def test_what_is_not_json_is_refused(http, body):
    for path in ("/v1/completions", "/v1/chat/completions"):
        check_refused(http.post(path, content=body))


def test_unknown_places_and_methods(http):
    check_refused(http.post("/v1/completions", json=completion(model="nope")), 404, "nope")
    check_refused(http.get("/v1/models/nope"), 404, "nope")
    check_refused(http.get("/nowhere"), 404, "/v1/chat/completions")
    check_refused(http.get("/v1/completions"), 405, "GET")
    check_refused(http.delete("/v1/models"), 405)
    check_refused(http.get("/v1/models/%ff%00%ed%a0%80"), 404)


def test_bodies_are_bounded_in_size_and_time(server, http):
    check_refused(http.post("/v1/completions", json=completion(prompt="a" * (1 << 20))), 413)
    check_refused(http.post("/v1/completions", content=iter([b" " * 60000] * 20)), 413)
    many = completion(**{str(number): 1 for number in range(2000)})
    check_refused(http.post("/v1/completions", json=many), 400, "up to 1024 entries")
    long = http.post("/v1/completions", json=completion(prompt="a" * 1_000_000))
    assert check_refused(long)["code"] == "context_length_exceeded"
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 99\r\n\r\n{"
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as slow:
        slow.sendall(head)
        assert slow.recv(10000).startswith(b"HTTP/1.1 408 ")
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as gone:
        gone.sendall(head)
    assert http.get("/health").status_code == 200


def test_calls_of_tools_are_laid_out(http):
    answer = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    said = http.post("/v1/chat/completions", json=chat(USER, answer, USER)).json()
    assert "<｜tool▁sep｜>f\n```json\n{}" in said["choices"][0]["message"]["content"]


def test_keys(caplog):
    with serving(FakeEngine(), small_tokenizer(), api_keys=KEYS) as running:
        with httpx.Client(base_url=running.url) as http:
            wrong = (
                None,
                "Bearer",
                "Bearer first-ke",
                "first-key",
                "Bearer first-key ö",
            )
            for header in wrong:
                headers = {} if header is None else {"Authorization": header.encode()}
                for call in (("POST", "/v1/completions"), ("GET", "/v1/models")):
                    answer = http.request(*call, json=completion(), headers=headers)
                    error = check_refused(answer, 401)
                    assert error["code"] == "invalid_api_key" and "first-key" not in answer.text
            for key in KEYS:
                headers = {"Authorization": f"Bearer {key}".encode()}
                answer = http.post("/v1/completions", json=completion(), headers=headers)
                assert answer.status_code == 200
            assert http.get("/health").status_code == 200
    assert not any(key in caplog.text for key in KEYS)


def test_overload_is_429_and_passes(server):
    engine = FakeEngine(max_rows=1, max_queue=2, step_seconds=0.005)

    async def flood(running):
        async with httpx.AsyncClient(base_url=running.url, timeout=30) as http:
            body = completion(max_tokens=60)
            posts = [http.post("/v1/completions", json=body) for _ in range(12)]
            answers = await asyncio.gather(*posts)
            later = await http.post("/v1/completions", json=body)
        return answers, later

    with serving(engine, small_tokenizer()) as running:
        answers, later = asyncio.run(flood(running))
        for answer in (refused := [a for a in answers if a.status_code != 200]):
            assert check_refused(answer, 429)["type"] == "rate_limit_error"
            assert int(answer.headers["Retry-After"]) > 0
        assert 1 <= len(refused) <= 10 and later.status_code == 200
        # All choices of a request are accepted, or none is.
        with httpx.Client(base_url=running.url) as http:
            many = http.post("/v1/completions", json=completion(n=4, max_tokens=2))
            check_refused(many, 429)
        assert running.until_idle(1)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_frees_its_rows(stream):
    engine = FakeEngine(max_rows=2, step_seconds=0.002, end=-1)
    with serving(engine, small_tokenizer(), context_tokens=10**6) as running:
        body = completion(max_tokens=900_000, n=3, stream=stream)
        with httpx.Client(base_url=running.url, timeout=0.3) as http:
            if stream:
                with http.stream("POST", "/v1/completions", json=body) as answer:
                    events = answer.iter_lines()
                    assert sum(next(events).startswith("data: {") for _ in range(40)) == 20
            else:
                with pytest.raises(httpx.ReadTimeout):
                    http.post("/v1/completions", json=body)
        steps = engine.steps
        assert running.until_idle() and engine.cancelled == 3 and steps > 3
        assert not running.failures


def test_a_request_that_fails_harms_no_other(server):
    tokenizer = small_tokenizer()
    engine = FakeEngine(step_seconds=0.002, end=tokenizer.eos_id)
    bad, refused = (tokenizer.encode(text)[0] for text in ("X", "Y"))
    engine.fails_on, engine.refuses = bad, refused

    async def together(running):
        async with httpx.AsyncClient(base_url=running.url) as http:
            bodies = [completion(prompt=text) for text in ("Say it", "X", "again", "Y")]
            bodies.append(completion(prompt="X", stream=True))
            return await asyncio.gather(*(http.post("/v1/completions", json=b) for b in bodies))

    with serving(engine, tokenizer) as running:
        said, failed, again, wrong, streamed = asyncio.run(together(running))
        assert [a.json()["choices"][0]["text"] for a in (said, again)] == ["Say it", "again"]
        assert check_refused(failed, 500)["type"] == "server_error"
        check_refused(wrong, 400, "another vocabulary")
        assert (
            '"type":"server_error"' in streamed.text and 'finish_reason":"stop' not in streamed.text
        )
        assert running.until_idle() and not running.failures


def test_an_engine_that_breaks_is_told_to_everyone():
    tokenizer = small_tokenizer()
    engine = FakeEngine(step_seconds=0.01, end=-1)
    engine.breaks_on = tokenizer.encode("X")[0]

    async def together(running):
        async with httpx.AsyncClient(base_url=running.url, timeout=20) as http:
            long = completion(max_tokens=200)
            running_ones = [
                asyncio.create_task(http.post("/v1/completions", json=long | {"stream": stream}))
                for stream in (False, True)
            ]
            await asyncio.sleep(0.2)
            broken = await http.post("/v1/completions", json=completion(prompt="X"))
            after = await http.post("/v1/completions", json=long)
            health = await http.get("/health")
            return *[await task for task in running_ones], broken, after, health

    with serving(engine, tokenizer) as running:
        whole, stream, broken, after, health = asyncio.run(together(running))
        for answer in (whole, broken, after):
            check_refused(answer, 503, "engine has failed")
        assert "engine has failed" in stream.text and health.status_code == 503
        assert running.failures == [1]


def test_health_and_metrics(server, http):
    assert http.get("/health").json() == {"status": "ready"}

    def read():
        answer = http.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain")
        lines = [line for line in answer.text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    before = read()
    http.post("/v1/completions", json=completion(max_tokens=3))
    http.post("/v1/completions", json=completion(n=-1))
    http.get("/v1/completions/../secret")
    after = read()

    def grown(name):
        return after[name] - before.get(name, 0)

    assert grown("dsv3_new_tokens_total") == 3
    assert grown("dsv3_prompt_tokens_total") == 1 + len(server.tokenizer.encode("Say it"))
    assert grown('dsv3_answers_total{path="/v1/completions",status="200"}') == 1
    assert grown('dsv3_answers_total{path="/v1/completions",status="400"}') == 1
    assert grown('dsv3_answers_total{path="other",status="404"}') == 1
    assert grown("dsv3_answer_seconds_count") == grown("dsv3_first_token_seconds_count") == 1
    assert after["dsv3_engine_rows_used"] == after["dsv3_engine_queued"] == 0


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4)
    ),
    max_leaves=8,
)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_no_body_makes_the_server_fail(server, path):
    """Bodies that are nearly right: any fields of the API with any JSON, or cut and stained."""
    fields = (*BAD_COMPLETIONS, *BAD_CHATS)
    role = st.sampled_from(["system", "user", "assistant", "tool", "developer"])
    message = st.fixed_dictionaries({"role": role, "content": st.text(max_size=20)})
    valid = st.fixed_dictionaries(
        {"model": st.just(MODEL)}
        | ({"prompt": st.text(max_size=20)} if path == "/v1/completions" else {})
        | ({"messages": st.lists(message, min_size=1, max_size=4)} if "chat" in path else {})
    )

    with httpx.Client(base_url=server.url) as http:

        @given(valid, st.dictionaries(st.sampled_from(fields), JSON, max_size=2), st.data())
        @settings(deadline=None, max_examples=150)
        def post(body, changes, draw):
            data = bytearray(json.dumps(body | changes).encode())
            for _ in range(draw.draw(st.integers(0, 2))):
                data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
            answer = http.post(path, content=bytes(data))
            assert answer.status_code < 500, (answer.text, data)
            if answer.status_code != 200:
                check_refused(answer, answer.status_code)

        post()
    assert server.until_idle()
