"""Comparison, gaps and the page, from run folders with made-up metrics."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from yoco_u.architecture import preset
from yoco_u.budget import kv_bytes, parameters, training_flops
from yoco_u.config import dump_yaml, parse
from yoco_u.errors import UserError
from yoco_u.formatting import (
    duration,
    scientific,
    short_bytes,
    short_count,
)
from yoco_u.plotting import PALETTE
from yoco_u.report import plots
from yoco_u.report.comparison import compare
from yoco_u.report.plots import smoothed
from yoco_u.report.run_report import render, write_report
from yoco_u.training.config import RunConfig
from yoco_u.training.run_folder import Run, read_run


def made_up(
    folder: Path, name: str, loops: int, steps: int, loss: float | None, planned: int | None = None, **settings: Any
) -> Run:
    """A run folder whose last validation loss is `loss`; None: never evaluated."""
    architecture = {"preset": "yoco_u", "size": "test", "loops": loops}
    training = {"steps": planned or steps, "sequence_length": 32, "batch_rows": 4, "micro_batch_rows": 4}
    training |= settings.pop("training", {})
    settings |= {
        "name": name,
        "architecture": architecture,
        "dataset": "d",
        "optimizer": {"warmup_steps": 0},
        "training": training,
    }
    config = parse(RunConfig, settings, "test")
    per_token = training_flops(config.architecture, 32)
    folder.mkdir()
    dump_yaml(config, folder / "config.yaml")
    records: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        common = {"step": step, "tokens": 128 * step, "flops": per_token * 128 * step}
        speed = {"tokens_per_second": 1000.0 + step, "model_flops_per_second": 1e9, "mfu": 0.5, "seconds": 0.1 * step}
        values = {
            "loss": 5 - 0.01 * step,
            "perplexity": 9.0,
            "bits_per_byte": 2.0,
            "gradient_norm": 1.0,
            "learning_rate": 1e-3,
        }
        records.append({"kind": "train"} | common | values | speed)
        if loss is not None and step % 10 == 0:
            records.append({"kind": "evaluation"} | common | {"loss": loss, "perplexity": 77.125, "bits_per_byte": 1.4321})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "environment.json").write_text(json.dumps({"torch": "2.x", "memory_bytes": 2**34, "resumed": []}))
    samples = [{"prompt": "def ", "text": "<b>x</b> & {{ 1 }}", "tokens": 3, "settings": {}}]
    (folder / "samples.json").write_text(json.dumps(samples))
    return read_run(folder)


def test_numbers_are_those_of_the_records_and_the_budget(tmp_path: Path) -> None:
    [found] = compare([made_up(tmp_path / "a", "A", 3, 20, 4.25)]).runs
    architecture = preset("yoco_u", "test", loops=3)
    assert (found.steps, found.tokens, found.loss, found.perplexity) == (20, 2560, 4.25, 77.125)
    assert found.parameters == parameters(architecture).total
    assert found.flops == 2560 * training_flops(architecture, 32) == pytest.approx(found.flops_per_token * 2560)
    assert found.kv_bytes == kv_bytes(architecture, 16384)
    assert found.tokens_per_second == 1010.5


@pytest.mark.parametrize(("looped", "word"), [(4.0, "lower"), (4.5, "higher"), (4.2, "same")])
def test_the_headline_says_what_came_out(tmp_path: Path, looped: float, word: str) -> None:
    runs = [made_up(tmp_path / "a", "Plain", 1, 20, 4.2), made_up(tmp_path / "b", "Looped", 3, 20, looped)]
    comparison = compare(runs)
    [gap] = comparison.gaps
    assert (gap.run, gap.other, gap.equal) == ("Looped", "Plain", "steps")
    assert gap.gap == pytest.approx(looped - 4.2)
    assert gap.flops_ratio == pytest.approx(comparison.runs[1].flops / comparison.runs[0].flops)
    assert comparison.headline.startswith("At equal steps")
    assert word in comparison.headline
    assert compare(runs[::-1]).gaps == comparison.gaps


@pytest.mark.parametrize("texts", list(product([None, "a", "b"], repeat=3)))
def test_only_losses_on_the_same_text_are_compared(tmp_path: Path, texts: tuple[str | None, ...]) -> None:
    """A run whose folder does not say its text is compared with all; the newest start counts."""
    runs = []
    for place, (text, resumed) in enumerate(zip(texts, [False, True, False], strict=True)):
        run = made_up(tmp_path / str(place), f"r{place}", 1, 20, 4 + place / 8)
        own = {} if text is None else {"validation": text}
        environment = {"torch": "2.x", "resumed": [{"step": 3} | own]} if resumed else own
        (run.folder / "environment.json").write_text(json.dumps(environment))
        runs.append(read_run(run.folder))
    comparison = compare(runs)
    pairs = [(a, b) for a, b in combinations(range(3), 2) if texts[a] == texts[b] or None in (texts[a], texts[b])]
    assert {frozenset((gap.run, gap.other)) for gap in comparison.gaps} == {frozenset((f"r{a}", f"r{b}")) for a, b in pairs}
    apart = {"a", "b"} <= set(texts)
    assert ("evaluated on different tokens" in comparison.headline) == apart
    assert "lowest loss" not in comparison.headline or not apart


TEACHER = {"teacher": "t", "architecture": preset("transformer", "test").model_dump()}


def test_the_flops_of_a_token_are_those_of_the_plan(tmp_path: Path) -> None:
    """Those of a teacher count, and those of loops by schedule, as in the run's records."""
    changed: dict[str, dict[str, Any]] = {
        "taught": {"distillation": TEACHER},
        "early": {"training": {"loop_schedule": [{"until": 0.5, "loops": 1}]}},
        "cut": {"training": {"backward_loops": 1}},
    }
    for name, settings in changed.items():
        run = made_up(tmp_path / name, name, 3, 20, 4.25, **settings)
        [found] = compare([run]).runs
        assert found.flops_per_token * 2560 == pytest.approx(run.config.training_flops())
        assert found.flops_per_token != pytest.approx(training_flops(run.config.architecture, 32), rel=0.01)


