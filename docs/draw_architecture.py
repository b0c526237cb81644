"""The rooms of the package: their order, and the picture of docs/architecture.md.

    python docs/draw_architecture.py

A room is a file or a folder directly in `yoco_u/`. It uses the rooms that stand before it in `FLOORS`, and none that stands
after it; tests/test_rooms.py reads the imports and holds the code to that.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from yoco_u.plotting import PALETTE, save_png

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "yoco_u"

FLOORS = (
    ("errors", "regular_files", "version", "paper"),
    ("locks", "folders", "files", "checksums", "formatting", "device", "free_cores", "config", "plotting", "confined"),
    ("architecture", "budget"),
    ("data", "model"),
    ("loading", "training"),
    ("inference", "report"),
    ("planning", "evaluation", "analysis", "conversion", "tuning", "serving", "integrations"),
    ("experiment", "bench"),
    ("cli",),
)
"""The order, from the ground floor up, and from left to right on each floor."""

ROOMS = tuple(room for floor in FLOORS for room in floor)

SAYS = {
    "errors": "one-line errors", "regular_files": "no pipes", "version": "", "paper": "the paper's figures", "locks": "",
    "folders": "whole or not at all", "files": "JSON", "checksums": "damage is noticed",
    "formatting": "numbers in words", "device": "what runs here", "free_cores": "beside others",
    "config": "YAML, overrides", "plotting": "one palette",
    "confined": "under limits",
    "architecture": "a list of stages", "budget": "FLOPs and bytes by arithmetic", "data": "corpus to batches",
    "model": "the one forward pass", "training": "batch to step, runs", "loading": "runs and models by path",
    "inference": "the engine", "report": "a page about runs", "planning": "what would fit", "evaluation": "loss, tasks",
    "analysis": "inside the loops", "conversion": "from Llama to YOCO-U", "tuning": "on chats, by TRL",
    "serving": "OpenAI's API", "integrations": "vLLM", "experiment": "grids and verdicts",
    "bench": "ours beside peers", "cli": "one thin file a command",
}  # fmt: skip

WAYS = {
    "prompt to text": ("cli", "inference", "model"),
    "HTTP request to stream": ("cli", "serving", "inference", "model"),
    "batch to optimizer step": ("cli", "training", "data", "model"),
    "YAML to verdict": ("cli", "experiment", "training", "report"),
}
"""The four ways of docs/architecture.md, by the rooms that they lead through."""


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


def lines(room: str) -> int:
    """Lines of Python, C++ and of the page in a room."""
    files = [file for file in PACKAGE.rglob("*") if file.suffix in (".py", ".cpp", ".h", ".js", ".css", ".html", ".jinja")]
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files if room_of(file) == room)


def draw(axes: Axes) -> None:
    """The floors from the ground up, and the four ways as numbered stations in the rooms that they lead through."""
    width, height, gap = 100.0, 6.0, 2.4
    stations: dict[str, tuple[float, float]] = {}
    for level, floor in enumerate(FLOORS):
        sizes = [max(lines(room), 450) ** 0.4 for room in floor]
        share = (width - 1.2 * (len(floor) - 1)) / sum(sizes)
        left, bottom = 0.0, level * (height + gap)
        for room, size in zip(floor, sizes, strict=True):
            shape = {"boxstyle": "round,pad=0,rounding_size=0.6", "facecolor": "#f3f1ec", "edgecolor": "#8a8578", "zorder": 1}
            axes.add_patch(FancyBboxPatch((left, bottom), share * size, height, **shape))
            axes.text(left + 1.2, bottom + 0.66 * height, room, va="center", fontsize=9.5, weight="bold", zorder=5)
            axes.text(left + 1.2, bottom + 0.27 * height, SAYS[room], va="center", fontsize=6.8, zorder=5)
            stations[room] = (left + 0.6 * share * size, bottom + height / 2)
            left += share * size + 1.2
    for number, (name, rooms) in enumerate(WAYS.items()):
        shift = 2.6 * (number - 1.5)
        x, y = zip(*((stations[room][0] + shift, stations[room][1]) for room in rooms), strict=True)
        axes.plot(x, y, color=PALETTE[number][0], linewidth=1.8, alpha=0.75, zorder=2, label=name)
        axes.scatter(x, y, color=PALETTE[number][0], s=120, zorder=3)
        for station, place in enumerate(zip(x, y, strict=True), start=1):
            axes.text(
                *place, str(station), color="white", fontsize=7.5, weight="bold", ha="center", va="center_baseline", zorder=4
            )
    axes.set_xlim(-1, width + 1)
    axes.set_ylim(-1, len(FLOORS) * (height + gap) - gap + 1)
    axes.axis("off")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False, fontsize=8.5)


def main() -> None:
    """Write docs/architecture.png."""
    figure = Figure(figsize=(10, 7.6), layout="constrained", dpi=130)
    draw(figure.add_subplot())
    save_png(figure, ROOT / "docs" / "architecture.png")


if __name__ == "__main__":
    main()
