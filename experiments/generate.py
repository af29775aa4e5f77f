"""Continues prompts from a checkpoint of ours.

python -m experiments.generate --checkpoint=runs/tiny --prompt='def main():'
"""

from absl import flags

from dsv3_jax.errors import UserError, run_main

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Working directory of a run.", required=True)
_PROMPT = flags.DEFINE_multi_string("prompt", ["def "], "Text to continue. Repeatable.")
_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "Tokens to add to each prompt.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the most likely token each time.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the sampling.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; write --prompt='...'")
    from dsv3_jax.checkpoint.pretrained import load_model, load_run_tokenizer

    model = load_model(_CHECKPOINT.value)
    tokenizer = load_run_tokenizer(_CHECKPOINT.value)
    import numpy as np

    for prompt in _PROMPT.value:
        ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
        tokens = model.generate(
            np.array([ids], np.int32),
            max_new_tokens=_TOKENS.value,
            temperature=_TEMPERATURE.value,
            seed=_SEED.value,
        )
        print(tokenizer.decode([int(token) for token in tokens[0][1:]]), flush=True)


if __name__ == "__main__":
    run_main(main)
