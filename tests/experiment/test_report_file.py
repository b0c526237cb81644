"""A report.json that somebody has edited is refused, with the place, before anything is made of it."""

import copy
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yoco_u.errors import UserError
from yoco_u.experiment.config import Experiment
from yoco_u.experiment.kept import finished_elsewhere, judge_again

RESULTS = Path(__file__).parents[2] / "recipes" / "results"
PLAIN, SIZES = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("long-half-rate", "sizes"))
DONE = next(number for number, cell in enumerate(PLAIN["cells"]) if cell["state"] == "finished")


def read(report: Any) -> Any:
    """The runs that `--kept` takes from such a file."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kept.json"
        path.write_text(report if isinstance(report, str) else json.dumps(report))
        grid = Experiment.model_validate((SIZES if "gaps" in report else PLAIN)["experiment"])
        return finished_elsewhere(path, grid, Path(folder) / "grid")


def cell(report: Any) -> Any:
    return report["cells"][DONE]


def with_curve(change: Callable[[list[Any]], list[Any]]) -> Callable[[Any], None]:
    def edit(report: Any) -> None:
        cell(report)["curve"] = change(cell(report)["curve"])

    return edit


def with_cell(**values: Any) -> Callable[[Any], None]:
    return lambda report: cell(report).update(values)


def with_losses(value: Any) -> Callable[[Any], None]:
    return lambda report: report["series"][0].update(loss_by_seed=dict.fromkeys(report["series"][0]["loss_by_seed"], value))


def with_experiment(**values: Any) -> Callable[[Any], None]:
    return lambda report: report["experiment"].update(values)


EDITS: dict[str, tuple[Callable[[Any], None], str]] = {
    "no curve": (with_curve(lambda curve: []), "curve: it is finished, but the evaluation after all"),
    "zeros": (with_curve(lambda curve: [[0, 0, 0]]), "curve.0.0: "),
    "too many tokens": (with_curve(lambda curve: [[10**30, 1.0, 5.0]]), "curve.0.0: "),
    "half a curve": (
        with_curve(lambda curve: curve[: len(curve) // 2]),
        "after all 16,384,000 tokens is missing",
    ),
    "reversed": (with_curve(lambda curve: curve[::-1]), "curve: the tokens or FLOPs do not rise behind"),
    "a point twice": (with_curve(lambda curve: [*curve, curve[-1]]), "do not rise"),
    "falling FLOPs": (with_curve(lambda curve: [curve[0], [curve[1][0], 1.0, 3.0], *curve[2:]]), "do not rise"),
    "between steps": (with_curve(lambda curve: [[curve[0][0] + 1, *curve[0][1:]], *curve[1:]]), "curve: 512,001 tokens"),
    "beyond the end": (with_curve(lambda curve: [*curve, [2 * curve[-1][0], 2 * curve[-1][1], 1.0]]), "in all"),
    "negative tokens": (with_curve(lambda curve: [[-1, 1.0, 1.0], *curve]), "curve.0.0: "),
    "negative FLOPs": (with_curve(lambda curve: [[1, -1.0, 1.0], *curve]), "curve.0.1: "),
    "a negative loss": (with_curve(lambda curve: [[*curve[0][:2], -1.0], *curve[1:]]), "curve.0.2: "),
    "true": (with_curve(lambda curve: [[True, 1.0, 1.0], *curve]), "curve.0.0: "),
    "text": (with_curve(lambda curve: [["512000", 1.0, 1.0], *curve]), "curve.0.0: "),
    "another last loss": (
        with_curve(lambda curve: [*curve[:-1], [*curve[-1][:2], 1.0]]),
        "the last loss of its curve is 1",
    ),
    "another kept loss": (with_losses(1.0), "but that in loss_by_seed is 1"),
    "an infinite loss": (with_losses("inf"), "loss_by_seed.0: "),
    "a loss in words": (with_losses("3.5"), "loss_by_seed.0: "),
    "no losses": (lambda report: report["series"][0].update(loss_by_seed={}), "loss_by_seed has no loss of it"),
    "losses of no seed": (
        lambda report: report["series"][0]["loss_by_seed"].update({"9": 1.0}),
        "has seed 9, which is none",
    ),
    "negative seconds": (with_cell(seconds=-1), "seconds: "),
    "no digest": (with_cell(dataset="x"), "dataset: "),
    "another seed": (with_cell(seed=1), "series and seed are"),
    "another series": (with_cell(series="x"), "series and seed are"),
    "another state": (with_cell(state="unfinished"), "loss_by_seed has a loss of it, but it is unfinished"),
    "an unknown state": (with_cell(state="done"), "state: "),
    "loops of nobody": (with_cell(loss_at_loops={"-1": 3.0}), "loss_at_loops"),
    "a negative loss at loops": (with_cell(loss_at_loops={"2": -3.0}), "loss_at_loops.2: "),
    "a measure": (with_cell(measures={"angular": [1, 2]}), "measures.angular: "),
    "an unknown measure": (with_cell(measures={"taste": 1}), "measures.taste: "),
    "halves of scores": (with_cell(measures={"tasks": [{"task": "p-hop"}]}), "measures.tasks.0."),
    "a cell twice": (lambda report: report["cells"].__setitem__(0, report["cells"][1]), "is there twice"),
    "one more cell": (lambda report: report["cells"].append(report["cells"][1]), "cells: it lists 9 runs, but its grid has 8"),
    "an unknown cell": (with_cell(cell="x"), "cells: x is none of its grid"),
    "a series twice": (lambda report: report["series"].append(report["series"][0]), "series: .* is there twice"),
    "an unknown series": (lambda report: report["series"][0].update(series="x"), "series: x is none of its grid"),
    "many seeds": (with_experiment(seeds=list(range(100_000))), "cells: it lists 8 runs, but its grid has "),
    "many values": (with_experiment(vary={f"optimizer.{n}": list(range(9)) for n in range(99)}), "cells: it lists 8 runs"),
    "sizes": (with_experiment(sizes={"small": {}}), "sizes: is missing"),
    "no settings": (with_experiment(base={}), "curve: "),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_report_is_refused_with_the_place(edit: str) -> None:
    report = copy.deepcopy(PLAIN)
    change, message = EDITS[edit]
    change(report)
    begun = time.process_time()
    with pytest.raises(UserError, match=rf"kept\.json: [^\n]*{message}[^\n]*$"):
        read(report)
    assert time.process_time() - begun < 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda report: report.update(sizes={}), "sizes: "),
        (lambda report: report["sizes"].update(giant=report["sizes"]["small"]), "sizes.giant: is no size of its grid"),
        (lambda report: report["sizes"].update(small=3), "sizes.small: "),
        (lambda report: report["sizes"]["small"]["cells"].pop(), r"cells: it lists \d+ runs, but its grid has \d+"),
        (lambda report: report["sizes"]["small"]["cells"][0].update(dataset="0" * 64), "cells: .* on 2 datasets"),
    ],
)
def test_so_is_one_of_several_sizes(change: Callable[[Any], None], message: str) -> None:
    report = copy.deepcopy(SIZES)
    name = next(iter(report["sizes"]))
    report = json.loads(json.dumps(report).replace(f'"{name}"', '"small"').replace(f'"{name}/', '"small/'))
    change(report)
    with pytest.raises(UserError, match=rf"report: {message}"):
        judge_again(report)


HUGE = ["1e999", "-1e999", "1e400", "9" * 400 + ".0", "NaN", "Infinity", "-Infinity", "1" + "0" * 400]


@pytest.mark.parametrize("number", HUGE)
def test_numbers_that_no_float_holds_are_refused(number: str) -> None:
    loss = json.dumps(cell(PLAIN)["curve"][0][2])
    for old, new in ((loss, number), ('"seconds": ', f'"seconds": {number}, "a": ')):
        with pytest.raises(UserError, match=r"kept\.json: "):
            read(json.dumps(PLAIN).replace(old, new, 1))


@pytest.mark.parametrize("text", ["[]", "3", "{}", '{"experiment": 3}', '{"experiment": {}, "sizes": {}}', "", "{"])
def test_what_is_no_report_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"kept\.json: "):
        read(text)


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    for key, one in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        yield from places(one, (*path, key))


READ = [place for key in ("cells", "series") for place in places(PLAIN[key], (key,))]
ODD = st.sampled_from([None, True, -1, 0, 0.5, 2, 10**30, 1e308, "", "x", "inf", [], {}, [[]], [1, 2], {"a": 1}, {"0": 1.0}])


@settings(max_examples=150, deadline=None)
@given(place=st.sampled_from(READ), value=ODD)
def test_whatever_is_there_instead(place: tuple[Any, ...], value: Any) -> None:
    """One line, or the finished runs of the file, whose losses are those of the file that was whole or of the edit."""
    report = copy.deepcopy(PLAIN)
    inner = report
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    try:
        found = read(report)
    except UserError as error:
        assert str(error).count("kept.json: ") == 1 and "\n" not in str(error)
    else:
        assert found.keys() <= {one["cell"] for one in PLAIN["cells"] if one["state"] == "finished"}
        whole = read(PLAIN)
        assert all(result.final.loss == whole[name].final.loss for name, result in found.items())
        judge_again(report)
