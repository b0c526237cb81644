"""The gap between YOCO-U and YOCO over the sizes of a grid, on made-up runs whose gaps are known."""

import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
from made_up_grids import Loss, grid, noise, preset, write_run
from scipy.stats import t

from yoco_u.budget import parameters
from yoco_u.experiment.config import Experiment
from yoco_u.experiment.grid import GridRun, expand
from yoco_u.experiment.results import read_results
from yoco_u.experiment.sizes import SizesSummary, summarize_sizes
from yoco_u.experiment.sizes_report import headline, line_text, render, write_sizes_report

SIZES = {
    name: {"architecture": {"hidden_size": width, "head_dim": width // 4}}
    for name, width in {"small": 16, "middle": 32, "large": 64, "huge": 128}.items()
}
MODELS = {
    "yoco-u": preset("yoco_u", label="YOCO-U"),
    "yoco": preset("yoco", label="YOCO"),
    "longer": preset("yoco", role="yoco", match={"by": "flops", "reference": "yoco-u"}),
}


def sizes_grid(seeds: tuple[int, ...] = (0, 1, 2), **settings: Any) -> Experiment:
    return grid(MODELS, seeds=seeds, sizes=SIZES, **settings)


def summary_of(experiment: Experiment, folder: Path, loss: Loss, left_out: str = "nothing") -> SizesSummary:
    runs = expand(experiment, folder)
    for run in runs:
        if left_out not in run.name:
            write_run(run, folder, loss)
    return summarize_sizes(experiment, read_results(runs, folder))


def doublings(run: GridRun) -> float:
    """How often the parameters have doubled since 10,000."""
    return math.log2(parameters(run.config.architecture).total / 10_000)


def closing(run: GridRun, share: float) -> float:
    """YOCO-U leads by 0.01 at equal steps. At equal FLOPs it lags by 0.3 at 10,000 parameters, and by 0.04 less a doubling."""
    lead = {"yoco-u": 0.01, "yoco": 0, "longer": 0.31 - 0.04 * doublings(run)}[run.model]
    return 3 - 0.1 * doublings(run) + 0.02 * run.seed - lead + noise(run) + (1 - share)


def test_the_gap_at_each_size_and_its_interval(tmp_path: Path) -> None:
    found = summary_of(sizes_grid(), tmp_path, closing)
    (steps,), (flops,) = found.of_cost("tokens"), found.of_cost("flops")
    assert [gap.size for gap in steps.gaps] == [gap.size for gap in flops.gaps] == list(SIZES)
    for at_steps, at_flops in zip(steps.gaps, flops.gaps, strict=True):
        wanted = 0.3 - 0.04 * math.log2(at_flops.looped.parameters / 10_000)
        assert at_steps.difference.mean == pytest.approx(-0.01, abs=0.004)
        assert at_flops.difference.mean == pytest.approx(wanted, abs=0.004)
        pairs = [at_flops.looped.final[seed] - at_flops.plain.final[seed] for seed in range(3)]
        half = t.ppf(0.975, 2) * statistics.stdev(pairs) / math.sqrt(3)
        assert at_flops.difference.low == pytest.approx(statistics.mean(pairs) - half)
        assert at_flops.difference.high == pytest.approx(statistics.mean(pairs) + half)


def test_the_trend_over_sizes_and_where_it_crosses_zero(tmp_path: Path) -> None:
    (line,) = summary_of(sizes_grid(), tmp_path, closing).of_cost("flops")
    assert line.trend is not None and line.trend.crossing is not None
    assert line.trend.per_doubling.mean == pytest.approx(-0.04, abs=0.002)
    assert line.trend.crossing.mean == pytest.approx(10_000 * 2 ** (0.3 / 0.04), rel=0.3)
    assert "whenever the parameters double" in line_text(line)
    assert re.search(r"would cross zero at about|would cross zero at [\d.]+[KM]", line_text(line))


def test_what_is_not_finished_is_left_out_and_said(tmp_path: Path) -> None:
    two = summary_of(sizes_grid(), tmp_path / "two", closing, left_out="g")  # none of large and huge, and none that is longer
    assert list(two.sizes) == ["small", "middle"]
    assert [len(line.gaps) for line in two.lines] == [2, 0]
    assert "3 or more sizes, there are 2" in line_text(two.lines[0])
    assert headline(two).startswith("12 of 36 runs are finished, 0 of 4 sizes whole.")
    assert "<th>huge/yoco_seed-0</th><td>not begun</td>" in render(two)

    part = summary_of(sizes_grid(), tmp_path / "part", closing, left_out="huge/yoco-u_seed-1")
    assert [[gap.difference.count for gap in line.gaps] for line in part.lines] == [[3, 3, 3, 2]] * 2
    assert part.lines[0].trend is not None and part.lines[0].trend.per_doubling.count == 2
    one = summary_of(sizes_grid(seeds=(5,)), tmp_path / "one", closing)
    assert all(gap.difference.low is None for line in one.lines for gap in line.gaps)
    assert "(one seed)" in render(one)


def test_every_budget_has_a_line(tmp_path: Path) -> None:
    """The lag at equal FLOPs is smaller with more tokens for each parameter."""

    def loss(run: GridRun, share: float) -> float:
        return closing(run, share) + (0.1 if run.model == "longer" and run.budget == 60 else 0)

    found = summary_of(sizes_grid(tokens_per_parameter=[20, 60]), tmp_path, loss)
    assert [(line.cost, line.budget) for line in found.lines] == [("tokens", 20), ("tokens", 60), ("flops", 20), ("flops", 60)]
    few, many = found.of_cost("flops")
    for gap, other in zip(few.gaps, many.gaps, strict=True):
        assert gap.size == other.size
        assert gap.looped.tokens / gap.looped.parameters == pytest.approx(20, rel=0.05)
        assert gap.difference.mean - other.difference.mean == pytest.approx(0.1, abs=0.005)
    page = render(found)
    assert "</svg>20 tokens for each parameter</li>" in page
    assert "</svg>60 tokens for each parameter</li>" in page


def test_the_report_has_the_gaps_and_leads_to_each_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("yoco_u.experiment.report.write_png", lambda *_: None)  # of each size, as of a grid of one
    found = summary_of(sizes_grid(), tmp_path, closing)
    write_sizes_report(found, tmp_path)
    page, data = (tmp_path / "report.html").read_text(), json.loads((tmp_path / "report.json").read_text())
    assert (tmp_path / "report.png").stat().st_size > 10_000
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", page)
    assert re.findall(r'<a href="([^"]*)"', page) == [f"{size}/report.html" for size in SIZES]
    for size in SIZES:
        alone = json.loads((tmp_path / size / "report.json").read_text())
        assert {"generator": data["generator"]} | data["sizes"][size] == alone
        assert {cell["cell"].partition("/")[0] for cell in alone["cells"]} == {size}
        assert alone["findings"][0]["verdict"] == "confirmed"
    for line, told in zip(found.lines, data["gaps"], strict=True):
        assert (told["equal"], told["budget"]) == (line.cost, None)
        assert [gap["difference"]["mean"] for gap in told["gaps"]] == [gap.difference.mean for gap in line.gaps]
    rows = re.findall(r'<tr class="numbers"><th>(\w+)</th>', page)
    assert rows == list(SIZES)
