"""The folder of a run: what is where, and that only one run at a time writes there."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from yoco_u.errors import UserError
from yoco_u.files import fresh_folder, publish, write_json
from yoco_u.training.checkpoint import first_difference
from yoco_u.training.config import RunConfig
from yoco_u.training.distributed import Distributed
from yoco_u.typed import dump_yaml, load_yaml, parse


class RunFolderTaken(UserError):  # noqa: N818
    """Another process trains there."""


class RunFolder:
    """Paths and small files of a run; written by rank 0 alone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config, self.summary, self.environment = path / "config.yaml", path / "summary.json", path / "environment.json"
        self.checkpoints, self.tokenizer, self.model = path / "checkpoints", path / "tokenizer", path / "model"

    @contextmanager
    def claim(self, config: RunConfig, distributed: Distributed) -> Iterator[None]:
        """Hold the folder for a run of `config`, new or continued. The lock goes with the process, however it ends.

        Raises:
            UserError: if it has a run of another config; `RunFolderTaken` if another process holds it.
        """
        lock = FileLock(self.path / ".lock")

        def enter() -> None:
            if self.path.exists() and not self.path.is_dir():
                raise UserError(f"{self.path}: is a file; name a folder for the run")
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise RunFolderTaken(
                    f"{self.path}: another process is training there; wait for it, or choose another folder"
                ) from None
            if self.config.exists() and self._has_begun():
                self.check_same(config)
            else:
                shutil.rmtree(self.tokenizer, ignore_errors=True)
                dump_yaml(config, self.config)

        try:
            distributed.on_main(enter)
            yield
        finally:
            lock.release()

    def _has_begun(self) -> bool:
        """Whether a step was taken: a run that failed before, for want of a corpus say, may begin with another config."""
        return self.checkpoints.exists() or (self.path / "metrics.jsonl").exists()

    def check_same(self, config: RunConfig) -> None:
        """Raise a UserError if the folder holds a run of another config, naming the first key that differs.

        Where the dataset lies does not count, only what it is made from, if that is known: runs may be moved, or named by
        another path.
        """
        old = parse(RunConfig, load_yaml(self.config), str(self.config))
        if (old.data and config.data) or Path(old.dataset).resolve() == Path(config.dataset).resolve():
            old = old.model_copy(update={"dataset": config.dataset})
        difference = first_difference(old, config)
        if difference is not None:
            key, before, now = difference
            raise UserError(
                f"{self.path}: holds a run with {key} = {before!r}, now {now!r}; "
                "choose another folder, or run it with the config it began with"
            )

    def read_summary(self) -> dict[str, Any] | None:
        """The summary of a finished run; None of one that is not."""
        return json.loads(self.summary.read_text(encoding="utf-8")) if self.summary.exists() else None

    def copy_tokenizer(self, source: Path) -> None:
        if not self.tokenizer.exists():
            shutil.copytree(source, fresh_folder(self.tokenizer), dirs_exist_ok=True)
            publish(self.tokenizer)

    def note_start(self, step: int, environment: dict[str, Any]) -> None:
        """Keep the environment of the first start, and a list of those that went on from a checkpoint."""
        if step == 0 or not self.environment.exists():
            write_json(self.environment, environment | {"resumed": []})
            return
        first = json.loads(self.environment.read_text(encoding="utf-8"))
        first["resumed"].append({"step": step} | environment)
        write_json(self.environment, first)
