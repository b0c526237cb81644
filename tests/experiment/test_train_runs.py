"""Training the runs of a grid: when none is begun any more, which are passed over, and what one process at a time does."""

import json
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_up_grids import grid, preset

from yoco_u.errors import UserError
from yoco_u.evaluation.held_out import validation_split
from yoco_u.experiment import run as runs_module
from yoco_u.experiment.config import AngularMeasure, Experiment, Measures
from yoco_u.experiment.grid import GridRun, expand
from yoco_u.experiment.measure import MEASURES, measure
from yoco_u.experiment.results import read_results
from yoco_u.experiment.run import has_diverged, train_runs
from yoco_u.training import TrainingInterrupted, evaluate, train, trainer
from yoco_u.training.distributed import Distributed
from yoco_u.training.run_folder import RunFolder
from yoco_u.training.step import StepResult, TrainingStep

Grid = tuple[Experiment, list[GridRun], Path]


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Grid:
    """Two runs of one step, their experiment and its folder."""
    monkeypatch.setattr(trainer, "gemm_rate", lambda device, dtype: 1e9)
    write_texts(tmp_path, "left + right")
    data = {"corpus": str(tmp_path / "train.txt"), "validation_corpus": str(tmp_path / "held-out.txt"), "vocab_size": 300}
    small = {"vocab_size": 300, "layers": 2}
    experiment = grid({"a": preset("yoco", **small), "b": preset("yoco_u", label="B", **small)}, seeds=(), data=data)
    few = ["steps=1", "sequence_length=16", "compile=off", "dtype=float32", "evaluation_tokens=16"]
    return experiment, expand(experiment, tmp_path / "grid", [f"training.{one}" for one in few]), tmp_path / "grid"


def write_texts(folder: Path, text: str) -> None:
    (folder / "train.txt").write_text("\n".join(f"{text} + {n}" for n in range(100)))
    (folder / "held-out.txt").write_text("\n".join(f"{text} - {n}" for n in range(9)))


