"""The way that training goes on a GPU, run on a CPU: flash attention by a stand-in, the loss in chunks, one read a step."""

from pathlib import Path
from typing import Any

import pytest
import torch
from flash import use_flash
from training_runs import deterministic, run_config, train_on_ranks

from yoco_u import YocoUConfig, YocoUForCausalLM
from yoco_u.data import BatchLoader, PackedDataset
from yoco_u.training import step, train, validation
from yoco_u.training.forward import batch_loss

EXPERTS = {"num_experts": 4, "experts_per_token": 2, "intermediate_size": 16}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "yoco_u": ("yoco_u", {"loop_gate": 0.5, "tie_word_embeddings": True, "qk_norm": True}),
    "experts": ("yoco_u", {"experts": EXPERTS}),
    "parscale": ("parscale", {}),
}
DRAWN = {"loop_draw": {"most": 5}, "early_exit_weight": 0.5, "backward_loops": 2, "evaluate_loops": [5]}
TRAINING: dict[str, dict[str, Any]] = {"yoco_u": {}, "experts": DRAWN, "parscale": {}}
STEPS = 3


def assert_close(found: Path, expected: Path) -> None:
    """Up to rounding, which the steps amplify: attention and loss add up in other orders."""
    for a, b in zip(deterministic(found), deterministic(expected), strict=True):
        assert a.pop("kind") == b.pop("kind")
        assert a == pytest.approx(b, rel=1e-3)


@pytest.mark.parametrize("which", ARCHITECTURES)
def test_a_run_has_the_losses_of_a_cpu_and_reads_once_a_step(
    which: str, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config(dataset, *ARCHITECTURES[which], micro_batch_rows=2, steps=STEPS, evaluate_every=2, **TRAINING[which])
    train(config, tmp_path / "cpu", progress=False)
    use_flash(monkeypatch)
    reads = []
    for module in (step, validation):
        monkeypatch.setattr(module, "read_back", lambda tensor: reads.append(tensor.shape) or tensor.tolist())
    train(config, tmp_path / "gpu", progress=False)
    assert reads.count((2,)) == STEPS  # loss and norm of each step
    scored = 1 + len(config.training.evaluate_loops)
    assert reads.count(()) == 2 * scored  # each evaluation, at each of its loop counts
    assert len(reads) == STEPS + 2 * scored
    assert_close(tmp_path / "gpu", tmp_path / "cpu")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_are_one(parallel: str, dataset: Path, tmp_path: Path) -> None:
    """Tied embeddings, whose gradient comes from the chunked loss and from the embedding."""
    config = run_config(dataset, *ARCHITECTURES["yoco_u"], parallel=parallel, micro_batch_rows=1, steps=STEPS)
    train(config, tmp_path / "one", progress=False)
    assert train_on_ranks(config, tmp_path / "two", gpu_path=True) == [0, 0]
    assert_close(tmp_path / "two", tmp_path / "one")


def test_masked_targets(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of a batch whose rows have unequally many targets."""
    config = run_config(dataset)
    model = YocoUForCausalLM(YocoUConfig.from_architecture(config.architecture))
    batch = BatchLoader(PackedDataset(dataset, "train", 24), 3).batch(0)
    batch["shift_labels"][0, 3:] = -100
    batch["shift_labels"][2] = -100
    device = torch.device("cpu")
    expected = batch_loss(model, batch, device, "float32", None)
    use_flash(monkeypatch)
    torch.testing.assert_close(batch_loss(model, batch, device, "float32", None), expected)
