"""What users add to a folder of ours, or change in it, is never lost when it is written anew."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import save, tokenizer
from examples import covering
from hypothesis import given
from hypothesis import strategies as st
from models import architecture, build

from yoco_u.checksums import SUMS, added_or_changed, check_changes, verify_checksums, write_checksums
from yoco_u.cli import main
from yoco_u.errors import UserError
from yoco_u.folders import NewFolder
from yoco_u.loading import load_model
from yoco_u.model import save_model

MINE = "years of work"


def write(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(MINE)


def link(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to("nowhere")


CHANGES: dict[str, Callable[[Path], None]] = {
    "exits.json": write,
    "README.md": write,
    "notes/deep/a.txt": write,
    "chat_template.jinja": write,
    "generation_config.json": write,
    "tokenizer_config.json": write,
    "link": link,
    "notes/link": link,
}


def saved(folder: Path, seed: int = 0) -> Path:
    save_model(build(architecture(vocab_size=300), seed=seed), tokenizer(), folder)
    return folder


@pytest.mark.parametrize(("name", "seed"), covering(list(CHANGES), [0, 1]))  # the same weights, and others
def test_changes_survive_that_a_model_is_saved_again(tmp_path: Path, name: str, seed: int) -> None:
    folder = saved(tmp_path / "model")
    assert added_or_changed(folder) == []
    CHANGES[name](folder / name)
    for _ in range(2):
        assert added_or_changed(folder) == [folder / name]
        saved(folder, seed)
        assert (folder / name).is_symlink() or (folder / name).read_text() == MINE
        assert not (folder / name).is_symlink() or os.readlink(folder / name) == "nowhere"
    assert verify_checksums(folder, "")
    other = saved(tmp_path / "other", seed)
    assert (folder / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def test_damage_is_mended_but_what_was_changed_on_purpose_stays(tmp_path: Path) -> None:
    """Weights and config that differ from their checksums are damaged; users remove the checksums if they change them."""
    folder = saved(tmp_path / "model")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1])
    saved(folder)
    assert (folder / "model.safetensors").read_bytes() == whole
    (folder / SUMS).unlink()
    (folder / "config.json").write_text(MINE)
    with pytest.raises(UserError, match=r"SHA256SUMS was removed, so what is there was changed on purpose; move it elsewhere"):
        saved(folder, 1)
    assert (folder / "config.json").read_text() == MINE and (folder / "model.safetensors").read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


names = st.sampled_from(["a", "b", "c/d", "c/e", "é f"])
contents = st.dictionaries(names, st.sampled_from([b"", b"1", b"2"]), max_size=5)


@given(fixed=st.sets(names), before=contents, after=contents)
def test_what_was_added_or_changed_is_told(
    tmp_path_factory: pytest.TempPathFactory, fixed: set[str], before: dict[str, bytes], after: dict[str, bytes]
) -> None:
    folder = tmp_path_factory.mktemp("folder")

    def fill(files: dict[str, bytes]) -> None:
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)

    fill(before)
    write_checksums(folder, [folder / name for name in fixed])
    fill(after)
    expected = {name for name in after if before.get(name) != after[name] and not (name in before and name in fixed)}
    assert {path.relative_to(folder).as_posix() for path in added_or_changed(folder)} == expected
    if expected:
        with pytest.raises(UserError, match="was added or changed since yoco-u wrote the folder"):
            check_changes(folder)


def test_a_folder_of_an_earlier_version(tmp_path: Path) -> None:
    """It has no list of what may change: files beside those with checksums stay, since nobody knows who wrote them."""
    (tmp_path / "a").write_text("a")
    assert added_or_changed(tmp_path) == []
    folder = saved(tmp_path / "model")
    (folder / ".yoco-u-written").unlink()
    (folder / "chat_template.jinja").write_text(MINE)
    saved(folder)
    assert (folder / "chat_template.jinja").read_text() == MINE
    load_model(folder, build(architecture()).device)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize(
    ("out", "change", "said"),
    [
        ("converted", lambda folder: write(folder / "exits.json"), "exits.json: was added or changed since yoco-u wrote"),
        ("converted", lambda folder: write(folder / "generation_config.json"), "generation_config.json: was added or changed"),
        ("converted", lambda folder: (folder / SUMS).unlink(), "was added or changed"),
        ("source", lambda _: None, "is what is converted"),
        ("link", lambda folder: (folder.parent / "link").symlink_to("source"), "is what is converted"),
        ("link", lambda folder: (folder.parent / "link").symlink_to("converted"), "link: is in the way"),
        ("ours", lambda folder: saved(folder.parent / "ours"), "holds something else than what yoco-u convert wrote"),
    ],
)
def test_convert_replaces_only_what_it_wrote(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], out: str, change: Callable[[Path], None], said: str
) -> None:
    save(tmp_path / "source", "llama")
    command = ["convert", str(tmp_path / "source"), "--kv", "mean", "--out"]
    for _ in range(2):
        assert main([*command, str(tmp_path / "converted")]) == 0
    change(tmp_path / "converted")
    before = tree(tmp_path)
    capsys.readouterr()
    assert main([*command, str(tmp_path / out)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert tree(tmp_path) == before


def test_a_dataset_and_a_checkpoint_are_no_place_for_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "source", "llama")
    saved(tmp_path / "part")
    shutil.move(tmp_path / "part" / "config.json", tmp_path / "part" / "dataset.json")
    before = tree(tmp_path)
    assert main(["convert", str(tmp_path / "source"), "--kv", "mean", "--out", str(tmp_path / "part")]) == 2
    assert "holds something else" in capsys.readouterr().err and tree(tmp_path) == before


def test_a_conversion_that_was_interrupted_once_it_was_there_may_be_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def publish(self: NewFolder) -> None:
        published(self)
        raise KeyboardInterrupt

    save(tmp_path / "source", "llama")
    command, published = (
        ["convert", str(tmp_path / "source"), "--kv", "mean", "--out", str(tmp_path / "out")],
        NewFolder.publish,
    )
    with monkeypatch.context() as patch:
        patch.setattr(NewFolder, "publish", publish)
        assert main(command) == 130
    assert (tmp_path / "out" / "config.json").exists()
    assert main(command) == 0
