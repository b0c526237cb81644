"""Checkpoints that are damaged, that cannot be written, or that bring code along."""

import errno
import io
import itertools
import os
import pickle
import shutil
import sys
import types
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from examples import covering
from models import architecture
from test_checksums import DAMAGES, damage
from test_resume import assert_same_run, unfinished_copy
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from training_runs import run_config

from yoco_u.checksums import SUMS, write_checksums
from yoco_u.errors import UserError
from yoco_u.folders import is_mark
from yoco_u.training import RunConfig, train
from yoco_u.training.checkpoint import Checkpoints, TrainerState, read_state, step_name
from yoco_u.training.distributed import Distributed

ALONE = Distributed(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def finished(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunConfig]:
    config = run_config(dataset)
    folder = tmp_path_factory.mktemp("finished")
    train(config, folder, progress=False)
    return folder, config


def newest(checkpoints: Path) -> tuple[Path | None, list[str]]:
    found = Checkpoints(checkpoints, ALONE)
    try:
        return found.newest()
    finally:
        found.close()


def test_any_damage_to_the_newest_checkpoint_sets_it_aside(finished: tuple[Path, RunConfig], tmp_path: Path) -> None:
    last = finished[0] / "checkpoints" / step_name(6)
    files = sorted(path.name for path in last.iterdir() if not is_mark(path))
    assert files == [".metadata", SUMS, "__0_0.distcp", "rng-00000.pt", "trainer.json"]
    for number, (name, how) in enumerate(itertools.product(files, DAMAGES)):
        if name == SUMS and how == "missing":  # as one of an earlier version, which is taken as it is
            continue
        folder = tmp_path / str(number)
        shutil.copytree(finished[0] / "checkpoints", folder)
        damage(folder / step_name(6) / name, how, at=1 + 7919 * number, bit=number % 8)
        path, (problem,) = newest(folder)
        assert path == folder / step_name(4), (name, how)
        assert problem.startswith(f"{folder / step_name(6)}"), problem
        assert sorted(path.name for path in folder.iterdir()) == [
            step_name(2), step_name(4), f"{step_name(6)}.damaged"
        ]  # fmt: skip


@pytest.mark.parametrize("error", [errno.EACCES, errno.EMFILE, errno.ESTALE, errno.ENOMEM])
@pytest.mark.parametrize("name", [SUMS, "__0_0.distcp", "trainer.json"])
def test_a_checkpoint_that_cannot_be_opened_stays(
    finished: tuple[Path, RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: int
) -> None:
    """It is whole for all that is known, and the run would begin again without it."""
    shutil.copytree(finished[0] / "checkpoints", folder := tmp_path / "checkpoints")
    for sums in folder.rglob(SUMS):
        if name == "trainer.json":  # which is hashed too, unless there are no checksums
            sums.unlink()
    before = sorted(folder.iterdir())
    opened = io.open

    def fails(file: Any, *arguments: Any, **settings: Any) -> Any:
        if Path(str(file)).name == name:
            raise OSError(error, os.strerror(error), str(file))
        return opened(file, *arguments, **settings)

    monkeypatch.setattr(io, "open", fails)
    with pytest.raises((OSError, UserError), match=f"{os.strerror(error)}.*{name}|{name}.*{os.strerror(error)}"):
        newest(folder)
    monkeypatch.undo()
    assert sorted(folder.iterdir()) == before and newest(folder) == (folder / step_name(6), [])


def test_the_run_goes_on_from_the_checkpoint_before_and_says_so(
    finished: tuple[Path, RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = unfinished_copy(finished[0], tmp_path / "run", step=4)
    damage(folder / "checkpoints" / step_name(4) / "__0_0.distcp", "flip", at=5000)
    train(finished[1], folder)
    said = " ".join(capsys.readouterr().err.split())
    assert "__0_0.distcp: the file is damaged, its checksum is not the one in SHA256SUMS; the checkpoint is set aside" in said
    assert f"continuing from {folder / 'checkpoints' / step_name(2)}" in said
    assert_same_run(folder, finished[0])


def test_without_a_sound_checkpoint_the_run_begins_again(
    finished: tuple[Path, RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = unfinished_copy(finished[0], tmp_path / "run", step=4)
    for step in (2, 4):
        damage(folder / "checkpoints" / step_name(step) / "rng-00000.pt", "empty")
    train(finished[1], folder)
    assert "no checkpoint is left: beginning again" in capsys.readouterr().err
    assert_same_run(folder, finished[0])
    assert len(list((folder / "checkpoints").glob("*.damaged"))) == 2


def test_only_folders_of_the_right_name_are_checkpoints(tmp_path: Path) -> None:
    for name in (
        "step-zzz",
        "step-1",
        "step-0000001",
        "step-٠٠٠٠٠٠٠٩",
        "step-00000009.old",
        "step--0000009",
        "a-step-00000009",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / step_name(7)).write_text("a file")
    before = sorted(tmp_path.iterdir())
    assert newest(tmp_path) == (None, [])
    assert sorted(tmp_path.iterdir()) == before


def test_a_checkpoint_beyond_eight_digits_is_newer(finished: tuple[Path, RunConfig], tmp_path: Path) -> None:
    for step in (99_999_998, 100_000_000):
        shutil.copytree(finished[0] / "checkpoints" / step_name(6), tmp_path / step_name(step))
    assert newest(tmp_path) == (tmp_path / "step-100000000", [])


@pytest.mark.parametrize("call", ["write_data", "finish", "fsync"])
def test_a_full_disk_stops_the_run_in_one_line_and_costs_only_the_last_steps(
    call: str, finished: tuple[Path, RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def full(function: Callable[..., Any]) -> Callable[..., Any]:
        def later(*arguments: Any, **settings: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > (40 if call == "fsync" else 1):
                raise OSError(errno.ENOSPC, "No space left on device")
            return function(*arguments, **settings)

        return later

    where = os if call == "fsync" else FileSystemWriter
    monkeypatch.setattr(where, call, full(getattr(where, call)))
    folder = tmp_path / "run"
    with pytest.raises((UserError, OSError), match="No space left on device"):
        train(finished[1], folder, progress=False)
    monkeypatch.undo()
    complete = {path.name for path in (folder / "checkpoints").glob("step-????????")}
    assert complete < {step_name(2), step_name(4), step_name(6)}
    train(finished[1], folder, progress=False)
    assert_same_run(folder, finished[0])


class Malice:
    """Unpickled, it would make a file."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call, self.arguments


def malicious(trace: Path) -> list[Any]:
    command = f"touch {trace}"
    whole = [
        Malice(os.system, command),
        Malice(eval, f"open({str(trace)!r}, 'w')"),
        Malice(exec, f"open({str(trace)!r}, 'w')"),
        Malice(Path.touch, trace),
        Malice(__import__, "antigravity"),
        Malice(torch.load, str(trace)),
    ]
    return [*whole, {"deep": [(1, whole[0])]}]


@pytest.mark.parametrize(("kind", "name"), covering(DAMAGES, ["tokenizer.json", "tokenizer_config.json"]))
def test_a_damaged_tokenizer_of_a_run_is_named(finished: tuple[Path, RunConfig], tmp_path: Path, name: str, kind: str) -> None:
    folder = unfinished_copy(finished[0], tmp_path / "run", step=4)
    damage(folder / "tokenizer" / name, kind)
    with pytest.raises(UserError, match=rf"tokenizer/{name}.*remove .*tokenizer, which is then copied"):
        train(finished[1], folder, progress=False)
    shutil.rmtree(folder / "tokenizer")
    train(finished[1], folder, progress=False)
    assert_same_run(folder, finished[0])


def test_nothing_in_a_checkpoint_is_executed(finished: tuple[Path, RunConfig], tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    for number, thing in enumerate(malicious(trace)):
        folder = unfinished_copy(finished[0], tmp_path / f"run-{number}", step=4)
        checkpoint = folder / "checkpoints" / step_name(4)
        if number % 2:
            torch.save(thing, checkpoint / "rng-00000.pt")
        else:
            (checkpoint / ".metadata").write_bytes(pickle.dumps(thing))
        write_checksums(checkpoint)
        with pytest.raises(UserError, match=r"step-00000004: the checkpoint is damaged \(.*\); remove it to go on"):
            train(finished[1], folder, progress=False)
        assert not trace.exists()


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
@pytest.mark.parametrize("name", ["PosixPath", "WindowsPath"])
def test_a_checkpoint_of_another_python_or_system_is_read(
    finished: tuple[Path, RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str
) -> None:
    """Its metadata says where it was written, by a class whose module and name differ from one to another."""
    folder = unfinished_copy(finished[0], tmp_path / "run", step=4)
    checkpoint = folder / "checkpoints" / step_name(4)
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    elsewhere = type(name, (), {"__module__": module, "__reduce__": lambda self: (type(self), ("runs", "elsewhere"))})
    metadata.storage_meta.checkpoint_id = elsewhere()
    with monkeypatch.context() as patch:
        there = types.ModuleType(module)
        setattr(there, name, elsewhere)
        patch.setitem(sys.modules, module, there)
        (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    write_checksums(checkpoint)
    train(finished[1], folder, progress=False)
    assert_same_run(folder, finished[0])


def test_no_value_beside_the_tensors_is_executed(finished: tuple[Path, RunConfig], tmp_path: Path) -> None:
    """What is no tensor, such as a learning rate, is a pickle of its own among the shards."""
    trace = tmp_path / "trace"
    folder = unfinished_copy(finished[0], tmp_path / "run", step=4)
    checkpoint = folder / "checkpoints" / step_name(4)
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    replaced = 0
    for index, stored in metadata.storage_data.items():
        if index.fqn.endswith(".lr"):
            torch.save(Malice(os.system, f"touch {trace}"), checkpoint / "__9_9.distcp")
            stored.relative_path, stored.offset = "__9_9.distcp", 0
            stored.length, replaced = (checkpoint / "__9_9.distcp").stat().st_size, replaced + 1
    assert replaced
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    write_checksums(checkpoint)
    with pytest.raises(UserError, match="the checkpoint is damaged"):
        train(finished[1], folder, progress=False)
    assert not trace.exists()


def test_no_file_beyond_the_checkpoint_is_read(finished: tuple[Path, RunConfig], tmp_path: Path) -> None:
    folder = unfinished_copy(finished[0], tmp_path / "run", step=4)
    checkpoint = folder / "checkpoints" / step_name(4)
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    for stored in metadata.storage_data.values():
        stored.relative_path = f"../{step_name(2)}/{stored.relative_path}"
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    write_checksums(checkpoint)
    with pytest.raises(UserError, match="points out of the checkpoint"):
        train(finished[1], folder, progress=False)


def test_a_second_one_of_a_name_leaves_what_a_user_added_to_the_first(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    state = TrainerState(step=3, seed=0, world_size=1, architecture=architecture())
    checkpoints = Checkpoints(tmp_path, ALONE)

    def save() -> set[str]:
        name = checkpoints.spare_name("non-finite-step-00000003")
        checkpoints.save(name, model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), state, keep=1)
        checkpoints.wait()
        return {path.name.removeprefix("non-finite-step-00000003") for path in tmp_path.iterdir()}

    with closing(checkpoints):
        assert save() == save() == {""}
        (tmp_path / "non-finite-step-00000003" / "notes.txt").write_text("years of work")
        (tmp_path / "non-finite-step-00000003-2").mkdir()
        (tmp_path / "non-finite-step-00000003-2" / "notes.txt").write_text("years of work")
        assert save() == save() == {"", "-2", "-3"}
    for name in ("", "-2"):
        assert (tmp_path / f"non-finite-step-00000003{name}" / "notes.txt").read_text() == "years of work"
    assert read_state(tmp_path / "non-finite-step-00000003-3") == state
