"""Loop schedules: the loop count of each step, the FLOPs that it costs, and that such a run resumes exactly."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from test_resume import assert_same_run, unfinished_copy
from training_runs import run_config, train_on_ranks

from yoco_u.budget import forward_flops
from yoco_u.errors import UserError
from yoco_u.model import YocoUForCausalLM
from yoco_u.training import parallelize, read_metrics, train
from yoco_u.training.config import LoopPhase
from yoco_u.training.distributed import Distributed

GROWING = [{"until": 0.25, "loops": 1}, {"until": 0.5, "loops": 2}]
GATED = {"loop_gate": 0.5}
ALONE = Distributed(0, 1, 0, torch.device("cpu"))


def test_each_step_runs_its_loops_and_evaluation_the_models_own(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, seen = run_config(dataset, steps=8, loop_schedule=GROWING, evaluate_every=4), []
    forward = YocoUForCausalLM.forward

    def watch(self: YocoUForCausalLM, *args: Any, num_loops: int | None = None, **kwargs: Any) -> Any:
        if self.training or not seen or seen[-1] != ("evaluation", num_loops):
            seen.append(("train" if self.training else "evaluation", num_loops))
        return forward(self, *args, num_loops=num_loops, **kwargs)

    monkeypatch.setattr(YocoUForCausalLM, "forward", watch)
    train(config, tmp_path / "run", progress=False)
    own = ("evaluation", None)
    trained = [("train", loops) for loops in (1, 1, 2, 2, None, None, None, None)]
    assert seen == [*trained[:4], own, *trained[4:], own]


def test_flops_are_those_of_the_loops_that_ran(dataset: Path, tmp_path: Path) -> None:
    config = run_config(dataset, steps=8, loop_schedule=GROWING, evaluate_every=8)
    summary = train(config, tmp_path / "run", progress=False)
    loops, tokens = [1, 1, 2, 2, 3, 3, 3, 3], 4 * 24
    each = [3 * tokens * forward_flops(config.architecture.with_loops(t), 24) for t in loops]
    steps = [record for record in read_metrics(tmp_path / "run") if record["kind"] == "train"]
    assert [record["flops"] for record in steps] == pytest.approx([sum(each[: i + 1]) for i in range(8)])
    assert summary["flops"] == pytest.approx(sum(each)) == config.training_flops()
    for record, flops in zip(steps, each, strict=True):
        seconds = tokens / record["tokens_per_second"]
        assert record["model_flops_per_second"] * seconds == pytest.approx(flops)


def test_it_continues_in_every_phase_to_the_same_weights(dataset: Path, tmp_path: Path) -> None:
    config = run_config(dataset, architecture=GATED, steps=8, loop_schedule=GROWING, save_every=1, evaluate_every=4)
    train(config, tmp_path / "whole", progress=False)
    for step in (1, 2, 5):
        folder = unfinished_copy(tmp_path / "whole", tmp_path / f"from-{step}", step)
        train(config, folder, progress=False)
        assert_same_run(folder, tmp_path / "whole")
        shutil.rmtree(folder)


def test_gates_rest_while_there_is_one_loop(dataset: Path, tmp_path: Path) -> None:
    config = run_config(dataset, architecture=GATED, steps=4, loop_schedule=[{"until": 0.9, "loops": 1}], save_every=4)
    train(config, tmp_path / "run", progress=False)
    model = YocoUForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert torch.equal(model.model.stages[0].loop_gates, torch.full((2,), 0.5))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_agree_with_one(dataset: Path, tmp_path: Path, parallel: str) -> None:
    config = run_config(
        dataset, architecture=GATED, steps=6, loop_schedule=GROWING, micro_batch_rows=2, parallel=parallel, evaluate_every=6
    )
    assert train_on_ranks(config, tmp_path / "two") == [0, 0]
    alone = train(config, tmp_path / "one", progress=False)
    together = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert together["validation"]["loss"] == pytest.approx(alone["validation"]["loss"], rel=1e-4)
    assert together["flops"] == alone["flops"]


@settings(max_examples=examples(30))
@given(ends=st.sets(st.floats(0.01, 0.99), max_size=4), loops=st.lists(st.integers(1, 5), min_size=4), steps=st.integers(1, 12))
def test_loop_counts_are_those_of_the_steps(ends: set[float], loops: list[int], steps: int) -> None:
    """Phases that are rounded to no step, and an architecture's own count that no step is left for, do not count."""
    schedule = tuple(LoopPhase(until=until, loops=count) for until, count in zip(sorted(ends), loops, strict=False))
    plain = run_config(Path("data"))
    training = plain.training.model_copy(update={"steps": steps, "loop_schedule": schedule})
    config = plain.model_copy(update={"training": training})
    assert config.loop_counts() == {config.loops_at(step) for step in range(steps)}


@pytest.mark.parametrize(("changes", "blocks"), [
    ({}, 8), ({"loop_schedule": [{"until": 0.9, "loops": 200}]}, 402), ({"loop_schedule": GROWING}, 8),
    ({"loop_schedule": [{"until": 0.9, "loops": 200}], "backward_loops": 5}, 12), ({"loop_draw": {"most": 7}}, 16),
])  # fmt: skip
def test_memory_is_that_of_the_step_with_most_loops(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], blocks: int
) -> None:
    monkeypatch.setattr(parallelize, "memory_bytes", lambda device: 2**30)
    config = run_config(Path("data"), sequence_length=10**6, **changes)
    with pytest.raises(UserError, match=f"through {blocks} blocks keeps at least"):
        parallelize.check_memory(config, ALONE)


@pytest.mark.parametrize(
    ("schedule", "architecture", "message"),
    [
        ([{"until": 0.5, "loops": 1}, {"until": 0.5, "loops": 2}], "yoco_u", "each must end after the one before"),
        ([{"until": 1.0, "loops": 1}], "yoco_u", "until"),
        ([{"until": 0.5, "loops": 0}], "yoco_u", "loops"),
        ([{"until": 0.5, "loops": 2}], "yoco", "the architecture has no loop"),
    ],
)
def test_impossible_schedules(dataset: Path, schedule: list[dict[str, Any]], architecture: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_config(dataset, architecture, loop_schedule=schedule)
