"""A run that was killed and started again gives exactly the results of a run that was not killed."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_runs import STEPS, deterministic, run_config, start

from yoco_u.checksums import SUMS
from yoco_u.config import dump_yaml
from yoco_u.data import DatasetIndex, prepare
from yoco_u.errors import UserError
from yoco_u.training import RunConfig, TrainingInterrupted, train
from yoco_u.training.metrics import METRICS, MetricsWriter
from yoco_u.training.step import StepResult, TrainingStep

EXPERTS = {"experts": {"num_experts": 4, "experts_per_token": 2, "intermediate_size": 16}}


def assert_same_run(folder: Path, reference: Path) -> None:
    assert deterministic(folder) == deterministic(reference)
    found, expected = (load_file(path / "model" / "model.safetensors") for path in (folder, reference))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    summaries = [json.loads((path / "summary.json").read_text()) for path in (folder, reference)]
    assert summaries[0]["validation"] == summaries[1]["validation"]


MOMENTS = [
    "open */metrics.jsonl",
    "open */step-00000002.partial/.yoco-u-part",
    "os.mkdir */step-00000002.partial",
    "open */step-00000002.partial/*.distcp",
    "os.rmdir */step-00000002.partial",  # while the files that the last kill left are removed
    "os.rename */step-00000002.partial/.metadata.tmp *",
    "os.rename */step-00000002.partial *",
    "open */tensorboard/*",
    "os.mkdir */step-00000006.partial",  # two older checkpoints are there, and one of them will be removed
    "os.rename */step-00000002 *.old.partial",
    "os.remove */step-00000004.old.partial/.yoco-u-part",
    "os.rmdir */step-00000004.old.partial",
    "open */trainer.json.partial/trainer.json",
    "os.mkdir */model.partial",
    "open */model.partial/config.json",
    "os.rename */model.partial *",
    "open */summary.json.partial/summary.json",
    "os.rename */summary.json.partial/summary.json *",
]


def test_killed_at_any_moment_it_continues_to_the_same_losses_and_weights(dataset: Path, tmp_path: Path) -> None:
    config = run_config(
        dataset, architecture=EXPERTS | {"loop_gate": 0.5}, steps=10, dtype="bfloat16", micro_batch_rows=2, keep_checkpoints=2
    )
    train(config, tmp_path / "reference", progress=False)
    folder = tmp_path / "killed"
    torn = 0
    for moment in MOMENTS:
        process = start(config, folder, own_signal=(moment, signal.SIGKILL))
        process.join()
        assert process.exitcode == -signal.SIGKILL, moment
        torn += any(folder.glob("checkpoints/step-????????.partial"))
    assert torn >= 4
    train(config, folder, progress=False)
    assert_same_run(folder, tmp_path / "reference")
    assert not list(folder.rglob("*.partial"))
    assert len(list((folder / "checkpoints").iterdir())) == 2
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["torch"] == torch.__version__
    assert all(0 < resumed["step"] <= 10 for resumed in environment["resumed"])


def test_a_signal_stops_after_the_step_with_a_checkpoint_to_continue_from(dataset: Path, tmp_path: Path) -> None:
    config = run_config(dataset)
    train(config, tmp_path / "reference", progress=False)
    folder = tmp_path / "stopped"
    process = start(config, folder, own_signal=("os.mkdir */step-00000002.partial", signal.SIGTERM))
    process.join()
    assert process.exitcode == 2
    error = (folder / "error-0.txt").read_text()
    assert f"stopped after step 3 of {STEPS}" in error and "run the same command again to continue" in error
    assert (folder / "checkpoints" / "step-00000003").is_dir()
    train(config, folder, progress=False)
    assert_same_run(folder, tmp_path / "reference")


def test_the_second_signal_acts_at_once(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from yoco_u.training import trainer

    def interrupted_evaluation(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(trainer, "evaluate", interrupted_evaluation)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with SIGINT ignored
    with pytest.raises(KeyboardInterrupt):
        train(run_config(dataset), tmp_path, progress=False)
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler
    monkeypatch.undo()
    assert train(run_config(dataset), tmp_path, progress=False)["steps"] == STEPS


def test_a_step_that_fails_because_of_the_signal_is_an_interruption(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heard: None
) -> None:
    def compiler_killed(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)
        raise RuntimeError("CppCompileError: pages of output")

    monkeypatch.setattr(TrainingStep, "gradients", compiler_killed)
    with pytest.raises(TrainingInterrupted, match=r"stopped in step 1 of 6; .* continue from the beginning"):
        train(run_config(dataset), tmp_path, progress=False)
    monkeypatch.undo()
    assert train(run_config(dataset), tmp_path, progress=False)["steps"] == STEPS


@pytest.fixture(scope="module")
def finished(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunConfig]:
    config = run_config(dataset)
    folder = tmp_path_factory.mktemp("finished")
    train(config, folder, progress=False)
    return folder, config


def unfinished_copy(finished: Path, folder: Path, step: int) -> Path:
    """A copy of the run as it was after the checkpoint of `step`, but with the metrics of later steps too."""
    shutil.copytree(finished, folder)
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "model")
    for checkpoint in (folder / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    return folder


def test_a_finished_run_says_so(finished: tuple[Path, RunConfig], capsys: pytest.CaptureFixture[str]) -> None:
    folder, config = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    summary = train(config, folder)
    assert summary == json.loads((folder / "summary.json").read_text())
    assert "the run is finished, at step 6" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_another_config_is_refused(finished: tuple[Path, RunConfig], dataset: Path) -> None:
    folder, _ = finished
    with pytest.raises(UserError, match=r"holds a run with optimizer.learning_rate = 0.003, now 0.01; choose another folder"):
        train(run_config(dataset, optimizer_learning_rate=0.01, batch_rows=8), folder, progress=False)
    with pytest.raises(UserError, match=r"architecture.stages.0.loops = 3, now 2"):
        train(run_config(dataset, architecture={"loops": 2}), folder, progress=False)


def test_another_dataset_is_refused_but_not_another_path_to_it(
    finished: tuple[Path, RunConfig], dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, config = finished
    monkeypatch.chdir(dataset.parent)
    assert train(run_config(Path(dataset.name)), folder, progress=False)["steps"] == config.training.steps
    with pytest.raises(UserError, match=r"holds a run with dataset = '.*', now 'elsewhere'"):
        train(run_config(Path("elsewhere")), folder, progress=False)


def test_another_dataset_in_the_same_place_is_refused(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether there is a checkpoint yet or not; the same texts prepared again from elsewhere are the same dataset."""
    config, place, texts = DatasetIndex.load(dataset).config, tmp_path / "dataset", dataset.parent / "functions.jsonl"
    shutil.copytree(dataset, place)
    settings = run_config(place, save_every=2)
    train(settings, tmp_path / "whole", progress=False)
    folder = unfinished_copy(tmp_path / "whole", tmp_path / "run", step=2)
    shutil.rmtree(place)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / texts.name).write_text(texts.read_text().replace("left", "leg"))
    for here, alike in ((tmp_path / "other", False), (dataset.parent, True)):
        monkeypatch.chdir(here)
        prepare(config, place, progress=False)
        if not alike:
            with pytest.raises(UserError, match="was begun with another dataset in the same place; bring it back"):
                train(settings, folder, progress=False)
            shutil.copytree(folder, begun := tmp_path / "begun")
            shutil.rmtree(begun / "checkpoints")
            with pytest.raises(UserError, match="was begun with another dataset"):
                train(settings, begun, progress=False)
            shutil.rmtree(place)
    train(settings, folder, progress=False)
    assert_same_run(folder, tmp_path / "whole")


