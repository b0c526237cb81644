"""`yoco-u experiment` end to end: a grid of tiny runs, killed, shared between processes, reported."""

import json
import os
import shutil
import signal
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock
from forked import FORKS, SUBPROCESS
from own_signals import signal_at

from yoco_u.cli import main
from yoco_u.errors import UserError
from yoco_u.evaluation.needle_grid import NeedleSettings
from yoco_u.experiment import jobs
from yoco_u.experiment.config import Measures
from yoco_u.experiment.measure import measure, read_measures
from yoco_u.experiment.run import claim_experiment
from yoco_u.folders import claim
from yoco_u.training import TrainingDiverged
from yoco_u.training.run_folder import read_run

GRID = """\
title: Small
base:
  data: {{corpus: {folder}/corpus, vocab_size: 300, validation_fraction: 0.3}}
  architecture: {{size: test, vocab_size: 300}}
  optimizer: {{warmup_steps: 1}}
  training:
    steps: {steps}
    sequence_length: 32
    batch_rows: 4
    micro_batch_rows: 4
    dtype: float32
    compile: "off"
    evaluate_every: 2
    save_every: 2
seeds: [0, 1]
measures: {{angular: {{tokens: 64}}}}
models:
  yoco: {{settings: {{architecture: {{preset: yoco}}}}}}
  yoco-u: {{label: YOCO-U, settings: {{architecture: {{preset: yoco_u, loops: 2}}}}}}
"""


@pytest.fixture
def grid(workspace: Path, tmp_path: Path) -> Path:
    file = tmp_path / "grid.yaml"
    file.write_text(GRID.format(folder=workspace, steps=4))
    return file


RUNS = ["yoco_seed-0", "yoco-u_seed-0", "yoco_seed-1", "yoco-u_seed-1"]


