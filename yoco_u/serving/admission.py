"""Admission: everything between a valid request body and the engine.

A request is refused if it asks for what this server does not offer or this model cannot do; any other becomes a job, for which
it is turned into token ids and sampling parameters. Whether there is room for it now is decided before that, by
`EngineLoop.submit`.
"""

import asyncio
import contextlib
import ctypes
import functools
import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerFast

from yoco_u.data import DocumentEncoder
from yoco_u.errors import UserError
from yoco_u.inference import Engine, SamplingParams
from yoco_u.inference.chat_template import chat_text, text_tokens
from yoco_u.inference.turns import Turns
from yoco_u.serving.engine_loop import EngineLoop
from yoco_u.serving.errors import ApiError
from yoco_u.serving.jobs import Admitted, Job
from yoco_u.serving.requests import ChatRequest, CompletionRequest, Message, SampledRequest
from yoco_u.serving.settings import ServerSettings
from yoco_u.serving.tools import template_writes_calls, written_out

_DEFAULT_MAX_TOKENS = 16  # of a completion, as in OpenAI's API
_SHORT = 10_000  # characters that are tokenized on the event loop, in a few milliseconds; longer texts go to a thread
_LONG_TEXTS = 2  # requests whose long texts are tokenized at the same time; that takes 100 bytes of memory a character
_PER_CHARACTER = 1e-6  # seconds that this takes
_CHATS = 8  # short chats that are tokenized at the same time
_ROLES = {"developer": "system"}  # OpenAI's newer name, which templates do not know
_SAMPLING = (
    "n", "temperature", "presence_penalty", "frequency_penalty", "logit_bias", "num_loops", "exit_threshold",
    "drafts", "top_k", "min_p",
    "repetition_penalty", "min_tokens", "ignore_eos", "stop_token_ids", "skip_special_tokens", "regex", "stop",
)  # fmt: skip
"""Parameters that requests and `SamplingParams` have under the same name, with the same meaning."""

T = TypeVar("T")


