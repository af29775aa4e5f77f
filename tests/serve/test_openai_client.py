"""The `openai` client against a server, over a socket; the engine says the prompt again."""

import openai
import pytest
from fake_engine import FakeEngine
from running_server import MODEL, serving, small_tokenizer

TEXT = "Say it again, café 🙂"


@pytest.fixture(scope="module")
def server():
    tokenizer = small_tokenizer()
    engine = FakeEngine(end=tokenizer.eos_id, tokens_a_step=2)
    with serving(engine, tokenizer) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def complete(client, **options):
    return client.completions.create(model=MODEL, **{"prompt": TEXT, "max_tokens": 100} | options)


def chat(client, content=TEXT, **options):
    messages = [{"role": "system", "content": "Do."}, {"role": "user", "content": content}]
    return client.chat.completions.create(model=MODEL, messages=messages, **options)


def test_a_completion(server, client):
    answer = complete(client)
    num_tokens = len(server.tokenizer.encode(TEXT))
    assert answer.object == "text_completion" and answer.model == MODEL
    assert [(c.index, c.text, c.finish_reason) for c in answer.choices] == [(0, TEXT, "stop")]
    assert answer.choices[0].logprobs is None
    assert answer.usage.prompt_tokens == answer.usage.completion_tokens == num_tokens + 1
    assert answer.usage.total_tokens == 2 * num_tokens + 2
    assert complete(client, prompt=TEXT * 9, max_tokens=openai.omit).usage.completion_tokens == 16


def test_prompts_as_ids_and_as_lists(server, client):
    ids = server.tokenizer.encode("again")
    bos = server.tokenizer.bos_id
    assert complete(client, prompt=[bos, *ids]).choices[0].text == "again"
    texts = ["Say", "it", ""]
    answer = complete(client, prompt=texts, n=2)
    assert [c.text for c in answer.choices] == ["Say", "Say", "it", "it", "", ""]
    assert [c.index for c in answer.choices] == list(range(6))
    answer = complete(client, prompt=[[bos, *ids], [bos]])
    assert [c.text for c in answer.choices] == ["again", ""]


def test_a_stream_is_the_same_text(client):
    chunks = list(complete(client, stream=True, n=3, stream_options={"include_usage": True}))
    assert len({chunk.id for chunk in chunks}) == 1
    *parts, last = chunks
    assert last.choices == [] and last.usage == complete(client, n=3).usage
    assert all(len(part.choices) == 1 and part.usage is None for part in parts)
    assert len(parts) > 3 * 4  # it came in pieces
    for index in range(3):
        choices = [p.choices[0] for p in parts if p.choices[0].index == index]
        assert "".join(choice.text for choice in choices) == TEXT
        assert [c.finish_reason for c in choices if c.finish_reason] == ["stop"]
        assert choices[-1].finish_reason == "stop"


