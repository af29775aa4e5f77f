"""Continues prompts, or answers them as chats, with a run of ours or a Hugging Face folder.

python -m experiments.generate --checkpoint=runs/tiny --prompt='def main():'
python -m experiments.generate --checkpoint=DIR --chat --dtype=bfloat16 --prompt='Why is it dark?'
"""

from absl import flags

from dsv3_jax.errors import UserError, run_main

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Working directory of a run, or a Hugging Face folder.", required=True
)
_PROMPT = flags.DEFINE_multi_string("prompt", ["def "], "Text to continue. Repeatable.")
_CHAT = flags.DEFINE_bool(
    "chat", False, "Prompts are a user's messages: prints the answer, up to the end-of-text token."
)
_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "Tokens to add to each prompt.")
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


if __name__ == "__main__":
    run_main(main)
