"""Typed configuration: pydantic models read from YAML, with one-line errors that suggest the nearest known key.

The usual path of a config file is `load_yaml`, then `apply_overrides` with what the command line adds, then `parse`.
"""

from yoco_u.config.base import Config, describe, describe_problems, did_you_mean, differences, parse, shown, wrong_setting
from yoco_u.config.needs import Needs
from yoco_u.config.numbers import (
    MOST_LOOPS,
    Count,
    EachOnce,
    Float32,
    Loops,
    LoopsOrAuto,
    NonNegativeFloat32,
    PositiveFloat32,
    Seconds,
    Seed,
    at_most,
    too_many_loops,
)
from yoco_u.config.overrides import apply_overrides, merged, split_settings, with_value
from yoco_u.config.yaml_text import dump_yaml, load_yaml

__all__ = [
    "MOST_LOOPS",
    "Config",
    "Count",
    "EachOnce",
    "Float32",
    "Loops",
    "LoopsOrAuto",
    "Needs",
    "NonNegativeFloat32",
    "PositiveFloat32",
    "Seconds",
    "Seed",
    "apply_overrides",
    "at_most",
    "describe",
    "describe_problems",
    "did_you_mean",
    "differences",
    "dump_yaml",
    "load_yaml",
    "merged",
    "parse",
    "shown",
    "split_settings",
    "too_many_loops",
    "with_value",
    "wrong_setting",
]