def test_a_checkpoint_of_another_architecture_is_refused(
    finished: tuple[Path, RunConfig], dataset: Path, tmp_path: Path
) -> None:
    folder = unfinished_copy(finished[0], tmp_path / "run", step=6)
    other = run_config(dataset, architecture={"hidden_size": 48})
    dump_yaml(other, folder / "config.yaml")
    with pytest.raises(UserError, match=r"step-00000006: the checkpoint's model has hidden_size = 32, this run's 48"):
        train(other, folder, progress=False)


def test_a_damaged_checkpoint_is_named(finished: tuple[Path, RunConfig], tmp_path: Path) -> None:
    """A checkpoint of an earlier version, which has no checksums. Those that have them are in `test_checkpoints.py`."""
    folder = unfinished_copy(finished[0], tmp_path / "run", step=4)
    next((folder / "checkpoints" / "step-00000004").glob("*.distcp")).unlink()
    (folder / "checkpoints" / "step-00000004" / SUMS).unlink()
    with pytest.raises(UserError, match=r"step-00000004: the checkpoint is damaged .* remove it to go on from the one before"):
        train(finished[1], folder, progress=False)
    shutil.rmtree(folder / "checkpoints" / "step-00000004")
    train(finished[1], folder, progress=False)
    assert_same_run(folder, finished[0])


def test_metrics_beyond_the_checkpoint_and_torn_lines_are_cut(finished: tuple[Path, RunConfig], tmp_path: Path) -> None:
    folder = unfinished_copy(finished[0], tmp_path / "run", step=4)
    with (folder / METRICS).open("a") as file:
        file.write('{"kind": "train", "step": 7, "lo')
    writer = MetricsWriter(folder, step=4)
    writer.write({"kind": "train", "step": 5, "loss": 1.0})
    writer.close()
    text = (folder / METRICS).read_text()
    assert [json.loads(line)["step"] for line in text.splitlines()] == [1, 2, 3, 3, 4, 5]
    assert text.endswith('{"kind": "train", "step": 5, "loss": 1.0}\n')


def test_random_numbers_continue(finished: tuple[Path, RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    update, drawn = TrainingStep.update, []

    def draw(self: TrainingStep, result: StepResult, step: int) -> float:
        drawn.append((step, torch.rand(()).item()))
        return update(self, result, step)

    monkeypatch.setattr(TrainingStep, "update", draw)
    train(finished[1], tmp_path / "whole", progress=False)
    train(finished[1], unfinished_copy(tmp_path / "whole", tmp_path / "run", step=4), progress=False)
    assert [step for step, _ in drawn] == [0, 1, 2, 3, 4, 5, 4, 5]
    assert drawn[6:] == drawn[4:6] and len(set(drawn)) == 6


def test_one_run_at_a_time_in_a_folder(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from yoco_u.training import trainer

    config, seen = run_config(dataset, steps=2, optimizer_warmup_steps=0), []

    def second(*_: object) -> float:
        with pytest.raises(UserError, match="another process is training or measuring there"):
            train(config, tmp_path, progress=False)
        seen.append(True)
        return 1e9

    monkeypatch.setattr(trainer, "gemm_rate", second)
    train(config, tmp_path, progress=False)
    assert seen == [True]
