"""Typed configuration: pydantic models read from YAML, with one-line errors that suggest the nearest known key.

The usual path of a config file is `load_yaml`, then `apply_overrides` with what the command line adds, then `parse`.
"""

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from yoco_u.errors import UserError
from yoco_u.files import write_text


class Config(BaseModel):
    """Base of every configuration object: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


C = TypeVar("C", bound=Config)


class _Loader(yaml.SafeLoader):
    """YAML in which only true and false are booleans, as in YAML 1.2, so `compile: off` reads as the text "off"."""


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
        source: where the data came from, which the error names.

    Raises:
        UserError: if something does not fit; it names the path of one such key.
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
        UserError: if the file cannot be read, is not YAML, or holds anything but a mapping.
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
        UserError: if an override is not of the form `key=value`, or its key has an empty part or leads through
            something that is no mapping.
    """
    for override in overrides:
        dotted, separator, text = override.partition("=")
        if not separator or not all(dotted.split(".")):
            raise UserError(f"override {override!r}: expected key=value, such as training.steps=100")
        try:
            value = yaml.load(text, _Loader)
        except yaml.YAMLError:
            raise UserError(f"override {override!r}: the value is not valid YAML; quote it") from None
        data = with_value(data, dotted, value, f"override {override!r}")
    return data


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
        raise UserError(f"{source}: {key} is {group!r}, not a group of settings")
    return data | {key: with_value(group or {}, rest, value, source)}


def merged(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """Merge two nested mappings; for a key that both have, the value in `top` wins unless both values are mappings."""
    result = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        result[key] = merged(base[key], value) if both else value
    return result


def differences(old: Config, new: Config) -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted key, old value, new value) for each key whose values differ between two configs."""
    return _differences(old.model_dump(mode="json"), new.model_dump(mode="json"), "")


def _differences(old: Any, new: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    if old == new:
        return
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = [(str(key), old.get(key), new.get(key)) for key in old | new]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(str(i), a, b) for i, (a, b) in enumerate(zip(old, new, strict=True))]
    else:
        yield path, old, new
        return
    for key, a, b in pairs:
        yield from _differences(a, b, f"{path}.{key}" if path else key)


def did_you_mean(name: str, known: Iterable[str], otherwise: str | None = None, most: int = 1) -> str:
    """The end of an error about an unknown name: a suggestion of known names that are spelt almost alike.

    Args:
        name: the unknown name.
        known: all known names.
        otherwise: what to say if no known name is close; by default a list of the known names.
        most: how many names to suggest at most.
    """
    names = list(known)
    near = difflib.get_close_matches(name, names, n=most)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"known are {', '.join(names)}" if otherwise is None else otherwise


def describe(cls: type[BaseModel], error: ValidationError) -> str:
    """One problem of a ValidationError in one line, with the nearest known name for an unknown key."""
    return describe_problems(cls, error.errors())


def describe_problems(cls: type[BaseModel], problems: Sequence[Mapping[str, Any]]) -> str:
    """One of the problems that `ValidationError.errors()` lists, in one line.

    An unknown key goes before any other problem: a misspelt key is both unknown and, under its right name, missing, and only
    the unknown one tells the user what to change.
    """
    problem = min(problems, key=lambda problem: problem["type"] != "extra_forbidden")
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = sorted(_known_keys(cls, problem["loc"][:-1]))
        return f"unknown key {path}: {did_you_mean(str(problem['loc'][-1]), known)}"
    if problem["type"] == "missing":
        return f"{path} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    if not path:
        return message
    return f"{path}: {message}" if problem["type"] == "value_error" else f"{path}: {message}, got {problem['input']!r}"


def _known_keys(cls: type[BaseModel], location: tuple[int | str, ...]) -> set[str]:
    """The field names of the models that may stand at `location`, a path of keys and list indices from `cls`."""
    models = [cls]
    for part in location:
        if isinstance(part, int):
            continue
        below = [model.model_fields[part].annotation for model in models if part in model.model_fields]
        found = [model for annotation in below for model in _models_in(annotation)]
        models = found or models
    return {name for model in models for name in model.model_fields}


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The pydantic models in a type annotation, such as `Stage` in `tuple[Stage, ...] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, UnionType, tuple, list, dict) or get_args(annotation):
        return [model for inner in get_args(annotation) for model in _models_in(inner)]
    return []
