"""Where the paths in a run's config lead, from whatever folder a command is called: each start of a run notes where it was."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from yoco_u.data.config import DataConfig
from yoco_u.data.corpus import is_path
from yoco_u.data.index import INDEX, DatasetIndex
from yoco_u.data.paths import matches
from yoco_u.data.places import absolute
from yoco_u.errors import UserError
from yoco_u.files import read_json
from yoco_u.training.config import RunConfig


class StartPaths(BaseModel):
    """Where a run was started.

    Attributes:
        working_folder: in which relative paths of the config begin.
        run_folder: where the run was.
        dataset: its place as the config of this start spells it.
    """

    working_folder: str
    run_folder: str
    dataset: str

    @classmethod
    def now(cls, run: Path, dataset: str) -> "StartPaths":
        return cls(working_folder=absolute(os.curdir), run_folder=absolute(str(run)), dataset=dataset)

    def places(self, path: str, run: Path) -> Iterator[str]:
        """Where a path may lead: where it led then, or, if that was moved along with the run, as far from it as then."""
        then = os.path.join(self.working_folder, os.path.expanduser(path))
        yield then
        yield os.path.normpath(os.path.join(absolute(str(run)), os.path.relpath(then, self.run_folder)))


class Start(BaseModel, extra="allow"):
    """What a run ran on, as `yoco_u.device.environment` tells it; starts of earlier versions have no paths.

    Attributes:
        special_tokens: whether texts of the dataset have the special tokens that they spell.
        run: the run's id, see `yoco_u.training.ownership`.
        validation: what tells the text that the run is evaluated on from others, see `yoco_u.training.validation.text_digest`.
    """

    paths: StartPaths | None = None
    special_tokens: bool | None = None
    run: str | None = None
    validation: str | None = None


class Environment(Start):
    """The contents of `environment.json`: the first start, and the later ones."""

    resumed: list[Start] = []

    @property
    def starts(self) -> list[Start]:
        """The oldest first."""
        return [self, *self.resumed]

    @property
    def start_paths(self) -> list[StartPaths]:
        """Those of all starts, the newest first."""
        return [start.paths for start in reversed(self.starts) if start.paths is not None]


class RunPaths:
    """The paths in the config of the run in a folder. Where its `environment.json` is damaged, it says nothing of them.

    Args:
        file: `environment.json`.
    """

    def __init__(self, run: Path, file: Path) -> None:
        self._run, self._starts = run, read_json(file, Environment, Environment(), lambda _: None).start_paths

    def places(self, path: str) -> Sequence[str]:
        """Where a path in the config may lead, the likeliest place first; into the working folder, if no start says another."""
        return [place for start in self._starts for place in start.places(path, self._run)] or [path]

    def find(self, path: str) -> str:
        """A path in the config as it leads to its place from the working folder; unchanged if that holds nothing, or for names.

        Args:
            path: an entry of a corpus, or the folder of a model.
        """
        if not is_path(path):
            return path
        return next((place for place in self.places(path) if os.path.lexists(place) or matches(Path(place))), path)

    def dataset(self, spelled: str) -> Path:
        """The folder of the run's dataset.

        Args:
            spelled: as in the config.

        Raises:
            UserError: if it is not where it was, nor moved along with the run, nor where the config leads from the working
                folder.
        """
        tried = self._datasets(spelled)
        found = next(filter(_is_dataset, tried), None)
        if found is None:
            where = " or ".join(tried)
            mend = f"put it there, or call this from the folder in which {spelled} is"
            raise UserError(f"{self._run}: its dataset is not in {where} ({INDEX} is missing); {mend}")
        return Path(found)

    def located(self, config: RunConfig, old: RunConfig) -> RunConfig:
        """The config of a run that goes on, whose paths lead where they led before, whatever the working folder is now.

        Args:
            old: as the run has noted it. What is spelled as there leads to the same place as then, if that is still there.
        """
        changed: dict[str, Any] = {}
        if config.dataset == old.dataset and (found := next(filter(_is_dataset, self._datasets(config.dataset)), None)):
            changed["dataset"] = config.dataset if found == absolute(config.dataset) else found
            if config.data is not None and config.data == old.data and DatasetIndex.load(found).config != config.data:
                changed["data"] = self._located_data(config.data)  # which is compared, but not read any more
        if config.start_from is not None and config.start_from == old.start_from:
            changed["start_from"] = self.find(config.start_from)
        if (own := config.distillation) is not None and (before := old.distillation) is not None:
            teacher = self.find(own.teacher) if own.teacher == before.teacher else own.teacher
            changed["distillation"] = own.model_copy(update={"teacher": teacher})
        return config.model_copy(update=changed)

    def _located_data(self, data: DataConfig) -> DataConfig:
        changed: dict[str, Any] = {"corpus": tuple(map(self.find, data.corpus))}
        if data.validation_corpus is not None:
            changed["validation_corpus"] = tuple(map(self.find, data.validation_corpus))
        if data.tokenizer is not None:
            changed["tokenizer"] = self.find(data.tokenizer)
        return data.model_copy(update=changed)

    def _datasets(self, spelled: str) -> list[str]:
        """Where the run's dataset may be, the likeliest place first."""
        places = [place for start in self._starts for place in start.places(start.dataset, self._run)]
        return list(dict.fromkeys(absolute(place) for place in [*places, spelled]))


def _is_dataset(folder: str) -> bool:
    return os.path.lexists(os.path.join(folder, INDEX))
