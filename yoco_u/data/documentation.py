"""English prose that is on every machine: what installed packages say about themselves, and the docstrings in their sources."""

import ast
import warnings
from collections.abc import Iterator
from email import message_from_bytes
from email.policy import compat32
from pathlib import Path

from yoco_u.data.compression import Advance
from yoco_u.data.formats import Document, read_text
from yoco_u.errors import UserError

_SHORTEST = 400
"""Characters; shorter docstrings are names of arguments rather than prose."""


def read_description(path: Path, name: str, advance: Advance) -> Iterator[Document]:
    """The long description in a package's METADATA file: mostly its README."""
    data = path.read_bytes()
    advance(len(data))
    text = message_from_bytes(data, policy=compat32).get_payload(decode=True)
    if isinstance(text, bytes):
        yield Document(name, text.decode(errors="replace").strip())


def read_docstrings(path: Path, name: str, advance: Advance) -> Iterator[Document]:
    """The longer docstrings of a Python file as one document; none if the file is no Python of this version."""
    try:
        [document] = read_text(path, name, "", advance)
        with warnings.catch_warnings(action="ignore"):  # sources with invalid escapes
            tree = ast.parse(document.text)
    except (UserError, SyntaxError, ValueError, RecursionError, MemoryError):
        return
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    text = "\n\n".join(one for one in found if one and len(one) >= _SHORTEST)
    if text:
        yield Document(name, text)
