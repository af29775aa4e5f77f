"""Supervised fine-tuning (spec §10.1): conversations packed into rows, for the training loop.

A sample is never cut: rows are filled with whole ones and padded. Packed samples do not see each
other, and positions restart in each, as "segments" tell the model.
Shape letters: B rows, T inputs of a row, X tokens of a sample.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax.checkpoint.pretrained import load_run_tokenizer
from dsv3_jax.config import Config
from dsv3_jax.data.chat import ChatTemplate, load_chat_template, save_chat_template
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.errors import UserError
from dsv3_jax.evals.endpoint import SamplingOptions
from dsv3_jax.evals.failures import Failures
from dsv3_jax.evals.local import LocalEndpoint
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.posttrain.conversations import Sample, read_samples
from dsv3_jax.posttrain.records import read_lines
from dsv3_jax.serve.requests import EngineOptions
from dsv3_jax.train.workdir import TOKENIZER

_OPEN_ROWS = 64  # that a sample may be put into


def pack_samples(samples: Sequence[Sample], sequence_length: int) -> list[list[Sample]]:
    """Samples of each row, in their order: the first of the newest rows that has room.

    Args:
      samples: of at most T + 1 tokens each, T = `sequence_length`.
    """
    capacity, rows, room = sequence_length + 1, [], []
    for sample in samples:
        size = len(sample.tokens_X)
        open_rows = range(max(0, len(rows) - _OPEN_ROWS), len(rows))
        row = next((row for row in open_rows if room[row] >= size), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(capacity)
        rows[row].append(sample)
        room[row] -= size
    return rows


def row_arrays(rows: Sequence[Sequence[Sample]], sequence_length: int) -> dict[str, np.ndarray]:
    """Arrays [B, T+1] of packed rows.

    Returns:
      "tokens" int32; "segments" int32, the number of a token's sample within its row from 1, 0 for
      padding; "learnt" bool, the tokens that count as targets.
    """
    shape = len(rows), sequence_length + 1
    tokens, segments = np.zeros((2, *shape), np.int32)
    learnt = np.zeros(shape, bool)
    for index, row in enumerate(rows):
        start = 0
        for number, sample in enumerate(row, start=1):
            end = start + len(sample.tokens_X)
            tokens[index, start:end] = sample.tokens_X
            segments[index, start:end] = number
            learnt[index, start:end] = sample.learnt_X
            start = end
    return {"tokens": tokens, "segments": segments, "learnt": learnt}


def with_weights(arrays: dict[str, np.ndarray], microbatches: int) -> dict[str, np.ndarray]:
    """ "learnt" replaced by "weights": the mean loss of all micro-batches is that of a target."""
    learnt = arrays["learnt"]
    # A sample's first token is no target: BOS, or what stands in for it, is never learnt.
    weights = learnt.astype(np.float32) * (microbatches / max(1, int(learnt.sum())))
    return {name: arrays[name] for name in ("tokens", "segments")} | {"weights": weights}


class SftRows:
    """The rows of all epochs, each in an order of its own, then padding; see `RowIterator`."""

    def __init__(
        self, config: Config, samples: Sequence[Sample], process_index: int, process_count: int
    ):
        self._length = config.data.sequence_length
        self._microbatch = config.microbatch_sequences
        self._index, self._count = process_index, process_count
        self._rows = epoch_rows(config, samples)
        self._order = {"seed": config.run.seed, "epochs": config.sft.epochs}
        self._order |= {"samples": len(samples), "rows": len(self._rows)}
        self._next = 0

    def next_rows(self, count: int) -> dict[str, np.ndarray]:
        """This process's `count` rows of the next step."""
        of_step = self._rows[self._next : self._next + count * self._count]
        self._next += count * self._count
        of_step += [[]] * (count * self._count - len(of_step))
        arrays = row_arrays(of_step, self._length)
        arrays = with_weights(arrays, len(of_step) // self._microbatch)
        # Micro-batches are made of every process's rows.
        own = slice(self._index, None, self._count)
        return {name: x[own] for name, x in arrays.items()}

    def get_state(self) -> dict[str, Any]:
        return {"order": self._order, "row": self._next}

    def set_state(self, state: dict[str, Any]) -> None:
        """Raises UserError when the position is one in other conversations."""
        for key, value in self._order.items():
            if state["order"][key] != value:
                raise UserError(
                    f"the saved data position has {key}={state['order'][key]} but this run has "
                    f"{value}; restore the conversations and settings, or start over with "
                    "checkpoint.restore=false"
                )
        self._next = state["row"]

    def close(self) -> None:
        pass


def epoch_rows(config: Config, samples: Sequence[Sample]) -> list[list[Sample]]:
    """The packed rows of `sft.epochs` epochs."""
    rows = []
    for epoch in range(config.sft.epochs):
        order = np.random.default_rng([config.run.seed, epoch]).permutation(len(samples))
        rows += pack_samples([samples[i] for i in order], config.data.sequence_length)
    return rows


class SftData:
    """What the training loop reads; see `train.source.TrainingData`.

    Attributes:
      train, held_out: the samples.
      failures: records left out, by reason.
    """

    def __init__(
        self,
        config: Config,
        samples: Sequence[Sample],
        tokenizer: Tokenizer,
        template: ChatTemplate,
        failures: str = "",
    ):
        self.failures = failures
        self._config, self._tokenizer, self._template = config, tokenizer, template
        order = np.random.default_rng(config.run.seed).permutation(len(samples))
        count = min(config.data.validation_documents, len(samples) // 4)
        self.held_out = [samples[i] for i in order[:count]]
        self.train = [samples[i] for i in order[count:]]

    def __str__(self) -> str:
        tokens = sum(len(sample.tokens_X) for sample in self.train)
        learnt = sum(int(sample.learnt_X.sum()) for sample in self.train)
        left_out = f"; left out: {self.failures}" if self.failures else ""
        return (
            f"{len(self.train):,} conversations, {tokens:,} tokens, {learnt:,} of them learnt, "
            f"{len(self.held_out):,} conversations held out{left_out}"
        )

    def save(self, workdir: Path) -> None:
        self._tokenizer.save(workdir / TOKENIZER)
        save_chat_template(self._template, workdir)

    def num_steps(self) -> int:
        """Steps of all epochs; the last one's rows are filled up with padding."""
        rows = len(epoch_rows(self._config, self.train))
        return -(-rows // self._config.data.sequences_per_step)

    def rows(self, process_index: int, process_count: int) -> SftRows:
        return SftRows(self._config, self.train, process_index, process_count)

    def validation_rows(self, count: int) -> dict[str, np.ndarray] | None:
        """`count` rows of the held-out samples, filled up with padding."""
        if not self.held_out:
            return None
        length = self._config.data.sequence_length
        rows = pack_samples(self.held_out, length)[:count]
        rows += [[]] * (count - len(rows))
        arrays = row_arrays(rows, length)
        return with_weights(arrays, count // self._config.microbatch_sequences)

    def write_samples(self, model: DeepSeekV3, path: Path, say: Callable[[str], None]) -> None:
        """Writes answers to held-out conversations to `path`, {"prompt", "text", "reference"}."""
        run, mesh = self._config.run, model.runtime.mesh
        shown = (self.held_out or self.train)[: run.num_samples]
        if not shown:
            return
        shards = 1 if mesh is None else mesh.shape["data"] * mesh.shape["expert"]
        context = self._config.data.sequence_length + run.sample_tokens
        options = EngineOptions(
            max_rows=shards,
            context_tokens=context,
            page_tokens=min(64, context),
            prefill_chunk=min(256, context),
            cache_dtype=model.runtime.compute_dtype.name,
        )
        endpoint = LocalEndpoint(model, options, self._tokenizer, self._template)
        prompts = [sample.messages[:-1] for sample in shown]
        answers = endpoint.complete(prompts, SamplingOptions(max_tokens=run.sample_tokens))
        with path.open("w") as file:
            for prompt, answer, sample in zip(prompts, answers, shown, strict=True):
                reference = sample.messages[-1].get("content")
                record = {"prompt": list(prompt), "text": answer.text, "reference": reference}
                file.write(json.dumps(record) + "\n")
                question = prompt[-1]["content"] if prompt else ""
                say(f"--- sample: {question!r} is answered with\n{answer.text}")


def load_data(config: Config) -> SftData:
    """Reads `sft.conversations` with the tokenizer and template of `checkpoint.initial_weights`.

    Raises:
      UserError: a file or setting is missing, too many records are bad, or none is good.
    """
    path = config.checkpoint.initial_weights
    if not path:
        raise UserError(
            "checkpoint.initial_weights is empty; name the run or folder to fine-tune, e.g. "
            "--set checkpoint.initial_weights=runs/tiny"
        )
    lines = read_lines("sft.conversations", config.sft.conversations)
    tokenizer, template = load_run_tokenizer(path), load_chat_template(path)
    tokenizer.check_fits(config.model.vocab_size)
    failures = Failures(
        f"sft.conversations={config.sft.conversations}, {len(lines):,} records",
        int(config.sft.max_bad_fraction * len(lines)),
        "mend them, or raise sft.max_bad_fraction to train without them",
    )
    samples = read_samples(
        lines,
        tokenizer,
        template,
        max_tokens=config.data.sequence_length + 1,
        failures=failures,
    )
    if not samples:
        raise UserError(
            f"sft.conversations={config.sft.conversations} holds no usable record ({failures}); "
            "give conversations, see dsv3_jax/posttrain/conversations.py"
        )
    return SftData(config, samples, tokenizer, template, str(failures))


def with_length(config: Config, data: SftData) -> Config:
    """The config with `run.num_steps` of all epochs, unless it is set."""
    if config.run.num_steps is not None:
        return config
    return replace(config, run=replace(config.run, num_steps=data.num_steps()))
