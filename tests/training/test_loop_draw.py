"""Loop counts drawn for each step: their distributions, the runs that draw them, and that such a run resumes exactly."""

import json
import math
import random
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import chisquare, norm, poisson
from test_resume import assert_same_run, unfinished_copy
from training_runs import run_config, start, train_on_ranks

from yoco_u.budget import forward_flops
from yoco_u.config import parse
from yoco_u.data import BatchLoader, PackedDataset
from yoco_u.errors import UserError
from yoco_u.experiment.duration import predict
from yoco_u.experiment.grid import GridRun
from yoco_u.loading import load_model
from yoco_u.model import YocoUForCausalLM
from yoco_u.model.loss import EarlyExit
from yoco_u.training import RunConfig, evaluate, read_metrics, train
from yoco_u.training.distributed import Distributed
from yoco_u.training.loop_draw import LoopDraw
from yoco_u.training.optimizer import build_optimizer
from yoco_u.training.parallelize import truncate_backpropagation
from yoco_u.training.step import Pass, TrainingStep

ALONE = Distributed(0, 1, 0, torch.device("cpu"))
UNIFORM = {"most": 4}
HUGINN = {"distribution": "poisson_lognormal", "most": 6, "mean": 3}
SPREAD = HUGINN | {"per_step": 2}
EVERYTHING = {"loop_draw": SPREAD, "backward_loops": 2, "early_exit_weight": 0.5}
GATED = {"loop_gate": 0.5}


def draw(**settings: Any) -> LoopDraw:
    return parse(LoopDraw, settings, "draw")


def by_integral(count: int, mean: float, sigma: float) -> float:
    """P(1 + Poisson(rate) = count) for a log-normal rate of mean - 1."""

    def density(z: float) -> float:
        rate = (mean - 1) * math.exp(sigma * z - sigma**2 / 2)
        return float(norm.pdf(z) * poisson.pmf(count - 1, rate))

    return float(quad(density, -10, 10, epsabs=1e-12, limit=200)[0])


@pytest.mark.parametrize(("mean", "sigma"), [(3.0, 0.5), (1.5, 0.1), (8.0, 1.5), (4.0, 0.0)])
def test_the_poisson_lognormal_distribution_is_huginns(mean: float, sigma: float) -> None:
    found = draw(distribution="poisson_lognormal", least=2, most=9, mean=mean, sigma=sigma).probabilities(planned=77)
    exact = [by_integral(count, mean, sigma) for count in range(1, 9)]
    expected = [exact[0] + exact[1], *exact[2:], 1 - sum(exact)]
    assert list(found) == [*range(2, 10)]
    assert [*found.values()] == pytest.approx(expected, abs=1e-9)


def test_without_truncation_its_mean_is_the_mean() -> None:
    chances = draw(distribution="poisson_lognormal", most=100, mean=4, sigma=0.5).probabilities(1)
    assert sum(loops * chance for loops, chance in chances.items()) == pytest.approx(4)


@pytest.mark.parametrize(
    "settings", [{"least": 2, "most": 5}, HUGINN, {"least": 3, "most": 3}, {"most": 5, "per_step": 3}, HUGINN | {"per_step": 4}]
)
def test_steps_draw_from_the_distribution(settings: dict[str, Any]) -> None:
    found, state = draw(**settings), torch.get_rng_state()
    drawn = [found.at(0, step, 3) for step in range(4000)]
    chances = found.probabilities(3)
    assert {len(counts) for counts in drawn} == {found.per_step} and all(list(counts) == sorted(counts) for counts in drawn)
    assert {loops for counts in drawn for loops in counts} <= chances.keys()
    for loops, chance in chances.items():  # of each count a step has as many as are expected, or one more or less
        assert all(abs(counts.count(loops) - chance * found.per_step) < 1 + 1e-9 for counts in drawn)
    if len(chances) > 1:
        counted = Counter(random.Random(step).choice(counts) for step, counts in enumerate(drawn))
        result = chisquare([counted[loops] for loops in chances], 4000 * np.array([*chances.values()]))
        assert result.pvalue > 1e-3
        assert drawn[:50] != [found.at(1, step, 3) for step in range(50)]
    assert drawn[100:200] == [found.at(0, step, 3) for step in range(100, 200)]
    assert torch.equal(torch.get_rng_state(), state)


