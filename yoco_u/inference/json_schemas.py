"""JSON schemas as grammars take them.

llguidance writes a name that no property declares with any escapes, so `\\u0061` may come where `a` is declared, and what
reads the JSON takes both for the same name. Names that fit a pattern it writes without escapes of letters. So where anything
may stand under further names, they become those of a pattern that every name fits.
"""

from collections.abc import Iterator
from typing import Any

_NAMED = frozenset({"properties", "$defs", "definitions", "dependentSchemas"})
"""Keywords whose value has a schema under each name."""
_DATA = frozenset({"enum", "const", "default", "examples", "required"})
"""Keywords whose value is no schema."""
_ANYTHING: tuple[Any, ...] = (True, {})
_ANY_NAME = {"patternProperties": {"": {}}, "additionalProperties": False}


def with_plain_names(schema: Any) -> Any:
    """A schema that allows the same JSON, but for names of properties that are declared, written with escapes.

    A schema in which `patternProperties` stands anywhere is returned as it is, since llguidance refuses patterns that overlap,
    and further names that have a schema of their own may still be written with escapes.
    """
    return schema if any("patternProperties" in one for one in _schemas(schema)) else _rewritten(schema)


def _schemas(schema: Any) -> Iterator[dict[str, Any]]:
    """All schemas within a schema."""
    if isinstance(schema, list):
        for one in schema:
            yield from _schemas(one)
    elif isinstance(schema, dict):
        yield schema
        for key, value in schema.items():
            if key in _NAMED and isinstance(value, dict):
                yield from _schemas(list(value.values()))
            elif key not in _DATA:
                yield from _schemas(value)


def _rewritten(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_rewritten(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _NAMED and isinstance(value, dict):
            value = {name: _rewritten(one) for name, one in value.items()}
        elif key not in _DATA:
            value = _rewritten(value)
        found[key] = value
    if schema.get("properties") and schema.get("additionalProperties", True) in _ANYTHING:
        found |= _ANY_NAME
    return found
