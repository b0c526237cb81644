"""Admission: everything between a valid request body and the engine.

A request is refused if it asks for what this server does not offer or this model cannot do; any other is turned into token ids
and sampling parameters. Whether there is room for it now is decided afterwards, by `EngineLoop.submit`.
"""

import asyncio
from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

from yoco_u.data import DocumentEncoder
from yoco_u.errors import UserError
from yoco_u.inference import Engine, SamplingParams
from yoco_u.inference.chat_template import chat_tokens
from yoco_u.serving.errors import ApiError
from yoco_u.serving.requests import ChatRequest, CompletionRequest, Message, SampledRequest
from yoco_u.serving.settings import ServerSettings

_DEFAULT_MAX_TOKENS = 16  # of a completion, as in OpenAI's API
_SHORT = 10_000  # characters that are tokenized on the event loop, in a millisecond or two; longer texts go to a thread
_SAMPLING = (
    "n", "temperature", "top_p", "presence_penalty", "frequency_penalty", "num_loops", "top_k", "min_p", "repetition_penalty",
    "min_tokens", "ignore_eos", "stop_token_ids", "skip_special_tokens", "regex", "stop",
)  # fmt: skip
"""Parameters that requests and `SamplingParams` have under the same name, with the same meaning."""

Admitted = tuple[list[list[int]], SamplingParams]
"""Token ids of each prompt, and the sampling parameters of all: what `EngineLoop.submit` takes."""


class Admission:
    """Refuses requests, or turns them into what the engine takes."""

    def __init__(self, engine: Engine, tokenizer: PreTrainedTokenizerFast, settings: ServerSettings) -> None:
        self._engine, self._tokenizer, self._settings = engine, tokenizer, settings
        self._encoder = DocumentEncoder(tokenizer)

    async def completion(self, body: CompletionRequest) -> Admitted:
        """Admit a request for completions.

        Raises:
            ApiError, UserError: if it is refused.
        """
        self._check_offer(body)
        max_tokens = _DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        prompts = [await self._encode(prompt) for prompt in body.prompts]
        for prompt in prompts:
            self._check_length(len(prompt), max_tokens)
        prompt_logprobs = body.logprobs if body.echo else None
        return prompts, _sampling_params(body, max_tokens, logprobs=body.logprobs, prompt_logprobs=prompt_logprobs)

    async def chat(self, body: ChatRequest) -> Admitted:
        """Admit a chat, which is one prompt; without a number of tokens, the answer may fill the context.

        Raises:
            ApiError, UserError: if it is refused.
        """
        self._check_offer(body)
        prompt = await self._encode_chat(body.messages)
        max_tokens = body.max_completion_tokens or body.max_tokens
        if max_tokens is None:
            max_tokens = max(1, min(self._settings.max_output_tokens, self._engine.max_model_len - len(prompt)))
        self._check_length(len(prompt), max_tokens)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        return [prompt], _sampling_params(body, max_tokens, logprobs=logprobs)

    def _check_offer(self, body: SampledRequest) -> None:
        """Refuse another model, and more outputs or loops than this server offers."""
        name, settings = self._settings.model_name, self._settings
        if body.model not in (None, name):
            raise ApiError(404, f"no model {body.model!r} here; there is {name!r}", param="model", code="model_not_found")
        if body.num_outputs > settings.max_n:
            raise ApiError(400, f"n is {body.num_outputs}, but at most {settings.max_n} are served", param="n")
        if body.num_loops is not None and body.num_loops > settings.max_num_loops:
            raise ApiError(
                400, f"num_loops is {body.num_loops}, but at most {settings.max_num_loops} are served", param="num_loops"
            )

    def _check_length(self, prompt_tokens: int, max_tokens: int) -> None:
        """Refuse outputs that are longer than this server offers, and sequences that are longer than the model's context."""
        longest, most = self._engine.max_model_len, self._settings.max_output_tokens
        if max_tokens > most:
            raise ApiError(400, f"max_tokens is {max_tokens}, but at most {most} are served", param="max_tokens")
        if prompt_tokens + max_tokens > longest:
            raise ApiError(
                400,
                f"this model's context is {longest} tokens, but {prompt_tokens} of the prompt and {max_tokens} of the output "
                f"make {prompt_tokens + max_tokens}; shorten the prompt or lower max_tokens",
                code="context_length_exceeded",
            )

    async def _encode(self, prompt: str | list[int]) -> list[int]:
        """A text as the tokens of a document that it begins; tokens stay as they are, if the vocabulary has them."""
        if isinstance(prompt, list):
            vocabulary = self._engine.architecture.vocab_size
            for token in prompt:
                if token >= vocabulary:
                    raise ApiError(400, f"token {token} is not in the vocabulary of {vocabulary}", param="prompt")
            return prompt
        if len(prompt) <= _SHORT:
            return self._encode_text(prompt)
        return await asyncio.to_thread(self._encode_text, prompt)

    def _encode_text(self, text: str) -> list[int]:
        return [int(token) for token in self._encoder.encode([text])[0]]

    async def _encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Messages as tokens, by the chat template; refused without a template, or if the template refuses them."""
        roles = {"developer": "system"}  # OpenAI's newer name, which templates do not know
        plain = [{"role": roles.get(one.role, one.role), "content": one.content or ""} for one in messages]
        try:
            return await asyncio.to_thread(chat_tokens, self._tokenizer, plain)
        except UserError as error:
            if self._tokenizer.chat_template:
                raise ApiError(400, str(error), param="messages") from None
            raise ApiError(400, f"{error} (/v1/completions)", param="messages", code="no_chat_template") from None


def _sampling_params(body: SampledRequest, max_tokens: int, **logprobs: int | None) -> SamplingParams:
    """The request's parameters as the engine takes them; what the request leaves open keeps the engine's default.

    Raises:
        UserError: if parameters do not go together.
    """
    given = {name: value for name in _SAMPLING if (value := getattr(body, name)) is not None}
    if body.seed is not None:
        given["seed"] = body.seed % 2**64
    if body.response_format is not None:
        given["json_schema"] = body.response_format.schema_of_output
    return SamplingParams(max_tokens=max_tokens, **given, **logprobs)