def test_list_trains_nothing(run: Any, grid: Path, tmp_path: Path) -> None:
    outcome = run("experiment", grid, "--out", tmp_path / "out", "--list")
    assert outcome.status == 0
    assert [line.split()[:2] for line in outcome.out.splitlines() if "seed" in line] == [
        [str(i), c] for i, c in enumerate(RUNS)
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("undrawn")
def test_a_grid_is_trained_reported_and_not_trained_again(run: Any, grid: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("experiment", grid, "base.training.dtype=auto", "--out", out)
    outcome = run(*command)
    assert outcome.status == 0
    assert f"report: {out}/report.html" in outcome.out
    data = json.loads((out / "report.json").read_text())
    assert [cell["cell"] for cell in data["cells"]] == RUNS
    assert {cell["state"] for cell in data["cells"]} == {"finished"}
    runs = [read_run(out / name) for name in RUNS]
    assert [r.config.training.seed for r in runs] == [0, 0, 1, 1]
    assert len({r.config.dataset for r in runs}) == 1
    for cell, found in zip(data["cells"], runs, strict=True):
        assert cell["curve"][-1][2] == pytest.approx(found.kind("evaluation")[-1]["loss"], abs=1e-6)
    distances = json.loads((out / RUNS[1] / "measures.json").read_text())["angular"]["result"]
    assert len(distances["layers"]) == 2 * 2 + 2
    assert "repeat a pattern in each loop" in " ".join(outcome.out.split())
    written = {path: path.stat().st_mtime_ns for path in out.rglob("m*s.json*")}
    assert len(written) == 8
    again = run(*command)
    assert again.status == 0
    assert again.err.count("nothing to do") == 4
    assert written == {path: path.stat().st_mtime_ns for path in written}
    assert run(*command, "--report").err == ""


def test_a_grid_of_sizes_is_reported_with_their_gaps(run: Any, grid: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sizes = (
        "sizes={small: {architecture: {hidden_size: 16, head_dim: 4}}, large: {architecture: {hidden_size: 32, head_dim: 8}}}"
    )
    outcome = run("experiment", grid, sizes, "seeds=[0]", "measures=null", "base.training.steps=2", "--out", out)
    assert outcome.status == 0
    assert outcome.out.startswith("4 of 4 runs are finished, 2 of 2 sizes whole.")
    assert f"report: {out}/report.html" in outcome.out
    data = json.loads((out / "report.json").read_text())
    for gap in data["gaps"][0]["gaps"]:
        losses = [
            read_run(out / gap["size"] / f"{model}_seed-0").kind("evaluation")[-1]["loss"] for model in ("yoco-u", "yoco")
        ]
        assert gap["difference"]["mean"] == pytest.approx(losses[0] - losses[1])
    assert (out / "small" / "report.html").exists()


@pytest.mark.usefixtures("undrawn")
def test_runs_by_number_name_and_shard(run: Any, grid: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("experiment", grid, "--out", out, "--run", "1").out == ""
    assert run("experiment", grid, "--out", out, "--run", "yoco-u_seed-0").err.count("nothing to do") == 1
    run("experiment", grid, "--out", out, "--only", "1/4")
    assert {path.parent.name for path in out.glob("*/summary.json")} == {"yoco-u_seed-0", "yoco_seed-0"}
    outcome = run("experiment", grid, "--out", out, "--report")
    assert outcome.out.startswith("2 of 4 runs are finished")


def test_overrides_are_of_the_experiment(run: Any, grid: Path, tmp_path: Path) -> None:
    outcome = run("experiment", grid, "seeds=[5]", "base.training.steps=3", "--out", tmp_path / "out", "--list")
    assert "yoco_seed-5" in outcome.out
    assert "2 runs" in outcome.out


@pytest.mark.usefixtures("undrawn")
def test_taken_and_diverging_runs_do_not_stop_the_grid(
    run: Any, grid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from yoco_u.experiment import run as module

    train, asked, out = module.train, [], tmp_path / "out"

    def diverge(config: Any, folder: Path, progress: bool) -> Any:
        asked.append(folder.name)
        if folder.name == RUNS[0]:
            (folder / "checkpoints" / "non-finite-step-00000001").mkdir(parents=True)
            raise TrainingDiverged("the loss is nan")
        return train(config, folder, progress=progress)

    monkeypatch.setattr(module, "train", diverge)
    claim(out, "experiment")
    claim(out / RUNS[1], "run")
    with FileLock(out / RUNS[1] / ".lock"):
        outcome = run("experiment", grid, "--out", out)
    assert outcome.status == 0
    assert asked == RUNS
    assert "the loss is nan; going on with the next run" in outcome.err
    assert "another process is training or measuring there" in outcome.err
    assert [line for line in outcome.err.splitlines() if "not finished" in line] == [f"not finished: {c}" for c in RUNS[:2]]
    assert {path.parent.name for path in out.glob("*/summary.json")} == {*RUNS[2:]}
    assert "passed over" in run("experiment", grid, "--out", out, "--run", "0").err
    assert asked == RUNS


def test_needles_that_cannot_be_made_are_refused_before_training(run: Any, grid: Path, tmp_path: Path) -> None:
    needles = "measures.needles={kinds: [single_1], lengths: [32]}"
    outcome = run("experiment", grid, needles, "--out", tmp_path / "out")
    assert outcome.status == 2
    assert "error: 32 tokens are too few for a needle of kind single_1" in outcome.err
    assert not list((tmp_path / "out").glob("*_seed-*"))


def test_needles_are_asked_for_once(workspace: Path, tmp_path: Path) -> None:
    shutil.copytree(workspace / "a", tmp_path / "a")
    asked = Measures(needles=NeedleSettings(kinds=("single_1",), lengths=(700,), depths=2, samples=1))
    measure(tmp_path / "a", asked, print)
    assert [(score["length"], score["depth"]) for score in read_measures(tmp_path / "a")["needles"]] == [(700, 0.0), (700, 1.0)]
    written = (tmp_path / "a" / "measures.json").stat().st_mtime_ns
    measure(tmp_path / "a", asked, print)
    assert (tmp_path / "a" / "measures.json").stat().st_mtime_ns == written
    assert read_measures(workspace) == {}


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in read_run(folder).records]


def _killed_at(moment: str, arguments: list[str]) -> None:
    signal_at(moment, signal.SIGKILL)
    main(arguments)


@pytest.mark.usefixtures("undrawn")
def test_killed_in_a_run_it_goes_on_to_the_same_losses(run: Any, workspace: Path, tmp_path: Path) -> None:
    file, out, whole = tmp_path / "grid.yaml", tmp_path / "out", tmp_path / "whole"
    file.write_text(GRID.format(folder=workspace, steps=6))
    moment = f"os.mkdir */{RUNS[1]}/checkpoints/step-00000004.partial"
    process = FORKS.Process(target=_killed_at, args=(moment, ["experiment", str(file), "seeds=[0]", "--out", str(out)]))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (out / RUNS[0] / "summary.json").exists()
    assert not (out / RUNS[1] / "summary.json").exists()
    first = (out / RUNS[0] / "metrics.jsonl").stat().st_mtime_ns

    assert run("experiment", file, "seeds=[0]", "--out", out).status == 0
    assert (out / RUNS[0] / "metrics.jsonl").stat().st_mtime_ns == first
    assert run("experiment", file, "seeds=[0]", "--out", whole).status == 0
    for name in RUNS[:2]:
        expected = [(step, pytest.approx(loss, rel=1e-6)) for step, loss in losses(whole / name)]
        assert losses(out / name) == expected


@pytest.fixture
def forked_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "subprocess", SUBPROCESS)


@pytest.mark.usefixtures("forked_jobs", "undrawn")
def test_several_processes_train_each_run_once(run: Any, grid: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    outcome = run("experiment", grid, "measures=null", "--out", out, "--jobs", "2")
    assert outcome.status == 0, outcome.err
    assert outcome.err.splitlines()[-1] == "4 of 4 runs are finished"
    assert "not finished" not in outcome.err
    assert {cell["state"] for cell in json.loads((out / "report.json").read_text())["cells"]} == {"finished"}
    for name in RUNS:
        assert [record["step"] for record in read_run(out / name).kind("train")] == [1, 2, 3, 4]
    assert [len((out / f"job-{number}.log").read_text()) > 0 for number in (1, 2)] == [True, True]


def test_without_time_nothing_is_trained_and_nothing_is_wrong(run: Any, grid: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    outcome = run("experiment", grid, "--out", out, "--jobs", "2", "--minutes", "0")
    assert outcome.status == 0
    assert outcome.out == ""
    assert "stopped after 0 minutes; run the same command again to continue" in outcome.err
    assert [line for line in outcome.err.splitlines() if "not finished" in line] == [f"not finished: {c}" for c in RUNS]
    assert not list(out.glob("*/summary.json"))


@pytest.mark.usefixtures("forked_jobs")
@pytest.mark.parametrize(("how", "count"), [("the time is over", 2), ("asked to stop", 1)])
def test_processes_that_stop_leave_a_checkpoint(
    how: str, count: int, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time is over, or the signal comes, once each process has taken a step; no run can end before."""
    file, out, now = tmp_path / "grid.yaml", tmp_path / "out", [0.0]
    file.write_text(GRID.format(folder=workspace, steps=10**6))
    monkeypatch.setattr(jobs, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=time.sleep))

    def watch() -> None:
        if len([metrics for metrics in out.glob("*/metrics.jsonl") if metrics.stat().st_size > 0]) == count:
            if how == "asked to stop":
                os.kill(os.getpid(), signal.SIGTERM)
            now[0] = 61.0

    claim_experiment(out)
    arguments = ["experiment", str(file), "base.training.save_every=1000000", "--out", str(out), "--only", "1/1"]
    with nullcontext() if how == "the time is over" else pytest.raises(KeyboardInterrupt):
        assert not jobs.run_jobs(arguments, count, out, minutes=1, watch=watch)
    for name in RUNS[:count]:
        (saved,) = (out / name / "checkpoints").glob("step-*")
        assert int(saved.name.removeprefix("step-")) == read_run(out / name).kind("train")[-1]["step"]
    assert not any((out / name).exists() for name in RUNS[count:])


def test_a_process_that_fails_is_named_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^{tmp_path}/job-1.log: this process failed: unknown architecture 'nowhere': "):
        jobs.run_jobs(["plan", "nowhere"], 1, tmp_path, minutes=None)


def test_mistakes(run: Any, grid: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "exclude each other" in run("experiment", grid, "--list", "--report").error
    assert "exclude each other" in run("experiment", grid, "--jobs", "2", "--only", "1/2").error
    assert "--jobs" in run("experiment", grid, "--jobs", "0").error
    assert "none of the 4 runs is finished" in run("experiment", grid, "--out", out, "--report").error
    assert "no such run" in run("experiment", grid, "--out", out, "--run", "x").error
    assert "SHARD/COUNT" in run("experiment", grid, "--out", out, "--only", "3").error
    assert "cannot read" in run("experiment", tmp_path / "none.yaml").error
    assert "did you mean models" in run("experiment", grid, "modls={}").error
    assert "unknown preset 'yoc'" in run("experiment", grid, "models.x={settings: {architecture: {preset: yoc}}}").error
    assert not out.exists()
    assert run("experiment", grid, "--out", out, "--run", "0").status == 0
    for choice in (("--run", "0"), ("--report",)):
        changed = run("experiment", grid, "base.optimizer.learning_rate=0.5", "--out", out, *choice)
        assert "optimizer.learning_rate = 0.001, now 0.5" in changed.err
        assert changed.status == 2
