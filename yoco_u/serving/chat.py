"""`/v1/chat/completions`: what clients get for it. Its route is in `app.py`, its request in `requests.py`."""

from collections.abc import Iterator
from typing import Any

from yoco_u.inference import Logprob, TokenLogprobs
from yoco_u.serving.answers import Answer
from yoco_u.serving.jobs import Event, Job
from yoco_u.serving.requests import ChatRequest
from yoco_u.serving.responses import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatLogprob,
    ChatLogprobs,
    ChatMessage,
    ChatResponse,
    TopLogprob,
    Usage,
)
from yoco_u.serving.token_texts import TokenTexts


class ChatAnswer(Answer[ChatChunkChoice]):
    """The answer to a chat. In a stream, the first chunk of each output names the role."""

    def __init__(self, body: ChatRequest, job: Job, model_name: str, texts: TokenTexts) -> None:
        super().__init__(body, job, model_name, "chatcmpl")
        self._texts, self._wants_logprobs = texts, bool(body.logprobs)

    def choices(self, index: int, event: Event, first: bool) -> Iterator[ChatChunkChoice]:
        delta = {"role": "assistant", "content": ""} if first else {}
        delta |= {"content": event.text} if event.text else {}
        if delta or event.logprobs or event.finish_reason is not None:
            logprobs = self._logprobs(event.logprobs or []) if self._wants_logprobs else None
            yield ChatChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=event.finish_reason)

    def chunk(self, choices: list[ChatChunkChoice], usage: Usage | None) -> ChatChunk:
        return ChatChunk(**self.head, choices=choices, usage=usage)

    def whole(self, usage: Usage) -> ChatResponse:
        return ChatResponse(**self.head, choices=[], usage=usage)

    def joined(self, index: int, parts: list[ChatChunkChoice]) -> tuple[ChatChoice, dict[str, list[Any]] | None]:
        message = ChatMessage(content="".join(part.delta.get("content", "") for part in parts))
        choice = ChatChoice(index=index, message=message, finish_reason=parts[-1].finish_reason or "stop")
        content = [one for part in parts if part.logprobs for one in part.logprobs.content]
        return choice, {"content": content} if self._wants_logprobs else None

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
