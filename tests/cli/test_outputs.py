"""Commands overwrite nothing that is not theirs, and say so before they compute anything; a full disk is one line."""

import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from yaml import safe_dump

from yoco_u.evaluation.needle_grid import NeedleSettings
from yoco_u.experiment.config import Measures, Samples
from yoco_u.experiment.measure import measure, write_samples
from yoco_u.experiment.run import is_finished
from yoco_u.inference import SamplingParams


def in_place(path: Path) -> None:
    path.mkdir()
    (path / "thesis.txt").write_text("years of work")


def parts_of_a_run(path: Path) -> None:
    for name in ("tokenizer", "model", "checkpoints/step-00000009", "analysis"):
        (path / name).mkdir(parents=True)
        (path / name / "mine").write_text("years of work")
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "dataset.json", "experiment.yaml", "report.html"):
        (path / name).write_text("name: years of work")


USERS: dict[str, Callable[[Path], object]] = {
    "folder": in_place,
    "folder with names of ours": parts_of_a_run,
    "file": lambda path: path.write_text("years of work"),
    "file in the place of its folder": lambda path: path.parent.rmdir() or path.parent.write_text("years of work"),
    "pipe": os.mkfifo,
    "partial file": lambda path: path.with_name(f"{path.name}.partial").write_text("years of work"),
}

COMMANDS = {
    "train": ("train", "{workspace}/config.yaml", "--out", "{out}", "--json"),
    "train, data too": ("train", "{workspace}/config.yaml", "dataset={out}", "--out", "{fresh}", "--json"),
    "prepare": ("prepare", "--corpus", "{workspace}/corpus", "--out", "{out}", "data.validation_fraction=0.3", "--json"),
    "convert": ("convert", "{workspace}/a", "--kv", "mean", "--out", "{out}"),
    "convert, GGUF": ("convert", "{workspace}/a", "--gguf", "--out", "{out}"),
    "grpo": ("grpo", "{workspace}/a", "{workspace}/problems.jsonl", "problems=1", "--out", "{out}"),
    "report": ("report", "{workspace}/a", "--out", "{out}"),
    "analyze": ("analyze", "{workspace}/a", "--out", "{out}"),
    "experiment": ("experiment", "{workspace}/grid.yaml", "--out", "{out}"),
    "experiment in processes": ("experiment", "{workspace}/grid.yaml", "--out", "{out}", "--jobs", 2),
    "quickstart": ("quickstart", "--out", "{out}", "--config", "{workspace}/grid.yaml"),
    "plan": ("plan", "{workspace}/a", "--json", "{out}"),
    "plan, picture": ("plan", "{workspace}/a", "--plot", "{out}"),
    "needles": ("needles", "{workspace}/a", "--json", "{out}"),
    "needles, picture": ("needles", "{workspace}/a", "--plot", "{out}"),
    "sft": ("sft", "{workspace}/a", "{workspace}/chats.jsonl", "--out", "{out}"),
    "exits": ("exits", "{workspace}/a", "--plot", "{out}"),
    "context, JSON": ("context", "{workspace}/a", "--json", "{out}"),
    "context": ("context", "{workspace}/a", "--plot", "{out}"),
    "bench": ("bench", "--quick", "--json", "{out}"),
    "bench, picture": ("bench", "--quick", "--plot", "{out}"),
}


