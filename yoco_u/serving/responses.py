"""What clients receive, in the shapes of OpenAI's API and of our own routes."""

from typing import Literal

from pydantic import BaseModel


class CachedTokens(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    """Token counts of a whole request: all its prompts and outputs together."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class CompletionLogprobs(BaseModel):
    """Log probabilities, one entry for each token. Tokens whose bytes are not text by themselves are named `bytes:\\xNN`."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None


class CompletionResponse(BaseModel):
    """A whole completion, or one chunk of a stream of it."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatLogprob]


class ChatMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"]


class ChatResponse(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatChunkChoice(BaseModel):
    """One output's part in a chunk.

    Attributes:
        delta: has `role` in an output's first chunk, and `content` where there is new text.
    """

    index: int
    delta: dict[str, str]
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None


class ChatChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "yoco-u"
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class ModelFacts(BaseModel):
    """What the page shows of the model, and the limits of its controls.

    Attributes:
        chat: whether the model has a chat template that can be used; without one it continues texts.
        num_loops: T of requests that name none.
    """

    name: str
    chat: bool
    parameters: int
    stages: list[str]
    window: int | None
    num_loops: int
    max_num_loops: int
    max_model_len: int
    max_output_tokens: int
    max_n: int


class KVBytes(BaseModel):
    """Size of the KV cache of one sequence.

    Attributes:
        bytes: what this model keeps.
        transformer_bytes: what a Transformer of the same shape keeps: full attention in as many layers, each applied once.
    """

    bytes: int
    transformer_bytes: int


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    error: ErrorDetail
