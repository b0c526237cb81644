"""Settings that have no effect beside the others: refused when a user gives them, and read as defaults in what runs wrote.

The settings are found in the config classes, and those that should be declared in their docstrings.
"""

import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

import yoco_u
from yoco_u.config import Config, Needs, parse
from yoco_u.data import DataConfig
from yoco_u.errors import UserError
from yoco_u.evaluation.needle_grid import NeedleSettings
from yoco_u.experiment.config import Experiment
from yoco_u.experiment.grid import expand
from yoco_u.training.config import RunConfig
from yoco_u.training.run_folder import read_run_config
from yoco_u.training.settings import DistillationConfig, OptimizerConfig, TrainingConfig

SMALL = {"preset": "yoco_u", "size": "test"}
REST: dict[str, dict[str, Any]] = {
    "DistillationConfig": {"teacher": "a", "architecture": SMALL},
    "LoopDraw": {"most": 4},
    "RotaryScaling": {"factor": 2.0},
    "TrainingConfig": {"steps": 2},
}
"""What a class needs beside the settings in question."""

BESIDE = {("RotaryScaling", "llama3"): {"original_length": 64}, ("RotaryScaling", "yarn"): {"original_length": 64}}
FREE = {"Stage", "BenchSettings", "SamplingParams", "EngineSettings", "PlanSettings", "ToolCalls"}
"""Classes whose docstrings name values of other settings, and whose settings have an effect beside all of them."""


def classes(base: type[Config] = Config) -> Iterator[type[Config]]:
    for module in pkgutil.walk_packages(yoco_u.__path__, "yoco_u."):
        if not any(part in module.name for part in ("vllm", "workers", "stand_ins", "__main__", "kernels")):
            importlib.import_module(module.name)
    waiting = [base]
    while waiting:
        found = [one for one in waiting.pop().__subclasses__() if one.__module__.startswith("yoco_u.")]
        waiting += found
        yield from found


ALL = sorted({one for one in classes() if "<locals>" not in one.__qualname__}, key=lambda one: one.__name__)
NEEDS = [
    (cls, name, one)
    for cls in ALL
    for name, field in cls.model_fields.items()
    for one in field.metadata
    if isinstance(one, Needs)
]


def other(cls: type[Config], name: str) -> Any:
    """A value of a setting that is not its default."""
    kind, default = cls.model_fields[name].annotation, cls.model_fields[name].default
    literals = [value for one in (kind, *get_args(kind)) if get_origin(one) is Literal for value in get_args(one)]
    if literals:
        return next(value for value in literals if value != default)
    if isinstance(default, bool):
        return not default
    return 2 if default is None else default / 2 if isinstance(default, float) else default + 1


def without(cls: type[Config], needs: Needs) -> Any:
    """A value of the other setting beside which this one has no effect."""
    kind = cls.model_fields[needs.setting].annotation
    known = [value for one in (kind, *get_args(kind)) if get_origin(one) is Literal for value in get_args(one)]
    if bool in (kind, *get_args(kind)):
        return not needs.values[0]
    return next((value for value in known if value not in needs.values), 3 if needs.setting == "steps" else "elsewhere")


@pytest.mark.parametrize(("cls", "name", "needs"), NEEDS, ids=lambda value: getattr(value, "__name__", str(value)[:20]))
def test_a_setting_that_needs_another(cls: type[Config], name: str, needs: Needs) -> None:
    rest, value, wrong = REST.get(cls.__name__, {}), other(cls, name), without(cls, needs)
    beside = BESIDE.get((cls.__name__, wrong), {}) if isinstance(wrong, str) else {}
    if needs.setting == "validation_corpus":
        wrong = ["elsewhere"]
    given = rest | beside | {needs.setting: wrong, name: value}
    with pytest.raises(UserError, match=rf"^a: {name} is .*, but has no effect: .*{needs.setting}.*; leave it out$"):
        parse(cls, given, "a")
    default = cls.model_fields[name].default
    assert getattr(parse(cls, given, "a", written=True), name) == default
    assert getattr(parse(cls, given | {name: default}, "a"), name) == default
    for right in needs.values:
        beside = BESIDE.get((cls.__name__, right), {}) if isinstance(right, str) else {}
        made = parse(cls, rest | beside | {needs.setting: right, name: value}, "a")
        assert getattr(made, name) == value
        assert parse(cls, made.model_dump(mode="json"), "a") == made


def described(cls: type[Config]) -> Iterator[tuple[str, str]]:
    """Each setting of a class with what the docstring says of it."""
    text = (cls.__doc__ or "").partition("Attributes:")[2]
    for found in re.finditer(r"^ {8}(\w+(?:, \w+)*): (.*(?:\n {12}.*)*)", text, re.MULTILINE):
        for name in found[1].split(", "):
            yield name, found[2]


