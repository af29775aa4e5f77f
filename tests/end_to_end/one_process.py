"""`python one_process.py N ARGS...`: `experiments.pretrain ARGS` in one process, as N would run it.

Each of N processes packs its own part of the documents, so their batches are not those of a run of
one process. Here one process packs all N parts and puts their rows where the N would have put them.
"""

import runpy
import sys
from functools import partial
from typing import Any

import numpy as np

from dsv3_jax.data import pipeline

PROCESSES = int(sys.argv.pop(1))


class RowsOfAll:
    """The rows of N processes that hold consecutive parts of every micro-batch."""

    def __init__(self, make_rows, config, corpus, **_):
        self._microbatch = config.microbatch_sequences
        self._parts = [
            make_rows(config, corpus, process_index=i, process_count=PROCESSES)
            for i in range(PROCESSES)
        ]

    def next_rows(self, count: int) -> dict[str, np.ndarray]:
        parts = [part.next_rows(count // PROCESSES) for part in self._parts]

        def join(name: str) -> np.ndarray:
            own = self._microbatch // PROCESSES
            grouped = [part[name].reshape(-1, own, *part[name].shape[1:]) for part in parts]
            return np.concatenate(grouped, axis=1).reshape(count, *parts[0][name].shape[1:])

        return {name: join(name) for name in parts[0]}

    def get_state(self) -> list[Any]:
        return [part.get_state() for part in self._parts]

    def close(self) -> None:
        for part in self._parts:
            part.close()


pipeline.train_iterator = partial(RowsOfAll, pipeline.train_iterator)
runpy.run_module("experiments.pretrain", run_name="__main__", alter_sys=True)
