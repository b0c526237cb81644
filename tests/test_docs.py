"""Pages that are made from the code, or name parts of it, are still true."""

import ast
import importlib
import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

from yoco_u.cli import app, main
from yoco_u.cli.settings import find_config

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md"), ROOT / "recipes" / "README.md"])
CODE = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
OF_PRESETS = ("preset", "size", "layers", "loops", "loop_gate", "streams", "prefix_tokens")
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


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


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """What a link may name behind its #: headings as GitHub spells them, and anchors that are written out."""
    text = CODE.sub("", read(page))
    headings = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", line) for line in re.findall(r"^#+ (.*)$", text, re.MULTILINE)]
    return {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in headings} | set(
        re.findall(r'<a id="(.*?)"', text)
    )


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", CODE.sub("", read(page))):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            there = page.parent / path if path else page
            assert there.exists(), target
            assert not anchor or anchor in anchors(there), target


def code(page: Path) -> str:
    """A page's code, line by line: its blocks, with what goes on behind a backslash as one line, and pieces in its texts."""
    text = read(page)
    blocks = [block.replace("\\\n", " ") for _, block in CODE.findall(text)]
    return "\n".join([*blocks, *re.findall(r"`([^`\n]+)`", CODE.sub("", text))])


@pages
def test_commands_have_the_options_that_pages_give_them(page: Path) -> None:
    group: Any = typer.main.get_command(app)
    for name, rest in re.findall(r"(?:(?<!\S)|(?<=bin/))(?:yoco-u|-m yoco_u\.cli) ([a-z]+)\b([^\n]*)", code(page)):
        options = {option for parameter in group.commands[name].params for option in parameter.opts} | {"--help"}
        assert set(OPTION.findall(rest.split(" #")[0])) <= options, f"{name}{rest}"


@pages
def test_scripts_have_the_options_that_pages_give_them(page: Path) -> None:
    for script, rest in re.findall(r"python ((?:benchmarks|recipes|docs)/\w+\.py)([^\n]*)", code(page)):
        source = read(ROOT / script)
        assert all(f'"{option}"' in source for option in OPTION.findall(rest.split(" #")[0])), f"{script}{rest}"


@pages
def test_settings_that_pages_name_exist(page: Path) -> None:
    """Those that are written with their section, such as `training.steps`, in code."""
    keys = {prefix + name for _, prefix, cls in generator().SECTIONS for name in cls.model_fields}
    keys |= {f"architecture.{name}" for name in OF_PRESETS}
    sections = "training|optimizer|data|architecture|distillation"
    named = re.findall(rf"(?<![\w./])(?:base\.)?((?:{sections})\.[a-z_]+)", code(page))
    assert {key for key in named if not key.endswith((".md", ".py"))} <= keys


@pages
def test_python_in_pages_imports_what_there_is(page: Path) -> None:
    for language, block in CODE.findall(read(page)):
        if language == "python":
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("yoco_u"):
                    module = importlib.import_module(node.module or "")
                    assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


@pages
def test_tests_that_pages_name_exist(page: Path) -> None:
    """Files and folders, and each word that chooses among their tests, somewhere in them."""
    for line in re.findall(r"\bpytest (tests[^`\n#]*)", read(page)):
        words = shlex.split(line)
        chosen = words.index("-k") if "-k" in words else len(words)
        places = [ROOT / place for place in words[:chosen]]
        assert all(place.exists() for place in places), line
        files = [file for place in places for file in ([place] if place.is_file() else place.rglob("test_*.py"))]
        text = "".join(map(read, files))
        for word in set(re.findall(r"[a-z_0-9]+", " ".join(words[chosen + 1 :]))) - {"and", "or", "not"}:
            assert word in text, f"{word} in {line}"


def test_every_command_and_every_room_is_on_the_pages_that_list_them() -> None:
    group: Any = typer.main.get_command(app)
    table = set(re.findall(r"^\| `(\w+)` \|", read(DOCS / "command-line.md"), re.MULTILINE))
    assert table == set(group.commands)
    rooms = {path.name for path in (ROOT / "yoco_u").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    in_map = set(re.findall(r"\]\(yoco_u/([\w.]+)\)", read(ROOT / "README.md")))
    assert rooms - {"__init__.py"} <= in_map
