"""Harness tasks that need no download: questions made from the functions of Python's own standard library.

They show that everything works, and say something about a model of Python code. They are no benchmark, because every model may
have seen the library in training.
"""

import ast
import random
import sysconfig
import textwrap
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

_MODULES = (
    "argparse", "ast", "bisect", "calendar", "configparser", "copy", "csv", "dataclasses", "difflib", "enum", "fractions",
    "functools", "gettext", "heapq", "inspect", "ipaddress", "optparse", "pprint", "shlex", "statistics", "string", "tarfile",
    "textwrap", "tokenize", "traceback", "turtle", "typing", "uuid", "zipfile",
)  # fmt: skip
_SHOWN_LINES = 6
_LONGEST = 40
_EXAMPLES = 64  # for few-shot contexts
_CHOICES = 4


def questions(**_: Any) -> DatasetDict:
    """Beginnings of functions, each with four choices of the line that comes next: the true one and three of other functions.

    Fields: `context`, lines with their line ends; `choices`, four lines; `answer`, the index of the true one; `line`, the true
    line. Splits: `train`, for few-shot examples, and `test`. Every call gives the same questions.
    """
    rows = [_cut(function) for function in _functions()]
    draw = random.Random(0)
    draw.shuffle(rows)
    found = []
    for context, line in rows:
        others = sorted({other for _, other in draw.sample(rows, 4 * _CHOICES)} - {line})
        choices = [line, *draw.sample(others, _CHOICES - 1)]
        draw.shuffle(choices)
        found.append({"context": context, "choices": choices, "answer": choices.index(line), "line": line})
    return DatasetDict(train=Dataset.from_list(found[:_EXAMPLES]), test=Dataset.from_list(found[_EXAMPLES:]))


def texts(**_: Any) -> DatasetDict:
    """Whole functions, shortest first. Field: `text`. Split: `test`."""
    return DatasetDict(test=Dataset.from_list([{"text": text} for text in sorted(_functions(), key=len)]))


def same_line(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the generated text begins with the true line; spaces at the end of a line do not count."""
    return {"same_line": float(results[0].split("\n")[0].rstrip() == doc["line"].rstrip())}


def _cut(function: str) -> tuple[str, str]:
    """The first lines of a function, and the next line that is not empty."""
    lines = function.splitlines(keepends=True)
    following = next(index for index in range(_SHOWN_LINES, len(lines)) if lines[index].strip())
    return "".join(lines[:following]), lines[following].rstrip("\n")


@lru_cache
def _functions() -> tuple[str, ...]:
    """The source texts of all functions that are somewhat longer than the shown lines, each text once."""
    folder = Path(sysconfig.get_path("stdlib"))
    return tuple(dict.fromkeys(text for name in _MODULES for text in _functions_of(_source(folder, name))))


def _source(folder: Path, name: str) -> str:
    file = folder / f"{name}.py"
    return (file if file.is_file() else folder / name / "__init__.py").read_text(encoding="utf-8")


def _functions_of(source: str) -> Iterator[str]:
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
            text = textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno]))
            if _SHOWN_LINES + 2 <= text.count("\n") <= _LONGEST:
                yield text
