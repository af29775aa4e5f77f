"""The tool's passes, against drafts and choices read from the whole model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from small_engine import CONFIG, CONTEXT, OPTIONS, make_model

from dsv3_jax.serve.engine import Engine
from tools.bench_speculative import measure, summary, table

LENGTH = 32


def make_engine(num_draft_tokens):
    options = {"context_tokens": LENGTH, "num_draft_tokens": num_draft_tokens, "max_queue": 64}
    return Engine(make_model(), dataclasses.replace(OPTIONS, **options))


@jax.jit
def choices(tokens_BT):
    """After each token, what the model chooses, and what its module drafts for one later."""
    main_BTD, mtp, _ = make_model().hidden_states(tokens_BT)
    logits = make_model().logits
    return jnp.argmax(logits(main_BTD), -1), jnp.argmax(logits(mtp[0]), -1)


def test_passes_are_counted_where_they_stand():
    rows = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (4, LENGTH)).tolist()
    held_out, generated = measure(make_engine(1), rows, eos_id=-1, temperature=0.0, places=6)
    expected = []
    for row in rows:
        for place in range(6):
            start = LENGTH // 4 + (LENGTH - 3 - LENGTH // 4) * place // 6
            text = np.zeros((1, CONTEXT), np.int32)
            text[0, :start] = row[:start]
            text[0, start] = np.asarray(choices(text)[0])[0, start - 1]
            chosen, drafted = (np.asarray(x)[0] for x in choices(text))
            expected.append(int(drafted[start - 1] == chosen[start]))
    assert held_out.text == "held-out" and held_out.passes == len(expected) == 24
    assert held_out.accepted == [sum(expected) / 24] and 0 < sum(expected) < 24
    assert generated.text == "generated" and generated.tokens_per_second > 0
    # A row's tokens but the first come from passes; its last pass may have no room for a draft.
    tokens = generated.passes * generated.tokens_per_pass
    assert 4 * (LENGTH - LENGTH // 4 - 2) <= round(tokens) <= 4 * (LENGTH - LENGTH // 4 - 1)
    assert len(table([held_out, generated]).splitlines()) == 3


def test_rates_are_of_drafts_whose_forerunners_were_accepted():
    fields = {"text": "held-out", "num_draft_tokens": 2, "temperature": 0.0}
    result = summary([0, 0, 1, 2, 2], **fields)
    assert result.accepted == [3 / 5, 2 / 3] and result.tokens_per_pass == 2.0
    assert summary([0, 0], **fields).accepted == [0.0, 0.0]
