"""Problems whose answers can be checked: read from JSON lines, and the reward of what a model answers."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, StrictFloat, StrictInt, StrictStr

from yoco_u.data.json_lines import read_lines
from yoco_u.errors import UserError

Prompt = str | list[dict[str, Any]]
"""A text that the model continues, or the messages of a chat, mappings of `role` and `content`."""

_KINDS = {str: "texts", list: "chats"}


class _Message(BaseModel, extra="allow"):
    role: str
    content: str


class _Line(BaseModel, extra="allow"):
    prompt: str | list[_Message] = Field(min_length=1)
    answer: StrictStr | StrictInt | Annotated[StrictFloat, Field(allow_inf_nan=False)]


def read_problems(files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Read files of JSON lines, each `{"prompt": ..., "answer": ...}`; other keys are ignored.

    Returns:
        Mappings of `prompt`, a `Prompt`, and `answer`, a text.

    Raises:
        UserError: at the first file that cannot be read, and the first line that is no problem, or whose prompt is a chat where
            earlier ones were texts, or the other way round; it names both.
    """
    for _, problem in placed_problems(files):
        yield problem


def placed_problems(files: Sequence[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    """As `read_problems`, each with its place: `FILE, line N`."""
    first = None
    for place, line in read_lines(files, _Line, "problems"):
        prompt = line.prompt if isinstance(line.prompt, str) else [message.model_dump() for message in line.prompt]
        first = type(prompt) if first is None else first
        if type(prompt) is not first:
            raise UserError(f"{place}: the prompts before are {_KINDS[first]}, but this one is not; give prompts of one kind")
        yield place, {"prompt": prompt, "answer": str(line.answer)}


class Matches:
    """The reward 1 for a completion that gives the answer, else 0. Blanks around either do not count.

    Args:
        pattern: a regular expression; see `GRPOSettings`.

    Raises:
        UserError: if it is none.
    """

    def __init__(self, pattern: str) -> None:
        try:
            self._pattern = re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise UserError(f"pattern {pattern!r} is no regular expression ({error})", "pattern") from None

    def __call__(self, completion: str, answer: str) -> float:
        matches = list(self._pattern.finditer(completion))
        if not matches:
            return 0.0
        given = matches[-1][min(1, self._pattern.groups)]
        return float(given is not None and given.strip() == answer.strip())
