"""A benchmark from end to end: prompts out, answers in, marks and their certainty."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dsv3_jax.evals.endpoint import Endpoint, SamplingOptions
from dsv3_jax.evals.failures import Failures
from dsv3_jax.evals.statistics import bootstrap_interval, pass_at_k, wilson_interval
from dsv3_jax.evals.tasks import Item, Task

_BATCH = 64  # prompts between two looks at the failures


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How benchmarks are run."""

    chat: bool = False  # conversations without examples; else texts to continue, with them
    shots: int | None = None  # None: the task's own
    num_samples: int = 1  # answers to each item
    ks: tuple[int, ...] = (1,)  # of pass@k
    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int | None = None  # None: the task's own
    max_failures: int = 20  # of answers that do not come, or cannot be marked
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One answer. A failed one is wrong, and counted by its reason as well."""

    item: int
    text: str
    right: bool
    failure: str | None = None
    finish_reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of one benchmark."""

    num_items: int
    shots: int
    score: float  # share of right answers: pass@1
    interval: tuple[float, float]  # 95 %
    pass_at: dict[int, float]
    failures: dict[str, int]  # by reason
    num_cut: int  # answers that ran into max_tokens
    marks: list[Mark]


def evaluate(
    task: Task,
    items: Sequence[Item],
    endpoint: Endpoint,
    settings: Settings,
    examples: Sequence[Item] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Outcome:
    """Asks for every item and marks the answers.

    Args:
      examples: what few-shot prompts are made of.
      progress: called with (answers so far, all of them).

    Raises:
      UserError: too few examples, or more than `max_failures` failed.
    """
    shots = (0 if settings.chat else task.shots) if settings.shots is None else settings.shots
    prompts = [
        task.prompt(item, task.examples(item, examples, shots) if shots else (), settings.chat)
        for item in items
    ]
    failures = Failures(
        task.title,
        settings.max_failures,
        "check the endpoint, or raise --max_failures to count them as wrong",
    )
    jobs = [index for index in range(len(items)) for _ in range(settings.num_samples)]
    marks: list[Mark] = []
    for start in range(0, len(jobs), _BATCH):
        batch = jobs[start : start + _BATCH]
        options = SamplingOptions(
            max_tokens=settings.max_tokens or task.max_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            stop=() if settings.chat else task.stop,
            seed=settings.seed + start,
        )
        answered = endpoint.complete([prompts[index] for index in batch], options)
        for index, answer in zip(batch, answered, strict=True):
            right, failure = False, answer.error
            if failure is None:
                try:
                    right = task.is_right(items[index], answer.text)
                except Exception as error:  # whatever an answer does to the code that marks it
                    failure = f"marking: {type(error).__name__}"
            if failure is not None:
                failures.add(failure)
            marks.append(
                Mark(
                    item=index,
                    text=answer.text,
                    right=right,
                    failure=failure,
                    finish_reason=answer.finish_reason,
                )
            )
        progress(len(marks), len(jobs))
    return _outcome(marks, len(items), shots, settings, failures)


def _outcome(
    marks: list[Mark], num_items: int, shots: int, settings: Settings, failures: Failures
) -> Outcome:
    n = settings.num_samples
    right = [sum(mark.right for mark in marks[i * n : (i + 1) * n]) for i in range(num_items)]
    pass_at = {k: sum(pass_at_k(n, c, k) for c in right) / num_items for k in settings.ks}
    interval = (
        wilson_interval(sum(right), num_items)
        if n == 1
        else bootstrap_interval([count / n for count in right], settings.seed)
    )
    return Outcome(
        num_items=num_items,
        shots=shots,
        score=sum(right) / (n * num_items),
        interval=interval,
        pass_at=pass_at,
        failures=dict(failures.counts),
        num_cut=sum(mark.finish_reason == "length" for mark in marks),
        marks=marks,
    )
