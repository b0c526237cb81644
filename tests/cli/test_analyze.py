"""`yoco-u analyze` end to end, and what users get wrong."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from yoco_u.checksums import SUMS
from yoco_u.cli import main

MEASURES = ("angular", "lens", "loss", "convergence", "attention", "drafts")
PNGS = {"angular-distance", "logit-lens", "loss-against-loops", "loops-to-convergence", "attention-span", "drafts-accepted"}


def told(folder: Path) -> Any:
    return json.loads((folder / "analysis.json").read_text())


def test_a_run_is_looked_into(run: Any, workspace: Path, tmp_path: Path) -> None:
    out = tmp_path / "analysis"
    outcome = run("analyze", workspace / "a", "--out", out, "--tokens", 10**6, "--queries", 8)
    assert outcome.status == 0
    assert {path.name for path in out.glob("[!.]*")} == {
        "analysis.json",
        "analysis.html",
        *(f"{name}.png" for name in PNGS),
    }
    for path in out.glob("[!.]*"):
        assert str(path) in outcome.out
        assert path.stat().st_size > 1000
    data = told(out)
    assert data["about"]["text"] == "validation split"
    assert data["about"]["left_out"] == {"exits": "tiny has no exits.json; run yoco-u exits first, or give --exit-threshold"}
    [found] = data["studies"]
    assert (found["name"], found["trained_loops"], found["num_loops"]) == ("tiny", 2, 2)
    assert [(layer["attention"], layer["loop"], layer["layer"]) for layer in found["unrolled"]] == [
        ("sliding", 1, 1), ("sliding", 1, 2), ("sliding", 2, 1), ("sliding", 2, 2), ("cross", 1, 1), ("cross", 1, 2),
    ]  # fmt: skip
    assert all(found[measure] for measure in MEASURES)
    assert sum(found["convergence"]["all"]["prediction"]) == pytest.approx(1)
    assert sum(group["tokens"] for group in found["convergence"]["classes"]) == data["about"]["tokens"]

    counts = [option for loops in range(1, 7) for option in ("--num-loops", loops)]
    scores = run("evaluate", workspace / "a", *counts, "--json").json["results"]
    assert data["about"]["tokens"] == scores[0]["tokens"]
    for row, score in zip(found["loss"], scores, strict=True):
        assert row["loops"] == score["num_loops"]
        assert row["loss"] == pytest.approx(score["loss"], rel=1e-6)
    assert found["lens"]["loops"][0]["rest"]["loss"] == pytest.approx(scores[0]["loss"], rel=1e-6)


def test_files_equal_evaluate_too(run: Any, workspace: Path, tmp_path: Path) -> None:
    text = (workspace / "corpus" / "03.py", "--sequence-length", 20)
    assert run("analyze", workspace / "a" / "model", *text, "--measures", "loss", "--out", tmp_path).status == 0
    [score] = run("evaluate", workspace / "a" / "model", *text, "--num-loops", 4, "--json").json["results"]
    data = told(tmp_path)
    assert data["about"]["tokens"] == score["tokens"]
    assert data["studies"][0]["loss"][3]["loss"] == pytest.approx(score["loss"], rel=1e-6)
    assert {path.name for path in tmp_path.glob("[!.]*")} == {
        "analysis.json",
        "analysis.html",
        "loss-against-loops.png",
    }


@pytest.mark.usefixtures("undrawn")
def test_a_run_without_loops_says_what_is_left_out(run: Any, workspace: Path) -> None:
    outcome = run("analyze", workspace / "b", "--tokens", 64)
    assert outcome.status == 0
    no_loop = dict.fromkeys(("lens", "convergence", "drafts"), "twin runs no loop")
    for measure, reason in {**no_loop, "loss": "twin has no loop", "exits": "the model runs one loop"}.items():
        assert f"left out: {measure}, as {reason}" in outcome.out
    data = told(workspace / "b" / "analysis")
    assert set(data["about"]["left_out"]) == {"lens", "loss", "convergence", "exits", "drafts"}
    [found] = data["studies"]
    assert {measure for measure in MEASURES if found[measure]} == {"angular", "attention"}
    again = run("analyze", workspace / "b", "--tokens", 64, "--num-loops", 3, "--measures", "loss,lens")
    assert again.status == 0
    [found] = told(workspace / "b" / "analysis")["studies"]
    assert [row["loops"] for row in found["loss"]] == [1, 2, 3, 4]
    assert (found["num_loops"], len(found["lens"]["loops"])) == (3, 3)


def test_runs_in_one_picture(run: Any, workspace: Path, tmp_path: Path) -> None:
    options = ("--compare", workspace / "b", "--compare", workspace / "a", "--tokens", 64, "--out", tmp_path)
    assert run("analyze", workspace / "a", *options, "--measures", "angular,lens,loss").status == 0
    studies = told(tmp_path)["studies"]
    assert [found["name"] for found in studies] == [str(workspace / name) for name in ("a", "b", "a")]
    assert [len(found["loss"]) for found in studies] == [6, 1, 6]
    assert studies[0]["loss"] == studies[2]["loss"]
    assert studies[1]["lens"] is None


@pytest.mark.usefixtures("undrawn")
def test_where_tokens_exit(run: Any, workspace: Path, tmp_path: Path) -> None:
    """By the model's exits.json, by its heads at another threshold, and by angular distances without the file."""
    folder, options = tmp_path / "a", ("--tokens", 320, "--measures", "exits", "--out", tmp_path / "out")
    shutil.copytree(workspace / "a", folder)
    found = []
    assert run("analyze", folder, *options, "--exit-threshold", 0.4).status == 0
    found.append(told(tmp_path / "out")["studies"][0]["exits"])
    fitted = run("exits", folder, "--tokens", 640, "--json").json["chosen"]
    for threshold in ((), ("--exit-threshold", 0)):
        assert "Loops run, by place" in run("analyze", folder, *options, *threshold).out
        found.append(told(tmp_path / "out")["studies"][0]["exits"])
    assert [(one["score"], one["threshold"]) for one in found] == [
        ("angular", 0.4), (fitted["score"], fitted["threshold"]), (fitted["score"], 0),
    ]  # fmt: skip
    assert found[2]["all"]["shares"] == [0, 1] and found[2]["all"]["mean"] == 2
    [score] = run("evaluate", folder, "--num-loops", 2, "--json").json["results"]
    every = run("analyze", folder, *options, "--tokens", 10**6, "--exit-threshold", 0)
    assert every.status == 0
    assert told(tmp_path / "out")["studies"][0]["exits"]["all"]["loss"] == pytest.approx(score["loss"], abs=1e-5)
    shown = "".join(one["text"] for one in told(tmp_path / "out")["studies"][0]["shown"])
    assert "return x *" in shown and "täglich" in shown


