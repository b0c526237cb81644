"""Dry runs of the training step and of evaluation on the meta device: one read each, and nothing hidden.

The optimizer's own update is not watched: without a GPU it is another implementation than the fused one of GPUs.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from dry_run import META, OnDevice, on_meta
from models import PRESETS
from training_runs import run_config

from yoco_u import YocoUConfig, YocoUForCausalLM
from yoco_u.data import BatchLoader, PackedDataset
from yoco_u.training import step, validation
from yoco_u.training.distributed import Distributed
from yoco_u.training.optimizer import build_optimizer
from yoco_u.training.step import Pass, TrainingStep
from yoco_u.training.validation import evaluate

EXPERTS = {"num_experts": 4, "experts_per_token": 2, "intermediate_size": 16, "auxiliary_loss_weight": 0.01}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in PRESETS},
    "tied": ("yoco_u", {"tie_word_embeddings": True, "loop_gate": 0.3}),
    "experts": ("yoco_u", {"experts": EXPERTS}),
}
ALONE = Distributed(0, 1, 0, META)


def counted(run: OnDevice, module: Any, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The tensors that a module reads back, all of the meta device."""
    reads: list[torch.Tensor] = []
    answer = module.read_back
    monkeypatch.setattr(module, "read_back", lambda tensor: reads.append(tensor) or answer(tensor))
    return reads


@pytest.mark.parametrize(("variant", "dtype"), [*((variant, "bfloat16") for variant in VARIANTS), ("yoco_u", "float32")])
def test_training_step(variant: str, dtype: str, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, settings = VARIANTS[variant]
    config = run_config(dataset, name, {"layers": 2} | settings, dtype=dtype, micro_batch_rows=2, checkpoint_stages=[0])
    with META:
        model = YocoUForCausalLM(YocoUConfig.from_architecture(config.architecture))
    training = TrainingStep(model, build_optimizer(model, config.optimizer), config, ALONE)
    batches = BatchLoader(PackedDataset(dataset, "train", 24), 4)
    run = on_meta(monkeypatch, host=True)
    reads = counted(run, step, monkeypatch)
    update = training.optimizer.step

    def unwatched() -> None:
        with run.relaxed():
            update()

    monkeypatch.setattr(training.optimizer, "step", unwatched)
    with run:
        result = training.gradients(batches.batch(0), [Pass(num_loops=2)])
        training.update(result, 0)
    assert result.loss == 2.0 and result.norm == 1.0
    assert len(reads) == 1 and reads[0].device == META
    assert all(p.grad is not None and p.grad.device == META for p in model.parameters())


def test_evaluation(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with META:
        model = YocoUForCausalLM(YocoUConfig.from_architecture(run_config(dataset).architecture))
    rows = PackedDataset(dataset, "validation", 24, shuffle=False)
    run = on_meta(monkeypatch, host=True)
    reads = counted(run, validation, monkeypatch)
    with run:
        found = evaluate(model, rows, 96, 2, ALONE)
    assert found.tokens == 96 and len(reads) == 1 and reads[0].device == META
