r"""Calls of tools as a model writes them, in the form of Hermes and Qwen, and the grammar of an output that may have some.

A call is a block of its own, behind the text if there is any:

    <tool_call>
    {"name": "weather", "arguments": {"city": "Paris"}}
    </tool_call>
"""

import json
import re
from collections.abc import Callable, Collection
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from yoco_u.config import Config, Count
from yoco_u.inference.json_schemas import with_plain_names

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MOST_CALLS = 128  # in one output, as in one message of a chat

_ARGUMENTS = re.compile(r"^arguments_([0-9]+):", re.MULTILINE)


def _object_schema(schema: dict[str, Any]) -> dict[str, Any]:
    given = schema.get("type", "object")
    if given != "object" and given != ["object"]:
        raise ValueError("the arguments of a tool are an object; the type of their schema must be object")
    return schema | {"type": "object"}


Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]  # as in OpenAI's API; no such name breaks out of a call
ObjectSchema = Annotated[dict[str, Any], AfterValidator(_object_schema)]


class ToolCalls(Config):
    """Calls that an output may have: text, then any number of calls, whose arguments fit the schemas.

    Attributes:
        schemas: the JSON schema of the arguments of each tool, by its name.
        required: the output has a call at least, and no text.
        most: calls of one output at most.
    """

    schemas: dict[Name, ObjectSchema] = Field(min_length=1)
    required: bool = False
    most: Count = MOST_CALLS

    def grammar(
        self, text_schema: dict[str, Any] | None, token_id: Callable[[str], int | None], added_tokens: Collection[int]
    ) -> str:
        """The grammar of the whole output, in llguidance's form of Lark.

        Args:
            text_schema: an output without calls is JSON that fits this schema; None for any text.
            token_id: the token that stands for a tag, None where the tag is written in ordinary tokens alone.
            added_tokens: other tokens that may come in the text; llguidance knows them by their numbers alone.

        Raises:
            RecursionError: if a schema is nested too deeply.
        """
        opening, closing = (_either(tag, token_id(tag)) for tag in (OPEN, CLOSE))
        more = f'("\\n" {opening} call){{0,{self.most - 1}}}' if self.most > 1 else ""
        if self.required:
            lines = [f"start: {opening} call {more}"]
        elif text_schema is not None:
            lines = [f"start: answer | {opening} call {more}", f"answer: %json {json.dumps(with_plain_names(text_schema))}"]
        else:
            lines = [f"start: text | begun call {more}", *_text_before_calls(token_id(OPEN), added_tokens)]
        lines.append("call: " + " | ".join(f"call_{index}" for index in range(len(self.schemas))))
        for index, (name, schema) in enumerate(self.schemas.items()):
            lines.append(f'call_{index}: {json.dumps(_head(name))} arguments_{index} "}}\\n" {closing}')
            lines.append(f"arguments_{index}: %json {json.dumps(with_plain_names(schema))}")
        return "\n".join(lines)

    def tool_of(self, grammar: str, line: int) -> str | None:
        """The tool whose schema is on a line of the grammar, from 1 on; None if there is none."""
        found = _ARGUMENTS.match(grammar.split("\n")[line - 1])
        return list(self.schemas)[int(found[1])] if found else None


def call_text(name: str, arguments: str) -> str:
    """A call as the model writes it.

    Args:
        arguments: JSON text.
    """
    return f"{OPEN}{_head(name)}{arguments}}}\n{CLOSE}"


def _head(name: str) -> str:
    """What stands between the opening tag and the arguments."""
    return f'\n{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": '


def _either(tag: str, token: int | None) -> str:
    return f'"{tag}"' if token is None else f'("{tag}" | <[{token}]>)'


def _text_before_calls(opening: int | None, added_tokens: Collection[int]) -> list[str]:
    """The rules `text`, any text without an opening tag, and `begun`, such a text up to the end of the tag."""
    pieces = "(TEXT added)* " if added_tokens else ""
    added = [f"added: <[{','.join(map(str, sorted(added_tokens)))}]>"] if added_tokens else []
    token = f" | TEXT <[{opening}]>" if opening is not None else ""
    return [
        f"text: {pieces}TEXT",
        f"begun: {pieces}(written{token})",
        f'written[lazy]: ANY "{OPEN}"',
        "ANY: /(?s:.*)/",
        f"TEXT: ANY & ~/(?s:.*){OPEN}(?s:.*)/",
        *added,
    ]
