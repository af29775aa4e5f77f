"""The OpenAI API over an engine: completions, chats, models; health and metrics beside it.

Whatever a client sends wrong is a 4xx with an error object; a 5xx means that the engine failed.
"""

import asyncio
import contextlib
import hmac
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from dsv3_jax.data.chat import ChatTemplate
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.errors import UserError, did_you_mean
from dsv3_jax.serve.answers import ChatFormat, Choice, CompletionFormat, Envelope, Piece, usage
from dsv3_jax.serve.calls import Call, Caller
from dsv3_jax.serve.http import ClientGone, EventStream, read_body, unless_gone
from dsv3_jax.serve.loop import EngineFailed, EngineInterface, EngineLoop, Job
from dsv3_jax.serve.metrics import CountAnswers, Metrics
from dsv3_jax.serve.openai import AnyRequest, ApiError, ChatRequest, CompletionRequest, parse
from dsv3_jax.serve.requests import Overloaded
from dsv3_jax.serve.text import TokenBytes

PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics")


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """What a server serves, and what it takes."""

    model_name: str
    context_tokens: int  # prompt and answer together
    vocab_size: int  # rows of the embedding table
    api_keys: tuple[str, ...] = ()  # any of them opens /v1; none: no key is asked for
    max_body_bytes: int = 4 << 20
    max_choices: int = 32  # prompts x n of one request
    body_seconds: float = 30.0  # that a body may take to arrive


def make_app(
    engine: EngineInterface,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    options: ServerOptions,
    on_failure: Callable[[], None] = lambda: None,
) -> FastAPI:
    """The ASGI application; the engine's thread lives as long as its lifespan.

    Args:
      engine: warmed up, and used by nobody else.
      on_failure: called when the engine has failed; every request is a 503 from then on.
    """
    server = _Server(engine, tokenizer, template, options, on_failure)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        server.loop.start()
        yield
        await server.loop.stop()

    app = FastAPI(title="dsv3-jax", lifespan=lifespan, openapi_url=None)
    app.add_middleware(CountAnswers, metrics=server.metrics, paths=PATHS)
    keyed = [Depends(server.check_key)]
    app.post("/v1/completions", dependencies=keyed)(server.completions)
    app.post("/v1/chat/completions", dependencies=keyed)(server.chat)
    app.get("/v1/models", dependencies=keyed)(server.models)
    app.get("/v1/models/{name:path}", dependencies=keyed)(server.model)
    app.get("/health")(server.health)
    app.get("/metrics")(server.show_metrics)
    app.add_exception_handler(ApiError, _show_api_error)
    app.add_exception_handler(HTTPException, _show_http_error)
    app.add_exception_handler(EngineFailed, _show_engine_failed)
    app.add_exception_handler(ClientGone, _show_nothing)
    app.add_exception_handler(Exception, _show_unexpected)
    return app


class _Server:
    def __init__(
        self,
        engine: EngineInterface,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        options: ServerOptions,
        on_failure: Callable[[], None],
    ):
        self.loop, self.metrics = EngineLoop(engine, on_failure), Metrics()
        self._options, self._created = options, int(time.time())
        self._token_bytes = TokenBytes(tokenizer)
        self._caller = Caller(
            tokenizer=tokenizer,
            template=template,
            context_tokens=options.context_tokens,
            vocab_size=options.vocab_size,
            max_choices=options.max_choices,
        )

    async def check_key(self, http: Request) -> None:
        given = http.headers.get("authorization", "").encode("latin-1")
        # Every key is compared to its end, so that the time taken tells nothing.
        keys = [f"Bearer {key}".encode() for key in self._options.api_keys]
        if keys and not any([hmac.compare_digest(given, key) for key in keys]):
            raise ApiError(
                401,
                "a valid key is needed; send the header 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def completions(self, http: Request) -> Response:
        body = await self._read(http, CompletionRequest)
        form = CompletionFormat(self._token_bytes, body.num_logprobs)
        return await self._answer(http, body, form, self._caller.completion)

    async def chat(self, http: Request) -> Response:
        body = await self._read(http, ChatRequest)
        form = ChatFormat(self._token_bytes, body.num_logprobs)
        return await self._answer(http, body, form, self._caller.chat)

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._description()]}

    async def model(self, name: str) -> dict[str, Any]:
        self._check_model(name)
        return self._description()

    async def health(self) -> Response:
        status = 503 if self.loop.failed else 200
        return JSONResponse({"status": "failed" if self.loop.failed else "ready"}, status)

    async def show_metrics(self) -> Response:
        text = self.metrics.render(await self.loop.statistics())
        return Response(text, media_type=self.metrics.content_type)

    def _description(self) -> dict[str, Any]:
        return {
            "id": self._options.model_name,
            "object": "model",
            "created": self._created,
            "owned_by": "dsv3-jax",
            "max_model_len": self._options.context_tokens,
        }

    def _check_model(self, name: str) -> None:
        served = self._options.model_name
        if name != served:
            name = name[:100]
            raise ApiError(
                404,
                f"model {name!r} is not served here;{did_you_mean(name, [served])} "
                f"this server has {served!r}",
                "model",
                "model_not_found",
            )

    async def _read(self, http: Request, schema: type[AnyRequest]) -> AnyRequest:
        options = self._options
        data = await read_body(http, options.max_body_bytes, options.body_seconds)
        body = parse(schema, data)
        self._check_model(body.model)
        return body

    async def _answer(
        self,
        http: Request,
        body: AnyRequest,
        form: CompletionFormat | ChatFormat,
        make_call: Callable[[AnyRequest], Call],
    ) -> Response:
        start = time.perf_counter()
        call = await asyncio.to_thread(make_call, body)
        try:
            job = await self.loop.submit(call.requests)
        except UserError as error:
            raise ApiError(400, str(error)) from None
        except Overloaded:
            message = "too many requests are waiting; try again later"
            raise ApiError(429, message, code="overloaded", headers={"Retry-After": "1"}) from None
        self.metrics.prompt_tokens.inc(call.num_prompt_tokens)
        answer = _Answer(
            job, call, Envelope.new(form, body.model), self._token_bytes, self.metrics, start
        )
        if body.stream:
            return EventStream(answer.events(body.include_usage), on_end=job.cancel)
        try:
            return JSONResponse(await unless_gone(http.receive, answer.whole()))
        finally:
            job.cancel()


