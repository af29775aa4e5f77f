"""What the training loop reads: a protocol, and the pre-training corpus as one such."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dsv3_jax.config import Config
from dsv3_jax.data import pipeline
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.train.samples import write_samples
from dsv3_jax.train.workdir import TOKENIZER


class Rows(Protocol):
    """One process's training rows, with a position; `pipeline.RowIterator` is the model of it."""

    def next_rows(self, count: int) -> dict[str, np.ndarray]:
        """The next rows, all of one step: [count, T+1] arrays as `losses.model_losses` reads."""
        ...

    def get_state(self) -> dict[str, Any]:
        """The position, as JSON values."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from a position; the rows that follow are bit-identical."""
        ...

    def close(self) -> None: ...


class TrainingData(Protocol):
    """The data of a run. As text it is one line for the console."""

    def save(self, workdir: Path) -> None:
        """Writes what turns text into tokens beside the checkpoints."""
        ...

    def rows(self, process_index: int, process_count: int) -> Rows:
        """The rows of one of several processes."""
        ...

    def validation_rows(self, count: int) -> dict[str, np.ndarray] | None:
        """`count` fixed rows, the same on every process; None when nothing is held out."""
        ...

    def write_samples(self, model: DeepSeekV3, path: Path, say: Callable[[str], None]) -> None:
        """Writes texts of the trained model to a JSONL file and shows them."""
        ...


class CorpusData:
    """A tokenised corpus; see `data/pipeline.py`."""

    def __init__(self, config: Config, corpus: pipeline.Corpus):
        self._config, self._corpus = config, corpus

    def __str__(self) -> str:
        return str(self._corpus)

    def save(self, workdir: Path) -> None:
        self._corpus.tokenizer.save(workdir / TOKENIZER)

    def rows(self, process_index: int, process_count: int) -> pipeline.RowIterator:
        return pipeline.train_iterator(
            self._config, self._corpus, process_index=process_index, process_count=process_count
        )

    def validation_rows(self, count: int) -> dict[str, np.ndarray] | None:
        if not self._config.data.validation_documents:
            return None
        return pipeline.validation_rows(self._config, self._corpus, count)

    def write_samples(self, model: DeepSeekV3, path: Path, say: Callable[[str], None]) -> None:
        write_samples(model, self._corpus, self._config, path, say)
