"""POST /v1/completions."""

import secrets
import time
from collections.abc import AsyncIterator

from fastapi import Request, Response

from yoco_u.inference import TokenLogprobs
from yoco_u.serving.answers import EventStream, usage, whole
from yoco_u.serving.engine_loop import Event, FinishReason, Job
from yoco_u.serving.requests import CompletionRequest
from yoco_u.serving.responses import CompletionChoice, CompletionLogprobs, CompletionResponse, Usage
from yoco_u.serving.served_model import ServedModel
from yoco_u.serving.token_texts import CompletionLogprobWriter

_DEFAULT_MAX_TOKENS = 16


async def complete(body: CompletionRequest, request: Request, model: ServedModel) -> Response:
    """Answer a request for completions."""
    model.check(body)
    max_tokens = _DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    prompts = _several(body.prompt)
    tokens = [await model.encode(prompt) for prompt in prompts]
    for one in tokens:
        model.check_length(len(one), max_tokens)
    params = body.sampling_params(max_tokens, logprobs=body.logprobs, prompt_logprobs=body.logprobs if body.echo else None)
    answer = _Answer(body, model, prompts, await model.loop.submit(tokens, params))
    if body.stream:
        return EventStream(answer.chunks(), answer.job)
    return await whole(request, answer.job, answer.response(), CompletionResponse.model_dump_json)


def _several(prompt: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)


class _Answer:
    def __init__(self, body: CompletionRequest, model: ServedModel, prompts: list[str | list[int]], job: Job) -> None:
        self.job, self._body, self._model = job, body, model
        self._id, self._created = f"cmpl-{secrets.token_hex(16)}", int(time.time())
        self._outputs = [_Output(body, model, prompt, job) for prompt in prompts for _ in range(body.num_outputs)]

    async def chunks(self) -> AsyncIterator[str]:
        """A chunk an event that has something to show."""
        at_end, always = self._body.usage_in_stream
        omitted = None if at_end or always else {"usage"}
        new = 0
        async for event in self.job:
            index = self._index(event)
            new += len(event.token_ids)
            text, logprobs = self._outputs[index].take(event)
            if text or logprobs is not None or event.finish_reason is not None:
                choice = CompletionChoice(index=index, text=text, logprobs=logprobs, finish_reason=event.finish_reason)
                yield self._response([choice], usage(self.job, new) if always else None).model_dump_json(exclude=omitted)
        if at_end:
            yield self._response([], usage(self.job, new)).model_dump_json()

    async def response(self) -> CompletionResponse:
        """All in one."""
        new = 0
        async for event in self.job:
            self._outputs[self._index(event)].keep(event)
            new += len(event.token_ids)
        return self._response([output.choice(index) for index, output in enumerate(self._outputs)], usage(self.job, new))

    def _index(self, event: Event) -> int:
        return event.prompt * self._body.num_outputs + event.output

    def _response(self, choices: list[CompletionChoice], counts: Usage | None = None) -> CompletionResponse:
        return CompletionResponse(
            id=self._id, created=self._created, model=self._model.settings.model_name, choices=choices, usage=counts
        )


class _Output:
    """One output: its events as text and log probabilities, with the prompt before them where it is to be echoed."""

    def __init__(self, body: CompletionRequest, model: ServedModel, prompt: str | list[int], job: Job) -> None:
        self._echoes = bool(body.echo)
        self._prompt, self._model, self._job = prompt, model, job
        self._writer = CompletionLogprobWriter(model.texts, job.params) if body.logprobs is not None else None
        self._kept: list[tuple[str, CompletionLogprobs | None]] = []
        self._finish_reason: FinishReason | None = None

    def take(self, event: Event) -> tuple[str, CompletionLogprobs | None]:
        text, tokens = event.text, event.token_ids
        logprobs: list[TokenLogprobs | None] = list(event.logprobs or [])
        if self._echoes:
            self._echoes = False
            request = self._job.requests[event.prompt]
            text = self._echo(request.prompt_token_ids) + text
            tokens = request.prompt_token_ids + tokens
            logprobs = (request.prompt_logprobs or []) + logprobs
        if self._writer is None or not tokens:
            return text, None
        return text, self._writer.write(tokens, logprobs)

    def keep(self, event: Event) -> None:
        self._kept.append(self.take(event))
        self._finish_reason = event.finish_reason

    def choice(self, index: int) -> CompletionChoice:
        """What was kept, as one."""
        found = [logprobs for _, logprobs in self._kept if logprobs is not None]
        logprobs = None
        if self._writer is not None:
            logprobs = CompletionLogprobs(
                tokens=[token for one in found for token in one.tokens],
                token_logprobs=[value for one in found for value in one.token_logprobs],
                top_logprobs=[top for one in found for top in one.top_logprobs],
                text_offset=[offset for one in found for offset in one.text_offset],
            )
        text = "".join(text for text, _ in self._kept)
        return CompletionChoice(index=index, text=text, logprobs=logprobs, finish_reason=self._finish_reason)

    def _echo(self, tokens: list[int]) -> str:
        if isinstance(self._prompt, str):
            return self._prompt
        return str(
            self._model.tokenizer.backend_tokenizer.decode(tokens, skip_special_tokens=self._job.params.skip_special_tokens)
        )