def test_the_mean_follows_a_schedule(dataset: Path) -> None:
    schedule = [{"until": 0.25, "loops": 1}, {"until": 0.5, "loops": 2}]
    growing = {"distribution": "poisson_lognormal", "most": 30}
    config = run_config(dataset, steps=4000, loop_schedule=schedule, loop_draw=growing)
    drawn = np.array([config.loops_at(step)[0] for step in range(4000)])
    assert (drawn[:1000] == 1).all()
    assert drawn[1000:2000].mean() == pytest.approx(2, abs=0.15)
    assert drawn[2000:].mean() == pytest.approx(3, abs=0.15)


def test_exits_are_drawn_from_the_loops_before_the_last(dataset: Path) -> None:
    config = run_config(dataset, steps=2000, loop_draw={"most": 3}, early_exit_weight=1.0)
    draws = [(step, loops) for step in range(2000) for loops in config.loops_at(step)]
    pairs = Counter((loops, config.exit_at(step, loops)) for step, loops in draws)
    assert pairs.keys() == {(1, None), (2, 1), (3, 1), (3, 2)}
    assert pairs[3, 1] == pytest.approx(pairs[3, 2], rel=0.2)
    assert run_config(dataset, loop_draw={"most": 3}).exit_at(0, 3) is None


def direct_flops(config: RunConfig, *counts: int | None) -> float:
    """Model FLOPs of a step of 4 rows of 24 tokens: forward, backward through two loops, and an exit by the cross-decoder."""
    return sum(_flops_of_all_rows(config, loops or 0) for loops in counts) / len(counts)


def _flops_of_all_rows(config: RunConfig, loops: int) -> float:
    a, tokens = config.architecture, 4 * 24
    cross = a.stages[1].layers * 2 * (a.hidden_size * 2 * 32 + 3 * a.hidden_size * a.intermediate_size)
    cross += a.stages[1].layers * 4 * 32 * 25 / 2
    behind = cross + 2 * a.hidden_size * 2 * 16 + 2 * a.vocab_size * a.hidden_size
    whole, last = (forward_flops(a.with_loops(n), 24) for n in (loops, min(loops, 2)))
    return tokens * (whole + 2 * last + (3 * behind if loops > 1 else 0))