class Admission:
    """Refuses requests, or turns them into jobs.

    Args:
        no_chats: why chats are refused, None if they are not.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: PreTrainedTokenizerFast,
        loop: EngineLoop,
        settings: ServerSettings,
        no_chats: str | None,
    ) -> None:
        self._engine, self._tokenizer, self._loop, self._settings = engine, tokenizer, loop, settings
        self._encoder = DocumentEncoder(tokenizer)
        self._most_characters = _most_characters(tokenizer, engine.max_model_len)
        # None of these are asyncio's own threads, for which the end of an event loop waits.
        self._texts = Turns("texts", _LONG_TEXTS, "long texts are being tokenized")
        self._chats = ThreadPoolExecutor(_CHATS, "chat")
        self._no_chats = no_chats
        self._template_writes_calls = no_chats is None and template_writes_calls(tokenizer)

    async def completion(self, body: CompletionRequest) -> Job:
        """Admit a request for completions.

        Returns:
            The job, which the engine has accepted; whoever asked closes it.

        Raises:
            ApiError, UserError: if it is refused.
            Exception: as of `EngineLoop.submit`.
        """
        most = self._settings.max_output_tokens
        max_tokens = min(_DEFAULT_MAX_TOKENS, most) if body.max_tokens is None else body.max_tokens
        self._check_offer(body, "max_tokens", max_tokens)
        admit = functools.partial(self._admit_completion, body, max_tokens)
        return await self._loop.submit(len(body.prompts), body.num_outputs, admit)

    async def chat(self, body: ChatRequest) -> Job:
        """Admit a chat, which is one prompt; without a number of tokens, the answer may fill the context.

        Returns and raises what `completion` does.
        """
        name = "max_completion_tokens" if body.max_completion_tokens is not None else "max_tokens"
        max_tokens: int | None = getattr(body, name)
        self._check_offer(body, name, max_tokens)
        return await self._loop.submit(1, body.num_outputs, functools.partial(self._admit_chat, body, name, max_tokens))

    async def _admit_completion(self, body: CompletionRequest, max_tokens: int) -> Admitted:
        prompts = await self._encode(body.prompts)
        for prompt in prompts:
            self._check_length("prompt", len(prompt), "max_tokens", max_tokens)
        prompt_logprobs = body.logprobs if body.echo else None
        return prompts, _sampling_params(body, max_tokens, logprobs=body.logprobs, prompt_logprobs=prompt_logprobs)

    async def _admit_chat(self, body: ChatRequest, name: str, max_tokens: int | None) -> Admitted:
        prompt = await self._encode_chat(body)
        if max_tokens is None:
            max_tokens = max(1, min(self._settings.max_output_tokens, self._engine.max_model_len - len(prompt)))
        self._check_length("messages", len(prompt), name, max_tokens)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        return [prompt], _sampling_params(body, max_tokens, logprobs=logprobs, tools=body.calls)

    def _check_offer(self, body: SampledRequest, limit: str, max_tokens: int | None) -> None:
        """Refuse another model, and more or longer outputs, or more loops, than this server offers.

        Args:
            limit: what the request calls the most tokens of its output.
        """
        name, settings = self._settings.model_name, self._settings
        if body.model not in (None, name):
            raise ApiError(404, f"no model {body.model!r} here; there is {name!r}", param="model", code="model_not_found")
        if body.num_outputs > settings.max_n:
            raise ApiError(400, f"n is {body.num_outputs}, but at most {settings.max_n} are served", param="n")
        if isinstance(body.num_loops, int) and body.num_loops > settings.max_num_loops:
            raise ApiError(
                400, f"num_loops is {body.num_loops}, but at most {settings.max_num_loops} are served", param="num_loops"
            )
        if max_tokens is not None and max_tokens > (most := settings.max_output_tokens):
            raise ApiError(400, f"{limit} is {max_tokens}, but at most {most} are served", param=limit)

    def _check_length(self, prompt: str, prompt_tokens: int, limit: str, max_tokens: int) -> None:
        """Refuse sequences that are longer than the model's context.

        Args:
            prompt, limit: what the request calls its prompt, and the most tokens of its output.
        """
        longest = self._engine.max_model_len
        if prompt_tokens + max_tokens > longest:
            raise ApiError(
                400,
                f"this model's context is {longest} tokens, but {prompt_tokens} of the prompt and {max_tokens} of the output "
                f"make {prompt_tokens + max_tokens}; shorten the prompt or lower {limit}",
                param=prompt if prompt_tokens > longest else None,
                code="context_length_exceeded",
            )

    def _check_characters(self, prompt: str, characters: int) -> None:
        """Refuse a text that is too long whatever its tokens are, before it is tokenized."""
        if self._most_characters is not None and characters > self._most_characters:
            raise ApiError(
                400,
                f"this model's context is {self._engine.max_model_len} tokens, into which no text of {characters} characters "
                "fits; shorten the prompt",
                param=prompt,
                code="context_length_exceeded",
            )

    async def _encode(self, prompts: list[str | list[int]]) -> list[list[int]]:
        """Texts as the tokens of the documents that they begin; tokens stay as they are, if the vocabulary has them."""
        vocabulary, texts, found = self._engine.architecture.vocab_size, [], []
        for prompt in prompts:
            if isinstance(prompt, str):
                texts.append(prompt)
            elif (token := max(prompt)) >= vocabulary:
                raise ApiError(400, f"token {token} is not in the vocabulary of {vocabulary}", param="prompt")
            else:
                found.append(prompt)
        self._check_characters("prompt", max(map(len, texts), default=0))
        if (characters := sum(map(len, texts))) <= _SHORT:
            return found + self._encode_texts(texts)
        return found + await self._aside(characters, self._encode_texts, texts)

    def _encode_texts(self, texts: list[str]) -> list[list[int]]:
        return [tokens.tolist() for tokens in self._encoder.encode(texts)]

    async def _aside(self, characters: int, encode: Callable[..., T], *arguments: Any) -> T:
        """Tokenize long texts in a thread, of few at the same time, and give back the memory that this took.

        Raises:
            Crowded: if they would have to wait for too many others.
        """
        done: Future[T] = Future()

        def run() -> None:
            if not done.set_running_or_notify_cancel():
                return
            try:
                done.set_result(encode(*arguments))
            except BaseException as error:
                done.set_exception(error)
            with contextlib.suppress(OSError, TypeError, AttributeError):
                ctypes.CDLL(None).malloc_trim(0)  # glibc's; it keeps freed memory of threads otherwise

        self._texts.take(characters * _PER_CHARACTER, lambda: not done.cancelled(), run)
        return await asyncio.wrap_future(done)

    async def _encode_chat(self, body: ChatRequest) -> list[int]:
        """Messages and tools as tokens, by the chat template; refused if it cannot be used, or refuses them."""
        if self._no_chats is not None:
            raise ApiError(400, f"{self._no_chats} (/v1/completions)", code="no_chat_template")
        writes_out = bool(body.tools) and not self._template_writes_calls
        messages = [_for_template(one, parsed=not writes_out) for one in body.messages]
        tools = [tool.for_template() for tool in body.offered]
        try:
            # All of it, as the template may show more than contents: names, and the arguments of calls.
            characters = len(json.dumps([messages, tools], ensure_ascii=False))
            if writes_out:
                messages, tools = written_out(messages, tools), []
        except RecursionError:
            param = "tools" if tools else "messages"
            raise ApiError(400, f"{param}: a part is nested too deeply", param=param) from None
        try:
            if characters <= _SHORT:
                return await asyncio.get_running_loop().run_in_executor(self._chats, self._chat_tokens, messages, tools)
            return await self._aside(characters, self._chat_tokens, messages, tools)
        except UserError as error:
            raise ApiError(400, str(error), param="messages") from None

    def _chat_tokens(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[int]:
        text = chat_text(self._tokenizer, messages, tools=tools or None)
        self._check_characters("messages", len(text))
        return text_tokens(self._tokenizer, text)


def _most_characters(tokenizer: PreTrainedTokenizerFast, tokens: int) -> int | None:
    """The most characters that so many tokens can stand for; None where the tokenizer may drop characters of a text."""
    backend = tokenizer.backend_tokenizer
    takes_blanks = any(token.lstrip or token.rstrip for token in backend.get_added_tokens_decoder().values())
    if backend.normalizer is not None or "ByteLevel" not in str(backend.decoder) or takes_blanks:
        return None
    return tokens * max(map(len, backend.get_vocab(with_added_tokens=True)))


def _for_template(message: Message, parsed: bool) -> dict[str, Any]:
    """A message as chat templates know it: content is always there, and the arguments of tools are objects, if `parsed`."""
    found: dict[str, Any] = {"role": _ROLES.get(message.role, message.role), "content": message.content or ""}
    for key in ("name", "tool_call_id"):
        if (value := getattr(message, key)) is not None:
            found[key] = value
    if message.tool_calls:
        found["tool_calls"] = [one.model_dump(exclude_none=True) for one in message.tool_calls]
        for call in found["tool_calls"] if parsed else ():
            call["function"]["arguments"] = _object(call["function"]["arguments"])
    return found


def _object(text: str) -> object:
    """A JSON object, or the text as it is if it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


def _sampling_params(body: SampledRequest, max_tokens: int, **others: Any) -> SamplingParams:
    """The request's parameters as the engine takes them; what the request leaves open keeps the engine's default.

    Args:
        others: parameters that only some requests have, or that they have in another form.

    Raises:
        UserError: if parameters do not go together.
    """
    given = {name: value for name in _SAMPLING if (value := getattr(body, name)) is not None}
    if body.top_p == 0:
        given["top_k"] = 1  # the likeliest token alone; a probability of nothing would leave none
    elif body.top_p is not None:
        given["top_p"] = body.top_p
    if body.seed is not None:
        given["seed"] = body.seed % 2**64
    if body.response_format is not None:
        given["json_schema"] = body.response_format.schema_of_output
    return SamplingParams(max_tokens=max_tokens, **given, **others)
