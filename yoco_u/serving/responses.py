"""What clients receive, in the shapes of OpenAI's API and of our own routes."""

from typing import Any, Literal

from pydantic import BaseModel, SerializerFunctionWrapHandler, model_serializer


class CachedTokens(BaseModel):
    cached_tokens: int


class CompletionDetails(BaseModel):
    """How the tokens of the outputs came about.

    Attributes:
        accepted_prediction_tokens, rejected_prediction_tokens: tokens that were drafted, under OpenAI's names: those that
            became part of an output, and those that did not.
        mean_loops: mean over the tokens of how many loops were run for each; None without tokens.
    """

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int
    mean_loops: float | None


class Usage(BaseModel):
    """Token counts of a whole request: all its prompts and outputs together."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: CompletionDetails


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


class CalledFunction(BaseModel):
    """A function's name, and its arguments as JSON text."""

    name: str
    arguments: str


class AnsweredCall(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(BaseModel):
    """What the model says.

    Attributes:
        content: None where there are only calls.
        tool_calls: the tools that it calls; left out where there are none.
    """

    role: Literal["assistant"] = "assistant"
    content: str | None
    tool_calls: list[AnsweredCall] = []

    @model_serializer(mode="wrap")
    def _without_no_calls(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if value != []}


ChatFinishReason = Literal["stop", "length", "tool_calls"]


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: ChatFinishReason


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
        delta: has `role` in an output's first chunk, `content` where there is new text, and `tool_calls` where there are new
            parts of calls: of each its `index`, at its begin `id`, `type` and the function's `name`, and always the next part
            of the function's `arguments`.
    """

    index: int
    delta: dict[str, str | list[dict[str, Any]]]
    logprobs: ChatLogprobs | None = None
    finish_reason: ChatFinishReason | None


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
        num_loops: T of requests that name none; the most loops of a token, where their tokens leave the loop.
        auto_loops: whether requests may say `auto` in its place, without an `exit_threshold`.
        auto_by_default: whether those that name none are `auto`.
    """

    name: str
    chat: bool
    parameters: int
    stages: list[str]
    window: int | None
    num_loops: int
    auto_loops: bool
    auto_by_default: bool
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
