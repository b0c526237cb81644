"""`yoco-u experiment --kept`: going on with a grid of which only the report is left."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from yoco_u.experiment import jobs

GRID = """\
title: Small
base:
  data: {{corpus: {folder}/corpus, vocab_size: 300, validation_fraction: 0.3}}
  architecture: {{size: test, layers: 2, vocab_size: 300}}
  optimizer: {{warmup_steps: 1}}
  training:
    steps: 2
    sequence_length: 32
    batch_rows: 2
    micro_batch_rows: 2
    dtype: float32
    compile: "off"
    evaluate_every: 1
    save_every: 2
    evaluation_tokens: 64
seeds: [0, 1]
models:
  yoco: {{settings: {{architecture: {{preset: yoco}}}}}}
"""


@pytest.fixture
def grid(workspace: Path, tmp_path: Path) -> Path:
    file = tmp_path / "grid.yaml"
    file.write_text(GRID.format(folder=workspace))
    return file


@pytest.fixture
def kept(run: Any, grid: Path, tmp_path: Path) -> Path:
    """The report of a grid whose first seed alone is finished, and whose folder is gone."""
    out = tmp_path / "before"
    assert run("experiment", grid, "--out", out, "--run", "0").status == 0
    assert run("experiment", grid, "--out", out, "--report").status == 0
    (out / "report.json").rename(tmp_path / "kept.json")
    shutil.rmtree(out)
    return tmp_path / "kept.json"


def report(folder: Path) -> Any:
    """What a report says, but for how long its runs took."""
    found = json.loads((folder / "report.json").read_text())
    for part in found["sizes"].values() if "sizes" in found else [found]:
        for cell in part["cells"]:
            del cell["seconds"]
    return found


@pytest.mark.parametrize("sizes", [False, True])
def test_what_is_finished_is_not_trained_again_and_is_in_the_report(run: Any, grid: Path, tmp_path: Path, sizes: bool) -> None:
    options = ["sizes={small: {architecture: {hidden_size: 16, head_dim: 4}}, usual: {}}"] if sizes else []
    run("experiment", grid, *options, "--out", tmp_path / "whole")
    run("experiment", grid, *options, "seeds=[0]", "--out", tmp_path / "first")
    more = run("experiment", grid, *options, "--out", tmp_path / "more", "--kept", tmp_path / "first" / "report.json")
    assert more.status == 0
    trained = {path.parent.name for path in (tmp_path / "more").rglob("summary.json")}
    assert trained == {"yoco_seed-1"}
    assert more.out.startswith("4 of 4 runs" if sizes else "2 of 2 runs")
    assert report(tmp_path / "more") == report(tmp_path / "whole")


def test_a_run_by_its_number_and_the_report_alone(run: Any, grid: Path, kept: Path, tmp_path: Path) -> None:
    out = tmp_path / "more"
    assert run("experiment", grid, "--out", out, "--kept", kept, "--run", "0").status == 0
    assert not list(out.rglob("summary.json"))
    assert run("experiment", grid, "--out", out, "--kept", kept, "--report").out.startswith("1 of 2 runs")
    assert run("experiment", grid, "--out", out, "--kept", kept, "--run", "1").status == 0
    assert run("experiment", grid, "--out", out, "--kept", kept, "--report").out.startswith("2 of 2 runs")
    assert "none of the 2 runs" not in run("experiment", grid, "--out", out, "--report").err


def test_processes_are_told_of_it(run: Any, grid: Path, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def start(arguments: list[str], *others: Any) -> bool:
        started.append(arguments)
        return True

    monkeypatch.setattr(jobs, "run_jobs", start)
    outcome = run("experiment", grid, "--out", tmp_path / "more", "--kept", kept, "--jobs", "1")
    assert "not finished: yoco_seed-1" in outcome.err and "yoco_seed-0" not in outcome.err
    assert started[0][-2:] == ["--kept", str(kept)]


def test_another_grid_is_refused_before_training(run: Any, grid: Path, kept: Path, workspace: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "more", "--kept", kept)
    other = run("experiment", grid, "base.training.steps=3", *out)
    assert other.error.startswith(f"{kept}: yoco_seed-0 was trained with training.steps = 2, here it is 3; ")
    assert "is one of this grid" in run("experiment", grid, "seeds=[7]", *out).error
    assert run("experiment", grid, "--list", *out).error.startswith("--kept has no effect here: ")
    measured = run("experiment", grid, "measures={angular: {tokens: 64}}", *out)
    assert measured.error.startswith(f"{kept}: its runs were measured with ")
    assert not (tmp_path / "more").exists()
    text = kept.read_text()
    for damage in (
        text[:-9],
        "[]",
        "{}",
        '{"experiment": 3}',
        text.replace('"cell"', '"cel"'),
        text.replace('"finished"', '"ended"'),
    ):
        kept.write_text(damage)
        outcome = run("experiment", grid, *out)
        assert outcome.status == 2 and str(kept) in outcome.error
    assert "cannot read" in run("experiment", grid, "--out", tmp_path / "more", "--kept", tmp_path / "none.json").error
    assert not (tmp_path / "more").exists()


def test_another_dataset_is_refused_before_training(run: Any, grid: Path, kept: Path, tmp_path: Path) -> None:
    said = json.loads(kept.read_text())
    said["cells"][0]["dataset"] = "0" * 64
    kept.write_text(json.dumps(said))
    outcome = run("experiment", grid, "--out", tmp_path / "more", "--kept", kept)
    assert outcome.status == 2 and f"error: {kept} and {tmp_path}/more/data: the dataset was another one" in outcome.err
    assert not (tmp_path / "more" / "yoco_seed-1").exists()
