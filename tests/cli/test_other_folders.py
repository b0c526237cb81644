"""A run that was trained with relative paths, used from other folders, by commands that read its dataset."""

import shutil
from pathlib import Path
from typing import Any

import pytest

CONFIG = """\
name: tiny
architecture: {preset: yoco_u, size: test, vocab_size: 300, loops: 2}
dataset: data sets/ü
data: {corpus: corpus/*.py, vocab_size: 300, validation_fraction: 0.3}
optimizer: {warmup_steps: 0}
training: {steps: 1, sequence_length: 32, batch_rows: 4, micro_batch_rows: 4, dtype: float32, compile: "off"}
"""
COMMANDS: dict[str, tuple[Any, ...]] = {
    "evaluate": (), "context": ("--prefixes", "4", "--last", 4, "--texts", 1), "exits": ("--tokens", 64),
    "analyze": ("--tokens", 64, "--measures", "angular"),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """work/, in which `runs/a` was trained."""
    from yoco_u.cli import main

    work = tmp_path_factory.mktemp("folders") / "work"
    shutil.copytree(workspace / "corpus", work / "corpus")
    (work / "config.yaml").write_text(CONFIG, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        assert main(["train", "config.yaml", "--out", "runs/a", "--json"]) == 0
    return work


@pytest.mark.parametrize("command", COMMANDS)
def test_from_another_folder(run: Any, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = run(command, made / "runs" / "a", *COMMANDS[command])
    assert outcome.status == 0 and not list(tmp_path.iterdir())


def test_training_again(run: Any, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the same command, by the run's own config, and with every path spelled from where one is."""
    monkeypatch.chdir(tmp_path)
    spelled = (f"dataset='{made}/data sets/ü'", f"data.corpus='{made}/runs/../corpus/*.py'")
    for config, *overrides in (
        (made / "config.yaml",),
        (made / "runs" / "a" / "config.yaml",),
        (made / "config.yaml", *spelled),
    ):
        outcome = run("train", config, *overrides, "--out", made / "runs" / "a")
        assert outcome.status == 0 and "the run is finished" in outcome.err
    assert run("train", made / "config.yaml", *spelled, "--out", "b").status == 0
    assert (
        "holds a run with data.corpus.0"
        in run("train", made / "config.yaml", "data.corpus=corpus", "--out", made / "runs" / "a").error
    )
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_dataset_that_is_gone(run: Any, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(made / "runs" / "a", tmp_path / "runs" / "a")
    monkeypatch.chdir(tmp_path)
    (made / "data sets").rename(tmp_path / "moved")
    try:
        error = run("evaluate", "runs/a").error
        tried = [f"{folder}/data sets/ü" for folder in (made, tmp_path)]
        assert f"runs/a: its dataset is not in {' or '.join(tried)} (dataset.json is missing)" in error
        (tmp_path / "moved").rename(tmp_path / "data sets")
        assert run("evaluate", "runs/a").status == 0
    finally:
        (tmp_path / "data sets").rename(made / "data sets")
