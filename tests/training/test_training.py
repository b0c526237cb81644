"""Runs in one process: every architecture learns, and settings that must not change the results do not."""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from models import PRESETS
from training_runs import STEPS, deterministic, losses, run_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from yoco_u import YocoUConfig, YocoUForCausalLM
from yoco_u.config import parse
from yoco_u.data import BatchLoader, PackedDataset
from yoco_u.errors import UserError
from yoco_u.training import RunConfig, TrainingDiverged, train, trainer
from yoco_u.training.checkpoint import read_state
from yoco_u.training.distributed import Distributed
from yoco_u.training.optimizer import build_optimizer
from yoco_u.training.parallelize import checkpoint_stages, parallelize
from yoco_u.training.step import StepResult, TrainingStep

EXPERTS = {"num_experts": 4, "experts_per_token": 2, "intermediate_size": 16}
ALONE = Distributed(0, 1, 0, torch.device("cpu"))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_learns_and_generates(name: str, dataset: Path, tmp_path: Path) -> None:
    summary = train(run_config(dataset, name, steps=12, evaluate_every=12, save_every=12), tmp_path, progress=False)
    assert losses(tmp_path)[-1] < losses(tmp_path)[0] - 0.3
    assert summary["steps"] == 12 and summary["validation"]["loss"] < losses(tmp_path)[0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokens = tokenizer("def add", return_tensors="pt")
    assert model.generate(**tokens, max_new_tokens=3, do_sample=False).shape[1] > tokens["input_ids"].shape[1]


def assert_close(found: Path, expected: Path, rel: float = 2e-4) -> None:
    for a, b in zip(deterministic(found), deterministic(expected), strict=True):
        assert a.pop("kind") == b.pop("kind")
        assert a == pytest.approx(b, rel=rel)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_accumulation_changes_nothing_but_rounding(dtype: str, dataset: Path, tmp_path: Path) -> None:
    for rows in (4, 1):
        train(run_config(dataset, dtype=dtype, micro_batch_rows=rows, steps=3), tmp_path / str(rows), progress=False)
    assert_close(tmp_path / "1", tmp_path / "4", rel=2e-4 if dtype == "float32" else 2e-2)


def test_masked_targets_count_as_little_as_they_should(dataset: Path) -> None:
    """Micro-batches with unequal numbers of targets give the gradient of the mean over all targets."""
    config = run_config(dataset, micro_batch_rows=1)
    batch = BatchLoader(PackedDataset(dataset, "train", 24), 4).batch(0)
    for row, count in enumerate((0, 20, 5, 11)):
        batch["shift_labels"][row, :count] = -100
    model = YocoUForCausalLM(YocoUConfig.from_architecture(config.architecture))
    step = TrainingStep(model, build_optimizer(model, config.optimizer), config, ALONE)
    found = step.gradients(batch)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss = torch.nn.functional.cross_entropy(
        model(batch["input_ids"], document_ids=batch["document_ids"]).logits.flatten(0, 1), batch["shift_labels"].flatten()
    )
    loss.backward()
    assert found.loss == pytest.approx(loss.item(), rel=1e-5)
    norms = []
    for name, p in model.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-3, atol=1e-6)
        norms.append(p.grad.norm())
    assert found.norm == pytest.approx(torch.stack(norms).norm().item(), rel=1e-4)


@pytest.mark.parametrize("settings", [{}, {"experts": EXPERTS}])
def test_recomputing_activations_changes_nothing(settings: dict[str, Any], dataset: Path, tmp_path: Path) -> None:
    for name, stages in (("kept", []), ("recomputed", [0, 1])):
        config = run_config(dataset, architecture=settings, checkpoint_stages=stages, steps=3)
        train(config, tmp_path / name, progress=False)
    assert_close(tmp_path / "recomputed", tmp_path / "kept", rel=1e-6)


