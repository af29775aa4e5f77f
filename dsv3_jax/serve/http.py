"""What a server needs of HTTP beside FastAPI: bounded bodies, events, clients that go away."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from dsv3_jax.serve.openai import ApiError

Result = TypeVar("Result")


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


async def read_body(http: Request, max_bytes: int, seconds: float) -> bytes:
    """The body of a request.

    Raises:
      ApiError: it is longer than `max_bytes` (413), or not there after `seconds` (408).
      ClientGone: the client left before its end.
    """
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for part in http.stream():
                body += part
                if len(body) > max_bytes:
                    message = f"the body is larger than this server's {max_bytes} bytes"
                    raise ApiError(413, message, headers={"Connection": "close"})
    except TimeoutError:
        message = f"the body did not arrive within {seconds:g} seconds"
        raise ApiError(408, message, headers={"Connection": "close"}) from None
    except ClientDisconnect:
        raise ClientGone from None
    return bytes(body)


async def unless_gone(receive: Receive, work: Awaitable[Result]) -> Result:
    """The result of `work`, which is cancelled when the client goes; its body has been read.

    Raises:
      ClientGone: it went first.
    """

    async def until_gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(until_gone())
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        working.cancel()
        gone.cancel()


class EventStream(Response):
    """Server-sent events, one for each JSON value, and `[DONE]` at the end."""

    def __init__(self, events: AsyncIterator[dict[str, Any]], on_end: Callable[[], None]):
        """`on_end` is called however the answer ends."""
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        del self.headers["content-length"]
        self._events, self._on_end = events, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self._send(send))
        except ClientGone:
            pass
        finally:
            self._on_end()

    async def _send(self, send: Send) -> None:
        async def body(data: bytes, more: bool) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for event in self._events:
            text = json.dumps(event, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
            await body(f"data: {text}\n\n".encode(), True)
        await body(b"data: [DONE]\n\n", False)
