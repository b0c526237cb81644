"""A run goes on from its own checkpoints and config, and from no others."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_resume import assert_same_run, unfinished_copy
from training_runs import STEPS, run_config

from yoco_u.checksums import SUMS, write_checksums
from yoco_u.errors import UserError
from yoco_u.training import RunConfig, train
from yoco_u.training.checkpoint import TrainerState, read_state, step_name

Runs = tuple[Path, RunConfig]
OTHERS = {
    "rate": {"optimizer_learning_rate": 0.03},
    "seed": {"seed": 5},
    "batch": {"batch_rows": 8},
    "longer": {"steps": 8},
}


@pytest.fixture(scope="module")
def finished(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    config, folder = run_config(dataset), tmp_path_factory.mktemp("own") / "run"
    train(config, folder, progress=False)
    return folder, config


@pytest.fixture(scope="module")
def others(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of other settings, by the name of what is other."""
    folder = tmp_path_factory.mktemp("others")
    for name, settings in OTHERS.items():
        train(run_config(dataset, **{"keep_checkpoints": 1} | settings), folder / name, progress=False)
    return {name: folder / name for name in OTHERS}


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def made_older(folder: Path) -> None:
    """Make a run, or a checkpoint, one of an earlier version, which had no ids."""
    for file in [*folder.rglob("trainer.json"), *folder.rglob("environment.json")]:
        edit(file, lambda data: data.pop("run"))
        if (file.parent / SUMS).exists():
            write_checksums(file.parent)


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("other", OTHERS)
def test_a_checkpoint_of_another_run_is_refused(
    finished: Runs, others: dict[str, Path], tmp_path: Path, other: str, older: bool
) -> None:
    """Those of earlier versions, where they say of what run they are."""
    folder = unfinished_copy(finished[0], tmp_path / "run", step=4)
    (foreign,) = (others[other] / "checkpoints").iterdir()
    shutil.copytree(foreign, folder / "checkpoints" / foreign.name)
    if older:
        made_older(folder / "checkpoints" / foreign.name if other == "rate" else folder)
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(
        UserError, match=rf"{foreign.name}: .*; move it out of checkpoints/, and the same command goes on"
    ) as told:
        train(finished[1], folder, progress=False)
    assert "\n" not in str(told.value)
    assert (folder / "metrics.jsonl").read_bytes() == before and not (folder / "model").exists()
    shutil.move(folder / "checkpoints" / foreign.name, tmp_path)
    train(finished[1], folder, progress=False)
    assert_same_run(folder, finished[0])


@pytest.mark.parametrize("sums", [True, False])
@pytest.mark.parametrize(("key", "value"), [
    ("step", 2), ("step", 0), ("step", STEPS), ("step", 400), ("step", 10**12), ("seed", 1), ("seed", 2**63 - 1), ("tokens", 0),
    ("tokens", 4 * 96 + 1), ("run", "0" * 32), ("run", None),
])  # fmt: skip
def test_a_checkpoint_that_says_to_be_another_is_refused(
    finished: Runs, tmp_path: Path, key: str, value: object, sums: bool
) -> None:
    folder = unfinished_copy(finished[0], tmp_path / "run", step=4)
    checkpoint = folder / "checkpoints" / step_name(4)
    edit(checkpoint / "trainer.json", lambda data: data.update({key: value}))
    write_checksums(checkpoint) if sums else (checkpoint / SUMS).unlink()
    with pytest.raises(UserError, match=rf"{checkpoint.name}: (is|has) .*; move it out of checkpoints/"):
        train(finished[1], folder, progress=False)


@pytest.mark.parametrize("step", [2, 5, 400, 10**9])
def test_a_renamed_checkpoint_is_refused(finished: Runs, tmp_path: Path, step: int) -> None:
    folder = unfinished_copy(finished[0], tmp_path / "run", step=4)
    shutil.rmtree(folder / "checkpoints" / step_name(2))
    (folder / "checkpoints" / step_name(4)).rename(folder / "checkpoints" / step_name(step))
    with pytest.raises(UserError, match=rf"{step_name(step)}: is of step 4, which its name does not say"):
        train(finished[1], folder, progress=False)


