"""Verdicts and report on generated tasks, from made-up right answers and from a grid of two tiny runs."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_up_grids import grid, noise, preset, report_on, write_grid

from yoco_u.errors import UserError
from yoco_u.experiment.config import Measures
from yoco_u.experiment.findings.claims import judge
from yoco_u.experiment.findings.verdicts import Outcome
from yoco_u.experiment.grid import GridRun, expand
from yoco_u.experiment.measure import check_measures, measure, read_measures
from yoco_u.experiment.results import read_results
from yoco_u.files import write_json
from yoco_u.training import train

OPEN = "not decidable at this scale"
DEEP = [{"attention": "sliding", "layers": 6}, {"attention": "cross", "layers": 2}]
MODELS: dict[str, Any] = {
    "yoco-u": preset("yoco_u", label="YOCO-U"),
    "two-loops": preset("yoco_u", role="yoco_u", loops=2),
    "yoco": preset("yoco", label="YOCO"),
    "longer": preset("yoco", role="yoco", label="YOCO (longer)", match={"by": "flops", "reference": "yoco-u"}),
    "deep": preset("yoco", role="unrolled_yoco", label="YOCO (deep)", stages=DEEP),
    "deeper": preset("yoco", role="unrolled_yoco", stages=[{"attention": "sliding", "layers": 20}, *DEEP[1:]]),
}
Right = Callable[[GridRun, int], float]


def scores(right: Callable[[int], float], task: str = "p-hop", levels: tuple[int, ...] = (1, 2, 4)) -> list[dict[str, Any]]:
    return [
        {"task": task, "level": level, "answers": 500, "accuracy": right(level), "low": 0, "high": 1, "loss": 1.0}
        for level in levels
    ]


def level_loss(run: GridRun, share: float) -> float:
    return 3 - share + noise(run)


def asked(folder: Path, right: Right, models: dict[str, Any] = MODELS, seeds: tuple[int, ...] = (0, 1, 2)) -> list[GridRun]:
    runs = write_grid(grid(models, seeds), folder, level_loss)
    for run in runs:
        found = scores(lambda level, run=run: right(run, level)) + scores(lambda _: 0.5, "s5", (2,))
        write_json(folder / run.name / "measures.json", {"tasks": {"settings": {}, "result": found}})
    return runs


def outcomes(folder: Path, right: Right, **kwargs: Any) -> dict[str, Outcome]:
    found = judge(read_results(asked(folder, right, **kwargs), folder))
    return {judged.finding.id: judged.outcome for judged in found}


def falling(base: dict[str, float]) -> Right:
    """All models solve level 1; at level 2 and 4 each has its own share, and every seed shifts all alike."""
    return lambda run, level: 0.95 if level == 1 else base.get(run.model, 0.4) + 0.03 * run.seed + noise(run)


def test_each_comparison_has_its_own_verdict(tmp_path: Path) -> None:
    found = outcomes(tmp_path, falling({"yoco-u": 0.6, "yoco": 0.4, "longer": 0.6, "deep": 0.8, "deeper": 0.2}))
    assert [name for name in found if name.startswith("p-hop")] == [
        f"p-hop-equal-{e}" for e in ("parameters", "flops", "depth")
    ]
    verdicts = [found[f"p-hop-equal-{e}"].verdict for e in ("parameters", "flops", "depth")]
    assert verdicts == ["confirmed", OPEN, "not confirmed"]
    steps = found["p-hop-equal-parameters"]
    assert steps.numbers["difference"].mean == pytest.approx(0.2 * 2 / 3, abs=0.004)
    assert steps.numbers["difference"].count == 3
    assert steps.numbers["right_by_level"]["1"] == pytest.approx([0.95, 0.95])
    assert steps.numbers["right_by_level"]["4"] == pytest.approx([0.63, 0.43], abs=0.004)
    assert re.search(r"YOCO-U 73\.\d% \(\S+ parameters, 8 layers unrolled, 205K tokens", steps.text)
    assert re.search(r"\+13\.\d points \(95%: \+1\d\.\d to \+1\d\.\d, 3 seeds\)", steps.text)
    assert "By hops, 1: 95% and 95%, 2: 63% and 43%" in steps.text
    assert "YOCO (deep)" in found["p-hop-equal-depth"].text
    assert "YOCO (longer)" in found["p-hop-equal-flops"].text


def test_before_the_lowest_level_is_solved_depth_is_not_compared(tmp_path: Path) -> None:
    found = outcomes(tmp_path, lambda run, level: (0.95 if run.model == "yoco-u" else 0.6) - 0.1 * level + noise(run))
    for equal in ("parameters", "flops", "depth"):
        outcome = found[f"p-hop-equal-{equal}"]
        assert outcome.verdict == OPEN
        assert outcome.numbers["difference"].mean == pytest.approx(0.35, abs=0.004)
        assert "YOCO-U and YOCO" in outcome.text and "answered less than 90% of the lowest level" in outcome.text


def test_a_level_of_few_questions_does_not_count(tmp_path: Path) -> None:
    runs = asked(tmp_path, falling({"yoco-u": 0.6, "yoco": 0.4}))
    for run in runs:
        file = tmp_path / run.name / "measures.json"
        found = json.loads(file.read_text())
        found["tasks"]["result"].append(scores(lambda _: 0.0, levels=(0,))[0] | {"answers": 249})
        write_json(file, found)
    judged = {one.finding.id: one.outcome for one in judge(read_results(runs, tmp_path))}
    assert judged["p-hop-equal-parameters"].verdict == "confirmed"
    assert list(judged["p-hop-equal-parameters"].numbers["right_by_level"]) == ["1", "2", "4"]


@pytest.mark.parametrize(
    ("ours", "theirs", "levels"), [((1, 2), (1, 4), ["1"]), ((1, 2, 4), (1, 2), ["1", "2"]), ((1, 2), (3, 4), None)]
)
def test_only_levels_that_both_were_asked_are_compared(
    tmp_path: Path, ours: tuple[int, ...], theirs: tuple[int, ...], levels: list[str] | None
) -> None:
    """One seed of YOCO was asked every level, which changes nothing."""
    runs = asked(tmp_path, falling({}), {name: MODELS[name] for name in ("yoco-u", "yoco")})
    for run in runs:
        own = ours if run.model == "yoco-u" else (1, 2, 3, 4) if run.seed == 0 else theirs
        found = scores(lambda level, run=run: (1.0 if run.model == "yoco-u" else 0.95) / level + noise(run) / 8, levels=own)
        write_json(tmp_path / run.name / "measures.json", {"tasks": {"settings": {}, "result": found}})
    outcome = next(one.outcome for one in judge(read_results(runs, tmp_path)) if one.finding.id == "p-hop-equal-parameters")
    if levels is None:
        assert (outcome.verdict, outcome.numbers) == (OPEN, {})
        assert outcome.text.startswith("YOCO-U and YOCO were asked no level of p-hop in common")
    else:
        assert list(outcome.numbers["right_by_level"]) == levels
        expected = sum(0.05 / int(level) for level in levels) / len(levels)
        assert outcome.numbers["difference"].mean == pytest.approx(expected, abs=0.001)


def test_one_seed_decides_nothing(tmp_path: Path) -> None:
    found = outcomes(tmp_path, falling({"yoco-u": 0.8}), seeds=(0,))
    assert found["p-hop-equal-flops"].verdict == OPEN
    assert "(one seed, no interval)" in found["p-hop-equal-flops"].text


def test_a_model_that_is_missing_is_named(tmp_path: Path) -> None:
    few = {name: MODELS[name] for name in ("yoco-u", "yoco", "deeper")}
    found = outcomes(tmp_path, falling({}), models=few)
    assert found["p-hop-equal-parameters"].numbers
    for equal, text in (
        ("flops", "No YOCO-U and YOCO of equal FLOPs"),
        ("depth", "No YOCO-U and YOCO of equal unrolled depth"),
    ):
        assert found[f"p-hop-equal-{equal}"].text.startswith(text)
        assert not found[f"p-hop-equal-{equal}"].numbers


def test_report_shows_the_answers_by_level(tmp_path: Path) -> None:
    runs = asked(tmp_path, falling({"yoco-u": 0.6, "yoco": 0.4}))
    report_on(grid(MODELS), runs, tmp_path)
    page, data = (tmp_path / "report.html").read_text(), json.loads((tmp_path / "report.json").read_text())
    assert page.index("<h2>p-hop</h2>") < page.index("<h2>s5</h2>")
    table = page[page.index("<h2>p-hop</h2>") : page.index("<h2>s5</h2>")]
    assert "right answers at hops:" in table
    cells = re.findall(r"<th>YOCO-U</th><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td>", table)
    assert cells[0][:3] == ("95%", "63%", "63%")
    findings = {one["id"]: one for one in data["findings"]}
    assert findings["p-hop-equal-parameters"]["verdict"] == "confirmed"
    assert findings["s5-equal-flops"]["verdict"] == OPEN
    assert "Not of the paper: in p-hop YOCO-U has more right answers than a YOCO of equal FLOPs" in page


def test_the_measure_asks_the_tasks_of_the_corpus(tmp_path: Path) -> None:
    entry = "synthetic:s3:levels=2-3:documents=40:length=32"
    experiment = grid(
        {"yoco-u": preset("yoco_u", loops=2, vocab_size=257)},
        seeds=(0,),
        data={"corpus": entry, "validation_fraction": 0.2},
        measures={"tasks": {"answers": 10}},
    )
    [run] = expand(experiment, tmp_path, ["training={steps: 1, sequence_length: 32, dtype: float32, compile: 'off'}"])
    config = run.config
    assert experiment.measures is not None
    check_measures(experiment.measures, config, progress=False)
    train(config, tmp_path / "run", progress=False)
    measure(tmp_path / "run", experiment.measures, print)
    found = read_measures(tmp_path / "run")["tasks"]
    assert [(score["task"], score["level"]) for score in found] == [("s3", 2), ("s3", 3)]
    assert all(0 <= score["accuracy"] <= 1 for score in found)


@pytest.mark.parametrize("data", [None, {"corpus": "stdlib"}])
def test_a_corpus_without_tasks_is_refused(data: Any, tmp_path: Path) -> None:
    [run] = expand(grid({"yoco": preset("yoco")}, seeds=(0,), data=data), tmp_path)
    with pytest.raises(UserError, match=r"measures.tasks asks for generated tasks, but the corpus is (stdlib|not said)"):
        check_measures(Measures.model_validate({"tasks": {}}), run.config, progress=False)


def test_a_damaged_result_is_named(tmp_path: Path) -> None:
    runs = asked(tmp_path, falling({}))
    file = tmp_path / runs[0].name / "measures.json"
    file.write_text(file.read_text().replace('"accuracy"', '"accurbcy"'))
    with pytest.raises(UserError, match=r"measures\.json: tasks\.result\.0"):
        read_results(runs, tmp_path)