def test_of_many_runs_the_headline_says_the_lowest_loss(tmp_path: Path) -> None:
    runs = [made_up(tmp_path / f"{i}", f"r{i}", 1, 20, 4 + (i - 3) ** 2) for i in range(9)]
    few, many = compare(runs[:4]), compare(runs)
    assert few.headline.count("At equal") == len(few.gaps) == 6
    assert (len(many.gaps), many.headline.count("At equal")) == (36, 0)
    assert many.headline.startswith("The lowest loss is that of r3: 4.0000")
    assert many.headline.endswith(". 36 pairs of runs spent equal tokens or equal FLOPs.")


@pytest.mark.parametrize("settings", [{"distillation": TEACHER}, {"training": {"early_exit_weight": 0.5}}])
def test_only_losses_of_text_share_a_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]) -> None:
    plain, other = made_up(tmp_path / "a", "A", 3, 20, 4.5), made_up(tmp_path / "b", "B", 3, 20, 4.0, **settings)
    other = replace(other, records=[r | {"loss": 300.0} if r["kind"] == "train" else r for r in other.records])
    drawn: list[Axes] = []

    def svg(draw: Callable[[Axes], None]) -> str:
        drawn.append(Figure().subplots())
        draw(drawn[-1])
        return ""

    monkeypatch.setattr(plots, "svg", svg)
    for runs in ([plain, other], [other], [replace(other, records=other.kind("train"))]):
        plots.loss_plot(runs, "tokens", "tokens")
        shown = (y for line in drawn[-1].lines for y in np.asarray(line.get_ydata()))
        assert max((*drawn[-1].get_ylim(), *shown)) < 6
    assert "No lines for B:" in render([plain, other], compare([plain, other]), "x")
    assert "No lines" not in render([plain], compare([plain]), "x")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("loss", [0.0, 4.0, 1e200])
def test_plots_of_values_that_are_all_but_equal(tmp_path: Path, loss: float) -> None:
    run = made_up(tmp_path / "a", "A", 1, 2, None)
    records = [record | {"loss": loss, "gradient_norm": 0.0} for record in run.records]
    records[1]["loss"] = math.nextafter(loss, math.inf)
    run = replace(run, records=records)
    plots.loss_plot([run], "flops", "FLOPs")
    plots.step_plot([run], "gradient_norm", "norm", log=True)


def test_gaps_at_equal_flops_and_none_between_unequal_runs(tmp_path: Path) -> None:
    ratio = training_flops(preset("yoco_u", "test", loops=3), 32) / training_flops(preset("yoco_u", "test", loops=1), 32)
    runs = [
        made_up(tmp_path / "a", "Short", 1, 100, 4.2),
        made_up(tmp_path / "b", "Long", 1, round(100 * ratio), 4.0),
        made_up(tmp_path / "c", "Looped", 3, 100, 4.1),
    ]
    gaps = {gap.equal: gap for gap in compare(runs).gaps}
    assert set(gaps) == {"steps", "FLOPs"}
    assert (gaps["FLOPs"].run, gaps["FLOPs"].other) == ("Looped", "Long")
    assert gaps["FLOPs"].gap == pytest.approx(0.1)
    assert gaps["FLOPs"].tokens_ratio == pytest.approx(1 / ratio, rel=0.01)
    apart = compare(runs[:2])
    assert apart.gaps == []
    assert "No two runs" in apart.headline
    assert "Long" in apart.headline


def test_losses_are_compared_where_they_were_measured(tmp_path: Path) -> None:
    """Not where the runs are by now: one is evaluated at its step 1000, the other, at step 991, was at 900."""
    runs = [made_up(tmp_path / "a", "A", 1, 1000, 4.2), made_up(tmp_path / "b", "B", 3, 900, 4.3)]
    last = runs[1].kind("train")[-1]
    further = last | {"step": 991, "tokens": 991 * 128, "flops": last["flops"] / 900 * 991}
    runs[1] = replace(runs[1], records=[*runs[1].records, further])
    comparison = compare(runs)
    assert (comparison.runs[1].steps, comparison.runs[1].evaluated_steps) == (991, 900)
    assert comparison.gaps == []
    alone = compare(runs[1:])
    assert f"after {short_count(900 * 128)} tokens" in alone.headline


