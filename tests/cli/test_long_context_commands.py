"""`yoco-u context` and `yoco-u needles` on tiny runs, and what users get wrong."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from yoco_u.data import train_tokenizer

SMALL = ("--kinds", "single_2,multi_value", "--lengths", "700,800", "--depths", 2, "--samples", 1)


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("book") / "book.txt"
    path.write_text("".join(f"Chapter {i}. def g{i}(x): return {i} # täglich\n" for i in range(200)), encoding="utf-8")
    return path


def test_context_compares_models_and_loop_counts(run: Any, workspace: Path, book: Path, tmp_path: Path) -> None:
    files = ("--json", tmp_path / "context.json", "--plot", tmp_path / "context.png")
    options = ("--prefixes", "16,32,64", "--last", 8, "--texts", 5, "--num-loops", 1, "--num-loops", 2)
    shown = run("context", workspace / "a", workspace / "b", "--files", book, *options, *files)
    assert shown.status == 0 and "perplexity" in shown.out
    found = json.loads((tmp_path / "context.json").read_text())
    assert (found["last"], found["texts"], found["files"]) == (8, 5, [str(book)])
    assert [(Path(result["model"]).name, result["num_loops"]) for result in found["results"]] == [
        ("a", 1), ("a", 2), ("b", 1), ("b", 2)
    ]  # fmt: skip
    for result in found["results"]:
        assert [score["prefix"] for score in result["scores"]] == [16, 32, 64]
        assert len(result["text_losses"]) == 5
        for place, score in enumerate(result["scores"]):
            assert score["loss"] == pytest.approx(sum(losses[place] for losses in result["text_losses"]) / 5)
            assert f"{score['loss']:.4f}" in shown.out
    assert len({tuple(map(tuple, result["text_losses"])) for result in found["results"]}) == 4
    assert (tmp_path / "context.png").read_bytes().startswith(b"\x89PNG")


def test_context_reads_the_validation_split_by_default(run: Any, workspace: Path, tmp_path: Path) -> None:
    assert run("context", workspace / "a", "--prefixes", "8,16", "--last", 8, "--json", tmp_path / "c.json").status == 0
    [result] = json.loads((tmp_path / "c.json").read_text())["results"]
    assert result["num_loops"] == 2 and all(math.isfinite(score["loss"]) for score in result["scores"])


def other_tokenizer(run_folder: Path, folder: Path) -> Path:
    """The same model with a tokenizer of single bytes."""
    shutil.copytree(run_folder / "model", folder / "other")
    train_tokenizer(["x"], 257).save_pretrained(folder / "other")
    return folder / "other"


def test_context_mistakes(
    run: Any, workspace: Path, book: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    a, out = workspace / "a", ("--json", tmp_path / "c.json", "--plot", tmp_path / "c.png")
    assert "longest has" in run("context", a, "--files", book, "--prefixes", "16,1000000", *out).error
    assert "the longest has" in run("context", a, *out).error
    assert "rising whole numbers" in run("context", a, "--prefixes", "32,16", *out).error
    assert "rising whole numbers" in run("context", a, "--prefixes", "0,16", *out).error
    assert "--prefixes is '2k'" in run("context", a, "--prefixes", "2k", *out).error
    assert "name --files" in run("context", a / "model", *out).error
    small = ("--prefixes", "16,32", "--last", 8)
    assert (
        "reads other tokens"
        in run("context", a, other_tokenizer(a, tmp_path_factory.mktemp("other")), "--files", book, *small, *out).error
    )
    assert "no such folder" in run("context", tmp_path / "none", *out).error
    assert "none.txt" in run("context", a, "--files", tmp_path / "none.txt", *out).error
    assert "--last" in run("context", a, "--last", "0", *out).error
    assert "no such folder" in run("context", a, "--plot", tmp_path / "none" / "c.png").error
    assert not list(tmp_path.iterdir())


def test_needles(run: Any, workspace: Path, book: Path, tmp_path: Path) -> None:
    files = ("--json", tmp_path / "needles.json", "--plot", tmp_path / "needles.png")
    shown = run("needles", workspace / "a", *SMALL, "--haystack", book, "--num-loops", 3, "--dtype", "float32", *files)
    assert shown.status == 0 and "single_2: recall by depth" in shown.out
    found = json.loads((tmp_path / "needles.json").read_text())
    assert found["num_loops"] == 3 and found["haystack"] == [str(book)]
    assert found["settings"]["lengths"] == [700, 800]
    assert [(cell["kind"], cell["length"], cell["depth"]) for cell in found["cells"]] == [
        (kind, length, depth) for kind in ("single_2", "multi_value") for length in (700, 800) for depth in (0, 1)
    ]
    assert (tmp_path / "needles.png").read_bytes().startswith(b"\x89PNG")


def test_needles_of_words(run: Any, workspace: Path, tmp_path: Path) -> None:
    options = ("--kinds", "single_1,variable_tracking", "--lengths", 900, "--depths", 1, "--samples", 2)
    assert run("needles", workspace / "a", *options, "--values", "words", "--json", tmp_path / "words.json").status == 0
    assert run("needles", workspace / "a", *options, "--json", tmp_path / "numbers.json").status == 0
    words, numbers = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("words", "numbers"))
    assert words["settings"] == numbers["settings"] | {"values": "words"}
    assert words["cells"][0]["loss"] != numbers["cells"][0]["loss"] and words["cells"][1] == numbers["cells"][1]


def test_needles_mistakes(run: Any, workspace: Path, tmp_path: Path) -> None:
    a, out = workspace / "a", ("--json", tmp_path / "n.json", "--plot", tmp_path / "n.png")
    error = run("needles", a, "--kinds", "single_1,single_3", *out).error
    assert "single_3" in error and "variable_tracking" in error
    assert (
        "too few for a needle of kind single_1" in run("needles", a, "--kinds", "single_1", "--lengths", "64,2000", *out).error
    )
    assert "MiB are free" in run("needles", a, "--kinds", "single_1", "--lengths", "1000,1000000000", *out).error
    assert "--lengths is '1k'" in run("needles", a, "--lengths", "1k", *out).error
    assert "lengths" in run("needles", a, "--lengths", "0", *out).error
    assert "depths" in run("needles", a, "--depths", "0", *out).error
    assert "digits" in run("needles", a, "--digits", "1", *out).error
    assert "names" in run("needles", a, "--values", "names", *out).error
    assert "none.txt" in run("needles", a, "--haystack", tmp_path / "none.txt", *out).error
    assert "no such folder" in run("needles", tmp_path / "none", *out).error
    assert "no such folder" in run("needles", a, "--json", tmp_path / "none" / "n.json").error
    assert not list(tmp_path.iterdir())
