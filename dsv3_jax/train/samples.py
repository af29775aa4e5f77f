"""Texts that the trained model writes: beginnings of held-out documents, continued."""

import json
from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path

import numpy as np

from dsv3_jax.config import Config
from dsv3_jax.data.pipeline import Corpus
from dsv3_jax.model.transformer import DeepSeekV3

SAMPLES_FILE = "samples.jsonl"
PROMPT_TOKENS = 16
TEMPERATURE = 0.8


def write_samples(
    model: DeepSeekV3,
    corpus: Corpus,
    config: Config,
    path: Path,
    say: Callable[[str], None],
) -> None:
    """Writes `run.num_samples` objects {"prompt", "text"} to `path` and shows them.

    Prompts are the first tokens of held-out documents, or of training ones when nothing is held
    out; documents shorter than a prompt are skipped.
    """
    documents = chain.from_iterable((s[i] for i in range(len(s))) for s in _splits(corpus))
    long_enough = (ids for ids in documents if len(ids) >= PROMPT_TOKENS)
    prompts = [
        [corpus.tokenizer.bos_id, *ids[:PROMPT_TOKENS]]
        for ids in islice(long_enough, config.run.num_samples)
    ]
    if not prompts:
        return
    tokens_BT = model.generate(
        np.array(prompts, np.int32),
        max_new_tokens=config.run.sample_tokens,
        temperature=TEMPERATURE,
        seed=config.run.seed,
    )
    decode = corpus.tokenizer.decode
    with path.open("w") as file:
        for row in np.asarray(tokens_BT):
            prompt, text = decode(row[1 : PROMPT_TOKENS + 1]), decode(row[PROMPT_TOKENS + 1 :])
            file.write(json.dumps({"prompt": prompt, "text": text}) + "\n")
            say(f"--- sample: {prompt!r} continues with\n{text}")


def _splits(corpus: Corpus):
    held_out = any(len(shards) for shards in corpus.validation)
    return corpus.validation if held_out else corpus.train
