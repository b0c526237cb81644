"""The rooms of the package use those before them alone, and docs/architecture.md names files and functions that exist."""

import ast
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
ARCHITECTURE = ROOT / "docs" / "architecture.md"
LONGEST_FILE = 400
LINK = re.compile(r"\[`[^`\]]+`\]\(\.\./([^)#]+\.(?:py|cpp))\)((?:(?:,| and)? `[A-Za-z_.]+`)*)")


def _drawing() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw_architecture", ROOT / "docs" / "draw_architecture.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


DRAWING = _drawing()
FILES = sorted((ROOT / "yoco_u").rglob("*.py"))


def test_every_room_has_its_place() -> None:
    there = {DRAWING.room_of(file) for file in FILES} - {"__init__"}
    assert there == set(DRAWING.ROOMS) == set(DRAWING.SAYS)
    assert len(set(DRAWING.ROOMS)) == len(DRAWING.ROOMS)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT / "yoco_u")))
def test_a_file_uses_only_rooms_before_its_own(file: Path) -> None:
    own = DRAWING.room_of(file)
    if own == "__init__":  # the package's face, which hands out names of several rooms when they are used
        assert not [used for used, _ in DRAWING.imports(file) if used not in ("version", "architecture", "inference", "model")]
        return
    before = DRAWING.ROOMS[: DRAWING.ROOMS.index(own) + 1]
    for used, line in DRAWING.imports(file):
        assert used in before, f"{file}:{line}: {own} must not use {used}, which stands after it"


def test_the_reader_of_imports_sees_all_forms(tmp_path: Path) -> None:
    code = (
        "import yoco_u.a\nfrom yoco_u import b\nfrom yoco_u.c.d import e\nimport torch\ndef f():\n    from yoco_u.g import h\n"
    )
    file = tmp_path / "x.py"
    file.write_text(code)
    assert sorted(DRAWING.imports(file)) == [("a", 1), ("b", 2), ("c", 3), ("g", 6)]


def test_no_file_is_long() -> None:
    for folder in ("yoco_u", "tests", "benchmarks", "docs", "recipes"):
        for file in (ROOT / folder).rglob("*.py"):
            assert len(file.read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE, file


def named() -> list[tuple[str, str]]:
    """Each file that docs/architecture.md links to, with each name behind the link."""
    found = []
    for path, names in LINK.findall(ARCHITECTURE.read_text(encoding="utf-8")):
        found += [(path, name) for name in re.findall(r"`([A-Za-z_.]+)`", names)] or [(path, "")]
    return found


@pytest.mark.parametrize(("path", "name"), named())
def test_the_ways_lead_through_what_is_there(path: str, name: str) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    if not name:
        return
    if path.endswith(".cpp"):
        assert name in text
        return
    scope: list[ast.stmt] = ast.parse(text).body
    for part in name.split("."):
        kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        definition = next((node for node in scope if isinstance(node, kinds) and node.name == part), None)
        assigned = {
            target.id for node in scope if isinstance(node, ast.Assign) for target in node.targets if hasattr(target, "id")
        }
        assert definition is not None or part in assigned, f"{path} has no {name}"
        scope = definition.body if definition is not None else []


def test_the_page_names_enough_to_be_checked() -> None:
    assert len(named()) > 40
