"""Every finding on made-up curves that confirm it, contradict it, or leave it open."""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from examples import covering
from hypothesis import given
from hypothesis import strategies as st
from made_up_grids import finals, grid, noise, preset, results_of

from yoco_u.experiment.findings.claims import FINDINGS, judge
from yoco_u.experiment.findings.comparisons import tokens_to_equal_loss
from yoco_u.experiment.findings.verdicts import Outcome
from yoco_u.experiment.grid import GridRun
from yoco_u.experiment.results import Results

OPEN = "not decidable at this scale"


def outcome(results: Results, finding: str) -> Outcome:
    [judged] = [judged for judged in judge(results) if judged.finding.id == finding]
    return judged.outcome


def two(folder: Path, gap: float, seeds: tuple[int, ...] = (0, 1, 2), spread: float = 0.002) -> Results:
    models = {"yoco": preset("yoco"), "yoco-u": preset("yoco_u")}
    return results_of(grid(models, seeds), folder, finals({"yoco": 2.5, "yoco-u": 2.5 + gap}, spread))


@pytest.mark.parametrize(
    ("gap", "seeds", "spread", "verdict"),
    [
        (-0.05, (0, 1, 2), 0.002, "confirmed"),
        (0.05, (0, 1, 2), 0.002, "not confirmed"),
        (-0.001, (0, 1, 2), 0.02, OPEN),
        (-0.05, (0,), 0.002, OPEN),
    ],
)
def test_equal_steps(tmp_path: Path, gap: float, seeds: tuple[int, ...], spread: float, verdict: str) -> None:
    found = outcome(two(tmp_path, gap, seeds, spread), "equal-steps")
    assert found.verdict == verdict
    assert found.numbers["difference"].mean == pytest.approx(gap, abs=2 * spread)
    assert found.numbers["difference"].count == len(seeds)
    assert f"{found.numbers['difference'].mean:+.4f}".replace("-", "\u2212") in found.text


def test_a_seed_that_shifts_both_alike_does_not_blur_the_difference(tmp_path: Path) -> None:
    """Seeds differ by 0.05 here and the models by 0.01: only pairs tell them apart."""
    found = outcome(two(tmp_path, -0.01, spread=0.0005), "equal-steps")
    assert found.verdict == "confirmed"


def test_equal_flops_takes_the_yoco_that_spent_as_much(tmp_path: Path) -> None:
    models = {
        "yoco": preset("yoco"),
        "long": preset("yoco", role="yoco", match={"by": "flops", "reference": "yoco-u"}),
        "yoco-u": preset("yoco_u"),
    }
    results = results_of(grid(models), tmp_path, finals({"yoco": 2.6, "long": 2.4, "yoco-u": 2.5}))
    assert outcome(results, "equal-steps").verdict == "confirmed"
    equal = outcome(results, "equal-flops")
    assert equal.verdict == "not confirmed"
    assert equal.numbers["difference"].mean == pytest.approx(0.1, abs=0.004)


def test_where_the_gap_closes_the_crossing_is_told(tmp_path: Path) -> None:
    """The gap falls by 0.02 whenever tokens double, and is 0.04 at the end: two more doublings."""
    models = {"yoco": preset("yoco"), "yoco-u": preset("yoco_u")}
    tokens = [102_400 * 2**i for i in range(4)]

    def loss(run: GridRun, share: float) -> float:
        doublings = tokens.index(run.budget or 0)
        lag = 0.1 - 0.02 * doublings if run.model == "yoco-u" else 0
        return 3 - 0.2 * doublings + lag + noise(run, 0.0005) + 0.1 * (1 / share - 1)

    found = outcome(results_of(grid(models, tokens=tokens), tmp_path, loss), "equal-steps")
    assert found.verdict == "not confirmed"
    assert found.numbers["trend"].crossing.mean == pytest.approx(4 * tokens[-1], rel=0.1)
    assert "The lag closes" in found.text
    assert [gap["tokens"] for gap in found.numbers["gaps"]] == tokens


