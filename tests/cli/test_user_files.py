"""What users put into the folders of runs, experiments and analyses stays, and `convert` keeps exits that still fit."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from yoco_u.inference.exits import FILE

MINE = "years of work"


def test_a_run_whose_summary_is_lost_keeps_what_is_in_its_model(run: Any, workspace: Path, tmp_path: Path) -> None:
    folder, model = tmp_path / "a", tmp_path / "a" / "model"
    shutil.copytree(workspace / "a", folder)
    weights = (model / "model.safetensors").read_bytes()
    assert run("exits", folder, "--tokens", 320).status == 0
    exits = (model / FILE).read_bytes()
    (model / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "summary.json").unlink()
    command = ("train", workspace / "config.yaml", "--out", folder, "--json")
    assert run(*command).json["steps"] == 5
    assert (model / FILE).read_bytes() == exits and (model / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (model / "model.safetensors").read_bytes() == weights
    (folder / "summary.json").unlink()
    (model / "SHA256SUMS").unlink()
    assert "SHA256SUMS was removed, so what is there was changed on purpose" in run(*command).error
    assert (model / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize(
    "settings", [("--remote-code",), ("--remote-code", "--dtype", "bfloat16"), ("loops=3", "--kv", "mean")]
)
def test_exits_come_along_where_weights_and_loops_stay(
    run: Any, workspace: Path, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    source, out = tmp_path / "a", tmp_path / "out"
    shutil.copytree(workspace / "a", source, ignore=shutil.ignore_patterns("checkpoints"))
    convert = ("convert", source, *settings, "--out", out)
    assert run(*convert).err == "" and not (out / FILE).exists()
    assert run("exits", source, "--tokens", 320).status == 0
    for _ in range(2):  # what convert wrote is replaced
        told = run(*convert).err
        assert (out / FILE).exists() == (not told)
    if settings[0] == "loops=3":
        assert (
            told
            == "exits.json of the source is fitted to other weights and loops, and is left out; fit it anew with yoco-u exits\n"
        )
        return
    found = json.loads((source / "model" / FILE).read_text())
    assert json.loads((out / FILE).read_text()) | {"model": found["model"]} == found
    assert run("generate", out, "--prompt", "a", "--num-loops", "auto", "--max-tokens", 2).status == 0
    (source / "model" / FILE).write_text("{")
    told = run(*convert).err
    assert told.startswith("left out: ") and told.count("\n") == 1 and not (out / FILE).exists()


@pytest.mark.parametrize("name", ["report.html", "report.json", "report.png", "small/report.json"])
def test_a_report_of_an_experiment_replaces_only_reports(run: Any, workspace: Path, tmp_path: Path, name: str) -> None:
    out, grid = tmp_path / "out", tmp_path / "grid.yaml"
    grid.write_text(
        f"title: t\nbase: {{data: {{corpus: {workspace}/corpus, vocab_size: 300}}, architecture: {{size: test}}, "
        "training: {steps: 1, sequence_length: 32, batch_rows: 4, micro_batch_rows: 4}, optimizer: {warmup_steps: 0}}\n"
        "models: {a: {settings: {architecture: {preset: yoco}}}, b: {settings: {architecture: {preset: yoco_u}}}}\n"
        "sizes: {small: {}, large: {architecture: {layers: 8}}}\n"
    )
    (out / name).parent.mkdir(parents=True)
    (out / ".yoco-u-experiment").touch()
    (out / name).write_text(MINE)
    for options in ((), ("--report",), ("--jobs", 2)):
        assert f"{name}: is there and was not made by yoco-u" in run("experiment", grid, "--out", out, *options).error
    assert (out / name).read_text() == MINE
    assert {path.name for path in out.rglob("*") if path.is_file()} == {Path(name).name, ".yoco-u-experiment"}


@pytest.mark.parametrize("name", ["analysis.json", "analysis.html", "logit-lens.png"])
def test_an_analysis_replaces_only_its_own(run: Any, workspace: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / ".yoco-u-analysis").touch()
    (tmp_path / name).write_text(MINE)
    assert f"{name}: is there and was not made by yoco-u" in run("analyze", workspace / "a", "--out", tmp_path).error
    assert (tmp_path / name).read_text() == MINE


def test_a_plot_is_no_exits(run: Any, workspace: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    shutil.copytree(workspace / "a", folder, ignore=shutil.ignore_patterns("checkpoints"))
    plot = folder / "model" / FILE
    assert "is where the exits go; name another file" in run("exits", folder, "--plot", plot).error
    assert not plot.exists()


def test_a_config_that_says_the_same_keeps_its_comments(run: Any, workspace: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    shutil.copytree(workspace / "a", folder, ignore=shutil.ignore_patterns("checkpoints", "metrics.jsonl", "summary.json"))
    text = "# chosen with care\n" + (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text)
    assert run("train", folder / "config.yaml", "--out", folder, "--json").json["steps"] == 5
    assert (folder / "config.yaml").read_text() == text


def test_what_is_in_a_checkpoint_and_a_tokenizer_is_not_removed(run: Any, workspace: Path, tmp_path: Path) -> None:
    folder, command = (
        tmp_path / "a",
        ("train", workspace / "config.yaml", "--out", tmp_path / "a", "training.keep_checkpoints=1"),
    )
    assert run(*command, "training.save_every=4", "training.steps=4").status == 0
    kept = folder / "checkpoints" / "step-00000004"
    (kept / "notes").write_text(MINE)
    for name in ("summary.json", "metrics.jsonl"):
        (folder / name).unlink()
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("steps: 4", "steps: 8"))
    again = run(*command, "training.save_every=4", "training.steps=8")
    assert again.status == 0, again.err
    assert (kept / "notes").read_text() == MINE and (folder / "checkpoints" / "step-00000008").exists()
    shutil.rmtree(folder / "checkpoints")
    for name in ("summary.json", "metrics.jsonl"):
        (folder / name).unlink()
    (folder / "tokenizer" / "notes").write_text(MINE)
    assert "notes: was added or changed" in run(*command, "training.save_every=4", "training.steps=8").error
    assert (folder / "tokenizer" / "notes").read_text() == MINE