def test_runs_of_one_name_are_called_by_their_folders(tmp_path: Path) -> None:
    runs = [made_up(tmp_path / folder, "Same", 1, 20, loss) for folder, loss in (("a", 4.2), ("b", 4.1))]
    comparison = compare(runs)
    assert [run.name for run in comparison.runs] == [str(tmp_path / "a"), str(tmp_path / "b")]
    write_report(runs, comparison, tmp_path / "report.html")
    assert f"<h1>{tmp_path / 'a'}, {tmp_path / 'b'}</h1>" in (tmp_path / "report.html").read_text()


def test_unfinished_and_unscored_runs_are_named(tmp_path: Path) -> None:
    unscored = made_up(tmp_path / "a", "Young", 1, 5, None, planned=50)
    comparison = compare([unscored])
    assert comparison.headline == "Not finished yet: Young. No run has been evaluated yet."
    assert dict(comparison.table())["steps"] == ["5 of 50"]
    runs = [unscored, made_up(tmp_path / "b", "Old", 1, 20, 4.0)]
    write_report(runs, compare(runs), tmp_path / "report.html")


def test_a_run_without_a_training_step_is_refused(tmp_path: Path) -> None:
    evaluated = made_up(tmp_path / "a", "A", 1, 20, 4.0)
    run = replace(evaluated, records=evaluated.kind("evaluation"))
    with pytest.raises(UserError, match="a: the run has no training step yet"):
        compare([run])


class Page(HTMLParser):
    """Collects text, and every attribute from which a browser could load something."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.addresses += [
            found[key] or "" for key in ("src", "href", "srcset", "data", "xlink:href", "action") if key in found
        ]
        if tag not in ("meta", "path", "circle", "use", "rect", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("count", [1, 2, 7])
def test_the_page_is_complete_and_self_contained(tmp_path: Path, count: int) -> None:
    runs = [made_up(tmp_path / f"{i}", f"Run <{i}>", 1 + i % 3, 20, 4 + i / 8) for i in range(count)]
    comparison = compare(runs)
    write_report(runs, comparison, tmp_path / "deep" / "report.html", "A & B")
    source = (tmp_path / "deep" / "report.html").read_text()
    page = Page()
    page.feed(source)
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", source)
    assert all(address.startswith("#") for address in page.addresses)
    assert page.open == []
    for run, found in zip(runs, comparison.runs, strict=True):
        for shown in (run.config.name, f"{found.loss:.4f}", "77.12", "1.4321", short_count(found.parameters)):
            assert shown in page.text
    assert comparison.headline in page.text
    assert "<h1>A &amp; B</h1>" in source
    assert "def <b>x</b> & {{ 1 }}" in page.text
    assert page.text.count("sequence_length: 32") == count
    assert "16.0 GiB" in page.text
    ids = re.findall(r' id="([^"]+)"', source)
    assert len(ids) == len(set(ids))
    assert all(reference in ids for reference in re.findall(r'(?:url\(|href=")#([^)"]+)', source))


def test_plots_take_their_colours_from_the_page(tmp_path: Path) -> None:
    runs = [made_up(tmp_path / "a", "A", 1, 20, 4.0)]
    write_report(runs, compare(runs), tmp_path / "report.html")
    source = unescape((tmp_path / "report.html").read_text())
    plots = re.findall(r"<figure.*?</figure>", source, re.DOTALL)
    assert len(plots) == 5
    for plot in plots:
        assert "var(--run-0)" in plot
        assert "currentColor" in plot
        assert not any(colour in plot for pair in PALETTE for colour in pair)


def test_smoothing_keeps_a_constant_and_follows_a_step() -> None:
    assert smoothed([2.0] * 200) == pytest.approx([2.0] * 200)
    assert smoothed([1.0, 3.0]) == [1.0, 3.0]
    step = smoothed([0.0] * 100 + [1.0] * 400)
    assert step[99] == 0
    assert 0 < step[101] < 1
    assert step[-1] == pytest.approx(1, abs=1e-6)
    assert step == sorted(step)


def test_short_forms() -> None:
    assert [short_count(n) for n in (5, 1234, 1_234_567, 999_800_000, 3.2e12)] == ["5", "1.23K", "1.23M", "1000M", "3.2T"]
    assert [short_bytes(n) for n in (512, 2048, 62 * 2**20, 3 * 2**30)] == ["512 B", "2.0 KiB", "62.0 MiB", "3.0 GiB"]
    assert [duration(s) for s in (1.44, 83, 3723)] == ["1.4 s", "1 min 23 s", "1 h 02 min"]
    assert scientific(123456789) == "1.23e8"
