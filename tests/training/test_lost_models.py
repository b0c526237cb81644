"""The model of a finished run that is missing or damaged: what says so tells the truth, and the same command makes it anew."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_checksums import DAMAGES, damage
from test_own_checkpoints import contents
from training_runs import STEPS, run_config, train_on_ranks

from yoco_u.checksums import SUMS
from yoco_u.errors import UserError
from yoco_u.loading import load_model
from yoco_u.training import RunConfig, train
from yoco_u.training.checkpoint import step_name

CPU = torch.device("cpu")
LAST = step_name(STEPS)
Runs = tuple[Path, RunConfig]


@pytest.fixture(scope="module")
def finished(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    config, folder = run_config(dataset), tmp_path_factory.mktemp("lost") / "run"
    train(config, folder, progress=False)
    (folder / "model" / "exits.json").write_text("a user's")
    return folder, config


def copy(finished: Runs, tmp_path: Path) -> Path:
    shutil.copytree(finished[0], folder := tmp_path / "run")
    return folder


def lose(folder: Path, name: str, how: str) -> None:
    damage(folder / "model" / name, how, at=100) if name else shutil.rmtree(folder / "model")


@pytest.mark.parametrize(("name", "how"), [
    ("", "missing"), *(("model.safetensors", how) for how in DAMAGES), *(("config.json", how) for how in DAMAGES),
    ("tokenizer.json", "missing"), ("tokenizer.json", "flip"), (SUMS, "empty"), (SUMS, "cut"),
])  # fmt: skip
def test_a_lost_model_is_made_anew_from_the_last_checkpoint(
    finished: Runs, tmp_path: Path, name: str, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With what users had added to it, where the folder is still there; nothing else of the run changes."""
    folder = copy(finished, tmp_path)
    whole = contents(folder)
    lose(folder, name, how)
    with pytest.raises(UserError, match=r"\A.*run `yoco-u train` again to make model/ anew from the last checkpoint.*\Z"):
        load_model(folder, CPU)
    summary = train(finished[1], folder)
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and f"made model/ anew from {folder / 'checkpoints' / LAST}" in told
    if not name:
        del whole["model/exits.json"]
    assert contents(folder) == whole
    load_model(folder, CPU)
    assert train(finished[1], folder) == summary
    assert "nothing to do" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["missing", "__0_0.distcp", "trainer.json", ".metadata", "of another run"])
def test_without_the_last_checkpoint_it_is_said_what_to_do(finished: Runs, dataset: Path, tmp_path: Path, what: str) -> None:
    folder = copy(finished, tmp_path)
    lose(folder, "model.safetensors", "cut")
    last = folder / "checkpoints" / LAST
    if what in ("missing", "of another run"):
        shutil.rmtree(last)
    else:
        damage(last / what, "flip", at=9)
    if what == "of another run":
        train(run_config(dataset, optimizer_learning_rate=0.03), tmp_path / "other", progress=False)
        shutil.copytree(tmp_path / "other" / "checkpoints" / LAST, last)
    before = contents(folder)
    told = "move it out of checkpoints" if what == "of another run" else "trains to the end again"
    with pytest.raises(UserError, match=rf"\A.*{LAST}.*{told}.*\Z"):
        train(finished[1], folder, progress=False)
    assert contents(folder) == before
    shutil.rmtree(last, ignore_errors=True)
    (folder / "summary.json").unlink()
    train(finished[1], folder, progress=False)
    assert contents(folder / "model") == contents(finished[0] / "model")


@pytest.mark.parametrize("change", [
    lambda model: (model / SUMS).unlink(),
    lambda model: (model / "exits.json").write_text("another"),
    lambda model: (model / "generation_config.json").unlink(),
])  # fmt: skip
def test_a_model_that_was_changed_on_purpose_stays(finished: Runs, tmp_path: Path, change: Callable[[Path], object]) -> None:
    folder = copy(finished, tmp_path)
    change(folder / "model")
    before = contents(folder)
    train(finished[1], folder, progress=False)
    assert contents(folder) == before


def test_what_is_not_ours_in_its_place_stays(finished: Runs, tmp_path: Path) -> None:
    folder = copy(finished, tmp_path)
    shutil.rmtree(folder / "model")
    (folder / "model").mkdir()
    (folder / "model" / "notes").write_text("years of work")
    with pytest.raises(UserError, match="model"):
        train(finished[1], folder, progress=False)
    assert (folder / "model" / "notes").read_text() == "years of work"


@pytest.mark.parametrize("tokenizer", [True, False])
def test_the_dataset_is_needed_for_a_lost_tokenizer_alone(dataset: Path, tmp_path: Path, tokenizer: bool) -> None:
    config = run_config(tmp_path / "data")
    shutil.copytree(dataset, tmp_path / "data")
    train(config, tmp_path / "run", progress=False)
    whole = contents(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    shutil.rmtree(tmp_path / "data" if tokenizer else tmp_path / "run" / "tokenizer")
    train(config, tmp_path / "run", progress=False)
    assert contents(tmp_path / "run") == whole


@pytest.mark.parametrize("settings", [
    {"architecture": {"experts": {"num_experts": 4, "experts_per_token": 2, "intermediate_size": 16}, "loop_gate": 0.5}},
    {"architecture": {"tie_word_embeddings": True}, "dtype": "bfloat16"},
])  # fmt: skip
def test_every_kind_of_model_is_made_anew(dataset: Path, tmp_path: Path, settings: dict[str, object]) -> None:
    first = run_config(dataset, steps=1, optimizer_warmup_steps=0, **settings)
    train(first, tmp_path / "first", progress=False)
    started = first.model_copy(update={"start_from": str(tmp_path / "first")})
    for config, name in ((first, "first"), (started, "started")):
        if name == "started":
            train(config, tmp_path / name, progress=False)
        whole = contents(tmp_path / name / "model")
        shutil.rmtree(tmp_path / name / "model")
        train(config, tmp_path / name, progress=False)
        assert contents(tmp_path / name / "model") == whole


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_it_is_made_anew_by_any_number_of_processes(dataset: Path, tmp_path: Path, parallel: str) -> None:
    config, folder = run_config(dataset, steps=1, optimizer_warmup_steps=0, parallel=parallel), tmp_path / "run"
    assert train_on_ranks(config, folder) == [0, 0]
    whole = contents(folder / "model")
    for world_size in (1, 2):
        shutil.rmtree(folder / "model")
        assert train_on_ranks(config, folder, world_size) == [0] * world_size
        assert contents(folder / "model") == whole
