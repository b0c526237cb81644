"""The folder of a run: its files, how one run at a time writes them (`RunFolder`), and how they are read (`read_run`)."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import BaseModel, PositiveInt

from yoco_u.checksums import check_changes, verify_checksums, write_checksums
from yoco_u.config import dump_yaml, load_yaml, parse
from yoco_u.data import DatasetIndex, load_tokenizer
from yoco_u.data.places import changes
from yoco_u.errors import UserError
from yoco_u.files import Say, read_json, write_json
from yoco_u.folders import beside, check_claim, check_part, check_place, claim, discard, is_mark, mark, marked, replacing_folder
from yoco_u.training.config import RunConfig
from yoco_u.training.distributed import Distributed
from yoco_u.training.metrics import METRICS, SUMMARY, check_finished, read_metrics
from yoco_u.training.run_paths import Environment, RunPaths, Start, StartPaths

RUN = "run"
"""The kind of mark that a run folder bears."""

SAMPLES = "samples.json"
"""The texts that experiments let a run's model write."""


class _Sample(BaseModel, extra="allow"):
    prompt: str
    text: str


class _Summary(BaseModel, extra="allow"):
    name: str
    steps: PositiveInt


class RunFolderTaken(UserError):  # noqa: N818
    """Another process trains in this folder, or measures the model in it."""