def test_tokens_to_equal_loss_over_budgets(tmp_path: Path) -> None:
    """Both fall by 0.2 a doubling, YOCO-U is 0.2 lower: half the tokens."""
    models = {"yoco": preset("yoco"), "yoco-u": preset("yoco_u")}
    tokens = [102_400 * 2**i for i in range(4)]

    def loss(run: GridRun, share: float) -> float:
        return 3 - 0.2 * tokens.index(run.budget or 0) - (0.2 if run.model == "yoco-u" else 0) + noise(run) + (1 - share)

    found = outcome(results_of(grid(models, tokens=tokens), tmp_path, loss), "equal-loss")
    assert found.verdict == "confirmed"
    assert found.numbers["saving"].mean == pytest.approx(0.5, abs=0.02)
    assert "each with a schedule of its own" in found.text


@pytest.mark.parametrize(("gap", "verdict"), [(-0.05, "confirmed"), (0.05, "not confirmed")])
def test_tokens_to_equal_loss_along_runs(tmp_path: Path, gap: float, verdict: str) -> None:
    found = outcome(two(tmp_path, gap), "equal-loss")
    assert found.verdict == verdict
    if gap < 0:  # the curve is final + 0.04 (1/s - 1), which is the other's final at 1/s = 1 - gap / 0.04
        assert found.numbers["saving"].mean == pytest.approx(1 - 1 / (1 + 0.05 / 0.04), abs=0.04)
    else:
        assert "0 of 3 seeds" in found.text


@pytest.mark.parametrize("count", [2, 3, 5])
def test_equal_models_are_seldom_refuted_by_the_tokens_to_an_equal_loss(without_training: Results, count: int) -> None:
    """Two models of one law: by chance no seed of one reaches the other, in a quarter of all grids with two seeds."""
    generator, refuted, grids = np.random.default_rng(count), 0, 200
    yoco = without_training.series[0]
    for _ in range(grids):
        series = []
        for role in ("yoco", "yoco_u"):
            ends = {seed: float(generator.normal(2.5, 0.03)) for seed in range(count)}
            curves = {
                seed: tuple(replace(point, loss=end + 0.02 * (15 - i)) for i, point in enumerate(yoco.curves[0]))
                for seed, end in ends.items()
            }
            series.append(replace(yoco, role=role, loops=3 if role == "yoco_u" else 1, curves=curves))
        refuted += tokens_to_equal_loss(replace(without_training, series=tuple(series))).verdict == "not confirmed"
    assert refuted / grids < 0.06


PAPER_ORDER = [
    "rins", "yoco-u", "deeper", "universal-transformer", "upper-loop-without-shared-kv", "upper-loop", "yoco", "transformer",
    "parscale",
]  # fmt: skip


def architectures(folder: Path, losses: dict[str, float]) -> Results:
    models = {name: preset(name.replace("-", "_")) for name in losses}
    return results_of(grid(models), folder, finals(losses, 0.0005))


def test_the_papers_order_and_the_opposite_one(tmp_path: Path) -> None:
    same = outcome(architectures(tmp_path / "a", {n: 2 + 0.05 * i for i, n in enumerate(PAPER_ORDER)}), "order")
    assert (same.verdict, same.numbers["kendall_tau"]) == ("confirmed", pytest.approx(1))
    assert not same.numbers["contradict"]
    turned = outcome(architectures(tmp_path / "b", {n: 2 - 0.05 * i for i, n in enumerate(PAPER_ORDER)}), "order")
    assert (turned.verdict, turned.numbers["kendall_tau"]) == ("not confirmed", pytest.approx(-1))
    assert "Transformer" not in turned.text
    assert "parscale below rins" in turned.text
    level = outcome(architectures(tmp_path / "c", dict.fromkeys(PAPER_ORDER, 2.0)), "order")
    assert level.verdict == OPEN


