"""The bodies that clients send: OpenAI's completions and chat completions, with parameters of our own.

Parameters of OpenAI's API that do not change the answer, such as `user`, are accepted and ignored. Those that would change it
and that we do not support are refused. So are unknown parameters, as by OpenAI's own server.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, StrictBool, ValidationError, model_validator

from yoco_u.config import Config, LoopsOrAuto
from yoco_u.errors import UserError
from yoco_u.inference.drafts import Drafting
from yoco_u.inference.tool_calls import MOST_CALLS, Name, ObjectSchema, ToolCalls
from yoco_u.serving.fields import Bias, Body, Number, Prompt, Stop, Text, brief, only_text

_IGNORED = frozenset(
    ["user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_options",
     "prompt_cache_retention", "parallel_tool_calls"]
)  # fmt: skip
_REFUSED: dict[str, tuple[Any, ...]] = {  # refused unless null or one of these values, with which they ask for nothing
    "suffix": ("",), "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],),
    "function_call": ("none", "auto"), "modalities": (["text"],), "audio": (), "prediction": (), "web_search_options": (),
    "reasoning_effort": ("none",), "verbosity": ("medium",), "moderation": (),
}  # fmt: skip
_NO_FIELDS = _IGNORED | _REFUSED.keys()  # except in requests that have a field of that name
_NONE_OF = {"tools": "tool_choice", "functions": "function_call"}  # may be given where the other says that none is called
_ADVICE = {"functions": "use tools", "function_call": "use tools and tool_choice", "tools": "use /v1/chat/completions"}
_MOST_TOOLS = 128


class StreamOptions(Body):
    """What a stream reports besides the text.

    Attributes:
        include_usage: end the stream with a chunk that has no choices, only the token counts of the whole request.
        continuous_usage_stats: report the token counts so far in every chunk, as vLLM does.
        include_obfuscation: accepted and ignored.
    """

    include_usage: StrictBool | None = None
    continuous_usage_stats: StrictBool | None = None
    include_obfuscation: StrictBool | None = None


class NamedSchema(Body):
    """A JSON schema with its name."""

    name: Text | None = None
    description: Text | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: StrictBool | None = None


class ResponseFormat(Body):
    """The form that the output must have: any text, any JSON object, or JSON that fits a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("type json_schema and the key json_schema belong together; give both or neither")
        return self

    @property
    def schema_of_output(self) -> dict[str, Any] | None:
        """The schema that the output must fit, None if it may be any text."""
        if self.json_schema is not None:
            return self.json_schema.schema_
        return {"type": "object"} if self.type == "json_object" else None


class SampledRequest(Body):
    """Parameters of completions and chats alike. null stands for the default everywhere, as in OpenAI's API."""

    model: Text | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1), Number] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64), Number] | None = None
    stop: Stop | None = None
    temperature: Annotated[float, Field(ge=0, le=2), Number] | None = None
    top_p: Annotated[float, Field(ge=0, le=1), Number] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2), Number] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2), Number] | None = None
    logit_bias: Bias | None = None
    response_format: ResponseFormat | None = None
    num_loops: LoopsOrAuto | None = None
    exit_threshold: Annotated[float, Field(ge=0, le=1e30), Number] | None = None
    drafts: Drafting | None = None
    top_k: Annotated[int, Field(ge=0), Number] | None = None
    min_p: Annotated[float, Field(ge=0, le=1), Number] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100), Number] | None = None
    min_tokens: Annotated[int, Field(ge=0), Number] | None = None
    ignore_eos: StrictBool | None = None
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0), Number]], Field(max_length=256, fail_fast=True)] | None = None
    skip_special_tokens: StrictBool | None = None
    regex: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _others(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        fields = cls.model_fields
        others = {key: value for key, value in data.items() if key not in fields}
        for name, neutral in _REFUSED.items():
            unused = data.get(_NONE_OF.get(name, "")) == "none"
            if others.get(name) is not None and others[name] not in neutral and not unused:
                raise UserError(f"{name} is not supported; {_ADVICE.get(name, 'leave it out')}", name)
        return {key: value for key, value in data.items() if key in fields or key not in _NO_FIELDS}

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> "SampledRequest":
        if self.stream_options is not None and not self.stream:
            raise UserError("stream_options is for streams; set stream to true, or leave it out", "stream_options")
        return self

    @property
    def num_outputs(self) -> int:
        """Outputs of each prompt."""
        return self.n or 1

    @property
    def usage_in_stream(self) -> tuple[bool, bool]:
        """Whether a stream ends with token counts, and whether all its chunks have them."""
        options = self.stream_options or StreamOptions()
        return bool(options.include_usage), bool(options.continuous_usage_stats)


class CompletionRequest(SampledRequest):
    """Continue a prompt.

    Attributes:
        prompt: a text, which begins a document; token ids, which are used as they are; or a list of either. With an empty text,
            or null, the model begins a new document.
        echo: put the prompt before the output.
        logprobs: report the log probability of each output token and, with `echo`, of each prompt token, beside those of this
            many likeliest tokens in its place.
        num_loops: T, how often the looped layers run; the model's own by default. With `auto` each token leaves the loop when
            another one would hardly change it.
        exit_threshold: with `auto`, the score below which a token leaves the loop; the model's own by default.
        drafts: how tokens are drafted, which makes an answer faster and changes nothing in it; the server's way by default.
        regex: regular expression that the output as a whole must match.
    """

    prompt: Prompt = ""
    max_tokens: Annotated[int, Field(ge=0), Number] | None = None
    echo: StrictBool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20), Number] | None = None
    best_of: Annotated[int, Field(ge=0), Number] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts as a list, also where there is one."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)

    @model_validator(mode="after")
    def _best_of(self) -> "CompletionRequest":
        if self.best_of not in (None, 0, self.num_outputs):
            raise UserError(
                f"best_of {self.best_of} is not supported; leave it out and set n to get several outputs", "best_of"
            )
        return self