def test_each_step_runs_and_counts_what_it_drew(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, seen = run_config(dataset, steps=8, evaluate_every=4, evaluate_loops=[1, 3, 5], **EVERYTHING), []
    assert config.architecture.num_attention_heads * config.architecture.head_dim == 32
    assert config.architecture.num_key_value_heads * config.architecture.head_dim == 16
    forward = YocoUForCausalLM.forward

    def watch(self: YocoUForCausalLM, *args: Any, num_loops: int | None = None, **kwargs: Any) -> Any:
        if self.training:
            seen.append((num_loops, kwargs["early_exit"]))
        return forward(self, *args, num_loops=num_loops, **kwargs)

    monkeypatch.setattr(YocoUForCausalLM, "forward", watch)
    summary = train(config, tmp_path / "run", progress=False)
    loops = [parse(LoopDraw, SPREAD, "").at(0, step, 3) for step in range(8)]
    drawn = [(t, config.exit_at(step, t)) for step, counts in enumerate(loops) for t in counts]
    assert seen == [(t, None if at is None else EarlyExit(at, 0.5)) for t, at in drawn]
    assert len(set(loops)) > 2
    records = read_metrics(tmp_path / "run")
    assert all(("perplexity" in record) == (record["kind"] == "evaluation") for record in records)
    steps = [record for record in records if record["kind"] == "train"]
    assert [record["loops"] for record in steps] == [sum(counts) / 2 for counts in loops]
    each = [direct_flops(config, *counts) for counts in loops]
    assert [record["flops"] for record in steps] == pytest.approx([sum(each[: i + 1]) for i in range(8)])
    assert summary["flops"] == pytest.approx(sum(each))

    model, _ = load_model(tmp_path / "run", torch.device("cpu"))
    rows = PackedDataset(dataset, "validation", 24, shuffle=False)
    last = records[-1]
    for key, t in (("loss", 3), ("loss_at_1", 1), ("loss_at_3", 3), ("loss_at_5", 5)):
        assert last[key] == pytest.approx(evaluate(model, rows, 240, 4, ALONE, "float32", t).loss, rel=1e-6)
        assert summary["validation"][key] == last[key]


def test_a_plan_counts_what_is_expected(dataset: Path) -> None:
    config = run_config(dataset, steps=3000, **EVERYTHING)
    chances = config.training.loop_draw.probabilities(3)  # type: ignore[union-attr]
    expected = 3000 * sum(chance * direct_flops(config, t) for t, chance in chances.items())
    assert config.training_flops() == pytest.approx(expected)
    assert config.training_flops(3000) == pytest.approx(expected, rel=0.03)
    assert config.training_flops(3000) != config.training_flops()
    assert config.training_flops(10) == pytest.approx(sum(direct_flops(config, *config.loops_at(step)) for step in range(10)))
    scored = config.model_copy(update={"training": config.training.model_copy(update={"evaluate_loops": (1, 5)})})
    run = GridRun("a", "a", "a", "a", "a", None, None, None, 0, config)
    [plain], [more] = (predict([GridRun(**vars(run) | {"config": one})], lambda _: 1.0) for one in (config, scored))
    assert more.flops - plain.flops == pytest.approx(
        1000 * 240 * sum(forward_flops(config.architecture.with_loops(t), 24) for t in (1, 5))
    )


def test_killed_in_the_middle_it_continues_to_the_same_weights(dataset: Path, tmp_path: Path) -> None:
    config = run_config(
        dataset, architecture=GATED, steps=8, evaluate_loops=[1, 5], save_every=1, evaluate_every=4,
        micro_batch_rows=2, checkpoint_stages=[0], **EVERYTHING,
    )  # fmt: skip
    train(config, tmp_path / "whole", progress=False)
    process = start(config, tmp_path / "killed", own_signal=("os.rename */step-00000003.partial *", signal.SIGKILL))
    process.join()
    assert process.exitcode == -signal.SIGKILL
    train(config, tmp_path / "killed", progress=False)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    folder = unfinished_copy(tmp_path / "whole", tmp_path / "from-5", 5)
    train(config, folder, progress=False)
    assert_same_run(folder, tmp_path / "whole")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_agree_with_one(dataset: Path, tmp_path: Path, parallel: str) -> None:
    config = run_config(
        dataset, architecture=GATED, steps=5, micro_batch_rows=1, parallel=parallel, evaluate_every=5, evaluate_loops=[5],
        **EVERYTHING,
    )  # fmt: skip
    assert train_on_ranks(config, tmp_path / "two") == [0, 0]
    alone = train(config, tmp_path / "one", progress=False)
    together = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert together["validation"] == pytest.approx(alone["validation"], rel=1e-4)
    assert together["flops"] == alone["flops"]


@pytest.mark.parametrize("passes", [[Pass(5, EarlyExit(4, 0.5))], [Pass(1), Pass(5, EarlyExit(4, 0.5))]])
def test_micro_batches_add_up_to_the_whole_batch(dataset: Path, passes: list[Pass]) -> None:
    batch = BatchLoader(PackedDataset(dataset, "train", 24), 4, 0, 1).batch(0)

    def step(rows: int) -> dict[str, torch.Tensor]:
        config = run_config(dataset, micro_batch_rows=rows, **EVERYTHING)
        torch.manual_seed(0)
        model = YocoUForCausalLM._from_config(_config(config)).double()
        truncate_backpropagation(model, config.training.backward_loops)
        TrainingStep(model, build_optimizer(model, config.optimizer), config, ALONE).gradients(batch, passes)
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

    parts, whole = step(1), step(4)
    assert parts.keys() == whole.keys()
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-5, atol=1e-9)


