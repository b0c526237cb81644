"""`/v1/chat/completions`: what clients get for it. Its route is in `app.py`, its request in `requests.py`."""

import secrets
from collections.abc import Iterator
from typing import Any

from yoco_u.inference import Logprob, TokenLogprobs
from yoco_u.inference.call_reader import CallPiece, CallReader
from yoco_u.serving.answers import Answer
from yoco_u.serving.jobs import Event, Job
from yoco_u.serving.requests import ChatRequest
from yoco_u.serving.responses import (
    AnsweredCall,
    CalledFunction,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatFinishReason,
    ChatLogprob,
    ChatLogprobs,
    ChatMessage,
    ChatResponse,
    TopLogprob,
    Usage,
)
from yoco_u.serving.token_texts import TokenTexts


class ChatAnswer(Answer[ChatChunkChoice]):
    """The answer to a chat. In a stream, the first chunk of each output names the role.

    The finish reason is `tool_calls` where the output ended behind whole calls. An output that was cut within a call keeps its
    own reason, and the arguments as far as they came.
    """

    def __init__(self, body: ChatRequest, job: Job, model_name: str, texts: TokenTexts) -> None:
        super().__init__(body, job, model_name, "chatcmpl")
        self._texts, self._wants_logprobs = texts, bool(body.logprobs)
        self.lists = ("content",) if self._wants_logprobs else ()
        tools = job.params.tools
        self._readers = (
            []
            if tools is None
            else [CallReader(tools.required, job.params.json_schema is not None) for _ in range(job.num_outputs)]
        )

    def choices(self, index: int, event: Event, first: bool) -> Iterator[ChatChunkChoice]:
        delta: dict[str, Any] = {"role": "assistant", "content": ""} if first else {}
        reason: ChatFinishReason | None = event.finish_reason
        if self._readers:
            reader = self._readers[index]
            delta |= _delta(reader.append(event.text, last=reason is not None))
            if reason == "stop" and reader.complete:
                reason = "tool_calls"
        elif event.text:
            delta["content"] = event.text
        if delta or event.logprobs or reason is not None:
            logprobs = self._logprobs(event.logprobs or []) if self._wants_logprobs else None
            yield ChatChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=reason)

    def chunk(self, choices: list[ChatChunkChoice], usage: Usage | None) -> ChatChunk:
        return ChatChunk(**self.head, choices=choices, usage=usage)

    def whole(self, usage: Usage) -> ChatResponse:
        return ChatResponse(**self.head, choices=[], usage=usage)

    def joined(self, index: int, parts: list[ChatChunkChoice]) -> ChatChoice:
        content = "".join(str(part.delta.get("content", "")) for part in parts)
        calls = _joined([one for part in parts for one in part.delta.get("tool_calls", [])])
        message = ChatMessage(content=None if calls and not content else content, tool_calls=calls)
        return ChatChoice(index=index, message=message, finish_reason=parts[-1].finish_reason or "stop")

    def _logprobs(self, logprobs: list[TokenLogprobs]) -> ChatLogprobs:
        return ChatLogprobs(
            content=[
                ChatLogprob(**self._entry(one.chosen).model_dump(), top_logprobs=[self._entry(top) for top in one.top])
                for one in logprobs
            ]
        )

    def _entry(self, one: Logprob) -> TopLogprob:
        token = one.token_id
        return TopLogprob(token=self._texts.text(token), logprob=one.logprob, bytes=list(self._texts.bytes(token)))


def _delta(pieces: list[str | CallPiece]) -> dict[str, Any]:
    """Pieces of an output as what they add to its message; of each call there is one part."""
    text = "".join(piece for piece in pieces if isinstance(piece, str))
    calls: dict[int, dict[str, Any]] = {}
    for piece in pieces:
        if isinstance(piece, CallPiece):
            part = calls.setdefault(piece.index, {"index": piece.index, "function": {"arguments": ""}})
            part["function"]["arguments"] += piece.arguments
            if piece.name is not None:
                part |= {"id": f"call_{secrets.token_hex(12)}", "type": "function"}
                part["function"]["name"] = piece.name
    return ({"content": text} if text else {}) | ({"tool_calls": list(calls.values())} if calls else {})


def _joined(parts: list[Any]) -> list[AnsweredCall]:
    """Whole calls from their parts, each of which begins with the one that has its id."""
    begins = [part for part in parts if "id" in part]
    arguments: list[list[str]] = [[] for _ in begins]
    for part in parts:
        arguments[part["index"]].append(part["function"]["arguments"])
    return [
        AnsweredCall(id=begin["id"], function=CalledFunction(name=begin["function"]["name"], arguments="".join(texts)))
        for begin, texts in zip(begins, arguments, strict=True)
    ]
