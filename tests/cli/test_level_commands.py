"""Generated tasks by the commands: prepared, trained on, and scored level by level."""

import json
from pathlib import Path
from typing import Any

import pytest

from yoco_u.cli import main

CONFIG = """\
name: words
architecture: {{preset: yoco_u, size: test, vocab_size: 257, loops: 2}}
dataset: {folder}/data
data: {{corpus: "synthetic:s5:levels=2-3:documents=40:length=48", validation_fraction: 0.2}}
optimizer: {{warmup_steps: 1}}
training: {{steps: 2, sequence_length: 48, batch_rows: 4, micro_batch_rows: 4, dtype: float32, compile: "off"}}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words")
    (folder / "config.yaml").write_text(CONFIG.format(folder=folder), encoding="utf-8")
    assert main(["train", f"{folder}/config.yaml", "--out", f"{folder}/run", "--json"]) == 0
    return folder / "run"


def test_prepare(run: Any, tmp_path: Path) -> None:
    outcome = run("prepare", "--corpus", "synthetic:p-hop:documents=50", "--out", tmp_path / "data", "--json")
    assert (outcome.json["vocab_size"], outcome.json["eot_id"]) == (257, 0)
    assert sum(split["shards"][0]["documents"] for split in outcome.json["splits"].values()) == 50
    assert "levels 1-99" in run("prepare", "--corpus", "synthetic:p-hop:levels=1-99", "--out", tmp_path / "b", "--json").error


def test_evaluate(run: Any, trained: Path) -> None:
    tasks = ["synthetic:s5:levels=2-4:length=48", "synthetic:addition:levels=2"]
    outcome = run("evaluate", trained, *tasks, "--num-loops", 1, "--num-loops", 3, "--answers", 20)
    assert (outcome.status, outcome.err) == (0, "")
    rows = [line.split() for line in outcome.out.splitlines() if line.split()[:1] in (["s5"], ["addition"])]
    assert [row[:3] for row in rows] == [
        [task, loops, level] for loops in "13" for task, level in (("s5", "2"), ("s5", "3"), ("s5", "4"), ("addition", "2"))
    ]
    found = run("evaluate", trained, *tasks, "--answers", 20, "--json").json
    assert found["tasks"] == tasks
    [result] = found["results"]
    assert result["num_loops"] == 2
    assert [score["level"] for score in result["levels"]] == [2, 3, 4, 2]
    assert all(score["low"] <= score["accuracy"] <= score["high"] for score in result["levels"])
    [split] = run("evaluate", trained, "--json").json["results"]  # the validation split: answers alone
    summary = json.loads((trained / "summary.json").read_text())
    assert split["loss"] == pytest.approx(summary["validation"]["loss"], abs=1e-5)
    assert split["bits_per_byte"] == pytest.approx(summary["validation"]["bits_per_byte"], abs=1e-5)
    assert run("context", trained, "--prefixes", "8,16", "--last", 8, "--texts", 1).status == 0


def test_exits_of_a_task(run: Any, trained: Path) -> None:
    """The losses are those of the answers: of the run's own split, and of the instances for tests of a task."""
    outcome = run("exits", trained, "--json")
    assert {one["accuracy"] is None for one in outcome.json["results"]} == {False}
    task = "synthetic:s5:levels=3:length=60"  # rows are its documents, and not of 48 tokens as in the run
    found = run("exits", trained, task, "--tokens", 60 * 12, "--json").json
    assert found["tokens"] == 60 * 6
    assert [one["accuracy"] for one in found["results"][:2]] == pytest.approx([0, 0], abs=0.2)
    assert "right" in run("exits", trained, task, "--tokens", 60 * 4).out
    assert run("analyze", trained, task, "--tokens", 120, "--measures", "loss", "--out", trained.parent / "study").status == 0


def test_mistakes(run: Any, trained: Path, workspace: Path) -> None:
    assert "did you mean p-hop" in run("evaluate", trained, "synthetic:phop").error
    assert "a task and a.txt a text" in run("evaluate", trained, "a.txt", "synthetic:s5").error
    assert (
        "--weights has no effect here: it is for texts" in run("evaluate", trained, "synthetic:s5", "--weights", "int8").error
    )
    assert "--answers is for synthetic tasks" in run("evaluate", trained, "--answers", 3).error
    assert "tokens are not bytes" in run("evaluate", workspace / "a", "synthetic:word-problems:levels=2").error
    for command in ("exits", "analyze"):
        for files in (("a.txt", "synthetic:s5"), ("synthetic:s5", "a.txt")):
            assert "synthetic:s5 is a generated task, and a.txt comes with it" in run(command, trained, *files).error
        assert "comes with it; give a task by itself" in run(command, trained, "synthetic:s5", "synthetic:s3").error
        odd = run(command, trained, "synthetic:s5:length=60", "--sequence-length", 100).error
        assert "rows of 100 tokens would part answers from their questions; give --sequence-length 60, or a multiple" in odd
        assert "tokens are not bytes" in run(command, workspace / "a", "synthetic:s5:levels=2").error
