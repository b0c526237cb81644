"""The report of a grid, finished or not, as page and as JSON."""

import json
import re
from pathlib import Path

import pytest
from made_up_grids import finals, grid, preset, report_on, results_of, write_grid, write_run

from yoco_u.errors import UserError
from yoco_u.experiment.findings.claims import FINDINGS
from yoco_u.experiment.grid import expand
from yoco_u.experiment.report import render
from yoco_u.experiment.results import read_results
from yoco_u.experiment.summary import summarize
from yoco_u.files import write_json

MODELS = {"yoco": preset("yoco", label=r"YOCO & <b> $\x$"), "yoco-u": preset("yoco_u", label="YOCO-U")}
LOSSES = {"yoco": 2.5, "yoco-u": 2.4}


def test_report_of_a_finished_grid(tmp_path: Path) -> None:
    experiment = grid(MODELS)
    runs = write_grid(experiment, tmp_path, finals(LOSSES))
    summary = report_on(experiment, runs, tmp_path)
    page, data = (tmp_path / "report.html").read_text(), json.loads((tmp_path / "report.json").read_text())
    assert (tmp_path / "report.png").stat().st_size > 10_000

    assert summary.headline.startswith("6 of 6 runs are finished, 3 seeds.")
    assert "<h1>Made &lt;up&gt;</h1>" in page
    assert "YOCO &amp; &lt;b&gt;" in page
    assert "right answers" not in page
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", page)
    for finding in FINDINGS:
        assert finding.statement.split(",")[0] in page
    assert [(f["id"], f["verdict"]) for f in data["findings"]][:1] == [("equal-steps", "confirmed")]
    assert page.count('class="verdict confirmed"') == sum(f["verdict"] == "confirmed" for f in data["findings"])

    by_name = {series["series"]: series for series in data["series"]}
    looped = by_name["yoco-u"]
    assert looped["loss_by_seed"].keys() == {"0", "1", "2"}
    assert looped["loss"]["mean"] == pytest.approx(sum(looped["loss_by_seed"].values()) / 3)
    assert looped["minus_baseline"]["mean"] == pytest.approx(-0.1, abs=0.004)
    assert by_name["yoco"]["minus_baseline"] is None
    assert f"{looped['loss']['mean']:.4f}" in page
    assert len(data["cells"]) == 6
    tokens, flops, loss = data["cells"][-1]["curve"][-1]
    assert (tokens, flops) == (204_800, pytest.approx(runs[-1].config.training_flops()))
    assert loss == pytest.approx(looped["loss_by_seed"]["2"], abs=1e-6)
    assert all(fit["law"] is None and "there are 1" in fit["reason"] for fit in data["fits"])


def test_losses_at_several_loop_counts(tmp_path: Path) -> None:
    experiment = grid(MODELS)
    plain = results_of(experiment, tmp_path / "plain", finals(LOSSES))
    assert "Loss over loops" not in render(summarize(experiment, plain))
    base = experiment.base | {"training": experiment.base["training"] | {"evaluate_loops": [1, 2]}}
    experiment = experiment.model_copy(update={"base": base})
    runs = write_grid(experiment, tmp_path, finals(LOSSES))
    metrics = tmp_path / runs[-1].name / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"loss_at_1"', '"left out, as it is not finite"'))
    summary = report_on(experiment, runs, tmp_path)
    assert "Loss over loops" in (tmp_path / "report.html").read_text()
    looped = next(series for series in summary.results.series if series.name == "yoco-u")
    assert looped.evaluated_at == {1, 2, 3}
    assert looped.at_loops(3) == looped.final
    assert looped.at_loops(1).keys() == {0, 1}
    assert looped.at_loops(2) == {seed: pytest.approx(loss + 0.2) for seed, loss in looped.final.items()}
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["cells"][0]["loss_at_loops"].keys() == {"1", "2"}
    assert data["cells"][-1]["loss_at_loops"]["1"] is None


def test_budgets_are_fitted(tmp_path: Path) -> None:
    tokens = [102_400 * 2**i for i in range(5)]
    experiment = grid(MODELS, tokens=tokens)
    runs = write_grid(experiment, tmp_path, lambda run, share: 1.5 + 30 * (run.budget or 0) ** -0.3 + (1 - share))
    report_on(experiment, runs, tmp_path)
    data = json.loads((tmp_path / "report.json").read_text())
    fits = {(fit["model"], fit["x"]): fit["law"] for fit in data["fits"]}
    assert fits.keys() == {(model, x) for model in LOSSES for x in ("tokens", "flops")}
    for law in fits.values():
        assert law["exponent"]["mean"] == pytest.approx(0.3, rel=0.01)
        assert law["floor"]["mean"] == pytest.approx(1.5, rel=0.01)
    assert "Loss over budgets" in (tmp_path / "report.html").read_text()


