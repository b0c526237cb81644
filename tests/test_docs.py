"""Pages that are made from the code, or name parts of it, are still true."""

import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest

from yoco_u.cli import main
from yoco_u.cli.settings import find_config

DOCS = Path(__file__).parents[1] / "docs"


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_configuration", DOCS / "generate_configuration.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_configuration_page_is_the_generated_one() -> None:
    """If this fails: python docs/generate_configuration.py"""
    assert (DOCS / "configuration.md").read_text(encoding="utf-8") == generator().page()


def test_configuration_page_explains_only_what_exists() -> None:
    module = generator()
    keys = {prefix + name for _, prefix, cls in module.SECTIONS for name in cls.model_fields}
    assert set(module.PLAIN) <= keys
    for _, _, cls in module.SECTIONS:
        assert set(module.attributes(cls)) <= set(cls.model_fields)


def commands() -> list[str]:
    return re.findall(r"^yoco-u .*", (DOCS / "command-line.md").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("line", commands())
def test_commands_of_the_command_line_page_exist(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, command, *arguments = shlex.split(line)
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    for argument in arguments:
        assert not argument.startswith("--") or argument in shown
    if command == "train":
        assert find_config(arguments[0]).is_file()
