"""Two processes give the losses of one up to rounding, and checkpoints load on either number of processes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_runs import STEPS, deterministic, losses, run_config, train_on_ranks

from yoco_u.folders import mark
from yoco_u.training import RunConfig, train

EXPERTS = {"num_experts": 4, "experts_per_token": 2, "intermediate_size": 16}
ARCHITECTURES = {
    "yoco_u": ("yoco_u", {"loop_gate": 0.5, "tie_word_embeddings": True, "qk_norm": True}),
    "experts": ("yoco_u", {"experts": EXPERTS}),
    "parscale": ("parscale", {}),
}


def config_of(dataset: Path, which: str, parallel: str, **settings: object) -> RunConfig:
    name, architecture = ARCHITECTURES[which]
    return run_config(dataset, name, architecture, parallel=parallel, **settings)


@pytest.fixture(scope="module")
def alone(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The runs of one process."""
    folders = {which: tmp_path_factory.mktemp(which) for which in ARCHITECTURES}
    for which, folder in folders.items():
        train(config_of(dataset, which, "ddp"), folder, progress=False)
    return folders


def assert_close(folder: Path, reference: Path) -> None:
    found, expected = deterministic(folder), deterministic(reference)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.pop("kind") == b.pop("kind")
        assert a == pytest.approx(b, rel=2e-4)
    weights, wanted = (load_file(path / "model" / "model.safetensors") for path in (folder, reference))
    assert weights.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(weights[name], wanted[name], rtol=1e-3, atol=2e-4)
    for part in ("config.json", "tokenizer.json"):
        assert (folder / "model" / part).read_text() == (reference / "model" / part).read_text()


@pytest.mark.parametrize(
    ("which", "parallel"), [("yoco_u", "ddp"), ("yoco_u", "fsdp"), ("experts", "ddp"), ("parscale", "fsdp")]
)
def test_two_processes_are_one(which: str, parallel: str, dataset: Path, alone: dict[str, Path], tmp_path: Path) -> None:
    config = config_of(dataset, which, parallel, micro_batch_rows=1, checkpoint_stages=[0])
    assert train_on_ranks(config, tmp_path) == [0, 0]
    assert_close(tmp_path, alone[which])


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_checkpoint_moves_between_two_processes_and_one(
    parallel: str, dataset: Path, alone: dict[str, Path], tmp_path: Path
) -> None:
    config, folder = config_of(dataset, "experts", parallel), tmp_path / "run"
    assert train_on_ranks(config, folder) == [0, 0]
    trainer = json.loads((folder / "checkpoints" / "step-00000002" / "trainer.json").read_text())
    assert (trainer["step"], trainer["world_size"]) == (2, 2)
    go_back(folder, 2)
    train(config, folder, progress=False)
    assert_close(folder, alone["experts"])
    go_back(folder, 4)
    assert train_on_ranks(config, folder) == [0, 0]
    assert_close(folder, alone["experts"])


def go_back(folder: Path, step: int) -> None:
    (folder / "summary.json").unlink()
    for checkpoint in (folder / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)


def test_errors_reach_every_process(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: [")
    (tmp_path / "metrics.jsonl").write_text("{}\n")  # a run that has begun
    mark(tmp_path, "run")
    assert train_on_ranks(config_of(dataset, "yoco_u", "ddp"), tmp_path) == [2, 2]
    assert all(f"{tmp_path / 'config.yaml'}: not" in (tmp_path / f"error-{rank}.txt").read_text() for rank in (0, 1))
    config = config_of(dataset, "yoco_u", "ddp", batch_rows=3, micro_batch_rows=1)
    assert train_on_ranks(config, tmp_path / "other") == [2, 2]
    assert "does not divide among 2 processes" in (tmp_path / "other" / "error-1.txt").read_text()


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_all_processes_stop_at_a_non_finite_loss(parallel: str, dataset: Path, tmp_path: Path) -> None:
    config = config_of(dataset, "yoco_u", parallel, optimizer_learning_rate=1e20, optimizer_clip_norm=1e20)
    assert train_on_ranks(config, tmp_path) == [2, 2]
    messages = {(tmp_path / f"error-{rank}.txt").read_text() for rank in (0, 1)}
    assert len(messages) == 1
    (saved,) = (tmp_path / "checkpoints").glob("non-finite-step-*")
    assert str(saved) in messages.pop()
    assert len(losses(tmp_path)) == int(saved.name.removeprefix("non-finite-step-")) < STEPS