@pytest.mark.usefixtures("undrawn")
def test_a_damaged_exits_file_leaves_out_its_measure_alone(run: Any, workspace: Path, tmp_path: Path) -> None:
    folder, options = tmp_path / "a", ("--tokens", 64, "--out", tmp_path / "out")
    shutil.copytree(workspace / "a", folder)
    (folder / "model" / "exits.json").write_text("{")
    assert run("analyze", folder, *options, "--measures", "angular").status == 0
    refused = run("analyze", folder, *options, "--measures", "angular,exits")
    assert refused.status == 2 and "--measures exits: " in refused.error and "exits.json" in refused.error
    assert run("analyze", folder, *options).status == 0
    [(measure, reason)] = told(tmp_path / "out")["about"]["left_out"].items()
    assert measure == "exits" and "exits.json" in reason and "fit it anew" in reason


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--measures", "angular,len"), "--measures has 'len'; expected some of angular,lens"),
        (("--num-loops", 0), "--num-loops is 0"),
        (("--tolerance", 0), "--tolerance is 0"),
        (("--exit-threshold", -1), "--exit-threshold"),
        (
            ("--measures", "exits"),
            "--measures exits: tiny has no exits.json; run yoco-u exits first, or give --exit-threshold; leave",
        ),
        (("--tokens", 0), "--tokens"),
        (("--queries", 0), "--queries"),
        (("--sequence-length", 0), "--sequence-length"),
        (("--sequence-length", 10**6), "one row of sequence_length"),
        (("--device", "abacus"), "abacus"),
        (("--compare", "none"), "no such folder"),
        (("none.txt",), "none.txt"),
    ],
)
def test_mistakes(run: Any, workspace: Path, tmp_path: Path, options: tuple[object, ...], part: str) -> None:
    assert part in run("analyze", workspace / "a", *options, "--out", tmp_path / "out").error
    assert not (tmp_path / "out").exists()


def test_measures_that_a_model_does_not_have(run: Any, workspace: Path, tmp_path: Path) -> None:
    error = run("analyze", workspace / "b", "--measures", "angular,lens", "--out", tmp_path / "out").error
    assert error == "--measures lens: twin runs no loop, and this measure follows one looped stage; leave it out"
    assert "once" not in error
    assert "has no loop; leave it out" in run("analyze", workspace / "b", "--measures", "loss").error
    assert not (tmp_path / "out").exists()


def test_nothing_to_look_at(run: Any, workspace: Path, tmp_path: Path) -> None:
    assert "no such folder" in run("analyze", tmp_path / "none").error
    assert "a saved model has no validation split" in run("analyze", workspace / "a" / "model").error
    (tmp_path / "empty.txt").write_text("")
    assert "no text in the files" in run("analyze", workspace / "a", tmp_path / "empty.txt").error
    (tmp_path / "file").write_text("")
    assert "is a file" in run("analyze", workspace / "a", "--out", tmp_path / "file").error


def test_models_of_other_tokens(run: Any, workspace: Path, tmp_path: Path) -> None:
    settings = ["data.vocab_size=270", "data.validation_fraction=0.3"]
    assert main(["prepare", "--corpus", f"{workspace}/corpus", "--out", f"{tmp_path}/data", *settings, "--json"]) == 0
    shutil.copytree(workspace / "a" / "model", tmp_path / "other")
    for file in (tmp_path / "data" / "tokenizer").iterdir():
        shutil.copy(file, tmp_path / "other")
    (tmp_path / "other" / SUMS).unlink()
    error = run("analyze", workspace / "a", "--compare", tmp_path / "other").error
    assert "its tokenizer is not that of" in error
