"""How large the body of a request may be, how bodies are read without holding up others, and that clients may leave."""

import asyncio
import gc
import json
import time
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.exceptions import HTTPException
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from yoco_u.errors import first_line
from yoco_u.serving.errors import error_response
from yoco_u.serving.fields import brief

CLIENT_GONE = 499
_LARGE = 2**15  # bytes of a body, which take a millisecond or two


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


class HeadRequests:
    """Middleware that answers HEAD as GET; uvicorn leaves the body out."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        await self._app(scope, receive, send)


class Parsing:
    """Whose body is parsed now. Large bodies wait for large ones, and small ones for small ones."""

    def __init__(self) -> None:
        self._large, self._small = asyncio.Lock(), asyncio.Lock()

    def turn(self, body: bytes) -> asyncio.Lock:
        return self._large if len(body) > _LARGE else self._small


class BodyRoute(APIRoute):
    """A route whose bodies are parsed in turns, and which does nothing more for a client that has gone.

    A large body takes 20 to 60 ms a MiB, during which no Python code can run; several that come at once would take the sum. So
    they are parsed one after another, and everybody else comes to work in between.

    uvicorn goes on with a request whose client has gone. Here, all that is done for it is cancelled: parsing, admission and
    waiting for the answer; a stream looks after itself.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle

        async def handle_unless_gone(request: Request) -> Response:
            if (encoding := request.headers.get("content-encoding", "identity").strip().lower()) != "identity":
                raise HTTPException(415, f"the body comes with Content-Encoding: {brief(encoding)}; send it as it is, without")
            request = _RequestInTurn(request.scope, request.receive)
            try:
                await request.body()
            except ClientDisconnect:
                return Response(status_code=CLIENT_GONE)
            found, gone = asyncio.ensure_future(handle(request)), asyncio.ensure_future(_disconnected(request))
            try:
                await asyncio.wait({found, gone}, return_when=asyncio.FIRST_COMPLETED)
                return found.result() if found.done() else Response(status_code=CLIENT_GONE)
            finally:
                gone.cancel()
                found.cancel()

        return handle_unless_gone


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _RequestInTurn(Request):
    async def json(self) -> Any:
        body = await self.body()
        parsing: Parsing = self.app.state.parsing
        async with parsing.turn(body):
            begun = time.perf_counter()
            found = _parsed(body)
            # The engine's thread, which gives way to this one at each operation, needs as much time as the body has taken.
            await asyncio.sleep(time.perf_counter() - begun if len(body) > _LARGE else 0)
            return found


def _parsed(body: bytes) -> Any:
    gc.disable()  # it would look at all that has been parsed so far again and again, and finds nothing
    try:
        return json.loads(body)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise HTTPException(400, "the body is nested too deeply; flatten it") from None
    except ValueError as error:
        problem, _, _ = first_line(error).partition(";")  # which is followed by advice for programs
        raise HTTPException(400, f"the body cannot be read: {problem}") from None
    finally:
        gc.enable()
