"""What a request asks of the sampler: how tokens are chosen, when the output ends, what is reported of it."""

import json
from typing import Annotated, Any

from pydantic import Field, NonNegativeInt, ValidationError, field_validator, model_validator

from yoco_u.config import (
    Config,
    Count,
    Float32,
    LoopsOrAuto,
    NonNegativeFloat32,
    PositiveFloat32,
    at_most,
    describe,
    wrong_setting,
)
from yoco_u.errors import UserError
from yoco_u.inference.drafts import Drafting
from yoco_u.inference.tool_calls import ToolCalls

MOST_OUTPUTS = 2**16
"""Outputs of one prompt at most."""


class SamplingParams(Config):
    """How one request is sampled. The filters apply in the order temperature, top-k, top-p, min-p.

    Attributes:
        n: independent outputs of the one prompt.
        max_tokens: tokens of an output at most; 0 samples nothing: the prompt is scored, or only computed into the caches.
        temperature: divides the logits; 0 takes the likeliest token every time, whatever the filters and the seed are.
        top_k: choose among so many likeliest tokens; 0 for all.
        top_p: choose among the likeliest tokens that together have this probability.
        min_p: leave out tokens less likely than this share of the likeliest one's probability.
        repetition_penalty: divides positive and multiplies negative logits of tokens in the prompt or the output; 1 for none.
        presence_penalty: subtracted from the logit of each token that the output has.
        frequency_penalty: subtracted from the logit of a token for each time that the output has it.
        logit_bias: added to the logits of tokens, by token id, after the penalties.
        seed: the same seed gives the same output whatever else runs; None draws a new one.
        stop: texts that end the output, not part of it; one string or several.
        stop_token_ids: tokens that end the output, besides the model's end token.
        ignore_eos: go on after the model's end token.
        min_tokens: tokens of an output at least, before any end token or stop string counts.
        logprobs: report log probabilities (natural) of each output token and of so many likeliest ones, 0 to 20. They are
            those of the model's own logits, before penalties, grammars, temperature and filters.
        prompt_logprobs: the same of each prompt token after the first.
        prompt_logprobs_start: leave out the prompt tokens before this position. The cross-decoder and the LM head do not run
            for them, and their prefix is shared with other requests.
        num_loops: T, the loops of the model for this request; None for the model's own. With `auto` each token leaves the loop
            when another one would hardly change it, and runs the model's own T at most.
        exit_threshold: with `auto`, the score below which a token leaves the loop, see `exits.py`: at 0 none leaves, and the
            more the higher it is. None for that of the model's `exits.json`.
        drafts: how tokens are drafted, several of which one step then verifies: by the model's first loop (`loops`), from what
            stood behind the same tokens in prompt or output (`prompt`), or not at all (`none`). None for the engine's setting.
            The output is the same.
        json_schema: the output is JSON that fits this schema, a mapping or its JSON text.
        regex: the output as a whole matches this regular expression (Rust syntax, no look-around).
        tools: the output may call tools; with `json_schema`, what has no calls fits the schema.
        skip_special_tokens: leave special tokens out of the text.

    Raises:
        UserError: on the first setting that does not fit.
    """

    n: Annotated[Count, at_most(MOST_OUTPUTS, "all of which take memory at once")] = 1
    max_tokens: NonNegativeInt = 16
    temperature: NonNegativeFloat32 = 1.0
    top_k: NonNegativeInt = 0
    top_p: float = Field(default=1.0, gt=0, le=1)
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: PositiveFloat32 = 1.0
    presence_penalty: Float32 = 0.0
    frequency_penalty: Float32 = 0.0
    logit_bias: dict[Annotated[int, Field(ge=0, lt=2**31)], Float32] = {}
    seed: int | None = Field(default=None, ge=0, lt=2**64)
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    stop_token_ids: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...] = ()
    ignore_eos: bool = False
    min_tokens: NonNegativeInt = 0
    logprobs: int | None = Field(default=None, ge=0, le=20)
    prompt_logprobs: int | None = Field(default=None, ge=0, le=20)
    prompt_logprobs_start: NonNegativeInt = 0
    num_loops: LoopsOrAuto | None = None
    exit_threshold: NonNegativeFloat32 | None = None
    drafts: Drafting | None = None
    json_schema: dict[str, Any] | None = None
    regex: str | None = None
    tools: ToolCalls | None = None
    skip_special_tokens: bool = True

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise UserError(f"SamplingParams: {describe(type(self), error)}", wrong_setting(error.errors())) from None

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator("json_schema", mode="before")
    @classmethod
    def _schema_text(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"not JSON: {error}") from None
        except RecursionError:
            raise ValueError("nested too deeply") from None

    @model_validator(mode="after")
    def _together(self) -> "SamplingParams":
        if self.min_tokens > self.max_tokens:
            raise UserError(f"min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}; lower it", "min_tokens")
        if not self.max_tokens and self.n > 1:
            raise UserError(f"max_tokens 0 samples nothing, but n is {self.n}; lower n to 1", "n")
        if self.prompt_logprobs_start and self.prompt_logprobs is None:
            needed = "prompt_logprobs_start needs prompt_logprobs; set it, to 0 for the chosen tokens alone"
            raise UserError(needed, "prompt_logprobs_start")
        if self.exit_threshold is not None and self.num_loops != "auto":
            problem = f"exit_threshold is for num_loops auto, but num_loops is {self.num_loops}; set it to auto"
            raise UserError(problem, "exit_threshold")
        if self.num_loops == "auto" and self.drafts in ("loops", "prompt"):
            raise UserError(f"num_loops auto and drafts {self.drafts} exclude each other; set drafts none", "drafts")
        if self.regex is not None and self.grammar != "regex":
            raise UserError(f"{self.grammar} and regex exclude each other; give one", "regex")
        if self.constrained and (self.ignore_eos or self.min_tokens):
            given = "ignore_eos" if self.ignore_eos else "min_tokens"
            problem = f"{given} does not go with the grammar of {self.grammar}, which says where the output may end; drop one"
            raise UserError(problem, given)
        return self

    @property
    def grammar(self) -> str | None:
        """The name of the setting that says which tokens may come; None if all may."""
        return next((name for name in ("tools", "json_schema", "regex") if getattr(self, name) is not None), None)

    @property
    def constrained(self) -> bool:
        """Whether a grammar says which tokens may come."""
        return self.grammar is not None
