"""Every option of every command with values that it is not made for: exit 0, or one line and exit 2, and nothing left behind.

The table is made from the commands themselves, so a new option is in it at once. A test run draws one value for each option;
`YOCO_U_FUZZ=7 pytest tests/cli/test_fuzz.py` draws others, with seed 7, and `YOCO_U_FUZZ=all` runs all 7,400 lines.
"""

import io
import os
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import typer
from typer.models import OptionInfo

from yoco_u.cli import app, main

NUMBERS = (
    "", " ", "9" * 400, "9" * 5000, "-1", "0", "inf", "nan", "1e300", "1e400", "1.5", "٣", "0x10", "true", "-", "\udcff",
    "a\0b", "18446744073709551616",
)  # fmt: skip
TEXTS = (
    *NUMBERS, "x" * 300, ",", "1,", "1,,2", "2,1", "1e3,9", "=", "a=b", "a=", "[", "[" * 99, "{a: 1, a: 2}", "a: &a [*a]",
    "2026-13-45", "!!python/object:os.system", "none", "[bold]", "%s", "\n", "meta", "cpu:7",
)  # fmt: skip
PLACES = ("", " ", "a\0b", "\udcff", "x" * 300, "file/below", "folder", "file", "dangling", "circle", "-", "away/x")
READ = ("/dev/null", ".")
WRITTEN = ("--out", "--json", "--plot")
FLAG = "a flag"


@dataclass(frozen=True)
class Command:
    """A command line that works in the folder that `place` makes."""

    name: str
    arguments: tuple[str, ...] = ()
    options: dict[str, str] = field(default_factory=dict)

    def line(self, changed: str | int, value: str) -> list[str]:
        """The command line with another value for an option, by name, or an argument, by number."""
        options = self.options | ({changed: value} if isinstance(changed, str) else {})
        arguments = [value if number == changed else given for number, given in enumerate(self.arguments)]
        return [self.name, *arguments, *(part for pair in options.items() for part in pair if part != FLAG)]


COMMANDS = (
    Command("plan", ("yoco_u:size=test",), {"--context": "64", "--hardware": "h100"}),
    Command("plan", ("grid.yaml", "seeds=[0]"), {"--hardware": "h100"}),
    Command("prepare", ("config.yaml", "data.vocab_size=300"), {"--out": "prepared", "--json": FLAG}),
    Command("prepare", ("data.validation_fraction=0.3",), {"--corpus": "corpus", "--out": "prepared", "--json": FLAG}),
    Command("train", ("config.yaml", "training.steps=2", "optimizer.warmup_steps=1"), {"--out": "trained", "--json": FLAG}),
    Command("convert", ("run", "global_kvs=2"), {"--out": "new", "--kv": "fit", "--text": "corpus", "--tokens": "64"}),
    Command("sft", ("model", "chats.jsonl"), {"--out": "tuned"}),
    Command("grpo", ("model", "problems.jsonl", "problems=1"), {"--out": "tuned", "--test": "problems.jsonl"}),
    Command("generate", ("run",), {"--prompt": "a", "--max-tokens": "2"}),
    Command("chat", ("run",), {"--max-tokens": "2"}),
    Command("evaluate", ("run", "file"), {"--sequence-length": "16"}),
    Command("context", ("run",), {"--files": "corpus", "--prefixes": "8", "--last": "8", "--texts": "1"}),
    Command("needles", ("run",), {"--kinds": "single_1", "--lengths": "512", "--samples": "1", "--depths": "1"}),
    Command("tasks", ("run", "yoco_u_stdlib_choice"), {"--limit": "1", "--sequence-length": "1024"}),
    Command("serve", ("run",), {"--port": "0", "--cache-tokens": "4096", "--api-key": "k"}),
    Command("report", ("run",), {"--out": "page.html"}),
    Command("exits", ("model", "file"), {"--sequence-length": "16", "--mean-loops": "1.5"}),
    Command("analyze", ("run", "file"), {"--tokens": "32", "--sequence-length": "16", "--out": "study", "--measures": "loss"}),
    Command("experiment", ("grid.yaml", "seeds=[0]"), {"--list": FLAG}),
    Command("experiment", ("grid.yaml",), {"--out": "grid"}),
    Command("quickstart", ("training.steps=2",), {"--config": "grid.yaml", "--out": "quick"}),
    Command("bench", (), {"--size": "test", "--contexts": "64", "--batches": "1", "--peers": "none", "--rounds": "1"}),
)  # fmt: skip

