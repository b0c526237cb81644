"""YAML as config files and overrides use it: the plain data of JSON, in which nothing is ambiguous and nothing is unbounded.

Beside what is no YAML, a text is refused that has a key twice, a key that is no text, a tag (`!!python/object`), an alias that
leads back to itself or repeats its contents without end, or more nesting than any config needs. Only true and false are
booleans, and only decimal numbers are numbers, as in YAML 1.2: `compile: off`, `12:30`, `010` and `2026-11-28` are texts.
"""

import math
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.reader import ReaderError

from yoco_u.config.base import Config, shown
from yoco_u.errors import UserError, first_line
from yoco_u.files import write_text

DEEPEST = 64
"""Levels of nesting that a config may have."""

_MOST_VALUES = 100_000  # in one text, those behind an alias counted each time
_MOST_BYTES = 2**24
_LONGEST_PROBLEM = 200
_LINE_ENDS = "\x85\u2028\u2029"  # of YAML besides \n; PyYAML writes them so that they are read as spaces

_TAG = "tag:yaml.org,2002:"
_PLAIN = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?(?:0|[1-9][0-9_]*)", list("-+0123456789")),
    "float": (
        r"[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+][0-9]+)?|[-+]?\.[0-9][0-9_]*(?:[eE][-+][0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+0123456789."),
    ),
    "merge": (r"<<", ["<"]),
}  # fmt: skip
"""What a text without quotes means, by pattern and first characters; everything else is text."""


class _Loader(yaml.SafeLoader):
    """Reads a document as described above. It is checked while its nodes are composed, before any value is made of them."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._deepest = self._values = 0
        self._anchored: dict[str, tuple[int, int] | None] = {}  # levels and values of what has an anchor; None while it is read

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            known = self._anchored.get(str(event.anchor), (0, 0))
            if known is None:
                raise _refused(f"the alias *{event.anchor} stands inside of what it repeats", event.start_mark)
            self._count(event, *known)
            return super().compose_node(parent, index)
        if event.tag is not None:
            raise _refused(f"the tag {event.tag} is not known here; leave it out", event.start_mark)
        outside, before = self._deepest, self._values
        self._depth += 1
        self._deepest = self._depth
        self._count(event, 0, 1)
        if event.anchor is not None:
            self._anchored[event.anchor] = None
        node = super().compose_node(parent, index)
        if event.anchor is not None:
            self._anchored[event.anchor] = self._deepest - self._depth + 1, self._values - before
        self._deepest = max(self._deepest, outside)
        self._depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if key.tag not in (_TAG + "str", _TAG + "merge"):
                raise _refused("a key is no text; quote it, or leave out what it belongs to", key.start_mark)
            if key.value in seen:
                raise _refused(f"the key {key.value} is there twice; keep one of them", key.start_mark)
            seen.add(key.value)
        return node

    def text(self, node: yaml.ScalarNode) -> str:
        """The value of a text."""
        text = str(self.construct_scalar(node))
        if any(character == "\0" or "\ud800" <= character <= "\udfff" for character in text):
            raise _refused("a text has a character that no file can hold (NUL or half a pair)", node.start_mark)
        return text

    def whole_number(self, node: yaml.ScalarNode) -> int:
        """The value of a whole number."""
        try:
            return int(self.construct_yaml_int(node))
        except ValueError:  # Python reads no more than 4,300 digits
            raise _refused(f"a number of {len(node.value):,} digits cannot be computed with", node.start_mark) from None

    def number(self, node: yaml.ScalarNode) -> float:
        """The value of a number with a point."""
        value = float(self.construct_yaml_float(node))
        if math.isinf(value) and not node.value.lower().endswith("inf"):
            raise _refused(f"the number {shown(node.value)} is too large to compute with", node.start_mark)
        return value

    def _count(self, event: Any, levels: int, values: int) -> None:
        self._deepest = max(self._deepest, self._depth + levels)
        self._values += values
        if self._deepest > DEEPEST:
            raise _refused(f"more than {DEEPEST} levels of nesting", event.start_mark)
        if self._values > _MOST_VALUES:
            raise _refused(f"more than {_MOST_VALUES:,} values, those behind aliases counted", event.start_mark)


for _name, (_pattern, _first) in _PLAIN.items():
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(f"^(?:{_pattern})$"), _first)
_Loader.add_constructor(_TAG + "str", _Loader.text)
_Loader.add_constructor(_TAG + "int", _Loader.whole_number)
_Loader.add_constructor(_TAG + "float", _Loader.number)


def load_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a YAML mapping; an empty file is an empty mapping.

    Raises:
        UserError: if the file cannot be read, is not YAML as described above, or holds anything but a mapping.
    """
    try:
        with Path(path).open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot read the config file ({error.strerror}); check the path") from None
    if len(data) > _MOST_BYTES:
        raise UserError(f"{path}: longer than {_MOST_BYTES:,} bytes; expected a YAML config file")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}: not UTF-8 text in line {line}; expected a YAML config file") from None
    settings = load_text(text, str(path))
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise UserError(f"{path}: expected a mapping of settings, got {type(settings).__name__}")
    return settings


def load_text(text: str, source: str) -> Any:
    """The value of a YAML text.

    Args:
        source: where the text came from, which the error names.

    Raises:
        UserError: if it is not YAML as described above, with the line.
    """
    try:
        loader = _Loader(text)
    except ReaderError as error:
        line = len(f"{text[: error.position]}.".splitlines())
        raise UserError(f"{source}: not valid YAML in line {line}: the character U+{error.character:04X}") from None
    try:
        return loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, problem = loader.line if mark is None else mark.line, str(error.problem)
    except (ValueError, OverflowError) as error:  # a number too large for what PyYAML does with it, in an escape say
        line, problem = loader.line, first_line(error)
    short = " ".join(problem.split())[:_LONGEST_PROBLEM]
    raise UserError(f"{source}: not valid YAML in line {line + 1}: {short}")


def dump_yaml(config: Config, path: str | os.PathLike[str]) -> None:
    """Write a config that `load_yaml` and `parse` read back to an equal object.

    A file that says the same already stays as it is, with its comments.
    """
    data = config.model_dump(mode="json")
    with suppress(UserError):
        if load_yaml(path) == data:
            return
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    if any(end in text for end in _LINE_ENDS):
        text = yaml.safe_dump(data, sort_keys=False)
    write_text(Path(path), text)


def _refused(problem: str, mark: Any) -> ComposerError:
    return ComposerError(None, None, problem, mark)