@pytest.mark.parametrize(
    ("upper", "without", "verdict"), [(2.6, 2.6, "confirmed"), (2.4, 2.6, "not confirmed"), (2.5, 2.6, OPEN)]
)
def test_lower_half(tmp_path: Path, upper: float, without: float, verdict: str) -> None:
    results = architectures(tmp_path, {"yoco-u": 2.5, "upper-loop": upper, "upper-loop-without-shared-kv": without})
    assert outcome(results, "lower-half").verdict == verdict


@pytest.mark.parametrize(("rins", "verdict"), [(2.5, "confirmed"), (2.6, "not confirmed"), (2.3, "not confirmed")])
def test_on_a_par_with_rins(tmp_path: Path, rins: float, verdict: str) -> None:
    assert outcome(architectures(tmp_path, {"yoco-u": 2.5, "rins": rins}), "rins").verdict == verdict


@pytest.mark.parametrize(
    ("losses", "falls", "by_less"),
    [
        ((2.50, 2.40, 2.35, 2.33), "confirmed", "confirmed"),
        ((2.50, 2.45, 2.35, 2.05), "confirmed", "not confirmed"),
        ((2.50, 2.40, 2.45, 2.50), "not confirmed", "not confirmed"),
        ((2.50, 2.50, 2.50, 2.50), OPEN, OPEN),
    ],
)
def test_loss_against_loops(tmp_path: Path, losses: tuple[float, ...], falls: str, by_less: str) -> None:
    models = {"yoco": preset("yoco"), "yoco-u": preset("yoco_u", vary={"architecture.loops": [2, 3, 5]})}
    names = ["yoco", "yoco-u_loops-2", "yoco-u_loops-3", "yoco-u_loops-5"]
    results = results_of(grid(models), tmp_path, finals(dict(zip(names, losses, strict=True)), 0.001))
    assert outcome(results, "loops").verdict == falls
    found = outcome(results, "less-by-loop")
    assert found.verdict == by_less
    assert found.numbers["gain per loop, T=3 to 5"].mean == pytest.approx((losses[2] - losses[3]) / 2, abs=0.002)


@pytest.mark.parametrize(
    ("case", "roles"),
    covering(
        [(0.2, 0.19, "confirmed"), (0.2, -0.1, "not confirmed"), (-0.2, 0.1, "not confirmed"), (0.2, 0.0, OPEN)],
        [("plain_loop", "tamed_loop"), ("plain_loop", "yoco_u"), ("yoco_u", "tamed_loop")],
    ),
)
def test_early_lag(tmp_path: Path, case: tuple[float, float, str], roles: tuple[str, str]) -> None:
    (lag, gain, verdict), (plain, remedy) = case, roles
    models: dict[str, Any] = {
        "yoco": preset("yoco"),
        "plain": preset("yoco_u", role=plain),
        "tamed": preset("yoco_u", role=remedy, label="gates"),
    }
    early = {"yoco": 0.0, "plain": lag, "tamed": lag - gain}

    def loss(run: GridRun, share: float) -> float:
        return 2.5 + 0.05 * run.seed + noise(run, 0.001) + (early[run.model] if share <= 0.5 else 0) + 0.1 * (1 - share)

    found = outcome(results_of(grid(models), tmp_path, loss), "early-lag")
    assert found.verdict == verdict
    assert found.numbers["plain minus YOCO"]["early"].mean == pytest.approx(lag, abs=0.003)
    assert found.numbers["gates"]["early, minus plain"].mean == pytest.approx(-gain, abs=0.003)
    assert abs(found.numbers["plain minus YOCO"]["end"].mean) < 0.003
    if verdict == "confirmed":
        assert "95% of the early lag removed" in found.text.replace("94%", "95%").replace("96%", "95%")