class TextPart(Config):
    """A part of a message's content; parts of other types are not supported."""

    type: Literal["text"]
    text: str


class FunctionCall(BaseModel):
    """A function's name, and its arguments as JSON text, as a model wrote them."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: Text
    arguments: Text = "{}"


class ToolCall(BaseModel):
    """A tool that an earlier answer called."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: Text | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(BaseModel):
    """One message of a chat. Other keys are ignored, so that clients can send back the messages of OpenAI's answers.

    The chat template gets the keys that a message has. Whether it shows names, calls and results of tools is up to it.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[Text, BeforeValidator(only_text, json_schema_input_type=str | list[TextPart])] | None = None
    name: Text | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128, fail_fast=True)] | None = None
    tool_call_id: Text | None = None


class Function(Body):
    """A function that the model may call.

    Attributes:
        parameters: the JSON schema of its arguments, which are an object; without one it has none.
        strict: accepted and ignored: arguments always fit the schema.
    """

    name: Name
    description: Text | None = None
    parameters: ObjectSchema | None = None
    strict: StrictBool | None = None

    @property
    def schema_of_arguments(self) -> dict[str, Any]:
        none: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
        return none if self.parameters is None else self.parameters


class Tool(Body):
    """A tool that the model may call; tools of other types are not supported."""

    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        """The tool as models are shown it."""
        described = {} if self.function.description is None else {"description": self.function.description}
        function = {"name": self.function.name} | described | {"parameters": self.function.schema_of_arguments}
        return {"type": "function", "function": function}


class FunctionName(Body):
    name: str


class NamedTool(Body):
    """The one function to call."""

    type: Literal["function"]
    function: FunctionName


def _choice(value: object) -> object:
    if value in ("none", "auto", "required"):
        return value
    try:
        return NamedTool.model_validate(value)
    except ValidationError:
        expected = "none, auto, required or {type: function, function: {name: ...}}"
        raise ValueError(f"expected {expected}, got {brief(value)}") from None


ToolChoice = Annotated[
    str | NamedTool,
    PlainValidator(_choice, json_schema_input_type=Literal["none", "auto", "required"] | NamedTool),
]


class ChatRequest(SampledRequest):
    """Answer a chat.

    Attributes:
        max_completion_tokens: the newer name of max_tokens.
        logprobs: report the log probability of each output token.
        top_logprobs: report also those of this many likeliest tokens in its place.
        tools: what the answer may call.
        tool_choice: whether it does: as the model likes (auto), not at all (none), at least once and without any text
            (required), or one function, once. auto by default.
        parallel_tool_calls: whether there may be several calls in one answer, which is the default.
    """

    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000, fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=1), Number] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1), Number] | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20), Number] | None = None
    tools: Annotated[list[Tool], Field(max_length=_MOST_TOOLS, fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: StrictBool | None = None

    @property
    def offered(self) -> list[Tool]:
        """The tools that the model is shown."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def calls(self) -> ToolCalls | None:
        """The calls that the answer may have, None if it may have none."""
        if not self.offered:
            return None
        named = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None
        functions = [tool.function for tool in self.offered if named in (None, tool.function.name)]
        return ToolCalls(
            schemas={function.name: function.schema_of_arguments for function in functions},
            required=named is not None or self.tool_choice == "required",
            most=1 if named is not None or self.parallel_tool_calls is False else MOST_CALLS,
        )

    @model_validator(mode="after")
    def _tools(self) -> "ChatRequest":
        names = [tool.function.name for tool in self.tools or []]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"several tools have the name {twice}; give each its own", "tools")
        choice = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else self.tool_choice
        if choice not in (None, "none", "auto") and not names:
            raise UserError("tool_choice asks for a call, but there are no tools; give tools, or leave it out", "tool_choice")
        if isinstance(self.tool_choice, NamedTool) and choice not in names:
            raise UserError(f"tool_choice: no tool has the name {brief(choice)}", "tool_choice")
        return self

    @model_validator(mode="after")
    def _together(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise UserError("top_logprobs needs logprobs to be true", "top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise UserError("max_tokens and max_completion_tokens are two names of one thing; give one", "max_tokens")
        return self


REQUESTS: dict[str, type[SampledRequest]] = {"/v1/completions": CompletionRequest, "/v1/chat/completions": ChatRequest}