class RunFolder:
    """The paths of a run, and its small files, which rank 0 alone writes."""

    def __init__(self, path: Path) -> None:
        self.path, self.lock = path, path / ".lock"
        self.config, self.summary, self.environment = path / "config.yaml", path / SUMMARY, path / "environment.json"
        self.checkpoints, self.tokenizer, self.model = path / "checkpoints", path / "tokenizer", path / "model"

    @property
    def paths(self) -> RunPaths:
        """Where the paths in the config lead."""
        return RunPaths(self.path, self.environment)

    @contextmanager
    def claim(self, config: RunConfig, distributed: Distributed) -> Iterator[None]:
        """Lock the folder for a run of `config`, new or continued. The lock ends with the process, however that ends.

        Raises:
            UserError: if the folder holds a run of another config, or files and no run; `RunFolderTaken` if another process has
                the lock.
        """
        lock, missing = FileLock(self.lock), [path for path in (self.path, *self.path.parents) if not path.exists()]

        def enter() -> None:
            check_claim(self.path, RUN, _was_run)
            self._mark_parts()
            claim(self.path, RUN, _was_run)
            self._acquire(lock)
            if self.read_summary() is None:
                check_part(self.model)
                check_changes(self.model, kept=True)
                for place in (self.tokenizer, self.config, self.summary, self.environment, self.path / METRICS):
                    check_place(place)
            if self._has_begun():
                self._check_config()
                self.check_same(config)
            else:
                check_changes(self.tokenizer)
                discard(self.tokenizer)
                dump_yaml(config, self.config)

        try:
            distributed.on_main(enter)
            yield
        except (UserError, OSError):
            if missing and lock.is_locked:
                self._leave(missing)
            raise
        finally:
            lock.release()

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Lock the folder of a run while its model is measured.

        Raises:
            RunFolderTaken: if another process has the lock.
        """
        lock = FileLock(self.lock)
        self._acquire(lock)
        try:
            yield
        finally:
            lock.release()

    def located(self, config: RunConfig) -> RunConfig:
        """The config of a run that goes on: paths lead where they led when it began, and dtype `auto` is what it was then.

        See `RunPaths.located`. A config whose run has not begun is returned as it is.
        """
        if not (marked(self.path, RUN) and self._has_begun()):
            return config
        self._check_config()
        old = read_run_config(self.path)
        return self.paths.located(_with_dtype_of(old, config), old)

    def check_same(self, config: RunConfig) -> None:
        """Raise a UserError if the folder holds a run of another config, naming the first key that differs.

        A dtype of `auto` is what it was when the run began.
        Paths that lead to the same place are the same however they are spelled. Two paths of the dataset also are where both
        configs say what the dataset is prepared from, so that runs and datasets may be moved.
        """
        old = read_run_config(self.path)
        config = _with_dtype_of(old, config)
        if old.data and config.data:
            old = old.model_copy(update={"dataset": config.dataset})
        difference = next(changes(old, config, self.paths.places), None)
        if difference is not None:
            key, before, now = difference
            raise UserError(
                f"{self.path}: holds a run with {key} = {before!r}, now {now!r}; "
                "choose another folder, or run it with the config it began with"
            )

    def copy_tokenizer(self, source: Path) -> None:
        """Save the dataset's tokenizer in the folder, unless it is there already.

        Raises:
            UserError: if it is there and damaged.
        """
        if self.tokenizer.exists():
            verify_checksums(self.tokenizer, f"remove {self.tokenizer}, which is then copied from the dataset again")
            return
        with replacing_folder(self.tokenizer) as folder:
            load_tokenizer(source).save_pretrained(folder)
            write_checksums(folder)

    def check_contents(self, contents: dict[str, str | None]) -> None:
        """Check that what lies in the places of a run's dataset and teacher is what it was begun with.

        Args:
            contents: digests by what they are of, `dataset` or `teacher`; None for what cannot be told from others.

        Raises:
            UserError: if it is not. Earlier versions noted no digests, and whatever is there is taken.
        """
        for key, now in contents.items():
            if now is not None and self.noted(key) not in (None, now):
                raise UserError(
                    f"{self.path}: was begun with another {key} in the same place; bring it back, or begin a new run"
                )

    def noted(self, key: str) -> str | None:
        """The digest of the `dataset` or `teacher` that a run was begun with; None if it has not begun, or did not note it."""
        starts = [] if (found := self.noted_starts()) is None else [start.model_dump() for start in found]
        return next((start[key] for start in starts if isinstance(start.get(key), str)), None)

    def noted_starts(self) -> list[Start] | None:
        """The starts that `environment.json` tells of, the oldest first; None if the run has not begun, or the file is lost."""
        nothing = Environment()
        found = read_json(self.environment, Environment, nothing, lambda _: None) if self._has_begun() else nothing
        return None if found is nothing else found.starts

    def note_start(self, step: int, environment: dict[str, Any], dataset: str, say: Say) -> None:
        """Write down what the run runs on, and from where. What goes on from `step` goes into the list `resumed` of the first.

        Args:
            dataset: as the config spells it.
        """
        nothing = Environment()
        first = read_json(self.environment, Environment, nothing, say)
        environment = environment | {"paths": StartPaths.now(self.path, dataset).model_dump()}
        if step == 0 or first is nothing:
            write_json(self.environment, environment | {"resumed": []})
        else:
            before = first.model_dump(exclude_unset=True)
            write_json(self.environment, before | {"resumed": [*before.get("resumed", []), {"step": step} | environment]})

    def read_summary(self, say: Say = lambda _: None) -> dict[str, Any] | None:
        """The summary of a finished run; None if the run is not finished.

        A damaged one counts as missing, which is said, while there is a checkpoint from which the run can finish again.

        Raises:
            UserError: if it is damaged and there is no checkpoint.
        """
        nothing, can_finish = _Summary(name="", steps=1), any(self.checkpoints.glob("step-*"))
        found = read_json(self.summary, _Summary, nothing, say if can_finish else None)
        return None if found is nothing else found.model_dump()

    def _acquire(self, lock: FileLock) -> None:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise RunFolderTaken(
                f"{self.path}: another process is training or measuring there; wait for it, or choose another folder"
            ) from None

    def _mark_parts(self) -> None:
        """Mark what the run's folder holds, if it was made before there were marks."""
        if self.path.is_dir() and not marked(self.path, RUN) and _was_run(self.path):
            parts = (self.tokenizer, self.model)
            for folder in [*parts, *map(beside, parts), *self.checkpoints.glob("*")]:
                if folder.is_dir():
                    mark(folder)

    def _leave(self, made: list[Path]) -> None:
        """Remove a folder in which nothing has begun. The lock goes last, so that nobody takes the folder meanwhile.

        Args:
            made: the folders that were made for the run, the innermost first.
        """
        there = list(self.path.iterdir())
        files = [*filter(is_mark, there), self.config, self.environment, self.lock]
        if set(there) <= {*files, self.tokenizer}:
            with suppress(OSError):  # another process has come to the folder, and keeps it
                discard(self.tokenizer)
                for path in files:
                    path.unlink(missing_ok=True)
                for folder in made:
                    folder.rmdir()

    def _has_begun(self) -> bool:
        """Whether a step was taken. A run that failed earlier, on a missing corpus say, may begin anew with another config."""
        files = (self.path / METRICS, self.summary)
        return any(self.checkpoints.glob("*")) or any(file.is_file() and file.stat().st_size > 0 for file in files)

    def _check_config(self) -> None:
        """Refuse a run that has begun without telling how: another config would be taken for its own."""
        if not os.path.lexists(self.config):
            raise UserError(
                f"{self.config}: is missing, but a run has begun here; copy it back from elsewhere, or choose another folder"
            )


