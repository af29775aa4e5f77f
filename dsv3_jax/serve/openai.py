"""The requests of the OpenAI API that are understood, and the errors that answer the rest.

What a field may hold is said once, in its type. A field that is not here is refused by name, so
that nobody waits for an effect that never comes.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from dsv3_jax.errors import did_you_mean

MAX_LOGPROBS = 20
_MAX_ENTRIES = 1024
_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer that is not 200, as the API's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.headers = status, headers
        kind = "server_error" if status >= 500 else _TYPES.get(status, "invalid_request_error")
        readable = message.encode("utf-8", "replace").decode()
        self.body = {
            "error": {"message": readable, "type": kind, "param": param, "code": code},
        }


def _bounded(values: Any) -> Any:
    """Refuses a huge table as a whole: every entry of it may be a mistake to be written down."""
    if isinstance(values, dict) and len(values) > _MAX_ENTRIES:
        raise ValueError(f"an object may have up to {_MAX_ENTRIES} entries")
    return values


class _Schema(BaseModel):
    # Strict: "5" is not a number, 1 is not a switch. A null is a field that was left out.
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        if not isinstance(_bounded(values), dict):
            return values
        return {key: value for key, value in values.items() if value is not None}


class StreamOptions(_Schema):
    include_usage: bool = False


_Stop = Annotated[str, Field(min_length=1, max_length=256)]


class Generation(_Schema):
    """What completions and chats have in common."""

    model: str
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, lt=2**31, description="a number of tokens; 0: all")
    min_p: float = Field(0.0, ge=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    logit_bias: Annotated[
        dict[str, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_bounded)
    ] = Field(
        {},
        description=f"an object: up to {_MAX_ENTRIES} token ids with numbers between -100 and 100",
    )
    seed: int | None = Field(None, ge=0, lt=2**31)
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    n: int = Field(1, ge=1)
    stop: _Stop | Annotated[list[_Stop], Field(max_length=16, fail_fast=True)] = Field(
        [], description="a text or up to 16 texts, each of 1 to 256 characters"
    )
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None  # for the caller's own books

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


_TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class CompletionRequest(Generation):
    """POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[_TokenId], Field(min_length=1, fail_fast=True)]
        | Annotated[list[str], Field(min_length=1, fail_fast=True)]
        | Annotated[
            list[Annotated[list[_TokenId], Field(min_length=1, fail_fast=True)]],
            Field(min_length=1, fail_fast=True),
        ]
    ) = Field(description="a text, a list of texts, a list of token ids or a list of such lists")
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    best_of: int | None = Field(None, ge=1)

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One entry for each text to continue."""
        one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if one else self.prompt


class ContentPart(_Schema):
    type: Literal["text"]
    text: str


class FunctionCall(_Schema):
    name: str
    arguments: str


class ToolCall(_Schema):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(_Schema):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[ContentPart], Field(fail_fast=True)] | None = Field(
        None, description="a text, or a list of parts {'type': 'text', 'text': ...}"
    )
    tool_calls: list[ToolCall] = Field([], min_length=1, fail_fast=True)
    tool_call_id: str | None = None  # answers are laid out in the order of the calls

    @model_validator(mode="after")
    def _says_something(self) -> "Message":
        if self.content is None and not self.tool_calls:
            raise ValueError("a message needs content")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls belong to the assistant's messages")
        return self

    def for_template(self) -> dict[str, Any]:
        """As `data.chat` reads it."""
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        role = "system" if self.role == "developer" else self.role
        message = {"role": role, "content": content}
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        return message


class ResponseFormat(_Schema):
    type: Literal["text"]


class ChatRequest(Generation):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, fail_fast=True)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    response_format: ResponseFormat | None = None

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


AnyRequest = TypeVar("AnyRequest", bound=Generation)


def parse(schema: type[AnyRequest], body: bytes) -> AnyRequest:
    """Reads the body of a request.

    Raises:
      ApiError: 400 with the field and what it may hold.
    """
    try:
        request = schema.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(schema, error) from None
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options needs stream=true", "stream_options")
    if isinstance(request, CompletionRequest):
        if request.best_of not in (None, request.n):
            raise ApiError(400, "best_of other than n is not supported; leave it out", "best_of")
        if request.echo and request.logprobs is not None:
            message = "logprobs of the prompt are not supported; use echo without logprobs"
            raise ApiError(400, message, "echo")
    if isinstance(request, ChatRequest):
        if request.top_logprobs is not None and not request.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs=true", "top_logprobs")
        if None not in (request.max_tokens, request.max_completion_tokens):
            message = "max_tokens is the old name of max_completion_tokens; give one of them"
            raise ApiError(400, message, "max_tokens")
    return request


def _refusal(schema: type[Generation], error: ValidationError) -> ApiError:
    """The first mistake, by the name of its field and without what was sent."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    param = ".".join(str(part)[:100] for part in first["loc"]) or None
    if first["type"] == "extra_forbidden":
        allowed = list(schema.model_fields)
        where = f"{param!r} is not supported by this server"
        if len(first["loc"]) > 1:
            return ApiError(400, f"{where}; leave it out", param)
        hint = did_you_mean(str(param), allowed)
        return ApiError(400, f"{where};{hint} it takes {', '.join(allowed)}", param)
    said = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return ApiError(400, f"the body is not a JSON object of the API: {said}")
    fields = Message.model_fields | schema.model_fields
    for depth, name in enumerate(first["loc"], start=1):
        if name in fields and fields[name].description:  # shorter than every alternative's mistakes
            param = ".".join(map(str, first["loc"][:depth]))
            return ApiError(400, f"{param!r} must be {fields[name].description}", param)
    return ApiError(400, f"{param!r}: {said}", param)
