"""How often the model accepts MTP's drafts, and how many tokens come out of a pass.

    python -m tools.bench_speculative --checkpoint=runs/tiny [--num_draft_tokens=1,2]
        [--temperatures=0,1] [--format=json]

An engine decodes two kinds of text, of the documents that the run held out:

  held-out   every pass stands at another place of a document and has nothing but the document
             before it; what the pass chooses is dropped
  generated  the model writes on from the beginning of a row by itself, up to the length that it
             was trained with or the end-of-text token

Only passes that verify all drafts count. A draft is accepted when it is what the model chooses with
the document, or its own text, before it, whatever the document says. Time is of generated text,
with programs already compiled.
"""

import dataclasses
import json
import time

from absl import flags

from dsv3_jax.errors import UserError, run_main
from dsv3_jax.serve.engine import Engine
from dsv3_jax.serve.requests import EngineOptions, Request, Sampling
from tools.text import aligned

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Working directory of a run, its corpus at hand.", required=True
)
_NUM_DRAFT_TOKENS = flags.DEFINE_list("num_draft_tokens", ["1", "2"], "Drafts a pass.")
_TEMPERATURES = flags.DEFINE_list("temperatures", ["0", "1"], "0: greedy.")
_NUM_ROWS = flags.DEFINE_integer("num_rows", 64, "Rows of held-out text.", lower_bound=1)
_PLACES = flags.DEFINE_integer("places", 16, "Passes in each row, held-out.", lower_bound=1)
_MAX_ROWS = flags.DEFINE_integer("max_rows", 8, "Texts decoded together.", lower_bound=1)
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "Of the weights, the arithmetic and the cache."
)
_FORMAT = flags.DEFINE_enum("format", "text", ["text", "json"], "Of what is printed.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """Of one kind of text with one setting."""

    text: str  # 'held-out', 'generated'
    num_draft_tokens: int
    temperature: float
    passes: int
    accepted: list[float]  # of each draft, where all before it were
    tokens_per_pass: float
    tokens_per_second: float | None = None  # of generated text


def accepted_drafts(
    engine: Engine, requests: list[Request], *, first_pass_only: bool = False
) -> tuple[list[int], int]:
    """Runs requests to their ends, or through their first pass of decoding.

    Returns:
      Of each pass that verified all drafts, how many were accepted; and the tokens that came out.
    """
    left = {engine.submit(request): request.max_tokens for request in requests}
    prompts, accepted, num_tokens = set(left), [], 0
    while engine.has_work:
        for output in engine.step():
            request_id, count = output.request_id, len(output.tokens)
            num_tokens += count
            if request_id in prompts:  # the token after the prompt, which nothing drafted
                prompts.remove(request_id)
            elif count and output.finish_reason != "stop":
                if left[request_id] > engine.options.num_draft_tokens:
                    accepted.append(count - 1)
                if first_pass_only:
                    engine.cancel(request_id)
            left[request_id] -= count
    return accepted, num_tokens


def summary(accepted: list[int], **fields) -> Result:
    """Rates of passes with `num_draft_tokens` drafts each."""
    reached = [sum(count >= i for count in accepted) for i in range(fields["num_draft_tokens"] + 1)]
    return Result(
        passes=len(accepted),
        accepted=[
            here / before if before else 0.0
            for before, here in zip(reached, reached[1:], strict=False)
        ],
        tokens_per_pass=1 + sum(accepted) / len(accepted),
        **fields,
    )


def measure(
    engine: Engine, rows: list[list[int]], eos_id: int, temperature: float, places: int
) -> list[Result]:
    """Both kinds of text; without drafts, generated text alone.

    Args:
      rows: held-out text, each row as long as the engine's context.
      places: held-out passes in each row.
    """
    num_drafts, length = engine.options.num_draft_tokens, engine.options.context_tokens
    fields = {"num_draft_tokens": num_drafts, "temperature": temperature}

    def request(index: int, start: int, max_tokens: int) -> Request:
        return Request(
            prompt=tuple(rows[index][:start]),
            max_tokens=max_tokens,
            sampling=Sampling(temperature=temperature, seed=index),
            stop_ids=frozenset({eos_id}),
        )

    results, first = [], length // 4
    if num_drafts:
        room = length - num_drafts - 2 - first  # a pass with all drafts fits after any place
        starts = [first + room * i // places for i in range(places)]
        requests = [
            request(index, start, num_drafts + 2) for index in range(len(rows)) for start in starts
        ]
        accepted, _ = accepted_drafts(engine, requests, first_pass_only=True)
        results.append(summary(accepted, text="held-out", **fields))
    begin = time.perf_counter()
    requests = [request(index, first, length - first) for index in range(len(rows))]
    accepted, num_tokens = accepted_drafts(engine, requests)
    pace = num_tokens / (time.perf_counter() - begin)
    results.append(summary(accepted, text="generated", tokens_per_second=pace, **fields))
    return results


def table(results: list[Result]) -> str:
    depth = max(result.num_draft_tokens for result in results)
    rows = [
        ("text", "drafts", "temperature", "passes")
        + tuple(f"draft {i + 1}" for i in range(depth))
        + ("tokens a pass", "tokens/s")
    ]
    for result in results:
        rates = [f"{rate:.1%}" for rate in result.accepted] + [""] * depth
        pace = result.tokens_per_second
        rows.append(
            (result.text, str(result.num_draft_tokens), f"{result.temperature:g}")
            + (f"{result.passes:,}", *rates[:depth], f"{result.tokens_per_pass:.2f}")
            + ("" if pace is None else f"{pace:,.0f}",)
        )
    return "\n".join(aligned(rows, 1))


def numbers(flag: flags.FlagHolder, kind: type) -> list:
    try:
        return [kind(value) for value in flag.value]
    except ValueError:
        raise UserError(
            f"--{flag.name}={','.join(flag.value)} must be numbers, e.g. {','.join(flag.default)}"
        ) from None


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; write --checkpoint=DIR")
    drafts = sorted({0, *numbers(_NUM_DRAFT_TOKENS, int)})
    temperatures = numbers(_TEMPERATURES, float)
    import jax.numpy as jnp

    from dsv3_jax.checkpoint.pretrained import load_model, load_run_tokenizer
    from dsv3_jax.checkpoint.reader import locate, open_checkpoint
    from dsv3_jax.data.pipeline import prepare_corpus, validation_rows
    from dsv3_jax.overrides import from_dict
    from dsv3_jax.serve.loop import warm_up

    config = from_dict(open_checkpoint(*locate(_CHECKPOINT.value)).extra["config"])
    corpus = prepare_corpus(config)
    if corpus.tokenizer.sha256 != load_run_tokenizer(_CHECKPOINT.value).sha256:
        raise UserError(
            f"the corpus of {_CHECKPOINT.value} has changed since it was trained; train it again"
        )
    length, count = config.data.sequence_length, _NUM_ROWS.value
    rows = validation_rows(config, corpus, count)["tokens"][:, :length].tolist()
    model = load_model(_CHECKPOINT.value, jnp.dtype(_DTYPE.value))
    results = []
    for num_draft_tokens in drafts:
        options = EngineOptions(
            max_rows=_MAX_ROWS.value,
            context_tokens=length,
            page_tokens=16,
            prefill_chunk=min(length, 128),
            cache_dtype=_DTYPE.value,
            num_draft_tokens=num_draft_tokens,
            max_queue=count * _PLACES.value,
        )
        engine = Engine(model, options)
        warm_up(engine)
        for temperature in temperatures:
            results += measure(engine, rows, corpus.tokenizer.eos_id, temperature, _PLACES.value)
    if _FORMAT.value == "json":
        print(json.dumps([dataclasses.asdict(result) for result in results], indent=2))
    else:
        print(table(results))


if __name__ == "__main__":
    run_main(main)