def _with_dtype_of(old: RunConfig, config: RunConfig) -> RunConfig:
    return config.with_dtype(old.training.dtype) if config.training.dtype == "auto" else config


@dataclass(frozen=True)
class Run:
    """What a run folder tells, of a finished run or an unfinished one.

    Attributes:
        folder: the run folder.
        config: the resolved config.
        records: the lines of metrics.jsonl, see `yoco_u.training.metrics`.
        environment: what the run ran on; empty if unknown.
        samples: `{"prompt": ..., "text": ...}` each, the text without the prompt; empty if none were made.
    """

    folder: Path
    config: RunConfig
    records: list[dict[str, Any]]
    environment: dict[str, Any]
    samples: list[dict[str, Any]]

    @property
    def validation(self) -> str | None:
        """What tells the text that the run is evaluated on from others; None if its newest start does not say it."""
        newest: dict[str, Any] = [self.environment, *self.environment.get("resumed", [])][-1]
        return newest.get("validation")

    def kind(self, kind: str) -> list[dict[str, Any]]:
        """The records of one kind: `train` or `evaluation`."""
        return [record for record in self.records if record["kind"] == kind]


def read_run(path: str | os.PathLike[str]) -> Run:
    """Read a run folder, finished or not.

    Raises:
        UserError: if it holds no run, a run without a step, a damaged file, or a finished run whose metrics are not whole.
    """
    folder = RunFolder(Path(path))
    config = read_run_config(path)
    records, summary = read_metrics(folder.path), folder.read_summary()
    if summary is not None:
        check_finished(folder.path, records, summary)
    if not records:
        raise UserError(f"{folder.path}: the run has no metrics yet; run `yoco-u train` first")
    environment = read_json(folder.environment, Environment, Environment()).model_dump(exclude_unset=True)
    return Run(folder.path, config, records, environment, read_samples(folder.path))


def read_samples(folder: Path, say: Say | None = None) -> list[dict[str, Any]]:
    """The texts that a run's model wrote; none if there is no file.

    Args:
        say: given by who writes the file anew then. Without it a damaged file is an error.

    Raises:
        UserError: if the file is damaged.
    """
    return [sample.model_dump() for sample in read_json(folder / SAMPLES, list[_Sample], [], say)]


def _was_run(folder: Path) -> bool:
    """Whether a folder without a mark holds a run, as one of an earlier version does."""
    try:
        read_run_config(folder)
    except UserError:
        return False
    return any((folder / name).exists() for name in (".lock", METRICS, "environment.json"))


def read_run_config(path: str | os.PathLike[str]) -> RunConfig:
    """The resolved config of a run folder.

    Raises:
        UserError: if the folder holds no run.
    """
    file = RunFolder(Path(path)).config
    if not file.is_file():
        raise UserError(f"{path}: no run here (config.yaml is missing); give a folder that `yoco-u train` wrote")
    return parse(RunConfig, load_yaml(file), str(file), written=True)


def has_special_tokens(path: str | os.PathLike[str]) -> bool:
    """Whether texts that spell special tokens have them as such in the dataset of a run.

    The run's config says it, or the run has noted it. For a run of an earlier version the dataset says it; where that is gone,
    texts are taken to spell none.

    Raises:
        UserError: if the folder holds no run, or its dataset is damaged.
    """
    run, config = RunFolder(Path(path)), read_run_config(path)
    if config.data is not None:
        return config.data.special_tokens
    starts = read_json(run.environment, Environment, Environment(), lambda _: None).starts
    noted = next((start.special_tokens for start in starts if start.special_tokens is not None), None)
    if noted is not None:
        return noted
    try:
        dataset = run.paths.dataset(config.dataset)
    except UserError:  # it is not there
        return False
    return DatasetIndex.load(dataset).config.special_tokens


def run_dataset(path: str | os.PathLike[str]) -> Path:
    """The folder of the dataset that a run is trained on, from whatever folder this is called.

    Raises:
        UserError: if the folder holds no run, or the dataset is not there any more, or another one is in its place.
    """
    run = RunFolder(Path(path))
    found = run.paths.dataset(read_run_config(path).dataset)
    run.check_contents({"dataset": DatasetIndex.load(found).digest})
    return found
