"""The rooms of the package: their order, and the picture of docs/architecture.md.

    python docs/draw_architecture.py

A room is a file or a folder directly in `yoco_u/`. It uses the rooms that stand before it in `FLOORS`, and none that stands
after it; tests/test_rooms.py reads the imports and holds the code to that.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "yoco_u"

FLOORS = (
    ("errors", "version", "paper"),
    ("files", "formatting", "device", "config", "plotting"),
    ("architecture", "budget"),
    ("data", "model"),
    ("training", "loading"),
    ("inference", "report"),
    ("planning", "evaluation", "analysis", "serving", "integrations"),
    ("experiment", "bench"),
    ("cli",),
)
"""The order, from the ground floor up, and from left to right on each floor."""

ROOMS = tuple(room for floor in FLOORS for room in floor)


def room_of(file: Path) -> str:
    """The room that a file of the package lies in."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(file: Path) -> Iterator[tuple[str, int]]:
    """The rooms that a file imports from, wherever in it, and the line of each import."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module == "yoco_u":
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("yoco_u."):
            names = [node.module.split(".")[1]]
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".")[1] for alias in node.names if alias.name.startswith("yoco_u.")]
        for name in names:
            yield name, node.lineno


def arrows() -> dict[tuple[str, str], int]:
    """Which room uses which other one, and in how many files."""
    found: dict[tuple[str, str], int] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        own = room_of(file)
        for used in {room for room, _ in imports(file)} - {own}:
            found[own, used] = found.get((own, used), 0) + 1
    return found