def test_recomputing_a_stage_keeps_less(dataset: Path) -> None:
    config = run_config(dataset)

    def saved_bytes(stages: tuple[int, ...]) -> int:
        model = YocoUForCausalLM(YocoUConfig.from_architecture(config.architecture))
        checkpoint_stages(model, stages)
        sizes: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        tokens = torch.zeros(2, 64, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(tokens, labels=tokens, use_cache=False).loss.backward()
        return sum(sizes.values())

    assert saved_bytes((0, 1)) < saved_bytes((0,)) < saved_bytes(())


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize(
    ("name", "settings", "code"),
    [("yoco_u", {}, "inductor"), ("yoco_u", {"experts": EXPERTS}, "aot_eager"), ("yoco_retention", {}, "aot_eager")],
    ids=["yoco_u", "experts", "retention"],
)
def test_compiling_changes_nothing_but_rounding(
    name: str, settings: dict[str, Any], code: str, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One architecture as users have it; of the others the graphs alone, since C++ takes long for each kind of block."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=code))
    settings = {"layers": 2} | settings
    for setting in ("on", "off"):
        config = run_config(dataset, name, settings, steps=3, compile=setting, checkpoint_stages=[1])
        train(config, tmp_path / setting, progress=False)
    assert_close(tmp_path / "on", tmp_path / "off", rel=1e-3)


def test_a_non_finite_loss_stops_with_the_state_before_it(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = TrainingStep.update

    def spoil(self: TrainingStep, result: StepResult, step: int) -> float:
        rate = update(self, result, step)
        if step == 2:
            with torch.no_grad():
                self.model.model.stages[0].layers[1].mlp.up_proj.weight[0, 0] = float("inf")
        return rate

    for name, evaluate_every, expected in (
        ("step", 100, "the loss is nan and the gradient norm nan (first in "),
        ("evaluation", 3, "the validation loss is nan after step 3; "),
    ):
        config = run_config(dataset, save_every=100, evaluate_every=evaluate_every)
        with monkeypatch.context() as patch, pytest.raises(TrainingDiverged) as stopped:
            patch.setattr(TrainingStep, "update", spoil)
            train(config, tmp_path / name, progress=False)
        message = str(stopped.value)
        assert message.startswith(expected) and "optimizer.learning_rate" in message and "\n" not in message
        (saved,) = (tmp_path / name / "checkpoints").iterdir()
        assert str(saved) in message
        assert saved.name == "non-finite-step-00000003" and read_state(saved).step == 3
        assert len(losses(tmp_path / name)) == 3
        # A run never resumes from the state it diverged in. It has no other checkpoint here, so it begins anew.
        assert train(config, tmp_path / name, progress=False)["steps"] == STEPS
        assert len(losses(tmp_path / name)) == STEPS


def test_a_non_finite_gradient_names_its_parameter(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "model.stages.1.layers.0.attn.q_proj.weight"

    def spoiled(*args: Any) -> torch.nn.Module:
        model = parallelize(*args)
        model.get_parameter(name).register_hook(lambda gradient: gradient * float("inf"))
        return model

    monkeypatch.setattr(trainer, "parallelize", spoiled)
    with pytest.raises(TrainingDiverged) as stopped:
        train(run_config(dataset), tmp_path, progress=False)
    assert f"(first in {name}, 1 parameters in all) in step 1, at learning rate 0.0015, on rows 0 to 3" in str(stopped.value)


def test_experts_are_balanced_by_the_load_of_the_step(dataset: Path, tmp_path: Path) -> None:
    train(run_config(dataset, architecture={"experts": EXPERTS}), tmp_path, progress=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    biases = torch.stack([block.mlp.choice_bias for stage in model.model.stages for block in stage.layers])
    rate = 1e-3
    assert biases.abs().max() <= STEPS * rate + 1e-9 and biases.abs().max() > 0
    torch.testing.assert_close(biases / rate, (biases / rate).round(), atol=1e-3, rtol=0)


def test_what_does_not_fit_is_refused(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer has .* model's vocab_size is 96; set architecture\.vocab_size to at"):
        train(run_config(dataset, architecture={"vocab_size": 96}), tmp_path / "vocabulary", progress=False)
    with pytest.raises(UserError, match="no prepared dataset here"):
        train(run_config(tmp_path / "nothing"), tmp_path / "dataset", progress=False)
    with pytest.raises(UserError, match="device 'tpu' cannot be used"):
        train(run_config(dataset, device="tpu"), tmp_path / "device", progress=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        train(run_config(dataset), tmp_path / "file", progress=False)


def test_a_missing_dataset_is_prepared_from_data(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": f"line {n} of text " * 9}) for n in range(60)))
    config = run_config(tmp_path / "dataset", steps=2, optimizer_warmup_steps=0)
    data = {"corpus": str(tmp_path / "text.jsonl"), "vocab_size": 300, "validation_fraction": 0.3}
    config = parse(RunConfig, config.model_dump() | {"data": data}, "test")
    assert train(config, tmp_path / "run", progress=False)["steps"] == 2
    assert (tmp_path / "dataset" / "dataset.json").exists()


def test_a_run_that_never_began_takes_another_config(dataset: Path, tmp_path: Path) -> None:
    """After a run failed on a corpus that cannot be read, another run can use the folder."""
    with pytest.raises(UserError, match="missing"):
        train(run_config(tmp_path / "missing"), tmp_path / "run", progress=False)
    assert train(run_config(dataset), tmp_path / "run", progress=False)["steps"] == STEPS
