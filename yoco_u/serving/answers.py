"""From the events of a job to an HTTP response: one JSON object, or a stream of server-sent events.

What completions and chats have in common is here; the shapes in which they differ are in `completions.py` and `chat.py`.
"""

import asyncio
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator
from typing import Any, Generic, TypeVar

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from pydantic_core import to_json
from starlette.types import Receive, Scope, Send

from yoco_u.serving.errors import stream_error
from yoco_u.serving.jobs import Event, Job
from yoco_u.serving.requests import SampledRequest
from yoco_u.serving.responses import CachedTokens, ChatChunkChoice, CompletionChoice, CompletionDetails, Usage

ChunkChoice = TypeVar("ChunkChoice", CompletionChoice, ChatChunkChoice)

CLIENT_GONE = 499
PIECE = 512  # tokens that are written in one call, in a few milliseconds


async def respond(answer: "Answer[Any]", request: Request) -> Response:
    """Send an answer in the form that its request asks for."""
    return EventStream(answer) if answer.streams else await _in_one_piece(answer, request)


class Answer(ABC, Generic[ChunkChoice]):
    """The answer to one request, made from the events of its job. Subclasses say which shape it has.

    An event becomes the choices of one or several chunks. A stream sends the chunks one by one; a whole response joins, for
    each output, the choices that the stream would have sent. An answer is read once, in one of the two ways.

    Answers can be large, with log probabilities or many outputs. A stream gives way to other clients after each chunk; a whole
    response is written in a thread, in pieces, because Python can switch threads between two calls but not in one.

    Attributes:
        job: the job that the engine runs for the request.
        streams: whether the client asked for a stream.
        head: the fields with which the whole response and every chunk begin.
    """

    def __init__(self, body: SampledRequest, job: Job, model_name: str, id_prefix: str) -> None:
        self.job, self.streams = job, bool(body.stream)
        self.head: dict[str, Any] = {
            "id": f"{id_prefix}-{secrets.token_hex(16)}", "created": int(time.time()), "model": model_name
        }  # fmt: skip
        self._usage_at_end, self._usage_always = body.usage_in_stream
        self._begun: set[int] = set()  # outputs that have had an event
        self._new_tokens = self._loops = 0

    @abstractmethod
    def choices(self, index: int, event: Event, first: bool) -> Iterator[ChunkChoice]:
        """What an event adds to output `index`, in pieces of bounded size; `first` for the output's first event."""

    @abstractmethod
    def chunk(self, choices: list[ChunkChoice], usage: Usage | None) -> BaseModel:
        """One chunk of a stream."""

    @abstractmethod
    def joined(self, index: int, parts: list[ChunkChoice]) -> tuple[BaseModel, dict[str, list[Any]] | None]:
        """The whole response's choice of an output without its log probabilities, and these as lists by name."""

    @abstractmethod
    def whole(self, usage: Usage) -> BaseModel:
        """The response in one piece, without its choices."""

    async def chunks(self) -> AsyncIterator[str]:
        """The chunks of a stream, as JSON."""
        omitted = None if self._usage_at_end or self._usage_always else {"usage"}
        async for event in self.job:
            for choice in self._take(event):
                usage = self._usage() if self._usage_always else None
                yield self.chunk([choice], usage).model_dump_json(exclude=omitted)
                await asyncio.sleep(0)
        if self._usage_at_end:
            yield self.chunk([], self._usage()).model_dump_json()

    async def response(self) -> str:
        """The response in one piece, as JSON."""
        return await asyncio.to_thread(self._write, [event async for event in self.job])

    def _write(self, events: list[Event]) -> str:
        outputs: list[list[ChunkChoice]] = [[] for _ in range(self.job.num_outputs)]
        for event in events:
            for choice in self._take(event):
                outputs[choice.index].append(choice)
        choices = []
        for index, parts in enumerate(outputs):
            joined, logprobs = self.joined(index, parts)
            written = joined.model_dump_json()
            choices.append(written if logprobs is None else _filled(written, '"logprobs":', "null", _lists(logprobs)))
        return _filled(self.whole(self._usage()).model_dump_json(), '"choices":', "[]", f"[{','.join(choices)}]")

    def _take(self, event: Event) -> Iterator[ChunkChoice]:
        index = event.prompt * self.job.params.n + event.output
        first = index not in self._begun
        self._begun.add(index)
        self._new_tokens += len(event.token_ids)
        self._loops += event.loops
        return self.choices(index, event, first)

    def _usage(self) -> Usage:
        """Token counts so far."""
        prompt_tokens = sum(len(tokens) for tokens in self.job.prompts)
        accepted, rejected = (sum(own[i] for own in self.job.drafts.values()) for i in range(2))
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=self._new_tokens,
            total_tokens=prompt_tokens + self._new_tokens,
            prompt_tokens_details=CachedTokens(cached_tokens=sum(self.job.cached_tokens.values())),
            completion_tokens_details=CompletionDetails(
                accepted_prediction_tokens=accepted,
                rejected_prediction_tokens=rejected,
                mean_loops=round(self._loops / self._new_tokens, 4) if self._new_tokens else None,
            ),
        )


def _lists(lists: dict[str, list[Any]]) -> str:
    """A JSON object of lists, written in many short calls."""
    return "{" + ",".join(f'"{name}":[{",".join(_slices(values))}]' for name, values in lists.items()) + "}"


def _slices(values: list[Any]) -> Iterator[str]:
    for begin in range(0, len(values), PIECE):
        yield to_json(values[begin : begin + PIECE])[1:-1].decode()


def _filled(json: str, key: str, empty: str, value: str) -> str:
    """JSON with the value of a key put in. The key with its quotes cannot be in a string, where quotes are escaped."""
    before, after = json.split(key + empty, 1)
    return before + key + value + after


class EventStream(StreamingResponse):
    """An answer as server-sent events. Its job is closed at the end, and also when the client goes away before."""

    def __init__(self, answer: Answer[Any]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(_events(answer), media_type="text/event-stream", headers=headers)
        self._job = answer.job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.close()


async def _events(answer: Answer[Any]) -> AsyncIterator[str]:
    try:
        async for chunk in answer.chunks():
            yield f"data: {chunk}\n\n"
    except Exception as error:
        yield stream_error(error)
    else:
        yield "data: [DONE]\n\n"


async def _in_one_piece(answer: Answer[Any], request: Request) -> Response:
    """Wait for the whole answer, or until the client goes away; the job is closed in either case."""
    gone = asyncio.ensure_future(_disconnected(request))
    found = asyncio.ensure_future(answer.response())
    try:
        await asyncio.wait({gone, found}, return_when=asyncio.FIRST_COMPLETED)
        if not found.done():
            return Response(status_code=CLIENT_GONE)
        return Response(found.result(), media_type="application/json")
    finally:
        gone.cancel()
        found.cancel()
        answer.job.close()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