def signal_in(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **keywords: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return function(*arguments, **keywords)

    return call


def not_finite(self: TrainingStep, *arguments: Any) -> StepResult:
    return replace(GRADIENTS(self, *arguments), loss=float("nan"))


GRADIENTS = TrainingStep.gradients
LAST: dict[str, tuple[Any, str, Any]] = {
    "step": (TrainingStep, "gradients", GRADIENTS),
    "step, which diverges": (TrainingStep, "gradients", not_finite),
    "evaluation": (trainer, "evaluate", evaluate),
    "checkpoint": (trainer._Run, "_save", trainer._Run._save),
}


@pytest.mark.parametrize("moment", LAST)
def test_a_signal_in_the_last_step_begins_no_other_run(moment: str, two: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment, runs, folder = two
    where, name, function = LAST[moment]
    with monkeypatch.context() as patch, pytest.raises(TrainingInterrupted):
        patch.setattr(where, name, signal_in(function))
        train_runs(experiment, runs, folder, progress=False)
    assert (folder / "a" / "summary.json").exists() == (function is not not_finite)
    assert not (folder / "b").exists()


@pytest.mark.parametrize(("checkpoints", "finished", "diverged"), [
    ((), False, False),
    (("step-00000004",), False, False),
    (("non-finite-step-00000000",), False, True),
    (("step-00000004", "non-finite-step-00000005"), False, True),
    (("step-00000005", "non-finite-step-00000005-2"), False, True),
    (("step-00000008", "non-finite-step-00000005", "non-finite-step-00000006"), False, False),
    (("step-123456789", "non-finite-step-99999999"), False, False),
    (("step-00000004", "step-00000008.damaged", "step-00000009-2.damaged", "non-finite-step-00000005"), False, True),
    (("step-00000004", "step-00000008.partial", "non-finite-step-00000005"), False, True),
    (("step-00000004", "non-finite-step-00000009.partial"), False, False),
    (("non-finite-step-00000005",), True, False),
])  # fmt: skip
def test_a_run_that_went_beyond_has_not_diverged(
    checkpoints: tuple[str, ...], finished: bool, diverged: bool, tmp_path: Path
) -> None:
    for name in checkpoints:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    if finished:
        (tmp_path / "summary.json").write_text('{"name": "a", "steps": 8}')
    assert has_diverged(tmp_path) == diverged


def test_one_process_at_a_time_measures_a_run(two: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment, runs, folder = two
    experiment = experiment.model_copy(update={"measures": Measures(angular=AngularMeasure(tokens=16))})
    measured, said = list[str](), list[str]()

    def second(run: Path, *arguments: Any) -> None:
        """Another process comes while this one measures."""
        measured.append(run.name)
        if len(measured) == 1:
            assert train_runs(experiment, runs, folder, runs[:1], progress=False, say=said.append) == []
        measure(run, *arguments)

    monkeypatch.setattr(runs_module, "measure", second)
    assert train_runs(experiment, runs, folder, runs[:1], progress=False) == []
    assert measured == ["a"]
    assert "a: another process is training or measuring there" in said[-1] and "going on with the next run" in said[-1]
    assert json.loads((folder / "a" / MEASURES).read_text())["angular"]["settings"] == {"tokens": 16}


def test_rank_0_alone_looks_what_there_is_to_do(two: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another rank may see a file earlier or later; if it chose by itself, ranks would wait for each other for ever."""
    experiment, runs, folder = two
    experiment = experiment.model_copy(update={"measures": Measures(angular=AngularMeasure(tokens=16))})
    on_main, asked, call = list[Any](), list[str](), Distributed.on_main

    def noted(self: Distributed, function: Callable[[], Any]) -> Any:
        on_main.append(function)
        found = call(self, function)
        on_main.pop()
        return found

    def only_on_main(function: Callable[..., Any]) -> Callable[..., Any]:
        def look(*arguments: Any) -> Any:
            assert on_main
            asked.append(function.__name__)
            return function(*arguments)

        return look

    monkeypatch.setattr(Distributed, "on_main", noted)
    monkeypatch.setattr(RunFolder, "read_summary", only_on_main(RunFolder.read_summary))
    monkeypatch.setattr(runs_module, "has_diverged", only_on_main(has_diverged))
    assert train_runs(experiment, runs, folder, runs[:1], progress=False) == []
    assert set(asked) == {"read_summary", "has_diverged"}


@pytest.mark.parametrize("prepared", [True, False], ids=["prepared", "removed"])
def test_a_dataset_that_was_prepared_anew_is_refused(prepared: bool, two: Grid) -> None:
    """Before another run is trained on it, or where it would be prepared then, and where runs on both would be compared."""
    experiment, runs, folder = two
    train_runs(experiment, runs, folder, runs[:1], progress=False)
    shutil.rmtree(folder / "data")
    write_texts(folder.parent, "right * left")
    if prepared:
        train(runs[1].config, folder / "b", progress=False)
        with pytest.raises(UserError, match="the dataset was another one for each"):
            read_results(runs, folder)
        shutil.rmtree(folder / "b")
    with pytest.raises(UserError, match=f"{folder}/a and {folder}/data: the dataset was another one for each"):
        train_runs(experiment, runs, folder, runs[1:], progress=False)
    assert not (folder / "b").exists()
    with pytest.raises(UserError, match="a: was begun with another dataset in the same place"):
        validation_split(folder / "a", 16)
    shutil.rmtree(folder / "data")
    write_texts(folder.parent, "left + right")
    assert train_runs(experiment, runs, folder, progress=False) == []
    assert [series.name for series in read_results(runs, folder).series] == ["a", "b"]


def test_a_run_beside_the_grid_may_have_another_dataset(two: Grid) -> None:
    experiment, runs, folder = two
    train_runs(experiment, runs, folder, runs[:1], progress=False)
    (folder / "a").rename(folder / "earlier")
    shutil.rmtree(folder / "data")
    write_texts(folder.parent, "right * left")
    assert train_runs(experiment, runs, folder, runs[1:], progress=False) == []
