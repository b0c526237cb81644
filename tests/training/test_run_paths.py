"""Runs and datasets from other folders than the one in which they were made, moved, and with paths spelled in other ways."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from training_runs import run_config

from yoco_u.config import parse
from yoco_u.data import DataConfig, prepare
from yoco_u.errors import UserError
from yoco_u.evaluation.held_out import score_held_out, validation_split
from yoco_u.training import RunConfig, train
from yoco_u.training.run_folder import RunFolder, run_dataset


@pytest.fixture(scope="module")
def made(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """work/, in which training ran: work/runs/a, whose dataset is `data/d`."""
    work = tmp_path_factory.mktemp("elsewhere") / "work"
    shutil.copytree(dataset, work / "data" / "d")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        train(run_config(Path("data/d"), steps=1, optimizer_warmup_steps=0), "runs/a", progress=False)
    return work


@pytest.fixture
def work(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A work/ of one's own, as if training had run there, and the working folder."""
    own = tmp_path / "work"
    shutil.copytree(made, own)
    file = own / "runs" / "a" / "environment.json"
    file.write_text(file.read_text().replace(str(made), str(own)))
    monkeypatch.chdir(own)
    return own


def without_paths(run: Path) -> None:
    """Make a run one of an earlier version."""
    file = run / "environment.json"
    file.write_text(json.dumps({key: value for key, value in json.loads(file.read_text()).items() if key != "paths"}))