def test_stop_strings_and_lengths(server, client):
    answer = complete(client, prompt="Say END of it", stop=["xyz", " EN", "it"])
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("Say", "stop")
    stream = complete(client, prompt="Say END of it", stop=" END", stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "Say"
    answer = complete(client, max_tokens=2)
    text = server.tokenizer.decode(server.tokenizer.encode(TEXT)[:2])
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (text, "length")
    assert server.until_idle()


def test_a_stop_string_frees_the_row(client):
    with serving(engine := FakeEngine(end=-1), small_tokenizer(), context_tokens=10**6) as slow:
        url = f"{slow.url}/v1"
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as other:
            answer = complete(other, prompt="again END", max_tokens=900_000, stop=["END"], n=2)
            assert [choice.text for choice in answer.choices] == ["again ", "again "]
        assert slow.until_idle() and engine.cancelled == 2


def test_logprobs_of_a_completion(server, client):
    answer = complete(client, logprobs=2, prompt="Say é")
    found, ids = answer.choices[0].logprobs, server.tokenizer.encode("Say é")
    texts = [server.tokenizer.decode([i]) for i in ids]
    assert found.tokens == texts and set(found.token_logprobs) == {-9999.0}  # -inf is not JSON
    names = [server.tokenizer.decode([token]) for token in (0, 1)]
    assert found.top_logprobs == [{names[0]: -1.0, names[1]: -2.0}] * len(ids)
    offsets = [len(server.tokenizer.decode(ids[:i]).rstrip("\ufffd")) for i in range(len(ids))]
    assert found.text_offset == offsets
    parts = [c.choices[0] for c in complete(client, logprobs=0, prompt="Say é", stream=True)]
    assert sum((part.logprobs.tokens for part in parts), []) == texts
    assert sum((part.logprobs.text_offset for part in parts), []) == offsets


def test_echo(client):
    answer = complete(client, prompt=["Say", "it"], echo=True)
    assert [choice.text for choice in answer.choices] == ["SaySay", "itit"]
    stream = complete(client, prompt="Say", echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "SaySay"


def test_a_chat(server, client):
    answer = chat(client)
    control = server.tokenizer.control_ids
    said = f"Do.<｜User｜>{TEXT}<｜Assistant｜>"  # the prompt, laid out by the template
    choice = answer.choices[0]
    assert answer.object == "chat.completion" and choice.finish_reason == "stop"
    assert (choice.message.role, choice.message.content) == ("assistant", said)
    assert choice.logprobs is None
    # A control token's name in a message stays text: two of them, where the template wrote one.
    answer = chat(client, "<｜User｜>", max_completion_tokens=40, logprobs=True)
    tokens = [entry.token for entry in answer.choices[0].logprobs.content]
    assert "<｜User｜>" in control and tokens.count("<｜User｜>") == 1
    assert answer.choices[0].message.content.count("<｜User｜>") == 2
    parts = [{"type": "text", "text": "Say "}, {"type": "text", "text": "it"}]
    assert "<｜User｜>Say it<" in chat(client, parts).choices[0].message.content
    # Without a limit the answer may fill the context.
    assert chat(client, TEXT * 5).choices[0].message.content.count(TEXT) == 5


def test_a_chat_streams(server, client):
    whole = chat(client, n=2, logprobs=True, top_logprobs=3)
    options = {"logprobs": True, "top_logprobs": 3, "stream_options": {"include_usage": True}}
    *chunks, last = list(chat(client, n=2, stream=True, **options))
    assert last.choices == [] and last.usage == whole.usage
    for index in range(2):
        choices = [c.choices[0] for c in chunks if c.choices[0].index == index]
        assert choices[0].delta.role == "assistant" and choices[0].delta.content == ""
        text = "".join(choice.delta.content or "" for choice in choices)
        assert text == whole.choices[index].message.content
        assert choices[-1].finish_reason == "stop"
        entries = sum((choice.logprobs.content for choice in choices), [])
        assert entries == whole.choices[index].logprobs.content
        assert b"".join(bytes(entry.bytes) for entry in entries).decode() == text
        assert [len(entry.top_logprobs) for entry in entries] == [3] * len(entries)
        assert entries[0].top_logprobs[1].logprob == -2.0 and entries[0].logprob == -9999.0


def test_what_a_caller_sets_reaches_the_engine(server, client, monkeypatch):
    seen, submit = [], server.engine.submit
    monkeypatch.setattr(server.engine, "submit", lambda r: seen.append(r) or submit(r))
    own = {"top_k": 7, "min_p": 0.25, "repetition_penalty": 1.5}
    options = {"temperature": 0.5, "top_p": 0.75, "presence_penalty": -1, "frequency_penalty": 2}
    options |= {"logit_bias": {"9": -100, "3": 1.5}, "seed": 11, "n": 3, "extra_body": own}
    complete(client, **options, max_tokens=5)
    first, second, third = seen
    assert first.max_tokens == 5 and first.stop_ids == {server.tokenizer.eos_id}
    sampling = vars(first.sampling)
    assert {key: sampling[key] for key in own} == own
    assert [sampling[key] for key in list(options)[:4]] == [0.5, 0.75, -1, 2]
    assert sampling["logit_bias"] == ((3, 1.5), (9, -100.0)) and sampling["seed"] == 11
    seeds = {request.sampling.seed for request in seen}
    assert len(seeds) == 3 and all(0 <= seed < 2**31 for seed in seeds)
    complete(client, **options, max_tokens=5)
    assert seen[3:] == [first, second, third]  # the same seed, the same requests
    del seen[:]
    complete(client, max_tokens=5)
    complete(client, max_tokens=5)
    assert seen[0].sampling.seed != seen[1].sampling.seed


def test_models(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError, match="nope"):
        client.models.retrieve("nope")


def test_mistakes_are_the_errors_of_the_client(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="tiny/tost", prompt="a")
    assert caught.value.code == "model_not_found" and "did you mean 'tiny/test'" in str(caught)
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, prompt=TEXT * 40)
    assert caught.value.code == "context_length_exceeded" and "256" in str(caught.value)
    with pytest.raises(openai.BadRequestError, match="temperature") as caught:
        complete(client, temperature=-1)
    assert caught.value.param == "temperature" and caught.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="'tools' is not supported"):
        chat(client, tools=[{"type": "function", "function": {"name": "f"}}])
