"""POST /v1/chat/completions."""

import secrets
import time
from collections.abc import AsyncIterator

from fastapi import Request, Response

from yoco_u.inference import TokenLogprobs
from yoco_u.serving.answers import EventStream, usage, whole
from yoco_u.serving.engine_loop import Event, Job
from yoco_u.serving.requests import ChatRequest
from yoco_u.serving.responses import ChatChoice, ChatChunk, ChatChunkChoice, ChatLogprobs, ChatMessage, ChatResponse, Usage
from yoco_u.serving.served_model import ServedModel
from yoco_u.serving.token_texts import chat_logprobs


async def answer_chat(body: ChatRequest, request: Request, model: ServedModel) -> Response:
    """Answer a chat."""
    model.check(body)
    tokens = await model.encode_chat(body.messages)
    max_tokens = body.max_completion_tokens or body.max_tokens
    if max_tokens is None:
        max_tokens = max(1, min(model.settings.max_output_tokens, model.engine.max_model_len - len(tokens)))
    model.check_length(len(tokens), max_tokens)
    params = body.sampling_params(max_tokens, logprobs=(body.top_logprobs or 0) if body.logprobs else None)
    answer = _Answer(body, model, await model.loop.submit([tokens], params))
    if body.stream:
        return EventStream(answer.chunks(), answer.job)
    return await whole(request, answer.job, answer.response(), ChatResponse.model_dump_json)


class _Answer:
    def __init__(self, body: ChatRequest, model: ServedModel, job: Job) -> None:
        self.job, self._body, self._model = job, body, model
        self._id, self._created = f"chatcmpl-{secrets.token_hex(16)}", int(time.time())

    async def chunks(self) -> AsyncIterator[str]:
        """A chunk an event that has something to show; each output's first one tells the role."""
        at_end, always = self._body.usage_in_stream
        omitted = None if at_end or always else {"usage"}
        begun: set[int] = set()
        new = 0
        async for event in self.job:
            new += len(event.token_ids)
            delta = {} if event.output in begun else {"role": "assistant", "content": ""}
            delta |= {"content": event.text} if event.text else {}
            if delta or event.logprobs or event.finish_reason is not None:
                begun.add(event.output)
                choice = ChatChunkChoice(
                    index=event.output, delta=delta, logprobs=self._logprobs(event.logprobs),
                    finish_reason=event.finish_reason,
                )  # fmt: skip
                yield self._chunk([choice], usage(self.job, new) if always else None).model_dump_json(exclude=omitted)
        if at_end:
            yield self._chunk([], usage(self.job, new)).model_dump_json()

    async def response(self) -> ChatResponse:
        """All in one."""
        events: list[list[Event]] = [[] for _ in range(self._body.num_outputs)]
        async for event in self.job:
            events[event.output].append(event)
        return ChatResponse(
            id=self._id,
            created=self._created,
            model=self._model.settings.model_name,
            choices=[self._choice(index, found) for index, found in enumerate(events)],
            usage=usage(self.job, sum(len(event.token_ids) for found in events for event in found)),
        )

    def _choice(self, index: int, events: list[Event]) -> ChatChoice:
        return ChatChoice(
            index=index,
            message=ChatMessage(content="".join(event.text for event in events)),
            logprobs=self._logprobs([one for event in events for one in event.logprobs or []]),
            finish_reason=events[-1].finish_reason or "stop",
        )

    def _chunk(self, choices: list[ChatChunkChoice], counts: Usage | None = None) -> ChatChunk:
        return ChatChunk(
            id=self._id, created=self._created, model=self._model.settings.model_name, choices=choices, usage=counts
        )

    def _logprobs(self, logprobs: list[TokenLogprobs] | None) -> ChatLogprobs | None:
        return chat_logprobs(self._model.texts, logprobs or []) if self._body.logprobs else None
