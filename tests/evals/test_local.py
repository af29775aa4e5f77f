"""The endpoint of this process: the text that teacher forcing gives."""

import pytest

from dsv3_jax.data.chat import ChatTemplate, encode_chat
from dsv3_jax.errors import UserError
from dsv3_jax.evals.endpoint import Answer, SamplingOptions
from dsv3_jax.evals.local import load_endpoint

CONVERSATION = [{"role": "user", "content": "What is it?"}]
TOKENS = 12


@pytest.fixture(scope="module")
def endpoint(folder):
    return load_endpoint(folder, context_tokens=64, max_rows=2)


def test_texts_and_conversations(endpoint, greedy, tokenizer):
    prompts = ["What is", CONVERSATION, "It is", "x" * 100, "is it?"]
    answers = endpoint.complete(prompts, SamplingOptions(max_tokens=TOKENS))
    for prompt, answer in zip(prompts, answers, strict=True):
        if prompt == "x" * 100:
            assert answer == Answer(error="too long")
            continue
        ids = (
            [tokenizer.bos_id, *tokenizer.encode(prompt)]
            if isinstance(prompt, str)
            else encode_chat(tokenizer, ChatTemplate(), prompt, True)
        )
        tokens = [*greedy(ids, TOKENS), tokenizer.eos_id]
        assert answer.text == tokenizer.decode(tokens[: tokens.index(tokenizer.eos_id)])


def test_stop_strings_and_seeds(endpoint):
    (whole,) = endpoint.complete(["What is"], SamplingOptions(max_tokens=TOKENS))
    stop = whole.text[4:6]
    (cut,) = endpoint.complete(["What is"], SamplingOptions(max_tokens=TOKENS, stop=(stop,)))
    assert cut == Answer(text=whole.text[: whole.text.index(stop)], finish_reason="stop")
    options = SamplingOptions(max_tokens=TOKENS, temperature=1.0, seed=1)
    first, second = endpoint.complete(["What is"] * 2, options)
    assert first != second
    assert endpoint.complete(["What is"] * 2, options) == [first, second]


def test_options_that_no_engine_takes(endpoint):
    with pytest.raises(UserError, match="top_p"):
        endpoint.complete(["a"], SamplingOptions(max_tokens=1, top_p=2.0))
