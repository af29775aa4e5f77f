"""Rows as the arrays that a program takes, and back."""

import numpy as np

from dsv3_jax.serve.programs import DecodeInputs, PrefillInputs, StepOutputs
from dsv3_jax.serve.requests import TokenLogprobs
from dsv3_jax.serve.scheduler import Row, Scheduler


def prefill_inputs(places: dict[int, Row], scheduler: Scheduler) -> PrefillInputs:
    """The next chunk of each row's prompt, at its place."""
    chunk = scheduler.options.prefill_chunk
    count = scheduler.options.prefill_rows * scheduler.num_shards
    inputs = PrefillInputs(
        tokens_BT=np.zeros((count, chunk + 1), np.int32),
        position_B=np.zeros(count, np.int32),
        count_B=np.zeros(count, np.int32),
        last_B=np.zeros(count, bool),
        limit_B=np.zeros(count, np.int32),
        row_B=np.zeros(count, np.int32),
        pages_BZ=np.zeros((count, scheduler.pages_per_row), np.int32),
        logprobs_B=np.zeros(count, bool),
    )
    for at, row in places.items():
        prompt, start = row.request.prompt, row.num_written
        tokens = prompt[start : start + chunk + 1]
        inputs.tokens_BT[at, : len(tokens)] = tokens
        inputs.position_B[at] = start
        inputs.count_B[at] = min(chunk, len(tokens))
        inputs.last_B[at] = start + chunk >= len(prompt)
        inputs.limit_B[at] = row.limit
        inputs.row_B[at] = row.index % scheduler.rows_per_shard
        inputs.pages_BZ[at, : len(row.pages)] = row.pages
        inputs.logprobs_B[at] = row.request.num_logprobs is not None
    return inputs


def decode_inputs(rows: list[Row], scheduler: Scheduler) -> DecodeInputs:
    """The last token and the drafts of each row, at the row's index; the other rows are idle."""
    num_rows, num_tokens = scheduler.options.max_rows, 1 + scheduler.options.num_draft_tokens
    inputs = DecodeInputs(
        tokens_BT=np.zeros((num_rows, num_tokens), np.int32),
        position_B=np.zeros(num_rows, np.int32),
        limit_B=np.zeros(num_rows, np.int32),
        pages_BZ=np.zeros((num_rows, scheduler.pages_per_row), np.int32),
        logprobs_B=np.zeros(num_rows, bool),
    )
    for row in rows:
        at = row.index
        inputs.tokens_BT[at] = [row.tokens[-1], *row.drafts]
        inputs.position_B[at] = len(row.tokens) - 1
        inputs.limit_B[at] = row.limit
        inputs.pages_BZ[at, : len(row.pages)] = row.pages
        inputs.logprobs_B[at] = row.request.num_logprobs is not None
    return inputs


def pages_of_shard(pages: list[int], shard: int, scheduler: Scheduler) -> np.ndarray:
    """int32 [S, Z]: the pages of a row at its shard, the trash page everywhere else."""
    pages_SZ = np.zeros((scheduler.num_shards, scheduler.pages_per_row), np.int32)
    pages_SZ[shard, : len(pages)] = pages
    return pages_SZ


def token_logprobs(
    result: StepOutputs, at: int, tokens: list[int], num_top: int
) -> tuple[TokenLogprobs, ...]:
    """Of the first tokens of row `at`, with `num_top` alternatives each."""

    def reported(i: int, token: int) -> TokenLogprobs:
        ids = result.top_ids_BTC[at, i, :num_top].tolist()
        logprobs = result.top_logprobs_BTC[at, i, :num_top].tolist()
        top = tuple(zip(ids, logprobs, strict=True))
        return TokenLogprobs(token=token, logprob=float(result.logprobs_BT[at, i]), top=top)

    return tuple(reported(i, token) for i, token in enumerate(tokens))