def test_from_any_folder(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = validation_split(Path("runs/a"), 24).row(0).tolist()
    (tmp_path / "link").symlink_to(work / "runs" / "a")
    for folder, run in ((work / "runs", "a"), (tmp_path, "work/runs/a/"), (Path("/"), work / "runs" / "a"), (tmp_path, "link")):
        monkeypatch.chdir(folder)
        assert validation_split(Path(run), 24).row(0).tolist() == here
        assert run_dataset(run) == work / "data" / "d"
    monkeypatch.chdir(work / "runs")
    assert train(run_config(Path("../data/d"), steps=1, optimizer_warmup_steps=0), "a", progress=False)["steps"] == 1


def test_texts_are_scored_without_the_dataset(work: Path) -> None:
    """Where it is gone, and where another one is in its place; the run has noted how its texts become tokens."""
    assert json.loads((work / "runs" / "a" / "environment.json").read_text())["special_tokens"] is False
    Path("text.txt").write_text("def one(x):\n    return x\n")
    [before] = score_held_out(Path("runs/a"), ["text.txt"]).results
    sums = Path("data/d/SHA256SUMS")
    for change in (lambda: sums.write_text(sums.read_text().replace("0", "1")), lambda: shutil.rmtree("data")):
        change()
        assert [before] == [*score_held_out(Path("runs/a"), ["text.txt"]).results]
        with pytest.raises(UserError, match=r"another dataset in the same place|its dataset is not in"):
            score_held_out(Path("runs/a"))


def test_moved(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run alone, then both, wherever the working folder is."""
    monkeypatch.chdir("/")
    shutil.move(work / "runs" / "a", tmp_path / "a")
    assert run_dataset(tmp_path / "a") == work / "data" / "d"
    shutil.move(tmp_path / "a", work / "runs" / "a")
    shutil.move(work, tmp_path / "new place")
    run = tmp_path / "new place" / "runs" / "a"
    assert run_dataset(run) == tmp_path / "new place" / "data" / "d"
    shutil.move(tmp_path / "new place" / "data", tmp_path / "data")
    tried = " or ".join(str(folder / "data" / "d") for folder in (work, tmp_path / "new place", Path("/")))
    with pytest.raises(UserError, match=f"{run}: its dataset is not in {tried} "):
        run_dataset(run)
    monkeypatch.chdir(tmp_path)
    assert run_dataset(run) == tmp_path / "data" / "d"


def test_of_an_earlier_version(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_paths(work / "runs" / "a")
    assert run_dataset("runs/a") == work / "data" / "d"
    monkeypatch.chdir(work / "runs")
    with pytest.raises(UserError, match=f"a: its dataset is not in {work}/runs/data/d \\(dataset.json is missing\\)"):
        run_dataset("a")
    monkeypatch.chdir(work)
    (work / "runs" / "a" / "environment.json").write_text("{")
    assert run_dataset("runs/a") == work / "data" / "d"


def spelled(work: Path, **settings: Any) -> RunConfig:
    """The config of a run with paths of all kinds, some of them other than those from `work`."""
    plain = run_config(Path("data/d")).model_dump(mode="json")
    teacher = plain["architecture"]
    given = {
        "start_from": "models/s",
        "distillation": {"teacher": settings.pop("teacher", "models/t"), "architecture": teacher},
        "data": {
            "corpus": settings.pop("corpus", ["texts/*.txt", "stdlib"]),
            "tokenizer": settings.pop("tokenizer", "models/s"),
            "validation_corpus": ["held-out.txt"],
        },
    }
    return parse(RunConfig, plain | given | settings, "test")


def test_going_on_with_paths_spelled_in_another_way(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(work / "runs" / "a")
    plain = spelled(work)
    run.config.write_text(plain.model_dump_json())
    (work / "link").symlink_to(work / "models")
    run.check_same(plain)
    up = {"start_from": "../models/s", "teacher": "../models/t", "corpus": ["../texts/*.txt", "stdlib"], "dataset": "../data/d"}
    whole = {"start_from": str(work / "link" / "s"), "teacher": f"{work}/models/./t", "tokenizer": f"{work}/models/s/"}
    for folder, settings in ((work / "runs", up), (Path("/"), whole | {"corpus": [f"{work}/texts/*.txt", "stdlib"]})):
        monkeypatch.chdir(folder)
        run.check_same(spelled(work, **settings))
        for key, other in {
            "start_from": "../models/other", "teacher": "t", "corpus": ["../texts/*.txt", "./stdlib"],
        }.items():  # fmt: skip
            with pytest.raises(UserError, match=f"holds a run with .*{key}"):
                run.check_same(spelled(work, **settings | {key: other}))
    moved = tmp_path / "moved"
    shutil.move(work, moved)
    monkeypatch.chdir(moved / "runs")
    RunFolder(Path("a")).check_same(spelled(work, **up))
    monkeypatch.chdir(moved)
    without_paths(moved / "runs" / "a")
    RunFolder(Path("runs/a")).check_same(spelled(work, start_from=f"{moved}/models/s"))


def test_going_on_by_the_same_command_in_another_folder(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is spelled as before leads where it led before; the dataset is not prepared anew."""
    (work / "runs" / "a" / "summary.json").unlink()
    shutil.rmtree(work / "runs" / "a" / "model")
    shutil.copytree(work / "runs" / "a" / "tokenizer", work / "models" / "s")
    plain = run_config(Path("data/d"), steps=1, optimizer_warmup_steps=0)
    (work / "elsewhere").mkdir()
    monkeypatch.chdir(work / "elsewhere")
    assert train(plain, work / "runs" / "a", progress=False)["steps"] == 1
    assert not list((work / "elsewhere").iterdir())
    run = RunFolder(work / "runs" / "a")
    run.config.write_text(spelled(work).model_dump_json())  # of another corpus than the dataset's, seen from here
    found = run.located(spelled(work))
    assert (found.dataset, found.start_from) == (str(work / "data" / "d"), str(work / "models" / "s"))
    assert found.distillation is not None and found.distillation.teacher == "models/t"  # which is nowhere
    assert found.data is not None and found.data.tokenizer == str(work / "models" / "s")
    run.check_same(found)
    given = spelled(work, dataset="d", start_from="s")
    assert run.located(given) == given


def test_a_later_start_says_where_the_dataset_is_then(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(work / "runs" / "a")
    shutil.move(work / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    run.note_start(1, {"torch": None}, "data/d", print)
    monkeypatch.chdir("/")
    assert run_dataset(run.path) == tmp_path / "data" / "d"
    noted = json.loads(run.environment.read_text())
    assert noted["resumed"][0]["step"] == 1 and noted["resumed"][0]["torch"] is None
    assert noted["paths"] == {"working_folder": str(work), "run_folder": str(run.path), "dataset": "data/d"}


def test_entries_of_a_corpus_from_another_folder(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (work / "texts").mkdir()
    (work / "texts" / "a.txt").write_text("a")
    monkeypatch.chdir("/")
    paths = RunFolder(work / "runs" / "a").paths
    for entry, place in {"texts": "texts", "texts/*.txt": "texts/*.txt", "texts/../texts/a.txt": "texts/a.txt"}.items():
        assert os.path.normpath(paths.find(entry)) == str(work / place)
    for name in ("stdlib", "hf:a/b", "synthetic:p-hop", "nowhere"):
        assert paths.find(name) == name


def test_a_dataset_is_of_the_same_config_however_its_paths_are_spelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: Path
) -> None:
    texts = dataset.parent / "functions.jsonl"
    (tmp_path / "here").mkdir()
    shutil.copy(texts, tmp_path / "here" / texts.name)
    monkeypatch.chdir(tmp_path / "here")

    def config(corpus: str) -> DataConfig:
        return DataConfig(corpus=corpus, vocab_size=300, validation_fraction=0.2)

    made = prepare(config(texts.name), "d", progress=False)
    assert made.working_folder == ".."
    monkeypatch.chdir(tmp_path)
    for same in (f"here/{texts.name}", f"{tmp_path}/here/{texts.name}", texts.name):
        assert prepare(config(same), "here/d", progress=False) == made
    shutil.move("here", "moved")
    assert prepare(config(f"moved/{texts.name}"), "moved/d", progress=False).config == made.config
    with pytest.raises(UserError, match=f"another config .corpus.0 '{texts.name}', now 'here/{texts.name}'"):
        prepare(config(f"here/{texts.name}"), "moved/d", progress=False)
