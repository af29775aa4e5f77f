"""What a server tells Prometheus: its answers, its pace, and the engine's own statistics."""

import dataclasses
import time
from collections.abc import Collection
from typing import Any

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """The metrics of one server."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self):
        self._registry = CollectorRegistry()
        self._engine: dict[str, Gauge] = {}
        self.answers = Counter(
            "dsv3_answers", "Answers that ended.", ("path", "status"), registry=self._registry
        )
        self.answer_seconds = self._histogram(
            "dsv3_answer_seconds", "From a request to the end of its answer."
        )
        self.first_token_seconds = self._histogram(
            "dsv3_first_token_seconds", "From a request to its first token."
        )
        self.prompt_tokens = Counter(
            "dsv3_prompt_tokens", "Tokens of prompts.", registry=self._registry
        )
        self.new_tokens = Counter("dsv3_new_tokens", "Tokens of answers.", registry=self._registry)

    def _histogram(self, name: str, description: str) -> Histogram:
        return Histogram(name, description, buckets=_SECONDS, registry=self._registry)

    def render(self, statistics: Any) -> bytes:
        """All of them as text; `statistics` is the engine's dataclass of numbers."""
        for field in dataclasses.fields(statistics):
            value = getattr(statistics, field.name)
            if not isinstance(value, int | float):
                continue  # tables, such as the load of every expert
            if field.name not in self._engine:
                name = f"dsv3_engine_{field.name}"
                self._engine[field.name] = Gauge(
                    name, f"{field.name} of the engine.", registry=self._registry
                )
            self._engine[field.name].set(value)
        return generate_latest(self._registry)


class CountAnswers:
    """ASGI middleware: counts answers by path and status, and times those of the API."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: Collection[str]):
        self._app, self._metrics, self._paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        status, start = "none", time.perf_counter()  # none: it stopped before it began

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.answers.labels(path, status).inc()
            if status == "200" and path.endswith("completions"):
                self._metrics.answer_seconds.observe(time.perf_counter() - start)
