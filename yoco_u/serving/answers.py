"""From the events of a job to an HTTP response: one JSON object, or a stream of server-sent events.

What completions and chats have in common is here; the shapes in which they differ are in `completions.py` and `chat.py`.
"""

import asyncio
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any, Generic, TypeVar

from fastapi import Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from pydantic_core import to_json
from starlette.types import Receive, Scope, Send

from yoco_u.serving.errors import stream_error
from yoco_u.serving.jobs import Event, Job
from yoco_u.serving.requests import SampledRequest
from yoco_u.serving.responses import CachedTokens, ChatChunkChoice, CompletionChoice, CompletionDetails, Usage

_PART = 2**16  # bytes of a whole answer that are sent at once, each of which the client has `client_seconds` to read
ChunkChoice = TypeVar("ChunkChoice", CompletionChoice, ChatChunkChoice)


async def respond(answer: "Answer[Any]") -> Response:
    """An answer in the form that its request asks for; its job is closed when it is over."""
    if answer.streams:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return _JobResponse(answer.job, _events(answer), media_type="text/event-stream", headers=headers)
    try:
        body = await answer.response()
    except BaseException:
        answer.job.close()
        raise
    return _JobResponse(answer.job, _parts(body), media_type="application/json", headers={"Content-Length": str(len(body))})


class Answer(ABC, Generic[ChunkChoice]):
    """The answer to one request, made from the events of its job. Subclasses say which shape it has.

    An event becomes the choices of one or several chunks. A stream sends the chunks one by one; a whole response joins, for
    each output, the choices that the stream would have sent. An answer is read once, in one of the two ways.

    Answers can be large, with log probabilities or many outputs. A stream gives way to other clients after each chunk; a whole
    response is written in a thread, in pieces, because Python can switch threads between two calls but not in one.

    Attributes:
        job: the job that the engine runs for the request.
        streams: whether the client asked for a stream.
        lists: names of the lists that hold log probabilities in a choice; none if they are not asked for.
        head: the fields with which the whole response and every chunk begin.
    """

    def __init__(self, body: SampledRequest, job: Job, model_name: str, id_prefix: str) -> None:
        self.job, self.streams = job, bool(body.stream)
        self.head: dict[str, Any] = {
            "id": f"{id_prefix}-{secrets.token_hex(16)}", "created": int(time.time()), "model": model_name
        }  # fmt: skip
        self.lists: tuple[str, ...] = ()
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
    def joined(self, index: int, parts: list[ChunkChoice]) -> BaseModel:
        """The whole response's choice of an output, without its log probabilities."""

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

    async def response(self) -> bytes:
        """The response in one piece, as JSON."""
        return await asyncio.to_thread(self._write, [event async for event in self.job])

    def _write(self, events: list[Event]) -> bytes:
        """The response; nothing if its job is given up meanwhile, because nobody waits for it any more."""
        outputs: list[list[ChunkChoice]] = [[] for _ in range(self.job.num_outputs)]
        logprobs = [_Lists(self.lists) for _ in outputs]
        for event in events:
            for choice in self._take(event):
                if self.job.given_up:
                    return b""
                logprobs[choice.index].add(choice.logprobs)
                choice.logprobs = None
                outputs[choice.index].append(choice)
        choices: list[bytes] = []
        for index, (parts, lists) in enumerate(zip(outputs, logprobs, strict=True)):
            without = self.joined(index, parts).model_dump_json().encode()
            choices.append(b"," if index else b"")
            choices.extend(_filled(without, b'"logprobs":', b"null", lists.parts()))
        whole = self.whole(self._usage()).model_dump_json().encode()
        return b"".join(_filled(whole, b'"choices":', b"[]", [b"[", *choices, b"]"]))

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
                mean_loops=self._loops / self._new_tokens if self._new_tokens else None,
            ),
        )


class _Lists:
    """A JSON object of lists, whose items are written when they are added: as JSON they take the least memory."""

    def __init__(self, names: Iterable[str]) -> None:
        self._lists: dict[str, list[bytes]] = {name: [] for name in names}

    def add(self, lists: BaseModel | None) -> None:
        for name, values in lists or ():
            self._lists[name].append(to_json(values)[1:-1])

    def parts(self) -> list[bytes]:
        if not self._lists:
            return [b"null"]
        lists = [f'"{name}":['.encode() + b",".join(filter(None, parts)) + b"]" for name, parts in self._lists.items()]
        return [b"{", b",".join(lists), b"}"]


def _filled(json: bytes, key: bytes, empty: bytes, value: list[bytes]) -> list[bytes]:
    """JSON with the value of a key put in. The key with its quotes cannot be in a string, where quotes are escaped."""
    before, after = json.split(key + empty, 1)
    return [before, key, *value, after]


class _JobResponse(StreamingResponse):
    """Leaves as fast as the client reads. Its job is closed at the end, and also when the client goes away before."""

    def __init__(self, job: Job, content: AsyncIterator[str | bytes], *, media_type: str, headers: dict[str, str]) -> None:
        super().__init__(content, media_type=media_type, headers=headers)
        self._job = job

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


async def _parts(body: bytes) -> AsyncIterator[bytes]:
    for begin in range(0, len(body), _PART):
        yield body[begin : begin + _PART]