@pytest.mark.parametrize(("key", "value"), [
    ("step", -1), ("step", 1.5), ("tokens", -1), ("seconds", -1), ("seed", -1), ("seed", 2**63), ("world_size", 0),
    ("run", ""), ("run", 7), ("run", "0" * 31 + "\n"), ("format", 2), ("more", 1),
])  # fmt: skip
def test_what_no_trainer_json_holds_is_damage(
    finished: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, value: object
) -> None:
    """Such a checkpoint is set aside, and the run goes on from the one before."""
    folder = unfinished_copy(finished[0], tmp_path / "run", step=4)
    checkpoint = folder / "checkpoints" / step_name(4)
    edit(checkpoint / "trainer.json", lambda data: data.update({key: value}))
    (checkpoint / SUMS).unlink()
    train(finished[1], folder)
    assert f"trainer.json: {key}" in capsys.readouterr().err
    assert checkpoint.with_name(f"{step_name(4)}.damaged").is_dir()
    assert_same_run(folder, finished[0])


@pytest.mark.parametrize("how", ["as it is", "older", "older, without environment", "without environment", "copied"])
def test_own_checkpoints_are_gone_on_from_exactly(finished: Runs, tmp_path: Path, how: str) -> None:
    """Those of earlier versions have no id, nor do those that are written behind them."""
    folder = unfinished_copy(finished[0], tmp_path / "run", step=4)
    if how == "copied":
        folder = folder.rename(tmp_path / "elsewhere")
    if "older" in how:
        made_older(folder)
    if "without" in how:
        (folder / "environment.json").unlink()
    train(finished[1], folder, progress=False)
    assert_same_run(folder, finished[0])
    ids = [read_state(path).run for path in sorted((folder / "checkpoints").iterdir())]
    own = None if "older" in how else read_state(finished[0] / "checkpoints" / step_name(STEPS)).run
    assert ids == [own] * 3
    (folder / "summary.json").unlink()
    train(finished[1], folder, progress=False)
    noted = json.loads((folder / "environment.json").read_text())
    assert {start["run"] for start in (noted, *noted["resumed"]) if start.get("run")} == ({own} if own else set())


def test_every_run_has_an_id_of_its_own(finished: Runs, others: dict[str, Path]) -> None:
    states: list[TrainerState] = [
        read_state(next((folder / "checkpoints").glob("step-*"))) for folder in (finished[0], *others.values())
    ]
    assert len({state.run for state in states}) == len(states)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize(
    "left", [("metrics.jsonl",), ("checkpoints",), ("summary.json",), ("checkpoints", "metrics.jsonl", "model")]
)
def test_a_run_that_has_begun_takes_no_config_for_its_own(
    finished: Runs, dataset: Path, tmp_path: Path, left: tuple[str, ...], same: bool
) -> None:
    """Be it the one that it began with, of which nobody knows."""
    shutil.copytree(finished[0], folder := tmp_path / "run")
    for name in {"metrics.jsonl", "checkpoints", "summary.json", "model"} - {*left}:
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
    (folder / "config.yaml").rename(kept := tmp_path / "config.yaml")
    before = contents(folder)
    with pytest.raises(UserError, match=r"\A.*config\.yaml: is missing, but a run has begun here; copy it back .*\Z"):
        train(finished[1] if same else run_config(dataset, **OTHERS["rate"]), folder, progress=False)
    assert contents(folder) == before
    if "summary.json" not in left and "checkpoints" in left:
        shutil.copy(kept, folder)
        train(finished[1], folder, progress=False)
        assert json.loads((folder / "summary.json").read_text())["steps"] == STEPS


@pytest.mark.parametrize("left", [(), ("config.yaml",), ("environment.json", "metrics.jsonl"), ("config.yaml", "checkpoints")])
def test_a_start_that_trained_nothing_may_begin_again_as_another(finished: Runs, tmp_path: Path, left: tuple[str, ...]) -> None:
    """Whatever it had come to when it was killed; the files of metrics and the folder of checkpoints are made empty."""
    shutil.copytree(
        finished[0], folder := tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "model", "summary.json")
    )
    (folder / "metrics.jsonl").write_bytes(b"")
    (folder / "checkpoints").mkdir()
    for name in {"config.yaml", "environment.json", "metrics.jsonl", "checkpoints"} - {*left}:
        (folder / name).rmdir() if (folder / name).is_dir() else (folder / name).unlink()
    other = run_config(Path(finished[1].dataset), steps=1, optimizer_warmup_steps=0)
    assert train(other, folder, progress=False)["steps"] == 1
    own = read_state(finished[0] / "checkpoints" / step_name(STEPS)).run
    assert read_state(folder / "checkpoints" / step_name(1)).run not in (own, None)
