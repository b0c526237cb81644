"""Loop schedules: the loop count of each step, the FLOPs that it costs, and that such a run resumes exactly."""

import json
import shutil
from contextlib import nullcontext
from itertools import combinations
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
from yoco_u.config import parse
from yoco_u.errors import UserError
from yoco_u.model import YocoUForCausalLM
from yoco_u.training import RunConfig, read_metrics, train, trainer
from yoco_u.training.distributed import Distributed
from yoco_u.training.phases import LoopPhase
from yoco_u.training.step import StepResult, TrainingStep

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
    gates = list[list[float]]()

    class Watched(TrainingStep):
        def update(self, result: StepResult, step: int) -> float:
            rate = super().update(result, step)
            gates.append(self.model.model.stages[0].loop_gates.tolist())
            return rate

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "TrainingStep", Watched)
        train(config, tmp_path / "run", progress=False)
    assert gates[:3] == [[0.5, 0.5]] * 3 and gates[3] != [0.5, 0.5]


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
    """Also where there are too few steps for all, as a run of an earlier version may have; what has none does not count."""
    schedule = tuple(LoopPhase(until=until, loops=count) for until, count in zip(sorted(ends), loops, strict=False))
    plain = run_config(Path("data"))
    training = plain.training.model_copy(update={"steps": steps, "loop_schedule": schedule})
    config = plain.model_copy(update={"training": training})
    assert config.loop_counts() == {loops for step in range(steps) for loops in config.loops_at(step)}


@pytest.mark.parametrize(
    ("schedule", "architecture", "message"),
    [
        ([{"until": 0.5, "loops": 1}, {"until": 0.5, "loops": 2}], "yoco_u", "each must end after the one before"),
        ([{"until": 1.0, "loops": 1}], "yoco_u", "until"),
        ([{"until": 0.5, "loops": 0}], "yoco_u", "loops"),
        ([{"until": 0.5, "loops": 2}], "yoco", "the architecture has no loop"),
        ([{"until": 0.1 * n, "loops": 1} for n in range(1, 7)], "yoco_u", "loop_schedule takes 7 steps at least"),
    ],
)
def test_impossible_schedules(dataset: Path, schedule: list[dict[str, Any]], architecture: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_config(dataset, architecture, loop_schedule=schedule)


def shares_of_the_steps(untils: list[float], steps: int) -> list[int]:
    """Where phases end: of all that leave a step to each and to what follows, those nearest to their shares, one by one."""
    rounded = [round(until * steps) for until in untils]
    possible = combinations(range(1, steps), len(untils))
    return list(min(possible, key=lambda ends: [abs(end - wanted) for end, wanted in zip(ends, rounded, strict=True)]))


@settings(max_examples=examples(60))
@given(ends=st.sets(st.floats(0.001, 0.999), max_size=4), steps=st.integers(1, 12), share=st.floats(0.001, 1))
def test_what_is_asked_for_has_a_step_however_few_there_are(ends: set[float], steps: int, share: float) -> None:
    """Each phase, what follows the last one, and a fade; as many as its share asks for where none would be left out."""
    schedule = [{"until": until, "loops": number + 4} for number, until in enumerate(sorted(ends))]
    windows = [{"until": phase["until"], "window": phase["loops"]} for phase in schedule]
    fits = not ends or len(ends) < steps
    asked = {"loop_schedule": schedule, "window_schedule": windows, "rope_cross_fades": share, "steps": steps}
    asked |= {"optimizer_warmup_steps": 0}
    with nullcontext() if fits else pytest.raises(UserError, match="one for each phase and one after them, but there are"):
        config = run_config(Path("data"), architecture={"rope_cross": False}, **asked)
        exact = shares_of_the_steps(sorted(ends), steps)
        loops = [next((n + 4 for n, end in enumerate(exact) if step < end), None) for step in range(steps)]
        assert [loops for step in range(steps) for loops in config.loops_at(step)] == loops
        assert [config.window_at(step) for step in range(steps)] == [it or config.architecture.window for it in loops]
        assert set(loops) == {None, *range(4, 4 + len(ends))}
        assert config.cross_rotation_at(0) == 1 and config.cross_rotation_at(steps) == 0


@pytest.mark.parametrize(("changes", "most"), [
    ({}, 3), ({"loop_schedule": [{"until": 0.5, "loops": 5}]}, 5), ({"loop_draw": {"most": 4}}, 4),
])  # fmt: skip
def test_gradients_that_are_cut_nowhere_are_refused(changes: dict[str, Any], most: int) -> None:
    config = run_config(Path("data"), **changes, backward_loops=most - 1)
    for loops in (most, most + 4):
        with pytest.raises(UserError, match=f"backward_loops {loops} cuts nothing, since no step has more than {most} loops"):
            run_config(Path("data"), **changes, backward_loops=loops)
    written = config.model_dump() | {"training": config.training.model_dump() | {"backward_loops": most}}
    assert parse(RunConfig, written, "a run", written=True).training.backward_loops is None