@given(kept=st.lists(st.sets(st.integers(0, 14)), min_size=3, max_size=3))
def test_early_means_measured_early(kept: list[set[int]], without_training: Results) -> None:
    """The losses are straight over log tokens, so that those after a quarter are known wherever evaluations lie around it."""
    lost, shift = {"yoco": 0.1, "plain": 0.5, "tamed": 0.2}, {"yoco": 0.001, "plain": 0.0, "tamed": 0.001}
    series = []
    for one, places in zip(without_training.series, kept, strict=True):
        curves = {
            seed: tuple(
                replace(curve[i], loss=2 + shift[one.name] * seed - lost[one.name] * math.log2((i + 1) / 16))
                for i in (*sorted(places), 15)
            )
            for seed, curve in one.curves.items()
        }
        series.append(replace(one, curves=curves))
    found = outcome(replace(without_training, series=tuple(series)), "early-lag")
    if all(min(places, default=15) <= 3 for places in kept):
        assert found.numbers["plain minus YOCO"]["early"].mean == pytest.approx(2 * 0.4 - 0.001)
        assert found.numbers["tamed"]["early, minus plain"].mean == pytest.approx(-2 * 0.3 + 0.001)
        assert found.verdict == "confirmed" and "after 51.2K tokens" in found.text and "75% of the early lag" in found.text
    else:
        assert (found.verdict, found.numbers) == (OPEN, {})
        assert re.search("(Yoco|Plain|Tamed) was first evaluated after [0-9]+% of its tokens, which is too late", found.text)


@pytest.fixture(scope="module")
def without_training(tmp_path_factory: pytest.TempPathFactory) -> Results:
    models = {
        "yoco": preset("yoco"),
        "plain": preset("yoco_u", role="plain_loop"),
        "tamed": preset("yoco_u", role="tamed_loop"),
    }
    return results_of(grid(models), tmp_path_factory.mktemp("grid"), finals(dict.fromkeys(models, 2.0)))


def test_a_yoco_u_with_gates_is_no_plain_loop(tmp_path: Path) -> None:
    models = {
        "yoco": preset("yoco"),
        "mine": preset("yoco_u", role="yoco_u", loop_gate=0.05),
        "t": preset("yoco_u", role="tamed_loop"),
    }
    results = results_of(grid(models), tmp_path, finals({"yoco": 2.0, "mine": 2.1, "t": 2.0}))
    assert outcome(results, "early-lag").text.startswith("No plain loop beside a YOCO")


def test_a_grid_that_was_made_for_nothing_says_what_is_missing(tmp_path: Path) -> None:
    results = results_of(grid({"mine": preset("transformer")}), tmp_path, finals({"mine": 2.0}))
    judged = judge(results)
    assert [j.finding.id for j in judged] == [finding.id for finding in FINDINGS]
    for j in judged:
        assert j.outcome.verdict == OPEN
        assert j.outcome.numbers == {}
        assert j.finding.needs in j.outcome.text


def test_of_several_tunings_the_best_stands_for_the_architecture(tmp_path: Path) -> None:
    rates = {"optimizer.learning_rate": [0.01, 0.02]}
    models = {"yoco": preset("yoco", vary=rates), "yoco-u": preset("yoco_u", vary=rates)}
    losses = {"yoco_learning-rate-0.01": 2.5, "yoco_learning-rate-0.02": 2.4}
    losses |= {"yoco-u_learning-rate-0.01": 2.45, "yoco-u_learning-rate-0.02": 2.6}
    found = outcome(results_of(grid(models), tmp_path, finals(losses)), "equal-steps")
    assert found.verdict == "not confirmed"
    assert found.numbers["difference"].mean == pytest.approx(0.05, abs=0.004)
    assert "learning rate 0.01 is the best of 2" in found.text and "learning rate 0.02 is the best of 2" in found.text


def with_measures(results: Results, taken: dict[str, dict[str, Any]]) -> Results:
    """The results, as if models had been measured: by series, shifted a little by each seed."""

    def shift(value: Any, by: float) -> Any:
        if isinstance(value, dict):
            return {key: one if key in ("length", "depth", "samples") else shift(one, by) for key, one in value.items()}
        return [shift(one, by * (1 + i % 5)) for i, one in enumerate(value)] if isinstance(value, list) else value + by

    series = []
    for one in results.series:
        found = {seed: shift(taken.get(one.name, {}), 0.001 * seed) for seed in one.curves}
        series.append(replace(one, measures=found))
    return replace(results, series=tuple(series))


