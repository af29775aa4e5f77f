"""The HTTP endpoint: what it sends, and how it takes servers that misbehave."""

import dataclasses
import time

import pytest
from stub_server import MODEL, Stub, stub

from dsv3_jax.errors import UserError
from dsv3_jax.evals.endpoint import Answer, HttpEndpoint, HttpOptions, SamplingOptions

FAST = HttpOptions(timeout_seconds=0.5, num_retries=2, retry_seconds=0.01, concurrency=4)


def test_texts_and_conversations_reach_their_paths_with_every_option():
    options = SamplingOptions(max_tokens=7, temperature=0.5, top_p=0.9, stop=("\n",), seed=3)
    with stub(lambda question, body: f"to {question}") as server:
        endpoint = HttpEndpoint(server.url.removesuffix("/v1"))
        conversation = [{"role": "system", "content": "s"}, {"role": "user", "content": "b"}]
        answers = endpoint.complete(["a", conversation], options)
    assert answers == [
        Answer(text="to a", finish_reason="stop"),
        Answer(text="to b", finish_reason="stop"),
    ]
    common = {"model": MODEL, "max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "stop": ["\n"]}
    text, chat = sorted(server.bodies, key=lambda body: "messages" in body)
    assert text == {**common, "seed": 3, "prompt": "a"}
    assert chat == {**common, "seed": 4, "messages": conversation}


@pytest.mark.parametrize(
    "behaviour, error, tries",
    [
        (Stub.SILENT, "timeout", 1),
        (Stub.DRIP, "timeout", 1),
        (Stub.GARBAGE, "garbage", 1),
        (Stub.NULL, "no text", 1),
        (Stub.REFUSED, "HTTP 400", 1),
        (Stub.BROKEN, "HTTP 500", 3),
        (Stub.BUSY, "HTTP 429", 3),
        (Stub.CLOSE, "connection failed", 3),
    ],
)
def test_misbehaviour_is_an_answer_with_a_reason_in_bounded_time(behaviour, error, tries):
    with stub(lambda question, body: behaviour) as server:
        endpoint = HttpEndpoint(server.url, options=FAST)
        begin = time.monotonic()
        answers = endpoint.complete(["a"], SamplingOptions())
        assert time.monotonic() - begin < 5
    assert answers == [Answer(error=error)]
    assert len(server.bodies) == tries


def test_a_busy_server_is_asked_again_until_it_answers():
    busy = [Stub.BUSY, Stub.BROKEN]
    with stub(lambda question, body: busy.pop() if busy else "at last") as server:
        answers = HttpEndpoint(server.url, options=FAST).complete(["a"], SamplingOptions())
    assert answers == [Answer(text="at last", finish_reason="stop")]


def test_calls_at_once_are_bounded_and_answers_keep_their_order():
    def behave(question, body):
        time.sleep(0.01 * (int(question) % 5))
        return question

    with stub(behave) as server:
        patient = dataclasses.replace(FAST, timeout_seconds=30)  # none is given up and left open
        endpoint = HttpEndpoint(server.url, options=patient)
        answers = endpoint.complete([str(i) for i in range(40)], SamplingOptions())
    assert [answer.text for answer in answers] == [str(i) for i in range(40)]
    assert 2 <= server.most_at_once <= FAST.concurrency


def test_a_server_that_dies_is_a_reason():
    with stub(lambda question, body: "x") as server:
        endpoint = HttpEndpoint(server.url, options=FAST)
    assert endpoint.complete(["a"], SamplingOptions()) == [Answer(error="connection failed")]


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host/v1", "http://", "http://h:x/v1"])
def test_what_is_no_url(url):
    with pytest.raises(UserError, match="is not a URL"):
        HttpEndpoint(url)


def test_mistakes_are_found_at_the_start():
    with stub(lambda question, body: "x") as server:
        with pytest.raises(UserError, match="did you mean 'stub'"):
            HttpEndpoint(server.url, "stup")
        url = server.url
    with pytest.raises(UserError, match="connection failed"):
        HttpEndpoint(url)
