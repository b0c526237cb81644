"""Reading config files: words such as `off` stay text, and every mistake is an error of one line."""

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from yoco_u.architecture import Architecture
from yoco_u.bench.cases import BenchSettings
from yoco_u.config import Config, apply_overrides, dump_yaml, load_yaml, parse
from yoco_u.config.yaml_text import load_text
from yoco_u.errors import UserError
from yoco_u.evaluation.needle_grid import NeedleSettings
from yoco_u.experiment.config import Experiment
from yoco_u.inference import EngineSettings, SamplingParams
from yoco_u.planning.hardware import Hardware
from yoco_u.planning.plan import PlanSettings
from yoco_u.serving.requests import ChatRequest, CompletionRequest
from yoco_u.serving.settings import Listen, ServerSettings
from yoco_u.training import RunConfig


def test_only_true_and_false_are_booleans(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("compile: off\nyes: no\nflag: true\nother: False\nname: true-ish\n", encoding="utf-8")
    assert load_yaml(file) == {"compile": "off", "yes": "no", "flag": True, "other": False, "name": "true-ish"}
    assert apply_overrides({}, ["training.compile=off", "a=[on, false]"]) == {
        "training": {"compile": "off"},
        "a": ["on", False],
    }


def test_overrides_leave_what_they_were_given_alone() -> None:
    data = {"a": {"b": [1]}}
    assert apply_overrides(data, ["a.c=2", "a.b=3"]) == {"a": {"b": 3, "c": 2}}
    assert data == {"a": {"b": [1]}}


@pytest.mark.parametrize("text", ["[1, 2", "- a\n- b", "\xff"])
def test_a_file_that_is_no_mapping_is_one_line(text: str, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"a\.yaml: [^\n]+$"):
        load_yaml(file)


@pytest.mark.parametrize("override", ["steps", "=3", "a.=3", "a..b=3", "a=[", "a.b.c=1"])
def test_a_bad_override_is_one_line(override: str) -> None:
    with pytest.raises(UserError, match=r"^override [^\n]+$"):
        apply_overrides({"a": {"b": 1}}, [override])


def test_unknown_keys_name_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown key windw: did you mean window"):
        parse(Architecture, {"preset": "yoco_u", "windw": 8}, "a.yaml")


@pytest.mark.parametrize(("text", "value"), [
    ("12:30", "12:30"), ("010", "010"), ("0x1F", "0x1F"), ("2026-13-45", "2026-13-45"), ("2026-11-28", "2026-11-28"),
    ("=", "="), ("1_000", 1000), ("-3", -3), ("1.5", 1.5), ("1e3", "1e3"), ("~", None), ("", None), (".5", 0.5), ("no", "no"),
])  # fmt: skip
def test_only_decimal_numbers_are_numbers(text: str, value: object) -> None:
    assert apply_overrides({}, [f"a={text}"]) == {"a": value}


def test_aliases_and_merges_are_read(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("a: &a {x: 1, y: [2]}\nb: *a\nc: {<<: *a, x: 3}\n")
    assert load_yaml(file) == {"a": {"x": 1, "y": [2]}, "b": {"x": 1, "y": [2]}, "c": {"x": 3, "y": [2]}}


LAUGHS = "a0: &a0 [1, 1]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(40))
CHAIN = "a0: &a0 [1]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}]\n" for i in range(3000))


@pytest.mark.parametrize(("text", "part"), [
    ("a: 1\nb: {c: 1,\n  c: 2}", "in line 3: the key c is there twice"), ("a: 1\n'a': 2", "there twice"),
    ("a: {<<: {b: 1}, <<: {b: 2}}", "there twice"), ("a: &a [*a]", "stands inside"), ("a: &a {b: {c: *a}}", "stands inside"),
    ("<<: &a {b: *a}", "stands inside"), ("a: " + "[" * 3000 + "]" * 3000, "levels"),
    ("a: " + "{b: " * 3000 + "}" * 3000, "levels"),
    ("a:\n" + "".join(" " * i + "- \n" for i in range(1, 99)), "levels"), (CHAIN, "levels"), (LAUGHS, "values"),
    ("1: 2", "a key is no text"), ("true: 2", "a key is no text"), ("[1]: 2", "a key is no text"), ("~: 1", "a key is no text"),
    ("a: !!python/object/apply:os.system [ls]", "the tag"), ("a: !!timestamp 2026-13-45", "the tag"),
    ("a: !!bool maybe", "the tag"),
    ("a: !!binary ///", "the tag"), ("a: !x 1", "the tag"), ("a: " + "9" * 5000, "digits"), ('a: "\\0"', "character"),
    ('a: "\\ud800"', "character"), ("a: 1\n---\na: 2", "not valid YAML"), ("a: *b", "undefined alias"),
    ("a: \0", "not valid YAML"),
    ("a: 1\n" * 4_000_000, "longer than"),
])  # fmt: skip
def test_what_is_ambiguous_or_without_end_is_refused(text: str, part: str, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=rf"a\.yaml: [^\n]*{part}[^\n]*$"):
        load_yaml(file)


WRONG_VALUES = (
    "9" * 5000, "-" + "9" * 10_000, "1_000" * 2000, "1.0e+400", "-" + "9" * 400 + ".5", ".5e+99999", "&a [*a]", "&a {b: [*a]}",
    "{<<: &a {b: *a}}", "&a {<<: *a}", "{<<: 3}", "{<<: [1]}", "*nobody", "{<<: *nobody}", "!!timestamp 2026-13-45",
    "!!binary ///", "!!int 0x" + "F" * 10_000, "!!float 1:30", "! x", "\0", "\x07", '"\\0"', '"\\ud800"', '"\\UFFFFFFFF"',
    '"\\U00110000"', '"\\q"', "{b: 1, b: 2}", '{"b\\nc": 1, "b\\nc": 2}', "{1: 2}", "{? [1] : 2}", "{? {} : 2}", "b: c: d",
    "@", "`", "&", "*", "[1, 2}", "}", "[" * 99 + "]" * 99, "&a [1] &b", LAUGHS.replace("\n", ", ").join("{}"),
    "{" + "x" * 2000 + ": 1, " + "x" * 2000 + ": 1}",
)  # fmt: skip


@pytest.mark.parametrize("value", WRONG_VALUES, ids=lambda value: ascii(value)[:20])
def test_every_mistake_names_the_file_and_the_line(value: str, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    befores = ("", "# a\n", "b: 1\r\nc: |\n  x\n\n", "b: é\u2028 d\n")
    for before, end in itertools.product(befores, ("", "\n", "\r\n", "\nlast: 1\n")):
        file.write_bytes(f"{before}a: {value}{end}".encode())
        with pytest.raises(UserError) as raised:
            load_yaml(file)
        line = len((before + ".").splitlines())
        assert str(raised.value).startswith(f"{file}: not valid YAML in line {line}: ")
        assert "\n" not in str(raised.value) and len(str(raised.value)) < 600


@pytest.mark.parametrize("before", [b"", b"a: 1\n", b"\n" * 5])
def test_what_is_no_utf_8_names_the_line(before: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(before + b"b: \xff")
    with pytest.raises(UserError, match=rf"a\.yaml: not UTF-8 text in line {before.count(10) + 1}"):
        load_yaml(tmp_path / "a.yaml")


@given(st.text(st.sampled_from("ab0.9eE-+ \n\t[]{}&*!|>'\"\\%@`#,?:<~\0\x85\u2028UxF"), max_size=40))
def test_any_text_is_read_or_refused_with_its_line(text: str) -> None:
    try:
        load_text(text, "source")
    except UserError as error:
        assert re.fullmatch(r"source: not valid YAML in line [1-9]\d*: [^\n]+", str(error))


class _Texts(Config):
    name: str
    values: dict[str, str | int | float | bool | None]


NUMBER = st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False)
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")) | st.sampled_from(
    ["off", "1:30", "0o17", "017", "1e3", "1_0", "2026-11-28", "~", "null", "=", "<<", "y", "0x1", ".5", ".inf", "- a", "a: b"]
)


@given(TEXT, st.dictionaries(TEXT, TEXT | NUMBER | st.booleans() | st.none()))
def test_what_is_written_is_read_again(tmp_path: Path, name: str, values: dict[str, Any]) -> None:
    config = parse(_Texts, {"name": name, "values": values}, "test")
    dump_yaml(config, tmp_path / "a.yaml")
    assert parse(_Texts, load_yaml(tmp_path / "a.yaml"), "a.yaml") == config


RUN = {
    "name": "a", "dataset": "data", "architecture": {"preset": "yoco_u", "size": "test", "experts": {"intermediate_size": 16}},
    "data": {"corpus": "stdlib"}, "optimizer": {"schedule": "wsd", "warmup_steps": 1},
    "training": {
        "steps": 20, "loop_schedule": [{"until": 0.5, "loops": 1}], "backward_loops": 2,
        "loop_draw": {"distribution": "poisson_lognormal", "most": 4}, "early_exit_weight": 0.5, "evaluate_loops": [1, 4],
    },
}  # fmt: skip
STREAMS = {"preset": "parscale", "size": "test", "streams": 2}
GRID = {"title": "a", "base": {}, "models": {"yoco-u": {"match": {"by": "flops", "reference": "yoco"}}, "yoco": {}}}
GOOD: list[tuple[type[Config], dict[str, Any]]] = [
    (RunConfig, RUN), (Architecture, STREAMS), (Experiment, GRID),
    (Experiment, GRID | {"measures": {"angular": {}, "needles": {}}}),
    (Experiment, GRID | {"samples": {"prompts": ["a"], "sampling": {}}}), (SamplingParams, {}), (EngineSettings, {}),
    (ServerSettings, {"model_name": "a"}), (Listen, {}), (PlanSettings, {}), (BenchSettings, {}), (NeedleSettings, {}),
    (Hardware, {"name": "a", "memory": 1e9, "gemm": 1e12, "bandwidth": 1e9}),
]  # fmt: skip
WRONG = (
    None, True, False, -1, 0, 1, 2, 0.5, 10**400, -(10**400), 2**31, 2**63, 2**64, 1e300, -1e300, 1e-300, float("inf"),
    float("nan"), "", " ",
    "a", "nan", "inf", "9" * 5000, "٣", "1e300", "2026-13-45", [], {}, [[]], [1, 1], [2, 3], [float("nan"), 0], [True, 0],
    [10**400],
    ["a", 1], {"a": 1}, {"a": {"a": [1]}}, [{}], "x" * 300,
)  # fmt: skip


def models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from models(part)


def places(cls: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The dotted key of every setting of a class and of those inside it."""
    for name, field in cls.model_fields.items():
        yield prefix + name
        for inner in models(field.annotation):
            yield from places(inner, f"{prefix}{name}.")


def changed(data: Any, key: str, value: object) -> Any:
    """The data with another value at a key; a list on the way is entered by its first element."""
    name, _, rest = key.partition(".")
    if isinstance(data, list):
        return [changed(data[0], key, value), *data[1:]] if data else data
    if name == "models" and rest:  # by name
        return data | {name: {"yoco-u": changed(data[name]["yoco-u"], rest, value), "yoco": {}}}
    return data | {name: value if not rest else changed(data.get(name) or {}, rest, value)}


@pytest.mark.parametrize(("cls", "good"), GOOD, ids=lambda value: getattr(value, "__name__", ""))
def test_every_setting_refuses_what_it_is_not_made_for(cls: type[Config], good: dict[str, Any]) -> None:
    """A wrong value is one line that is no page; any other makes a config of plain, finite values that can be computed with."""
    keys = list(places(cls))
    if cls is RunConfig:
        keys += [
            f"architecture.{key}" for key in ("preset", "size", "layers", "loops", "loop_gate", "streams", "prefix_tokens")
        ]
    for key in keys:
        for value in WRONG:
            try:
                config = parse(cls, changed(good, key, value), "a.yaml")
                json.dumps(config.model_dump(mode="json"), allow_nan=False)
                if isinstance(config, RunConfig):
                    config.training_flops()
            except UserError as error:
                assert "\n" not in str(error) and len(str(error)) < 1000, key


def limits(schema: Any) -> Iterator[str]:
    """The limits of whole numbers in a JSON schema, which Python keeps exact."""
    if isinstance(schema, dict):
        if schema.get("type") == "integer":
            yield from (str(schema[key]) for key in schema if "imum" in key)
        for value in schema.values():
            yield from limits(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from limits(value)


@pytest.mark.parametrize(("cls", "good"), [*GOOD, (CompletionRequest, {}), (ChatRequest, {"messages": [{"role": "user"}]})])
def test_limits_of_whole_numbers_are_printed_exactly(cls: type[Config], good: dict[str, Any]) -> None:
    found = set()
    for key, value in itertools.product(places(cls), (10**30, -(10**30), 2**64, -(2**64))):
        try:
            parse(cls, changed(good, key, value), "a.yaml")
        except UserError as error:
            if limit := re.search(r"(?:less|greater) than (?:or equal to )?(.+), got", str(error)):
                found.add(limit[1])
    of_floats = {"1000000000", "3.4e38", "-3.4e38"}
    assert {limit for limit in found if abs(float(limit)) > 10**6} <= {*limits(cls.model_json_schema()), *of_floats}


@pytest.mark.parametrize("text", [
    ".inf", "-.inf", ".nan", "9" * 400, "9" * 5000, "-1", "1e300", "1.0e+300", "[2, 3]", "[.nan, 0]", "2026-13-45",
    "{a: 1, a: 2}", "[" * 99, "&a [*a]", "!!python/name:os.system", "*b", "\0", "\udcff", '"\\ud800"', "", "'", "a: b: c",
    "- 1",
])  # fmt: skip
def test_every_setting_by_override(text: str) -> None:
    """What is no YAML is refused for itself, and what is no value of the setting for the setting."""
    for key in places(RunConfig):
        try:
            config = parse(RunConfig, apply_overrides(RUN, [f"{key}={text}"]), "a.yaml")
            json.dumps(config.model_dump(mode="json"), allow_nan=False)
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000, key


@pytest.mark.parametrize("value", [1e-300, 1e-320, 5e-324, 1e-46, 1e-40, 1.17e-38])
@pytest.mark.parametrize("key", ["optimizer.eps", "optimizer.learning_rate", "optimizer.weight_decay", "optimizer.clip_norm"])
def test_what_float32_takes_for_zero_is_refused(key: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"{key}: .*too small for a float32; expected at least 1\.18e-38"):
        parse(RunConfig, changed(RUN, key, value), "here")
    assert parse(RunConfig, changed(RUN, key, 2.0**-126), "here")