@pytest.mark.parametrize("cls", [cls for cls in ALL if cls.__name__ not in FREE], ids=lambda cls: cls.__name__)
def test_what_the_docstring_limits_is_declared(cls: type[Config]) -> None:
    """A docstring that says `with X` or `of X`, where X is a value of another setting, tells of a setting that needs it."""
    values = {
        str(value): setting
        for setting, field in cls.model_fields.items()
        for one in (field.annotation, *get_args(field.annotation))
        if get_origin(one) is Literal
        for value in get_args(one)
    }
    declared = {(name, needs.setting) for owner, name, needs in NEEDS if owner is cls}
    for name, text in described(cls):
        for value in re.findall(r"(?:[Ww]ith|[Oo]f|over which|not used with) `(\w+)`", text):
            setting = values.get(value, value if f"not used\n            with `{value}`" in text else None)
            if setting not in (None, name):
                assert (name, setting) in declared, f"{cls.__name__}.{name} speaks of {value}"


@pytest.mark.parametrize(
    ("given", "setting"),
    [
        ({"corpus": "synthetic:s5", "vocab_size": 300}, "vocab_size"),
        ({"corpus": "synthetic:s5", "special_tokens": True}, "special_tokens"),
        ({"corpus": ["stdlib", "packages"], "text_field": "body"}, "text_field"),
        ({"corpus": "a", "validation_corpus": "b", "tokenizer": "c", "seed": 3}, "seed"),
    ],
)
def test_a_dataset(given: dict[str, Any], setting: str) -> None:
    with pytest.raises(UserError, match=f"{setting} is .* but has no effect"):
        parse(DataConfig, given, "a")
    assert parse(DataConfig, {**given, setting: DataConfig.model_fields[setting].default}, "a")
    assert parse(DataConfig, {"corpus": "a.jsonl", setting: given[setting]}, "a")


def test_generated_documents_may_say_their_vocabulary() -> None:
    assert parse(DataConfig, {"corpus": "synthetic:s5", "vocab_size": 257}, "a").vocab_size == 257


def test_needles() -> None:
    for given in ({"kinds": ["variable_tracking"], "values": "words"}, {"kinds": ["single_1"], "values": "words", "digits": 5}):
        with pytest.raises(UserError, match="has no effect"):
            parse(NeedleSettings, given, "a")
    assert parse(NeedleSettings, {"values": "words", "digits": 5}, "a")


@pytest.mark.parametrize("key", ["training.steps", "training.seed", "name", "dataset"])
def test_a_grid_that_says_it_itself(key: str) -> None:
    training = {"sequence_length": 16, "batch_rows": 2, "micro_batch_rows": 2}
    base = {"optimizer": {"warmup_steps": 1}, "architecture": SMALL, "training": training}
    grid = {"title": "a", "base": base, "models": {"yoco-u": {}}, "tokens": [640], "seeds": [0]}
    assert expand(parse(Experiment, grid, "a"), Path("runs"))
    with pytest.raises(UserError, match=f"{key}=9.* has no effect here: .* says it of every run"):
        expand(parse(Experiment, grid, "a"), Path("runs"), [f"{key}=9"])
    if key.startswith("training."):
        said = {"training": {key.partition(".")[2]: 9}}
        with pytest.raises(UserError, match=f"models.yoco-u.settings.{key}: .* says it of every run"):
            parse(Experiment, grid | {"models": {"yoco-u": {"settings": said}}}, "a")
        assert parse(Experiment, grid | {"base": base | {"training": training | said["training"]}}, "a")


@pytest.mark.parametrize(("by", "key"), [("flops", "training.steps"), ("parameters", "architecture.intermediate_size")])
def test_what_a_match_says(by: str, key: str) -> None:
    group, name = key.split(".")
    matched = {"match": {"by": by, "reference": "yoco"}, "settings": {group: {name: 64}}}
    with pytest.raises(UserError, match=f"models.yoco-u.settings.{key}: a match by {by} with yoco says it"):
        parse(Experiment, {"title": "a", "base": {}, "models": {"yoco": {}, "yoco-u": matched}}, "a")


def test_a_run_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        "name: a\ndataset: d\narchitecture: {preset: yoco_u, size: test}\n"
        "optimizer: {decay_fraction: 0.3, warmup_steps: 1}\ntraining: {steps: 9}\n"
    )
    assert read_run_config(tmp_path).optimizer == OptimizerConfig(warmup_steps=1)
    assert {DistillationConfig, TrainingConfig, RunConfig} <= set(ALL)
