"""A pipe in the place of any file of a run or a model is one line or nothing, and nobody waits for what comes out of it."""

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

GRID = """\
title: Small
base:
  data: {{corpus: {folder}/corpus}}
  architecture: {{size: test, layers: 2, vocab_size: 300}}
  optimizer: {{warmup_steps: 1}}
  training: {{steps: 2, sequence_length: 32, batch_rows: 2, micro_batch_rows: 2}}
models:
  yoco: {{settings: {{architecture: {{preset: yoco}}}}}}
"""
REPORT = ("report", "RUN", "--out", "page.html")
GENERATE = ("generate", "RUN", "--prompt", "a", "--max-tokens", "1", "--num-loops", "auto")
OTHERS = [Path("model/exits.json"), Path("model/chat_template.jinja"), Path("model/added_tokens.json")]
"""Files that a model may have and this one has not."""


@contextmanager
def in_seconds(limit: float) -> Iterator[None]:
    """End what takes longer as Ctrl-C does, which no part of a command passes over."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def files(folder: Path) -> list[Path]:
    """Those beside the checkpoints, by their paths in the folder."""
    found = [path.relative_to(folder) for kind in ("*", "model/*") for path in folder.glob(kind) if path.is_file()]
    return sorted(found)


@pytest.mark.parametrize(
    ("command", "folder", "refused"),
    [
        (REPORT, "", {"metrics.jsonl", "environment.json"}),
        (GENERATE, "model", {"SHA256SUMS", "exits.json"}),
    ],
    ids=["run", "model"],
)
@pytest.mark.usefixtures("undrawn")
def test_in_place_of_each_file(
    run: Any,
    workspace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: tuple[str, ...],
    folder: str,
    refused: set[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    left = set(refused)
    for file in (file for file in [*files(workspace / "a"), *OTHERS] if file.parent == Path(folder)):
        copy = tmp_path / "run"
        shutil.copytree(workspace / "a", copy)
        (copy / file).unlink(missing_ok=True)
        os.mkfifo(copy / file)
        with in_seconds(60):
            outcome = run(*(part.replace("RUN", str(copy)) for part in command))
        assert outcome.status in (0, 2), (file, outcome)
        if outcome.status == 2:
            assert file.name in outcome.error or "no run here" in outcome.error or "not finished" in outcome.error
            left.discard(file.name)
        shutil.rmtree(copy)
    assert not left


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "device"])
@pytest.mark.parametrize(
    "command",
    [
        ("sft", "RUN/model", "PIPE", "--out", "out"),
        ("grpo", "RUN/model", "PIPE", "--out", "out"),
        ("experiment", "GRID", "--kept", "PIPE", "--out", "out"),
        ("convert", "PIPE", "--out", "out"),
        ("evaluate", "PIPE"),
        ("evaluate", "RUN", "PIPE"),
        ("train", "RUN/config.yaml", "data.tokenizer=PIPE", "dataset=new", "--out", "out"),
    ],
    ids=lambda command: command[0],
)
def test_in_place_of_what_is_named(
    run: Any, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], make: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "PIPE")
    (tmp_path / "GRID").write_text(GRID.format(folder=workspace))
    with in_seconds(60):
        outcome = run(*(part.replace("RUN", str(workspace / "a")) for part in command))
    assert "PIPE" in outcome.error
    assert not (tmp_path / "out").exists()
