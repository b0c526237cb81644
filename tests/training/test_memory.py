"""What is known of a run's memory beforehand, compared with the tensors of models that are made."""

from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import run_config

from yoco_u.config import parse
from yoco_u.errors import UserError
from yoco_u.model import YocoUConfig, YocoUForCausalLM
from yoco_u.training import RunConfig, memory
from yoco_u.training.distillation import freeze
from yoco_u.training.distributed import Distributed

CPU, GPU = torch.device("cpu"), torch.device("cuda")
ALONE = Distributed(0, 1, 0, CPU)
GROWING = [{"until": 0.25, "loops": 1}, {"until": 0.5, "loops": 2}]


def taught(teaching: dict[str, Any] | None, **settings: Any) -> RunConfig:
    plain = run_config(Path("data"), sequence_length=1, **settings).model_dump()
    if teaching is not None:
        architecture = run_config(Path("data"), "transformer", {"layers": 8}).architecture.model_dump()
        plain["distillation"] = {"teacher": "t", "architecture": architecture} | teaching
    return parse(RunConfig, plain, "test")


def held(config: RunConfig, shards: int) -> int:
    """Bytes of the weights, gradients and moments of one process."""
    model = YocoUForCausalLM(YocoUConfig.from_architecture(config.architecture))
    freeze(model, config.distillation)
    total = sum(p.numel() * (16 if p.requires_grad else 4) for p in model.parameters()) // shards
    if config.distillation is not None:
        teacher = YocoUForCausalLM(YocoUConfig.from_architecture(config.distillation.architecture))
        total += 4 * sum(p.numel() for p in teacher.parameters())
    return total


@pytest.mark.parametrize("teaching", [None, {}, {"trains": "cross"}, {"stage": "layers"}], ids=str)
@pytest.mark.parametrize(("device", "parallel", "processes", "shards"), [
    (CPU, "ddp", 1, 1), (CPU, "ddp", 2, 1), (CPU, "fsdp", 2, 4), (GPU, "fsdp", 1, 4),
])  # fmt: skip
def test_weights_gradients_and_moments(
    teaching: dict[str, Any] | None, device: torch.device, parallel: str, processes: int, shards: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Of 4 processes, 2 are on this machine; those of a CPU share its memory."""
    config = taught(teaching, parallel=parallel)
    found = Distributed(0, 1 if processes == shards == 1 else 4, 0, device, 2 if processes == 2 or device == GPU else 1)
    needed = processes * held(config, shards)
    monkeypatch.setattr(memory, "memory_bytes", lambda device: needed)
    memory.check_memory(config, found)
    monkeypatch.setattr(memory, "memory_bytes", lambda device: needed - 1)
    with pytest.raises(UserError, match="weights, gradients and optimizer"):
        memory.check_memory(config, found)


@pytest.mark.parametrize("tied", [False, True])
def test_rounded_weights_are_held_beside_the_others(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config(Path("data"), weights="int8", architecture={"tie_word_embeddings": tied})
    model = YocoUForCausalLM(YocoUConfig.from_architecture(config.architecture))
    rounded = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, torch.nn.Linear))
    needed = held(config, 1) + 4 * rounded
    monkeypatch.setattr(memory, "memory_bytes", lambda device: needed)
    memory.check_memory(config, ALONE)
    monkeypatch.setattr(memory, "memory_bytes", lambda device: needed - 1)
    with pytest.raises(UserError, match="weights, gradients and optimizer"):
        memory.check_memory(config, ALONE)


@pytest.mark.parametrize(("processes", "rows"), [(1, 8), (2, 4), (8, 1)])
def test_rows_are_those_of_one_process(processes: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config(Path("data"), sequence_length=10**5, batch_rows=8, micro_batch_rows=8)
    kept = 4 * rows * 10**5 * 32 * 8  # of float32, hidden size 32, and 8 blocks
    monkeypatch.setattr(memory, "memory_bytes", lambda device: kept)
    memory.check_memory(config, Distributed(0, processes, 0, CPU))
    monkeypatch.setattr(memory, "memory_bytes", lambda device: kept - 1)
    with pytest.raises(UserError, match=f"micro-batches of {rows} x 100000 tokens through 8 blocks keeps at least"):
        memory.check_memory(config, Distributed(0, processes, 0, CPU))


@pytest.mark.parametrize("teaching", [{"trains": "cross"}, {"stage": "layers"}], ids=str)
def test_frozen_blocks_keep_nothing(teaching: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = taught(teaching)
    config = config.model_copy(update={"training": config.training.model_copy(update={"sequence_length": 10**6})})
    monkeypatch.setattr(memory, "memory_bytes", lambda device: 2**28)
    with pytest.raises(UserError, match="through 2 blocks keeps at least"):
        memory.check_memory(config, ALONE)


@pytest.mark.parametrize(("changes", "blocks"), [
    ({}, 8), ({"loop_schedule": [{"until": 0.9, "loops": 200}]}, 402), ({"loop_schedule": GROWING}, 8),
    ({"loop_schedule": [{"until": 0.9, "loops": 200}], "backward_loops": 5}, 12), ({"loop_draw": {"most": 7}}, 16),
])  # fmt: skip
def test_memory_is_that_of_the_step_with_most_loops(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], blocks: int
) -> None:
    monkeypatch.setattr(memory, "memory_bytes", lambda device: 2**30)
    config = run_config(Path("data"), sequence_length=10**6, **changes)
    with pytest.raises(UserError, match=f"through {blocks} blocks keeps at least"):
        memory.check_memory(config, ALONE)