def test_each_pass_has_its_share_of_the_rows(dataset: Path) -> None:
    """The gradients of rows that are run in two ways are the sum of those of each half, weighted by the targets."""
    batch = BatchLoader(PackedDataset(dataset, "train", 24), 4, 0, 1).batch(0)
    config = run_config(dataset, micro_batch_rows=1)
    torch.manual_seed(0)
    model = YocoUForCausalLM._from_config(_config(config)).double()
    step = TrainingStep(model, build_optimizer(model, config.optimizer), config, ALONE)
    found = step.gradients(batch, [Pass(1), Pass(3)])
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    loss = torch.zeros((), dtype=torch.float64)
    for loops, rows in ((1, [0, 2]), (3, [1, 3])):
        logits = model(batch["input_ids"][rows], document_ids=batch["document_ids"][rows], num_loops=loops).logits
        loss += torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["shift_labels"][rows].flatten(), reduction="sum")
    loss = loss / (batch["shift_labels"] >= 0).sum()
    loss.backward()
    assert found.loss == pytest.approx(loss.item())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=1e-8)


def _config(config: RunConfig) -> Any:
    from yoco_u import YocoUConfig

    return YocoUConfig.from_architecture(config.architecture)


@pytest.mark.parametrize(
    ("settings", "architecture", "message"),
    [
        ({"loop_draw": {"least": 5, "most": 4}}, "yoco_u", "loop_draw: least is 5, above most, which is 4"),
        ({"loop_draw": {"most": 4, "mean": 2}}, "yoco_u", "mean is 2.0, but has no effect: it needs distribution"),
        ({"loop_draw": {"most": 4, "sigma": 0.7}}, "yoco_u", "sigma is 0.7, but has no effect"),
        ({"loop_draw": {"most": 1000}}, "yoco_u", "loop_draw.most"),
        ({"loop_draw": {"distribution": "poisson_lognormal", "most": 4, "mean": 0.5}}, "yoco_u", "loop_draw.mean"),
        ({"loop_draw": UNIFORM}, "yoco", "training.loop_draw draws the loop count, but the architecture has no loop"),
        ({"backward_loops": 1}, "yoco", "training.backward_loops divides the loops, but the architecture has no loop"),
        ({"backward_loops": 0}, "yoco_u", "backward_loops"),
        ({"early_exit_weight": 1.0}, "yoco", "training.early_exit_weight leaves the loop, but the architecture has no loop"),
        ({"early_exit_weight": 1.0}, "upper_loop", "needs one looped stage, before the cross-decoder"),
        ({"early_exit_weight": 1.0, "loop_draw": {"most": 1}}, "yoco_u", "needs a loop before the last, but all draws are 1"),
        ({"loop_draw": UNIFORM, "loop_schedule": [{"until": 0.5, "loops": 2}]}, "yoco_u", "but uniform has none"),
        ({"loop_draw": HUGINN, "loop_schedule": [{"until": 0.5, "loops": 2}]}, "yoco_u", "both say the mean"),
        ({"loop_draw": {"most": 4, "per_step": 0}}, "yoco_u", "loop_draw.per_step"),
        ({"evaluate_loops": [0]}, "yoco_u", "evaluate_loops"),
    ],
)  # fmt: skip
def test_impossible_settings(dataset: Path, settings: dict[str, Any], architecture: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_config(dataset, architecture, **settings)


def test_rows_that_do_not_divide_among_the_draws_are_refused(dataset: Path, tmp_path: Path) -> None:
    config = run_config(dataset, loop_draw={"most": 4, "per_step": 3})
    with pytest.raises(UserError, match=r"batch_rows 4 does not divide among 1 processes and 3 draws \(loop_draw.per_step\)"):
        train(config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