@pytest.mark.parametrize(
    ("layers", "verdict"),
    [
        ([0.30, 0.20, 0.25, 0.20, 0.12, 0.15, 0.10, 0.04, 0.06, 0.35, 0.20, 0.10], "confirmed"),
        ([0.10, 0.04, 0.06, 0.20, 0.12, 0.15, 0.30, 0.20, 0.25, 0.35, 0.20, 0.10], "not confirmed"),  # grows
        ([0.30, 0.20, 0.25, 0.20, 0.12, 0.15, 0.10, 0.04, 0.30, 0.10, 0.20, 0.10], "not confirmed"),  # no jump
        ([0.30, 0.20, 0.25, 0.12, 0.20, 0.15, 0.10, 0.04, 0.06, 0.35, 0.20, 0.10], "not confirmed"),  # another pattern
    ],
)
def test_angular_distances(tmp_path: Path, layers: list[float], verdict: str) -> None:
    plain = results_of(grid({"yoco-u": preset("yoco_u", layers=6)}), tmp_path, finals({"yoco-u": 2.5}))
    assert outcome(plain, "angular").verdict == OPEN
    found = outcome(with_measures(plain, {"yoco-u": {"angular": {"layers": layers}}}), "angular")
    assert found.verdict == verdict
    assert found.numbers["loop 2 minus loop 1"].mean == pytest.approx(sum(layers[3:6]) / 3 - sum(layers[:3]) / 3, abs=0.005)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("distance", [0.0, 0.1, 0.3])
def test_a_loop_of_equal_distances_has_no_pattern(tmp_path: Path, distance: float) -> None:
    plain = results_of(grid({"yoco-u": preset("yoco_u", layers=6)}), tmp_path, finals({"yoco-u": 2.5}))
    layers = [0.30, 0.20, 0.25, *3 * [distance], 0.01, 0.02, 0.01, 0.35, 0.20, 0.10]
    found = outcome(with_measures(plain, {"yoco-u": {"angular": {"layers": layers}}}), "angular")
    assert (found.verdict, found.numbers) == (OPEN, {})
    assert found.text.startswith("The angular distances within a loop are all equal")


@pytest.mark.parametrize(
    ("recalls", "verdict"),
    [
        ((0.05, 0.97, 0.98, 0.99), "confirmed"),
        ((0.05, 0.97, 0.60, 0.99), OPEN),
        ((0.95, 0.93, 0.92, 0.99), "not confirmed"),
    ],
)
def test_retrieval(tmp_path: Path, recalls: tuple[float, ...], verdict: str) -> None:
    stages = [{"attention": "sliding", "layers": 4}]
    shape = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    models: dict[str, Any] = {name: preset(name.replace("-", "_")) for name in ("transformer", "yoco", "yoco-u")}
    models["window-only"] = {"settings": {"architecture": shape | {"head_dim": 8, "window": 8, "stages": stages}}}
    experiment = grid(models, base={"training": grid({"x": {}}).base["training"], "optimizer": {"warmup_steps": 0}})
    names = ["window-only", "transformer", "yoco", "yoco-u"]
    for name in names[1:]:
        experiment.models[name].settings["architecture"]["size"] = "test"
    results = results_of(experiment, tmp_path, finals(dict.fromkeys(names, 2.5)))
    assert outcome(results, "retrieval").verdict == OPEN
    taken = {
        name: {
            "needles": [
                {"length": n, "depth": d, "samples": 1000, "recall": 1.0 if d > 0.5 else recall}
                for n in (64, 512)
                for d in (0, 0.5, 1)
            ]
        }
        for name, recall in zip(names, recalls, strict=True)
    }
    found = outcome(with_measures(results, taken), "retrieval")
    assert found.verdict == verdict
    assert found.numbers["yoco"].mean == pytest.approx(recalls[2], abs=0.005)
    assert "512 tokens" in found.text
