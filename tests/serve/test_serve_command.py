"""`python -m experiments.serve` with the real engine: the model's own text, and a clean end."""

import concurrent.futures
import re
import signal
import time

import httpx
import numpy as np
import openai
import pytest
from serve_process import KEY, SMALL, save_folder, start

from dsv3_jax.data.chat import ChatTemplate, encode_chat


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The path, the model and the tokenizer."""
    path = tmp_path_factory.mktemp("serve") / "awake"
    return path, *save_folder(path)


@pytest.fixture(scope="module")
def server(folder):
    """The process and its address; it must end well when the tests are over."""
    options = ("--port=0", "--context_tokens=400", "--max_rows=4", "--api_key_env=SERVE_KEY")
    process = start(folder[0], *SMALL, *options)
    line = process.stdout.readline()
    found = re.fullmatch(r"awake is served at (http://127\.0\.0\.1:\d+/v1)\n", line)
    assert found, line + process.communicate()[1]
    yield process, found[1]
    if process.poll() is None:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server[1], api_key=KEY, max_retries=0) as client:
        yield client


def complete(client, prompt, **options):
    return client.completions.create(model="awake", prompt=prompt, **options)


def test_the_text_is_the_models(folder, client):
    _, model, tokenizer = folder
    messages = [{"role": "user", "content": "What is it?"}]
    ids = encode_chat(tokenizer, ChatTemplate(), messages, True)
    new = model.generate(np.array([ids]), max_new_tokens=12)[0, len(ids) :].tolist()
    ended = [*new, tokenizer.eos_id]
    expected = tokenizer.decode(ended[: ended.index(tokenizer.eos_id)])
    answer = complete(client, [ids, ids], max_tokens=12, temperature=0)
    assert [choice.text for choice in answer.choices] == [expected] * 2
    options = {"model": "awake", "messages": messages, "temperature": 0}
    stream = client.chat.completions.create(**options, max_completion_tokens=12, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == expected


def test_logprobs_are_the_models(folder, client):
    _, model, tokenizer = folder
    ids = [tokenizer.bos_id, *tokenizer.encode("It is")]
    answer = complete(client, ids, max_tokens=1, temperature=0, logprobs=5)
    logits_V = np.asarray(model(np.array([ids]))[0, -1], np.float64)
    logprobs_V = logits_V - np.log(np.exp(logits_V).sum())
    found = answer.choices[0].logprobs
    assert found.token_logprobs[0] == pytest.approx(logprobs_V.max(), abs=1e-4)
    top = sorted(found.top_logprobs[0].values(), reverse=True)
    likeliest = np.sort(logprobs_V)[::-1][: len(top)]
    assert len(top) > 1 and top == pytest.approx(likeliest, abs=1e-4)


def test_a_seed_fixes_the_text_beside_any_others(client):
    options = {"max_tokens": 40, "seed": 5}
    alone = complete(client, "It is", n=3, **options)
    texts = [choice.text for choice in alone.choices]
    assert len(set(texts)) == 3
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        others = [pool.submit(complete, client, "What " * i, max_tokens=30) for i in range(6)]
        again = [pool.submit(complete, client, "It is", n=3, **options) for _ in range(2)]
        for future in again:
            assert [choice.text for choice in future.result().choices] == texts
        assert all(future.result().usage.completion_tokens for future in others)


def test_stop_strings_and_lost_clients_free_their_rows(client, server):
    text = complete(client, "It is", max_tokens=300, seed=1).choices[0].text
    stop = text[20:23]
    answer = complete(client, "It is", max_tokens=300, seed=1, stop=stop)
    assert answer.choices[0].text == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    for _ in range(6):  # more than there are rows
        stream = complete(client, "It is", max_tokens=390, n=2, stream=True, logit_bias={"1": -100})
        next(iter(stream))
        stream.close()
    end = time.monotonic() + 20
    metrics = ""
    while "dsv3_engine_rows_used 0.0" not in metrics and time.monotonic() < end:
        metrics = httpx.get(server[1].replace("/v1", "/metrics")).text
    assert "dsv3_engine_rows_used 0.0" in metrics and "dsv3_engine_queued 0.0" in metrics


def test_mistakes_of_callers(client, server):
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=server[1], api_key="other", max_retries=0).models.list()
    with pytest.raises(openai.BadRequestError, match="400 tokens"):
        complete(client, "It is", max_tokens=400)
    with pytest.raises(openai.BadRequestError, match="vocabulary"):
        complete(client, [280])
    with pytest.raises(openai.NotFoundError, match="awake"):
        client.completions.create(model="asleep", prompt="It")


def test_sigterm_lets_an_answer_end(client, server):
    """Last: it ends the server."""
    process, url = server
    stream = complete(client, "It is", max_tokens=390, stream=True, seed=3, logit_bias={"1": -100})
    events = iter(stream)
    first = next(events)
    process.send_signal(signal.SIGTERM)
    chunks = [first, *events]
    assert chunks[-1].choices[0].finish_reason == "length"
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    assert KEY not in out + error
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)


def test_mistakes_in_the_call_are_one_line(folder):
    started = [
        (start(folder[0], argument), told)
        for argument, told in (
            ("--checkpoint=/nowhere", "nowhere"),
            ("--api_key_env=NO_SUCH_KEY", "NO_SUCH_KEY"),
        )
    ]
    for process, told in started:
        out, error = process.communicate(timeout=120)
        assert process.returncode == 2 and told in error, error
        assert len(error.strip().splitlines()) == 1 and not out
