"""Settings that win over those of a file: dotted overrides of the command line, and mappings laid over each other."""

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from yoco_u.config.base import shown
from yoco_u.config.yaml_text import DEEPEST, load_text
from yoco_u.errors import UserError


def apply_overrides(data: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return `data` with dotted overrides such as `training.steps=100` applied; values are YAML.

    Raises:
        UserError: if an override is not of the form `key=value`, or its key has an empty part or leads through
            something that is no mapping.
    """
    for override in overrides:
        dotted, separator, text = override.partition("=")
        source = f"override {shown(override)}"
        if not separator or not all(parts := dotted.split(".")) or len(parts) > DEEPEST:
            raise UserError(f"{source}: expected key=value, such as training.steps=100")
        data = with_value(data, dotted, load_text(text, source), source)
    return data


def split_settings(text: str) -> list[str]:
    """`loops=5,experts={a: 1, b: 2}` -> loops=5 and experts={a: 1, b: 2}: a comma parts settings only before a key and its =.

    Raises:
        UserError: if a key is there twice.
    """
    parts = [part.strip() for part in re.split(r",(?=[^,={}\[\]]*=)", text)]
    counted = Counter(part.partition("=")[0].strip() for part in parts)
    for key, count in counted.items():
        if count > 1:
            raise UserError(f"{shown(text)}: {key} is given {count} times; keep one of them")
    return parts


def with_value(data: dict[str, Any], dotted: str, value: Any, source: str) -> dict[str, Any]:
    """Return a copy of `data` with one value replaced. Missing mappings on the path of its key are added.

    Args:
        dotted: path of the key, such as `training.steps`.
        source: where the value comes from, which the error names.

    Raises:
        UserError: if the path leads through something that is no mapping.
    """
    key, _, rest = dotted.partition(".")
    if not rest:
        return data | {key: value}
    group = data.get(key)
    if group is not None and not isinstance(group, dict):
        raise UserError(f"{source}: {key} is {shown(group)}, not a group of settings")
    return data | {key: with_value(group or {}, rest, value, source)}


def merged(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """Merge two nested mappings; for a key that both have, the value in `top` wins unless both values are mappings."""
    result = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        result[key] = merged(base[key], value) if both else value
    return result
