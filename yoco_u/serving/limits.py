"""How large the body of a request may be, and how bodies are read without holding up other requests."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.exceptions import HTTPException
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from yoco_u.serving.errors import error_response


class BodyLimit:
    """Middleware that refuses bodies that are too large with 413.

    Args:
        max_bytes: largest size of a body.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        length = Headers(scope=scope).get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self._max_bytes:
            return await error_response(413, self._too_large())(scope, receive, send)
        return await self._app(scope, self._limited(receive), send)

    def _limited(self, receive: Receive) -> Receive:
        taken = 0

        async def limited() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self._max_bytes:
                raise HTTPException(413, self._too_large())
            return message

        return limited

    def _too_large(self) -> str:
        return f"the body is larger than {self._max_bytes} bytes, the limit of this server"


class OneBodyAtATime(APIRoute):
    """A route whose bodies are parsed one after another, with a turn of the event loop for everybody else in between.

    A large body takes 50 to 100 ms a MiB, during which no Python code can run; several that come at once would take the sum.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_in_turn(request: Request) -> Response:
            return await handle(_RequestInTurn(request.scope, request.receive))

        return handle_in_turn


class _RequestInTurn(Request):
    async def json(self) -> Any:
        turn: asyncio.Lock = self.app.state.parsing
        async with turn:
            await asyncio.sleep(0)
            return await super().json()
