"""Typed configuration: pydantic models read from YAML, with one-line errors that name the nearest known key."""

import difflib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from yoco_u.errors import UserError
from yoco_u.files import write_text


class Config(BaseModel):
    """Base of every configuration object: immutable, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


C = TypeVar("C", bound=Config)


class _Loader(yaml.SafeLoader):
    """YAML in which only true and false are booleans, as in YAML 1.2: `compile: off` is the word."""


_BOOL = "tag:yaml.org,2002:bool"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def parse(cls: type[C], data: object, source: str) -> C:
    """Build `cls` from plain data.

    Args:
        data: what a YAML or JSON file holds, normally a mapping.
        source: where it came from, named in the error.

    Raises:
        UserError: on the first thing that does not fit, with the path of the key.
    """
    if not isinstance(data, dict):
        raise UserError(f"{source}: expected a mapping of settings, got {type(data).__name__}")
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{source}: {describe(cls, error)}") from None


def load_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a YAML mapping; an empty file is an empty mapping.

    Raises:
        UserError: if the file is missing, is not YAML, or holds something else than a mapping.
    """
    try:
        data = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UserError(f"{path}: cannot read the config file ({error.strerror}); check the path") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; expected a YAML config file") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a mapping of settings, got {type(data).__name__}")
    return data


def dump_yaml(config: Config, path: str | os.PathLike[str]) -> None:
    """Write a config that `load_yaml` and `parse` read back to an equal object."""
    write_text(Path(path), yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def apply_overrides(data: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return `data` with dotted overrides such as `training.steps=100` applied; values are YAML.

    Raises:
        UserError: if an override is not of the form `key=value` or goes through something that is no mapping.
    """
    result: dict[str, Any] = _copy(data)
    for override in overrides:
        dotted, separator, text = override.partition("=")
        if not separator or not dotted:
            raise UserError(f"override {override!r}: expected key=value, such as training.steps=100")
        try:
            value = yaml.load(text, _Loader)
        except yaml.YAMLError:
            raise UserError(f"override {override!r}: the value is not valid YAML; quote it") from None
        *parents, leaf = dotted.split(".")
        node = result
        for parent in parents:
            child = node.get(parent)
            if child is None:
                child = node[parent] = {}
            if not isinstance(child, dict):
                raise UserError(f"override {override!r}: {parent} is {child!r}, not a group of settings")
            node = child
        node[leaf] = value
    return result


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copy(item) for item in value]
    return value


def merged(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """Mappings joined group by group; where both have a value, that of `top`."""
    result = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        result[key] = merged(base[key], value) if both else value
    return result


def first_difference(old: Config, new: Config) -> tuple[str, Any, Any] | None:
    """The first key, dotted, in which two configs differ, and its two values."""
    return _difference(old.model_dump(mode="json"), new.model_dump(mode="json"), "")


def _difference(old: Any, new: Any, path: str) -> tuple[str, Any, Any] | None:
    if old == new:
        return None
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = [(str(key), old.get(key), new.get(key)) for key in old | new]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(str(i), a, b) for i, (a, b) in enumerate(zip(old, new, strict=True))]
    else:
        return path, old, new
    found = (_difference(a, b, f"{path}.{key}" if path else key) for key, a, b in pairs)
    return next(difference for difference in found if difference is not None)


def describe(cls: type[BaseModel], error: ValidationError) -> str:
    """The first problem of a ValidationError in one line, with the nearest known name for an unknown key."""
    return describe_problems(cls, error.errors())


def describe_problems(cls: type[BaseModel], problems: Sequence[Mapping[str, Any]]) -> str:
    """The same of its `errors()`.

    Unknown keys come first: a misspelt key is unknown under one name and missing under the other.
    """
    problem = min(problems, key=lambda problem: problem["type"] != "extra_forbidden")
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = sorted(_known_keys(cls, problem["loc"][:-1]))
        near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
        return f"unknown key {path}: {hint}"
    if problem["type"] == "missing":
        return f"{path} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    if not path:
        return message
    return f"{path}: {message}" if problem["type"] == "value_error" else f"{path}: {message}, got {problem['input']!r}"


def _known_keys(cls: type[BaseModel], location: tuple[int | str, ...]) -> set[str]:
    """The field names of the model found by walking `location` down from `cls`."""
    models = [cls]
    for part in location:
        if isinstance(part, int):
            continue
        below = [model.model_fields[part].annotation for model in models if part in model.model_fields]
        found = [model for annotation in below for model in _models_in(annotation)]
        models = found or models
    return {name for model in models for name in model.model_fields}


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, UnionType, tuple, list, dict) or get_args(annotation):
        return [model for inner in get_args(annotation) for model in _models_in(inner)]
    return []
