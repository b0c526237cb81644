"""JSON schemas as grammars take them.

llguidance writes a name that no property declares with any escapes, so `\\u0061` may come where `a` is declared, and what
reads the JSON takes both for the same name. Names that fit a pattern it writes without escapes of letters. So where anything
may stand under further names, they become those of a pattern that every name fits.
"""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

_NAMED = frozenset({"properties", "$defs", "definitions", "dependentSchemas"})
"""Keywords whose value has a schema under each name."""
_DATA = frozenset({"enum", "const", "default", "examples", "required"})
"""Keywords whose value is no schema."""
_ANYTHING: tuple[Any, ...] = (True, {})


def with_plain_names(schema: Any) -> Any:
    """A schema that allows the same JSON, but for names of properties that are declared, written with escapes.

    A schema in which `patternProperties` stands anywhere is returned as it is, since llguidance refuses patterns that overlap,
    and further names that have a schema of their own may still be written with escapes.
    """
    found = deepcopy(schema)
    parts = list(_schemas(found))
    if any("patternProperties" in one for one in parts):
        return schema
    for one in parts:
        if one.get("properties") and one.get("additionalProperties", True) in _ANYTHING:
            one.update(patternProperties={"": {}}, additionalProperties=False)
    return found


def _schemas(schema: Any) -> Iterator[dict[str, Any]]:
    """All schemas within a schema, itself included."""
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
