"""Values in the bodies that clients send, and how each is checked.

A body is checked on the event loop, while all other clients wait. So counts are checked before what is counted, and checks of
long lists are single calls of functions in C.
"""

import reprlib
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator, model_validator

from yoco_u.config import Config
from yoco_u.errors import UserError

_MOST_KEYS, _LONGEST_KEY = 100, 100  # each unknown key would be a problem to report
_MOST_PROMPTS = 2048
_MOST_BIASES = 1024

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 200


def brief(value: object) -> str:
    """`repr` of what a client sent, cut where it is long."""
    return _short.repr(value)


def _number(value: object) -> object:
    if isinstance(value, (bool, str)):
        raise ValueError(f"expected a number, got {brief(value)}")
    return value


def _tokens_or_texts(value: object) -> object:
    """Check a prompt: one text, one list of token ids, or a list of either; null is an empty text."""
    if value is None:
        return ""
    if isinstance(value, str):
        return _unicode(value)
    if not isinstance(value, list):
        raise ValueError(f"expected a string, token ids, or a list of either, got {type(value).__name__}")
    if not value:
        raise ValueError("the list is empty; give at least one token or one prompt")
    if isinstance(value[0], (str, list)):
        if len(value) > _MOST_PROMPTS:
            raise ValueError(f"{len(value)} prompts are too many; expected at most {_MOST_PROMPTS} in one request")
        return [_one_text(one) for one in value] if isinstance(value[0], str) else [_tokens(one) for one in value]
    return _tokens(value)


def _one_text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected only strings in the list, got {type(value).__name__}")
    return _unicode(value)


def _unicode(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"no Unicode text: a lone surrogate at character {error.start}") from None
    return value


def _tokens(value: object) -> list[int]:
    if not isinstance(value, list):
        raise ValueError(f"expected only lists of token ids in the list, got {type(value).__name__}")
    if not value:
        raise ValueError("a list of token ids is empty; give at least one")
    if set(map(type, value)) != {int} or min(value) < 0:
        wrong = next(token for token in value if type(token) is not int or token < 0)
        raise ValueError(f"token {brief(wrong)} is no token id; expected whole numbers of at least 0")
    return value


def _several(value: object) -> object:
    return [value] if isinstance(value, str) else value


Text = Annotated[str, AfterValidator(_unicode)]
Number = BeforeValidator(_number)  # comes last: a limit behind it would be rounded to a float in errors
TokenId = Annotated[int, Field(ge=0)]
Prompt = Annotated[
    str | list[str] | list[int] | list[list[int]],
    PlainValidator(
        _tokens_or_texts,
        json_schema_input_type=str
        | None
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1)],
    ),
]
_StopText = Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(_unicode)]
_StopTexts = Annotated[list[_StopText], Field(max_length=64, fail_fast=True)]
Stop = Annotated[_StopTexts, BeforeValidator(_several, json_schema_input_type=_StopText | _StopTexts)]


def _biases(value: object) -> object:
    """Check biases by token id, which JSON has as text."""
    if not isinstance(value, dict):
        raise ValueError(f"expected an object of token ids and numbers, got {type(value).__name__}")
    if len(value) > _MOST_BIASES:
        raise ValueError(f"{len(value)} tokens are too many; expected at most {_MOST_BIASES}")
    found: dict[int, float] = {}
    for key, bias in value.items():
        if not (isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) < 10 and key == str(int(key))):
            raise ValueError(f"{brief(key)} is no token id; expected whole numbers as text, without leading zeros")
        if isinstance(bias, bool) or not isinstance(bias, (int, float)) or not -100 <= bias <= 100:
            raise ValueError(f"the bias of {key} is {brief(bias)}; expected a number from -100 to 100")
        found[int(key)] = float(bias)
    return found


Bias = Annotated[
    dict[int, float], PlainValidator(_biases, json_schema_input_type=dict[str, Annotated[float, Field(ge=-100, le=100)]])
]


class Body(Config):
    """A part of a body, or a whole one."""

    @model_validator(mode="before")
    @classmethod
    def _few_keys(cls, data: Any) -> Any:
        if isinstance(data, dict):
            if len(data) > _MOST_KEYS:
                raise ValueError(f"{len(data)} keys are too many")
            for key in data:
                if len(key) > _LONGEST_KEY:
                    raise UserError(f"unknown key {brief(key)}", key[:_LONGEST_KEY])
        return data


def only_text(value: object) -> object:
    """Join the content of a message that comes in parts, which must all be text."""
    if not isinstance(value, list):
        return value
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError("only parts of the form {type: text, text: ...} are supported")
    return "".join(part["text"] for part in value)
