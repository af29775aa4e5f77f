"""Conversations for fine-tuning: a JSON object a line, as tokens of which some are learnt.

Two forms, both laid out by the chat template:

    {"messages": [{"role": "system" | "user" | "assistant" | "tool", "content": text}, ...]}
    {"prompt": text or messages, "completion": text}

A prompt of text is a user's turn, and the completion an assistant's; "system", a text, may stand
beside them. Loss is on what the assistant says, EOS included (spec §10.1). The template takes the
reasoning, up to `</think>`, out of earlier answers: those are read and not learnt, the last answer
is learnt whole. What follows the last answer is not read.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsv3_jax.data.chat import ROLES, ChatTemplate, encode_chat
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.errors import UserError
from dsv3_jax.evals.failures import Failures


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One conversation of X tokens.

    Attributes:
      tokens_X: int32.
      learnt_X: bool, the tokens to predict.
      messages: up to the last answer.
    """

    tokens_X: np.ndarray
    learnt_X: np.ndarray
    messages: tuple[Mapping[str, Any], ...]


class BadRecord(ValueError):
    """Why a record cannot be used, in few words that do not depend on the record."""


def read_samples(
    lines: Sequence[str],
    tokenizer: Tokenizer,
    template: ChatTemplate,
    *,
    max_tokens: int,
    failures: Failures,
) -> list[Sample]:
    """The samples of JSON lines; those that cannot be used are counted in `failures`.

    Args:
      max_tokens: of a sample; longer ones are not cut but left out.

    Raises:
      UserError: more failures than accepted.
    """
    samples = []
    for line in lines:
        try:
            sample = encode_sample(read_messages(line), tokenizer, template)
            if len(sample.tokens_X) > max_tokens:
                raise BadRecord("longer than the context")
            samples.append(sample)
        except BadRecord as reason:
            failures.add(str(reason))
    return samples


def read_messages(line: str) -> list[Mapping[str, Any]]:
    """The conversation of a line, in either form.

    Raises:
      BadRecord: it holds none, or a message without a known role or without text.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise BadRecord("not JSON") from None
    if not isinstance(record, Mapping):
        raise BadRecord("not an object")
    if "messages" in record:
        messages = record["messages"]
    elif "prompt" in record and "completion" in record:
        prompt = record["prompt"]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if not isinstance(messages, list):
            raise BadRecord("prompt is neither text nor messages")
        if "system" in record:
            messages = [{"role": "system", "content": record["system"]}, *messages]
        messages = [*messages, {"role": "assistant", "content": record["completion"]}]
    else:
        raise BadRecord("neither messages nor prompt and completion")
    if not isinstance(messages, list) or not all(isinstance(m, Mapping) for m in messages):
        raise BadRecord("messages is not a list of objects")
    for message in messages:
        if message.get("role") not in ROLES:
            raise BadRecord("unknown role")
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            raise BadRecord("content is not text")
    return messages


def encode_sample(
    messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, template: ChatTemplate
) -> Sample:
    """Tokens of a conversation up to its last answer, and which of them are learnt.

    Raises:
      BadRecord: nobody answers, or the template cannot lay it out turn by turn.
    """
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise BadRecord("no assistant turn")
    last = answers[-1]
    messages = tuple(messages[: last + 1])

    def encoded(count: int, **options: bool) -> list[int]:
        try:
            return encode_chat(tokenizer, template, messages[:count], **options)
        except UserError:
            raise BadRecord("the chat template refuses it") from None

    if messages[last].get("tool_calls"):
        tokens = encoded(last + 1)
    else:
        content = messages[last]["content"]
        tokens = encoded(last, add_generation_prompt=True)
        tokens += [*tokenizer.encode(content), tokenizer.eos_id]
    learnt = np.zeros(len(tokens), bool)
    for turn in answers:
        start = encoded(turn, add_generation_prompt=True)
        end = tokens if turn == last else encoded(turn + 1)
        if tokens[: len(start)] != start or tokens[: len(end)] != end:
            raise BadRecord("the chat template changes earlier turns")
        if turn == last or "</think>" not in (messages[turn].get("content") or ""):
            learnt[len(start) : len(end)] = True
    return Sample(tokens_X=np.array(tokens, np.int32), learnt_X=learnt, messages=messages)