GRID = """\
title: grid
base:
  data: {corpus: corpus, vocab_size: 300, validation_fraction: 0.3}
  optimizer: {warmup_steps: 1}
  training: {steps: 2, sequence_length: 16, batch_rows: 2, micro_batch_rows: 2, dtype: float32, compile: "off"}
models:
  yoco-u: {settings: {architecture: {preset: yoco_u, size: test, vocab_size: 300}}}
seeds: [0]
"""
CHAT = '{"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]}\n'


def values(command: Command) -> dict[str | int, tuple[str, ...]]:
    """For each argument, by number, and each option, by name, the values that it is not made for."""
    found: dict[str | int, tuple[str, ...]] = dict.fromkeys(range(len(command.arguments)), (*TEXTS, *PLACES, *READ))
    function = next(one.callback for one in app.registered_commands if one.callback.__name__ == command.name)
    for hint in get_type_hints(function, include_extras=True).values():
        kind, *about = get_args(hint) or (hint,)
        if about and isinstance(about[0], OptionInfo) and kind is not bool:
            name, kinds = str(about[0].default), {kind, *get_args(kind)}
            places = PLACES if name in WRITTEN else (*PLACES, *READ)
            found[name] = NUMBERS if kinds & {int, float} else places if Path in kinds else (*TEXTS, *places)
    return found


def lines(command: Command) -> list[list[str]]:
    """The line that works, and those with one value changed: all of them, or one for each argument and option."""
    chosen = os.environ.get("YOCO_U_FUZZ", "0")
    draw = random.Random(f"{chosen} {command.line('', '')}")
    changed = [
        command.line(place, value)
        for place, wrong in values(command).items()
        for value in (wrong if chosen == "all" else draw.sample(wrong, 1))
    ]
    return [command.line(-1, ""), *changed]


@pytest.fixture
def place(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Path]:
    """Makes and enters a folder with everything that the command lines name."""

    def make(number: int) -> Path:
        folder = tmp_path / str(number)
        (folder / "folder").mkdir(parents=True)
        (folder / "file").write_text("def f(x):\n    return x\n" * 4)
        (folder / "grid.yaml").write_text(GRID)
        (folder / "config.yaml").write_text((workspace / "config.yaml").read_text())
        for name, target in (("run", "a"), ("corpus", "corpus")):
            (folder / name).symlink_to(workspace / target)
        shutil.copytree(workspace / "a" / "model", folder / "model")
        (folder / "model" / "chat_template.jinja").write_text("{% for one in messages %}{{ one.content }}\n{% endfor %}")
        (folder / "chats.jsonl").write_text(CHAT)
        (folder / "problems.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
        (folder / "dangling").symlink_to(folder / "nothing")
        (folder / "circle").symlink_to(folder / "circle")
        monkeypatch.chdir(folder)
        return folder

    return make


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch, undrawn: None) -> None:
    """Leave out what takes long behind all checks: serving, measuring, tuning, grids, plots, and the harness's thousand tasks.

    Nothing is written to a chat.
    """
    from lm_eval.tasks import TaskManager

    def nothing(*_: object, **__: object) -> None:
        raise typer.Exit

    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.setattr("yoco_u.serving.server._Server.run", nothing)
    monkeypatch.setattr("gc.freeze", lambda: None)  # which would keep every model that was served
    monkeypatch.setattr("yoco_u.bench.run.Benchmark.run", nothing)
    monkeypatch.setattr("yoco_u.tuning.runs.train", nothing)
    monkeypatch.setattr("yoco_u.experiment.run.train_runs", nothing)
    monkeypatch.setattr("yoco_u.evaluation.harness_tasks.TaskManager", partial(TaskManager, include_defaults=False))


def contents(*folders: Path) -> set[tuple[str, int]]:
    """Everything in folders, files with their time. A lock stays where it was taken: removing it could let two processes in."""
    paths = [path for folder in folders for path in folder.rglob("*") if path.suffix != ".lock"]
    return {(str(path), 0 if path.is_dir() and not path.is_symlink() else path.lstat().st_mtime_ns) for path in paths}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.name} {' '.join(command.arguments)}")
def test_exit_0_or_one_line(
    command: Command, place: Callable[[int], Path], workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One error, that is: a note of what a folder holds and is not read may stand before it."""
    wrong = []
    for number, line in enumerate(lines(command)):
        folder = place(number)
        before = contents(folder, workspace)
        capsys.readouterr()
        try:
            status: Any = main(line)
        except BaseException as error:
            status = f"{type(error).__name__}: {error}"
        out, err = capsys.readouterr()
        left = contents(folder, workspace) ^ before
        refused = out == "" and re.fullmatch(r"(.* left out .*\n)?error: .*\n", err) and not left
        if status != 0 and not (status == 2 and number and refused):
            wrong.append((line, status, out[-300:], err[-300:], left))
    assert not wrong, "\n".join(map(repr, wrong))