@pytest.fixture(scope="module")
def grid(workspace: Path) -> Path:
    settings = {"preset": "yoco_u", "size": "test", "vocab_size": 300}
    base = {
        "data": {"corpus": "stdlib", "vocab_size": 300},
        "architecture": settings,
        "training": {"steps": 1, "sequence_length": 32, "batch_rows": 4, "micro_batch_rows": 4},
        "optimizer": {"warmup_steps": 0},
    }
    (workspace / "problems.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    (workspace / "grid.yaml").write_text(safe_dump({"title": "t", "base": base, "models": {"a": {}, "b": {}}}))
    return workspace


def tree(folder: Path) -> dict[str, str]:
    return {str(path): path.read_text("latin-1") if path.is_file() else "" for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("command", COMMANDS)
def test_what_a_user_put_there_is_refused(run: Any, grid: Path, tmp_path: Path, command: str, user: str) -> None:
    if user == "partial file" and command.startswith(("train", "grpo", "sft", "analyze", "experiment", "quickstart")):
        pytest.skip("what is written lies in the folder, not beside it")
    out = tmp_path / "place" / "out"
    out.parent.mkdir()
    USERS[user](out)
    before = tree(out.parent)
    arguments = [str(part).format(workspace=grid, out=out, fresh=tmp_path / "fresh") for part in COMMANDS[command]]
    assert str(out.parent) in run(*arguments).error
    assert tree(out.parent) == before


def test_a_result_is_written_again_but_no_input_and_no_file_of_a_run(run: Any, workspace: Path, tmp_path: Path) -> None:
    for _ in range(2):
        assert run("plan", workspace / "a", "--json", tmp_path / "a.json").status == 0
        assert run("report", workspace / "a", "--out", tmp_path / "a.html").status == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "a.json"]
    before = tree(workspace)
    for name in ("summary.json", "config.yaml", "metrics.jsonl", "model/config.json", "model", "."):
        assert str(workspace / "a" / name) in run("report", workspace / "a", "--out", workspace / "a" / name).error
    assert "was not made by yoco-u" in run("plan", workspace / "a", "--json", workspace / "a" / "config.yaml").error
    assert "is the file of --json too" in run("plan", workspace / "a", "--json", tmp_path / "x", "--plot", tmp_path / "x").error
    assert tree(workspace) == before


def test_a_run_of_an_earlier_version_goes_on(run: Any, workspace: Path, tmp_path: Path) -> None:
    """Its folders bear no marks; a killed process left parts of it."""
    old = tmp_path / "old"
    shutil.copytree(workspace / "a", old)
    for mark in [*old.rglob(".yoco-u-*")]:
        mark.unlink()
    (old / "summary.json").unlink()
    shutil.copytree(old / "model", old / "model.partial")
    (old / "checkpoints" / "step-00000009.partial").mkdir()
    (old / "checkpoints" / "step-00000009.partial" / "shard").touch()
    assert run("train", workspace / "config.yaml", "--out", old, "--json").json["steps"] == 5
    assert not list(old.rglob("*.partial"))


@pytest.mark.parametrize("limit", [1_000, 120_000])
def test_what_grows_too_large_is_one_line_and_the_run_goes_on(run: Any, workspace: Path, tmp_path: Path, limit: int) -> None:
    """As a full disk does, a limit of the size of files meets also what libraries write in C++ and Rust."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    command = ("train", workspace / "config.yaml", "--out", tmp_path / "run", "--json")
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        error = run(*command).error
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.startswith(str(tmp_path / "run")) and error.endswith("then run the same command again")
    assert run(*command).status == 0
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (tmp_path / "run", workspace / "a")]
    assert weights[0] == weights[1]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda whole: b"",
    "cut": lambda whole: whole[: len(whole) // 2],
    "zeros": lambda whole: bytes(len(whole)),
    "not UTF-8": lambda whole: b"\xff" + whole,
    "nested": lambda whole: b"[" * 100_000,
    "another shape": lambda whole: b"[1]\n",
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["environment.json", "samples.json", "metrics.jsonl", "summary.json"])
def test_a_damaged_file_of_a_run_is_named(run: Any, workspace: Path, tmp_path: Path, name: str, damage: str) -> None:
    folder = tmp_path / "run"
    shutil.copytree(workspace / "a", folder, ignore=shutil.ignore_patterns("checkpoints", "model"))
    (folder / "samples.json").write_text('[{"prompt": "a", "text": "b"}]')
    if name == "metrics.jsonl":  # of a run that is not finished
        (folder / "summary.json").unlink()
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(DAMAGE[damage](whole))
    if name == "summary.json":
        outcome = run("train", workspace / "config.yaml", "--out", folder, "--json")
    else:
        outcome = run("report", folder)
    if name == "metrics.jsonl" and damage == "cut":  # as that of a run which goes on
        assert outcome.status == 0
    elif name == "metrics.jsonl" and damage in ("nested", "zeros", "empty"):  # not a line of it is whole
        assert "no metrics yet" in outcome.error
    else:
        assert name in outcome.error


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_that_can_be_made_anew_is(run: Any, workspace: Path, tmp_path: Path, damage: str) -> None:
    """The checkpoints are whole, so that the run goes on; what is made is what was there, but for times."""
    folder = tmp_path / "run"
    shutil.copytree(workspace / "a", folder)
    before = {name: json.loads((folder / name).read_text()) for name in ("summary.json", "environment.json")}
    weights = (folder / "model" / "model.safetensors").read_bytes()
    for name in before:
        (folder / name).write_bytes(DAMAGE[damage]((folder / name).read_bytes()))
    assert not is_finished(folder)
    outcome = run("train", workspace / "config.yaml", "--out", folder)
    assert outcome.status == 0 and is_finished(folder)
    told = " ".join(outcome.err.split())
    for name, old in before.items():
        assert told.count(f"{folder / name}: ") == 1
        new = json.loads((folder / name).read_text())
        assert new.keys() == old.keys()
        assert all(new[key] == old[key] for key in ("name", "steps", "validation", "world_size", "resumed") if key in old)
    assert told.count("it is made anew") == 2 and "no checkpoint is left" not in told
    assert (folder / "model" / "model.safetensors").read_bytes() == weights
    assert run("train", workspace / "config.yaml", "--out", folder).err.count("\n") == 1


@pytest.mark.parametrize("damage", ["empty", "another shape"])
def test_damaged_texts_and_measures_are_made_anew(workspace: Path, tmp_path: Path, damage: str) -> None:
    (folder := tmp_path / "run").mkdir()
    for name in ("model", "tokenizer"):
        (folder / name).symlink_to(workspace / "a" / name)
    samples = Samples(prompts=("one",), sampling=SamplingParams(temperature=1, seed=0, n=2, max_tokens=2))
    measures = Measures(needles=NeedleSettings(kinds=("single_1",), lengths=(700,), depths=1, samples=1))
    makers = {"samples.json": lambda say: write_samples(folder, samples, say)}
    makers["measures.json"] = lambda say: measure(folder, measures, say)
    shutil.copy(workspace / "a" / "config.yaml", folder)
    for name, make in makers.items():
        said: list[str] = []
        make(said.append)
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(DAMAGE[damage](whole))
        make(said.append)
        assert [line.startswith(f"{folder / name}: ") and line.endswith("it is made anew") for line in said] == [True]
        assert (folder / name).read_bytes() == whole
        written = (folder / name).stat().st_mtime_ns
        make(said.append)
        assert (folder / name).stat().st_mtime_ns == written


@pytest.mark.parametrize("lost", [range(0), range(1, 4), range(5), range(2, 3), range(4, 5)])
def test_lost_metrics_are_told_and_the_run_is_finished(run: Any, workspace: Path, tmp_path: Path, lost: range) -> None:
    """Lines are lost; those that stay are still there when the run is done."""
    folder = tmp_path / "run"
    shutil.copytree(workspace / "a", folder)
    (folder / "summary.json").unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    steps = [step for step in range(1, 6) if step - 1 not in lost]
    kept = [line for line in lines if any(f'"step": {step},' in line for step in steps)]
    (folder / "metrics.jsonl").write_text("".join(kept[:1]) + "garbage\n" + "".join(kept[1:]))
    assert "line" in run("report", folder).error
    outcome = run("train", workspace / "config.yaml", "--out", folder)
    assert outcome.status == 0
    assert ("was damaged or lost" in outcome.err) == bool(lost)
    assert "garbage" in (folder / "metrics.damaged.jsonl").read_text()
    after = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert after[: len(kept)] == kept
    assert sum('"kind": "evaluation", "step": 5,' in line for line in after) == 1


@pytest.mark.parametrize("until", [0, 1, 0.2, 0.5, 0.9, "last evaluation", "last step", "last byte"])
def test_cut_metrics_of_a_finished_run_are_not_reported(
    run: Any, workspace: Path, tmp_path: Path, until: float | str, undrawn: None
) -> None:
    """Wherever they are cut: copied back, or finished again without the steps that are lost, they are."""
    folder, metrics = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    shutil.copytree(workspace / "a", folder)
    whole = metrics.read_bytes()
    ends = {"last evaluation": whole.rindex(b'{"kind": "eval'), "last step": whole.rindex(b'{"kind": "train'), "last byte": -1}
    metrics.write_bytes(whole[: ends[until] if isinstance(until, str) else int(until * len(whole)) - (until == 1)])
    steps = {record["step"] for record in map(json.loads, metrics.read_text().split("\n")[:-1]) if record["kind"] == "train"}
    error = run("report", folder).error
    assert f"{metrics}: lacks" in error and "the evaluation of step 5" in error
    assert (": lacks steps" in error) == (steps < {1, 2, 3, 4, 5})
    assert not (folder / "report.html").exists()
    left = metrics.read_bytes()
    metrics.write_bytes(whole)
    assert run("report", folder).status == 0
    metrics.write_bytes(left)
    if not steps:
        assert error.endswith("or train it again in another folder")
        return
    (folder / "summary.json").unlink()
    assert run("train", workspace / "config.yaml", "--out", folder).status == 0
    assert run("report", folder).status == 0
    page = (folder / "report.html").read_text()
    assert "Not finished yet" not in page and "No run has been evaluated" not in page
    assert ("steps_without_metrics" in json.loads((folder / "summary.json").read_text())) == (steps < {1, 2, 3, 4, 5})
    assert "nothing to do" in run("train", workspace / "config.yaml", "--out", folder).err
    metrics.write_bytes(metrics.read_bytes()[:-5])
    assert "lacks the evaluation of step 5, though" in run("report", folder).error


@pytest.mark.parametrize("name", ["[v2] run", "[bold]x[/bold]", "[", "x[", "[link=y]"])
def test_names_with_brackets_are_told_as_they_are(run: Any, workspace: Path, tmp_path: Path, name: str) -> None:
    """They are no markup. `[/b]` is a folder `[` with a folder `b]` in it."""
    folder = tmp_path / name / "b]" if name.endswith("[") else tmp_path / name
    shutil.copytree(workspace / "a", folder)
    command = ("train", workspace / "config.yaml", "--out", folder)
    assert run(*command).err == f"{folder}: the run is finished, at step 5; nothing to do.\n"
    (folder / "summary.json").unlink()
    outcome = run(*command)
    assert outcome.status == 0 and f"continuing from {folder / 'checkpoints'}" in outcome.err


def test_a_dataset_with_brackets_is_told_as_it_is(run: Any, workspace: Path, tmp_path: Path) -> None:
    out = tmp_path / "[" / "data]"
    command = ("prepare", "--corpus", workspace / "corpus", "--out", out, "data.validation_fraction=0.3", "data.vocab_size=300")
    assert run(*command).status == 0
    assert f"Using the dataset in {out}; remove it to read" in run(*command).err
