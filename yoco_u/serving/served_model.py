"""The one model of a server: its name, its limits, and texts as its tokens."""

import asyncio
import time
from collections.abc import Sequence

from yoco_u.budget import bytes_per_kv_element, kv_bytes, parameters
from yoco_u.data import DocumentEncoder
from yoco_u.errors import UserError
from yoco_u.inference import Engine
from yoco_u.inference.chat_template import chat_tokens
from yoco_u.serving.engine_loop import EngineLoop
from yoco_u.serving.errors import ApiError
from yoco_u.serving.requests import Message, SampledRequest
from yoco_u.serving.responses import KVBytes, Model, ModelFacts
from yoco_u.serving.settings import ServerSettings
from yoco_u.serving.token_texts import TokenTexts

_SHORT = 10_000  # characters that are tokenized at once, in under a millisecond or two; longer texts go to a thread


class ServedModel:
    """What the routes need of a model.

    Raises:
        UserError: if the engine has no tokenizer.
    """

    def __init__(self, engine: Engine, loop: EngineLoop, settings: ServerSettings) -> None:
        if engine.tokenizer is None:
            raise UserError("the engine has no tokenizer; texts cannot be served without one")
        self.engine, self.loop, self.settings = engine, loop, settings
        self.tokenizer = engine.tokenizer
        self.texts = TokenTexts(engine.tokenizer)
        self.created = int(time.time())
        self._encoder = DocumentEncoder(engine.tokenizer)

    def describe(self) -> Model:
        return Model(id=self.settings.model_name, created=self.created, max_model_len=self.engine.max_model_len)

    def check(self, body: SampledRequest) -> None:
        """Refuse what this server does not offer.

        Raises:
            ApiError: with what it does offer.
        """
        name, settings = self.settings.model_name, self.settings
        if body.model not in (None, name):
            raise ApiError(404, f"no model {body.model!r} here; there is {name!r}", param="model", code="model_not_found")
        if body.num_outputs > settings.max_n:
            raise ApiError(400, f"n is {body.num_outputs}, but at most {settings.max_n} are served", param="n")
        if body.num_loops is not None and body.num_loops > settings.max_num_loops:
            raise ApiError(
                400, f"num_loops is {body.num_loops}, but at most {settings.max_num_loops} are served", param="num_loops"
            )

    async def encode(self, prompt: str | list[int]) -> list[int]:
        """A text as a document's tokens; tokens as they are.

        Raises:
            ApiError: for a token that the model does not have.
        """
        vocabulary = self.engine.architecture.vocab_size
        if isinstance(prompt, list):
            for token in prompt:
                if token >= vocabulary:
                    raise ApiError(400, f"token {token} is not in the vocabulary of {vocabulary}", param="prompt")
            return prompt
        if len(prompt) <= _SHORT:
            return self._encode(prompt)
        return await asyncio.to_thread(self._encode, prompt)

    async def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """A chat's tokens, by the model's template.

        Raises:
            ApiError: if the model has no template, or it refuses the messages.
        """
        roles = {"developer": "system"}
        plain = [{"role": roles.get(one.role, one.role), "content": one.content or ""} for one in messages]
        try:
            return await asyncio.to_thread(chat_tokens, self.tokenizer, plain)
        except UserError as error:
            code = None if self.has_chat_template else "no_chat_template"
            raise ApiError(400, f"{error}{'' if code is None else ' (/v1/completions)'}", param="messages", code=code) from None

    @property
    def has_chat_template(self) -> bool:
        return bool(self.tokenizer.chat_template)

    def check_length(self, prompt_tokens: int, max_tokens: int) -> None:
        """Refuse what is longer than the model may.

        Raises:
            ApiError: with the numbers.
        """
        longest, most = self.engine.max_model_len, self.settings.max_output_tokens
        if max_tokens > most:
            raise ApiError(400, f"max_tokens is {max_tokens}, but at most {most} are served", param="max_tokens")
        if prompt_tokens + max_tokens > longest:
            raise ApiError(
                400,
                f"this model's context is {longest} tokens, but {prompt_tokens} of the prompt and {max_tokens} of the output "
                f"make {prompt_tokens + max_tokens}; shorten the prompt or lower max_tokens",
                code="context_length_exceeded",
            )

    def kv_bytes(self, tokens: int, num_loops: int) -> KVBytes:
        """Bytes of keys and values of one sequence: what this model keeps, and what a Transformer of its shape would."""
        kind = self.engine.cache.shape.kind
        a, twin = self.engine.architecture.with_loops(num_loops), self.engine.architecture.dense_transformer()
        kept, usual = (kv_bytes(one, tokens, bytes_per_kv_element(one, kind)) for one in (a, twin))
        return KVBytes(bytes=kept, transformer_bytes=usual)

    def facts(self) -> ModelFacts:
        a, settings = self.engine.architecture, self.settings
        return ModelFacts(
            name=settings.model_name,
            chat=self.has_chat_template,
            parameters=parameters(a).total,
            stages=[
                f"{stage.attention} x {stage.layers}" + (f", {stage.loops} loops" if stage.loops > 1 else "")
                for stage in a.stages
            ],
            window=a.window,
            num_loops=self.engine.num_loops,
            max_num_loops=settings.max_num_loops,
            max_model_len=self.engine.max_model_len,
            max_output_tokens=settings.max_output_tokens,
            max_n=settings.max_n,
        )

    def _encode(self, text: str) -> list[int]:
        return [int(token) for token in self._encoder.encode([text])[0]]
