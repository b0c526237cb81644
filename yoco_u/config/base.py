"""Configuration objects: what every setting must be, and the one line that says what is wrong with one."""

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from types import UnionType
from typing import Any, Self, TypeVar, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from yoco_u.config.needs import Needs
from yoco_u.errors import UserError

WRITTEN = "written by a run"
"""Context of a validation: the data was checked when a run began, perhaps by an earlier version."""

_LARGEST = 2**64 - 1  # a seed of torch has 64 bits
_LONGEST_SHOWN = 80


class Config(BaseModel):
    """Base of every configuration object: immutable, and an unknown key is an error.

    Numbers are finite, whole ones have at most 64 bits, and neither is ever true or false. A setting that has no effect beside
    the others is an error unless it has its default, as all settings have that a run writes down. In what a run has written
    such a setting is read as its default.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="wrap")
    @classmethod
    def _numbers(cls, given: object, handler: ValidatorFunctionWrapHandler) -> object:
        found: object = handler(given)
        _check_numbers(given, found)
        return found

    def without_effect(self) -> Iterator[tuple[str, str]]:
        """Yield each setting that has no effect beside the others, and what it needs, in words."""
        for name, needs in _needs(type(self)):
            if (missing := needs.unmet(getattr(self, needs.setting))) is not None:
                yield name, missing

    @model_validator(mode="after")
    def _nothing_is_ignored(self, info: ValidationInfo) -> Self:
        fields = type(self).model_fields
        ignored = {name: why for name, why in self.without_effect() if getattr(self, name) != fields[name].get_default()}
        if info.context == WRITTEN and ignored:
            return self.model_copy(update={name: fields[name].get_default() for name in ignored})
        for name, why in ignored.items():
            problem = f"{name} is {shown(getattr(self, name))}, but has no effect: it {why}; leave it out"
            raise UserError(problem, name)
        return self


@cache
def _needs(cls: type[Config]) -> tuple[tuple[str, Needs], ...]:
    """The settings of a class that need another one, by name."""
    return tuple((name, one) for name, field in cls.model_fields.items() for one in field.metadata if isinstance(one, Needs))


C = TypeVar("C", bound=Config)


def parse(cls: type[C], data: object, source: str, written: bool = False) -> C:
    """Build `cls` from plain data.

    Args:
        data: what a YAML or JSON file holds, normally a mapping.
        source: where the data came from, which the error names.
        written: whether a run has written it, and no user.

    Raises:
        UserError: if something does not fit; it names the path of one such key.
    """
    if not isinstance(data, dict):
        raise UserError(f"{source}: expected a mapping of settings, got {type(data).__name__}")
    try:
        return cls.model_validate(data, context=WRITTEN if written else None)
    except ValidationError as error:
        raise UserError(f"{source}: {describe(cls, error)}") from None


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
    spelt = {one.lower(): one for one in names}
    near = difflib.get_close_matches(name.lower(), spelt, n=most)
    if near:
        return f"did you mean {' or '.join(spelt[one] for one in near)}?"
    return f"known are {', '.join(names)}" if otherwise is None else otherwise


def describe(cls: type[BaseModel], error: ValidationError) -> str:
    """One problem of a ValidationError in one line, with the nearest known name for an unknown key."""
    return describe_problems(cls, error.errors())


def describe_problems(cls: type[BaseModel], problems: Sequence[Mapping[str, Any]]) -> str:
    """One of the problems that `ValidationError.errors()` lists, in one line.

    An unknown key goes before any other problem: a misspelt key is both unknown and, under its right name, missing, and only
    the unknown one tells the user what to change.
    """
    problem = _first(problems)
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        models, key = _models_at(cls, problem["loc"][:-1]), str(problem["loc"][-1])
        inside = ".".join([*path.split(".")[:-1], below, key]) if (below := _section_with(models, key)) else None
        known = sorted({name for model in models for name in model.model_fields})
        return f"unknown key {path}: {did_you_mean(key, known) if inside is None else f'did you mean {inside}?'}"
    if problem["type"] == "missing":
        return f"{path} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    if not path:
        return message
    return f"{path}: {message}" if problem["type"] == "value_error" else f"{path}: {message}, got {shown(problem['input'])}"


def wrong_setting(problems: Sequence[Mapping[str, Any]]) -> str | None:
    """The dotted name of the setting that `describe_problems` speaks of; None if it speaks of several, or of the whole."""
    problem = _first(problems)
    inner = getattr(problem.get("ctx", {}).get("error"), "setting", None)  # of a UserError that a validator has raised
    return ".".join(map(str, problem["loc"] if inner is None else (*problem["loc"], inner))) or None


def _first(problems: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return min(problems, key=lambda problem: problem["type"] != "extra_forbidden")


def shown(value: object) -> str:
    """A value as an error shows it: what Python writes, the beginning alone if that is long."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def _check_numbers(given: object, found: object) -> None:
    """Refuse whole numbers of more than 64 bits, and true or false where a number is expected.

    Args:
        given, found: a value before and after its validation; a list of them has become a tuple.

    Raises:
        ValueError: for the first such number.
    """
    if isinstance(found, tuple) and isinstance(given, (list, tuple)):
        for one, made in zip(given, found, strict=False):
            _check_numbers(one, made)
    elif isinstance(found, (int, float)) and not isinstance(found, bool):
        if isinstance(given, bool):
            raise ValueError(f"expected a number, got {str(given).lower()}")
        if isinstance(found, int) and abs(found) > _LARGEST:
            raise ValueError(f"{shown(found)} is too large to compute with; expected a smaller number")


def _section_with(models: Sequence[type[BaseModel]], key: str) -> str | None:
    """The setting of one of the models that is itself a model with this key, if there is exactly one."""
    found = {
        name
        for model in models
        for name, field in model.model_fields.items()
        if any(key in below.model_fields for below in _models_in(field.annotation))
    }
    return found.pop() if len(found) == 1 else None


def _models_at(cls: type[BaseModel], location: tuple[int | str, ...]) -> list[type[BaseModel]]:
    """The models that may stand at `location`, a path of keys and list indices from `cls`."""
    models = [cls]
    for part in location:
        if isinstance(part, int):
            continue
        below = [model.model_fields[part].annotation for model in models if part in model.model_fields]
        found = [model for annotation in below for model in _models_in(annotation)]
        models = found or models
    return models


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The pydantic models in a type annotation, such as `Stage` in `tuple[Stage, ...] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, UnionType, tuple, list, dict) or get_args(annotation):
        return [model for inner in get_args(annotation) for model in _models_in(inner)]
    return []
