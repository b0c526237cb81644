"""What all answers share: token counts, streams of events, and clients that go away."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from yoco_u.serving.engine_loop import Job
from yoco_u.serving.errors import stream_error
from yoco_u.serving.responses import CachedTokens, Usage

T = TypeVar("T")

CLIENT_GONE = 499


def usage(job: Job, completion: int) -> Usage:
    """Token counts of a job of which so many new tokens have been seen."""
    prompt = sum(len(tokens) for tokens in job.prompts)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=CachedTokens(cached_tokens=sum(job.cached_tokens.values())),
    )


class EventStream(StreamingResponse):
    """Server-sent events; when the client goes away, or at the end, the job is closed.

    Args:
        chunks: JSON texts.
    """

    def __init__(self, chunks: AsyncIterator[str], job: Job) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(_as_events(chunks), media_type="text/event-stream", headers=headers)
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.close()


async def _as_events(chunks: AsyncIterator[str]) -> AsyncIterator[str]:
    try:
        async for chunk in chunks:
            yield f"data: {chunk}\n\n"
    except Exception as error:
        yield stream_error(error)
    else:
        yield "data: [DONE]\n\n"


async def whole(request: Request, job: Job, answer: Coroutine[Any, Any, T], as_json: Callable[[T], str]) -> Response:
    """An answer in one piece, unless the client goes away meanwhile; the job is closed in any case."""
    gone = asyncio.ensure_future(_disconnected(request))
    found = asyncio.ensure_future(answer)
    try:
        await asyncio.wait({gone, found}, return_when=asyncio.FIRST_COMPLETED)
        if not found.done():
            return Response(status_code=CLIENT_GONE)
        return Response(as_json(found.result()), media_type="application/json")
    finally:
        gone.cancel()
        found.cancel()
        job.close()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
