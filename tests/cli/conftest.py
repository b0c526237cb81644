"""A corpus of a few texts, and two runs of five steps on it, made by the commands themselves."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from yoco_u.cli import main

CONFIG = """\
name: tiny
architecture: {{preset: yoco_u, size: test, vocab_size: 300, loops: 2}}
dataset: {folder}/data
data: {{corpus: {folder}/corpus, vocab_size: 300, validation_fraction: 0.3}}
optimizer: {{warmup_steps: 2}}
training:
  steps: 5
  sequence_length: 32
  batch_rows: 4
  micro_batch_rows: 4
  dtype: float32
  compile: "off"
  evaluate_every: 2
  save_every: 5
"""


@dataclass(frozen=True)
class Outcome:
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The message of a user's mistake, which is one line and nothing else."""
        assert self.status == 2, (self.status, self.out, self.err)
        assert self.out == ""
        assert self.err.startswith("error: ")
        assert self.err.endswith("\n")
        assert self.err.count("\n") == 1, self.err
        return self.err.removeprefix("error: ").strip()


@pytest.fixture(autouse=True)
def _small_caches(small_caches: None) -> None:
    """For every command."""


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Analyses and reports without their plots, which take most of the time."""
    for module in ("analysis.output", "experiment.plots"):
        monkeypatch.setattr(f"yoco_u.{module}.svg", lambda *_: "")
    for module in ("analysis.output", "experiment.report"):
        monkeypatch.setattr(f"yoco_u.{module}.write_png", lambda *_: None)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command in this process."""

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        return Outcome(status, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """corpus/, config.yaml, data/ and the runs a/ (T=2) and b/ (no loop)."""
    folder = tmp_path_factory.mktemp("workspace")
    (folder / "corpus").mkdir()
    for i in range(24):
        text = "".join(f"def f{i}_{j}(x):\n    return x * {i + j}  # täglich\n\n" for j in range(8))
        (folder / "corpus" / f"{i:02d}.py").write_text(text, encoding="utf-8")
    (folder / "config.yaml").write_text(CONFIG.format(folder=folder), encoding="utf-8")
    assert main(["prepare", f"{folder}/config.yaml", "--json"]) == 0
    assert main(["train", f"{folder}/config.yaml", "--out", f"{folder}/a", "--json"]) == 0
    yoco = ["name=twin", "architecture={preset: yoco, size: test, vocab_size: 300}"]
    assert main(["train", f"{folder}/config.yaml", *yoco, "--out", f"{folder}/b", "--json"]) == 0
    return folder
