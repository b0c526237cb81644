"""Reading config files: words such as `off` stay text, and every mistake is an error of one line."""

from pathlib import Path

import pytest

from yoco_u.architecture import Architecture
from yoco_u.config import apply_overrides, load_yaml, parse
from yoco_u.errors import UserError


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
