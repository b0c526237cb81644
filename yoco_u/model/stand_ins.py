"""What the modelling files have in the place of pydantic, which is not installed wherever transformers is.

The package itself does not use these classes. `yoco_u.model.remote_code` puts them where its modules name those of pydantic and
of `yoco_u.config`, so that `Architecture` is the same class body in both. They build, check and copy configs as the package
does; what is wrong is said in other words.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

from yoco_u.config import MOST_LOOPS, did_you_mean, shown
from yoco_u.errors import UserError

_LARGEST = 2**64 - 1


class ValidationError(ValueError):
    """A setting that does not fit."""


@dataclass(frozen=True)
class Field:
    """The default of a setting, and the limits of a number."""

    default: Any = None
    gt: float = -math.inf
    ge: float = -math.inf
    lt: float = math.inf
    le: float = math.inf

    def holds(self, value: float) -> bool:
        return self.gt < value < self.lt and self.ge <= value <= self.le


class Needs:
    """Of a setting that has no effect unless another one has one of some values."""

    def __init__(self, setting: str, *values: Any) -> None:
        self.setting, self.values = setting, values


Count = Annotated[int, Field(gt=0, lt=2**31)]
Loops = Annotated[int, Field(gt=0, le=MOST_LOOPS)]
Float32 = Annotated[float, Field(ge=-3.4e38, le=3.4e38)]
NonNegativeFloat32 = Annotated[float, Field(ge=0, le=3.4e38)]
PositiveFloat32 = Annotated[float, Field(ge=2.0**-126, le=3.4e38)]


def model_validator(mode: Literal["after"]) -> Callable[[Any], Any]:
    """Mark a method that checks a whole config when it has been built."""

    def marked(method: Any) -> Any:
        method.checks_config = True
        return method

    return marked


class Config:
    """Base of every configuration object: immutable, and an unknown key is an error."""

    model_fields: ClassVar[dict[str, Any]]

    def __init_subclass__(cls) -> None:
        cls.model_fields = {}
        for name, kind in vars(cls)["__annotations__"].items():
            default = vars(cls).get(name)
            cls.model_fields[name] = kind
            if isinstance(default, Field):
                cls.model_fields[name] = Annotated[kind, default]
                setattr(cls, name, default.default)
        dataclass(frozen=True, kw_only=True)(cls)

    def __post_init__(self) -> None:
        for name, kind in self.model_fields.items():
            object.__setattr__(self, name, _checked(name, kind, getattr(self, name)))
        for name, why in self.without_effect():
            if getattr(self, name) != getattr(type(self), name):
                raise ValidationError(f"{name} has no effect: it {why}")
        for method in vars(type(self)).values():
            if hasattr(method, "checks_config"):
                method(self)

    def without_effect(self) -> Iterator[tuple[str, str]]:
        """Each setting that has no effect beside the others, and what it needs, in words."""
        for name, kind in self.model_fields.items():
            for one in get_args(kind)[1:] if get_origin(kind) is Annotated else ():
                if isinstance(one, Needs) and getattr(self, one.setting) not in one.values:
                    yield name, f"needs another {one.setting}"

    def model_copy(self, update: dict[str, Any]) -> Any:
        """A copy with other values, which are not checked."""
        made = copy.copy(self)
        for name, value in update.items():
            object.__setattr__(made, name, value)
        return made

    def model_dump(self, mode: str = "json") -> dict[str, Any]:
        """The plain data of JSON that `parse` reads back."""
        return {name: _plain(getattr(self, name)) for name in self.model_fields}


C = TypeVar("C", bound=Config)


def parse(cls: type[C], data: object, source: str) -> C:
    """Build `cls` from plain data.

    Args:
        source: where the data came from, which the error names.

    Raises:
        UserError: if something does not fit.
    """
    try:
        return _built(cls, data)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from None


def describe(cls: type[Config], error: ValidationError) -> str:
    """What is wrong, in one line."""
    return str(error)


def _built(cls: type[C], data: object) -> C:
    if not isinstance(data, dict):
        raise ValidationError(f"expected a mapping of settings, got {type(data).__name__}")
    for key in data:
        if key not in cls.model_fields:
            raise ValidationError(f"unknown key {key}: {did_you_mean(str(key), cls.model_fields)}")
    for name in cls.model_fields:
        if name not in data and not hasattr(cls, name):
            raise ValidationError(f"{name} is missing")
    return cls(**data)


def _checked(name: str, kind: Any, value: Any) -> Any:
    """A value as its annotation has it: lists become tuples, mappings configs, whole numbers floats.

    Raises:
        ValidationError: if it is of another type, or beyond its limits.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        made = _checked(name, inner[0], value)
        for limits in inner[1:]:
            if isinstance(limits, Field) and not limits.holds(made):
                raise ValidationError(f"{name}: {shown(value)} is beyond its limits")
        return made
    if origin in (Union, UnionType):
        [some] = [one for one in inner if one is not type(None)]
        return None if value is None else _checked(name, some, value)
    if origin is Literal:
        if value in inner:
            return value
    elif origin is tuple:
        if isinstance(value, (list, tuple)):
            return tuple(_checked(f"{name}.{number}", inner[0], one) for number, one in enumerate(value))
    elif issubclass(kind, Config):
        return value if isinstance(value, kind) else _built(kind, value)
    elif isinstance(value, bool):
        if kind is bool:
            return value
    elif kind is float and isinstance(value, (int, float)) and math.isfinite(value):
        return float(value)
    elif kind is int and isinstance(value, (int, float)) and value % 1 == 0 and abs(value) <= _LARGEST:
        return int(value)
    raise ValidationError(f"{name}: {shown(value)} does not fit")


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return value.model_dump()
    return [_plain(one) for one in value] if isinstance(value, tuple) else value
