"""Continues prompts, answers them, or chats, with a run of ours or a Hugging Face folder.

python -m experiments.generate --checkpoint=runs/tiny --prompt='def main():'
python -m experiments.generate --checkpoint=DIR --chat --dtype=bfloat16 --prompt='Why is it dark?'
python -m experiments.generate --checkpoint=DIR --chat --dtype=bfloat16

The last one reads a message a line and keeps the conversation in mind: /new starts another, Ctrl-C
ends an answer, Ctrl-D the chat.
"""

import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from absl import flags

from dsv3_jax.errors import UserError, run_main

if TYPE_CHECKING:
    from dsv3_jax.data.chat import ChatTemplate
    from dsv3_jax.data.tokenizer import Tokenizer
    from dsv3_jax.model.transformer import DeepSeekV3
    from dsv3_jax.serve.engine import Engine
    from dsv3_jax.serve.requests import Request
    from dsv3_jax.serve.text import TokenBytes

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Working directory of a run, or a Hugging Face folder.", required=True
)
_PROMPT = flags.DEFINE_multi_string("prompt", ["def "], "Text to continue. Repeatable.")
_CHAT = flags.DEFINE_bool(
    "chat",
    False,
    "Prompts are a user's messages: prints the answer, up to the end-of-text token. "
    "Without --prompt: a conversation, message by message.",
)
_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "Tokens to add to each prompt.")
_CONTEXT_TOKENS = flags.DEFINE_integer("context_tokens", 4096, "Of a conversation, at most.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the most likely token each time.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the sampling.")
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "Of the weights and the arithmetic."
)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; write --prompt='...'")
    import jax.numpy as jnp
    import numpy as np

    from dsv3_jax.checkpoint.pretrained import load_model, load_run_tokenizer
    from dsv3_jax.data.chat import encode_chat, load_chat_template

    tokenizer = load_run_tokenizer(_CHECKPOINT.value)  # before the weights, which take long
    if _CHAT.value:
        template = load_chat_template(_CHECKPOINT.value)
        if not _PROMPT.present:
            model = load_model(_CHECKPOINT.value, jnp.dtype(_DTYPE.value))
            return converse(model, tokenizer, template)
        messages = [[{"role": "user", "content": prompt}] for prompt in _PROMPT.value]
        prompts = [encode_chat(tokenizer, template, m, True) for m in messages]
    else:
        prompts = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in _PROMPT.value]
    model = load_model(_CHECKPOINT.value, jnp.dtype(_DTYPE.value))
    for ids in prompts:
        tokens = model.generate(
            np.array([ids], np.int32),
            max_new_tokens=_TOKENS.value,
            temperature=_TEMPERATURE.value,
            seed=_SEED.value,
        )[0].tolist()
        if _CHAT.value:
            answer = [*tokens[len(ids) :], tokenizer.eos_id]
            shown = answer[: answer.index(tokenizer.eos_id)]
        else:
            shown = tokens[1:]
        print(tokenizer.decode(shown), flush=True)


def converse(model: "DeepSeekV3", tokenizer: "Tokenizer", template: "ChatTemplate") -> None:
    """Answers the messages of standard input, each with those before it in mind."""
    from dsv3_jax.data.chat import encode_chat
    from dsv3_jax.serve.engine import Engine
    from dsv3_jax.serve.requests import EngineOptions, Request, Sampling
    from dsv3_jax.serve.text import TokenBytes

    # The cache of a turn is found again by the next one: only the new messages are computed.
    options = EngineOptions(
        max_rows=1, context_tokens=_CONTEXT_TOKENS.value, cache_dtype=_DTYPE.value
    )
    engine, token_bytes = Engine(model, options), TokenBytes(tokenizer)
    messages: list[dict[str, str]] = []
    while (said := read_message()) is not None:
        if said == "/new":
            messages = []
            continue
        messages.append({"role": "user", "content": said})
        request = Request(
            prompt=tuple(encode_chat(tokenizer, template, messages, True)),
            max_tokens=_TOKENS.value,
            sampling=Sampling(temperature=_TEMPERATURE.value, seed=_SEED.value),
            stop_ids=frozenset({tokenizer.eos_id}),
        )
        answer = ""
        try:
            for piece in answer_pieces(engine, request, token_bytes):
                print(piece, end="", flush=True)
                answer += piece
        except UserError as error:
            if len(messages) == 1:
                raise
            print(f"error: {error}; or start anew with /new", file=sys.stderr, flush=True)
            messages.pop()
            continue
        print(flush=True)
        messages.append({"role": "assistant", "content": answer})


def read_message() -> str | None:
    """A line of standard input; None at its end."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return None
        if line:
            return line


def answer_pieces(engine: "Engine", request: "Request", token_bytes: "TokenBytes") -> Iterator[str]:
    """Text of one answer as it comes; Ctrl-C cuts it short.

    Raises:
      UserError: the request does not fit the engine.
    """
    from dsv3_jax.serve.answers import Choice

    request_id, choice = engine.submit(request), Choice(token_bytes, (), request.stop_ids)
    cut: list[int] = []  # by a handler, so that no step of the engine is left half done
    before = signal.signal(signal.SIGINT, lambda number, _: cut.append(number))
    try:
        while engine.has_work:
            if cut:
                engine.cancel(request_id)
            for output in engine.step():
                if output.finish_reason == "error":
                    raise UserError("the model's logits are not numbers; check its weights")
                yield choice.push(output).text
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    run_main(main)