def test_report_of_a_grid_under_way(tmp_path: Path) -> None:
    experiment = grid(MODELS, seeds=(0, 1))
    runs = expand(experiment, tmp_path)
    with pytest.raises(UserError, match="none of the 4 runs is finished yet"):
        report_on(experiment, runs, tmp_path)
    assert not (tmp_path / "report.html").exists()
    write_run(runs[0], tmp_path, finals(LOSSES))
    write_run(runs[1], tmp_path, finals(LOSSES), done=0.5)
    write_run(runs[2], tmp_path, finals(LOSSES), done=0.25)
    write_run(runs[3], tmp_path, finals(LOSSES), done=0)  # has begun, without a step
    (tmp_path / runs[2].name / "checkpoints" / "non-finite-step-00000400").mkdir(parents=True)
    report_on(experiment, runs, tmp_path)
    page, data = (tmp_path / "report.html").read_text(), json.loads((tmp_path / "report.json").read_text())
    states = {run["cell"]: run["state"] for run in data["cells"]}
    assert states == {
        "yoco_seed-0": "finished",
        "yoco-u_seed-0": "unfinished",
        "yoco_seed-1": "diverged",
        "yoco-u_seed-1": "not begun",
    }
    assert [series["series"] for series in data["series"]] == ["yoco"]
    for name, state in states.items():
        assert state == "finished" or re.search(rf"<th>{name}</th><td>{state}</td>", page)
    assert "1 of 4 runs are finished, 2 seeds." in page
    assert "(one seed)" in page


def test_a_grid_that_was_moved_is_reported(tmp_path: Path) -> None:
    experiment = grid({"yoco": preset("yoco")}, data={"vocab_size": 300})
    write_grid(experiment, tmp_path / "cluster", finals({"yoco": 2.0}))
    (tmp_path / "cluster").rename(tmp_path / "laptop")
    results = read_results(expand(experiment, tmp_path / "laptop"), tmp_path / "laptop")
    assert len(results.series[0].curves) == 3
    other = grid({"yoco": preset("yoco")}, data={"vocab_size": 301})
    with pytest.raises(UserError, match=r"holds a run with data.vocab_size = 300, now 301"):
        read_results(expand(other, tmp_path / "laptop"), tmp_path / "laptop")


def test_a_finished_run_that_lost_all_its_metrics_is_named(tmp_path: Path) -> None:
    """It is not taken for one that has not begun."""
    runs = write_grid(grid(MODELS), tmp_path, finals(LOSSES))
    (tmp_path / "yoco-u_seed-1" / "metrics.jsonl").write_bytes(b"")
    with pytest.raises(UserError, match=r"metrics.jsonl: lacks steps 1 to 1600 and .*; .* train it again in another folder"):
        read_results(runs, tmp_path)


@pytest.mark.parametrize("kept", [0, 4])
def test_a_finished_run_without_its_last_evaluation_is_named(tmp_path: Path, kept: int) -> None:
    """An earlier one is not taken for its final loss."""
    experiment = grid(MODELS)
    runs = write_grid(experiment, tmp_path, finals(LOSSES))
    file = tmp_path / "yoco-u_seed-1" / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    evaluations = [line for line in lines if json.loads(line)["kind"] == "evaluation"]
    file.write_text("".join(line for line in lines if line not in evaluations[kept:]))
    with pytest.raises(UserError, match=r"yoco-u_seed-1/metrics.jsonl: lacks the evaluation of step 1600, though"):
        read_results(runs, tmp_path)


def test_needles_are_maps_of_their_mean_over_the_seeds(tmp_path: Path) -> None:
    experiment, shares = grid(MODELS), {"yoco": 0.2, "yoco-u": 0.9}
    runs = write_grid(experiment, tmp_path, finals(LOSSES))
    assert "<h2>Needles</h2>" not in render(summarize(experiment, read_results(runs, tmp_path)))
    for run in runs:
        needles = [
            {
                "kind": "single_1",
                "length": length,
                "depth": depth,
                "samples": 1,
                "recall": shares[run.model] * depth + 0.03 * (run.seed - 1),
                "token_accuracy": 0.5,
                "loss": 1.0,
            }
            for depth in (0.5, 1.0)
            for length in (256, 512)
        ]
        write_json(tmp_path / run.name / "measures.json", {"needles": {"settings": {}, "result": needles}})
    report_on(experiment, runs, tmp_path)
    page = (tmp_path / "report.html").read_text()
    yoco, looped = page[page.index("<h2>Needles</h2>") :].split("</figure>")[:2]
    assert "YOCO &amp; &lt;b&gt;" in yoco and "YOCO-U" in looped
    assert re.findall(r">(\d+%)<", yoco) == ["50%", "100%", "10%", "10%", "20%", "20%"]
    assert re.findall(r">(\d+%)<", looped)[2:] == ["45%", "45%", "90%", "90%"]