class _Answer:
    """The choices of one call while they grow."""

    def __init__(
        self,
        job: Job,
        call: Call,
        envelope: Envelope,
        token_bytes: TokenBytes,
        metrics: Metrics,
        start: float,
    ):
        self._job, self._call, self._envelope = job, call, envelope
        self._metrics, self._start = metrics, start
        self._choices = [
            Choice(token_bytes, call.stops, request.stop_ids) for request in call.requests
        ]

    async def whole(self) -> dict[str, Any]:
        pieces = [Piece(text=echo) for echo in self._call.echoes]
        async for index, piece in self._pieces():
            pieces[index] += piece
        return self._envelope.whole(pieces, self._usage())

    async def events(self, include_usage: bool) -> AsyncIterator[dict[str, Any]]:
        """The answer in parts; a failure is the last of them."""
        form, extra = self._envelope.format, {"usage": None} if include_usage else {}
        for index, echo in enumerate(self._call.echoes):
            yield self._envelope.event([form.first(index, echo)]) | extra
        try:
            async for index, piece in self._pieces():
                if piece != Piece():
                    yield self._envelope.event([form.part(index, piece)]) | extra
        except (ApiError, EngineFailed) as error:
            yield (error if isinstance(error, ApiError) else _engine_failed()).body
            return
        if include_usage:
            yield self._envelope.event([]) | {"usage": self._usage()}

    async def _pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        first = True
        async for index, output in self._job.outputs():
            if output.finish_reason not in (None, "stop", "length"):
                raise ApiError(500, "the engine failed on this request")
            choice = self._choices[index]
            before = choice.num_tokens
            piece = choice.push(output)
            self._metrics.new_tokens.inc(choice.num_tokens - before)
            if first:
                self._metrics.first_token_seconds.observe(time.perf_counter() - self._start)
                first = False
            if piece.finish_reason is not None and output.finish_reason is None:
                self._job.stop(index)  # at a stop string
            yield index, piece

    def _usage(self) -> dict[str, int]:
        new = sum(choice.num_tokens for choice in self._choices)
        return usage(self._call.num_prompt_tokens, new)


def _engine_failed() -> ApiError:
    return ApiError(503, "the engine has failed and this server is ending; try another")


async def _show_api_error(_: Request, error: ApiError) -> Response:
    return JSONResponse(error.body, error.status, error.headers)


async def _show_http_error(http: Request, error: HTTPException) -> Response:
    message = f"{http.method} {http.url.path[:100]} is not of this API; it has {', '.join(PATHS)}"
    shown = ApiError(error.status_code, message, headers=error.headers)
    return await _show_api_error(http, shown)


async def _show_engine_failed(http: Request, _: EngineFailed) -> Response:
    return await _show_api_error(http, _engine_failed())


async def _show_nothing(_: Request, __: ClientGone) -> Response:
    return Response(status_code=499)  # to nobody, but it is counted


async def _show_unexpected(http: Request, _: Exception) -> Response:
    return await _show_api_error(http, ApiError(500, "the server failed on this request"))
