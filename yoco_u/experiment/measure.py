"""Measures of a trained model besides its loss: angular distances, needles found in long texts, answers to generated tasks."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel

from yoco_u.analysis import AngularDistances, angular_distances, split_batches
from yoco_u.config import Config
from yoco_u.data import DatasetIndex, DocumentEncoder, load_tokenizer, prepare
from yoco_u.data.synthetic import SyntheticCorpus, is_synthetic, read_entry
from yoco_u.device import find_device
from yoco_u.errors import UserError
from yoco_u.evaluation.held_out import validation_split
from yoco_u.evaluation.levels import LevelScore, score_levels
from yoco_u.evaluation.needle_grid import NeedleScore, NeedleSettings, check_needles, needle_grid
from yoco_u.evaluation.needles import NOISE_KINDS, load_haystack
from yoco_u.experiment.config import AngularMeasure, Measures, Samples, TaskMeasure
from yoco_u.files import Say, read_json, write_json
from yoco_u.inference import LLM
from yoco_u.inference.outputs import check_outputs
from yoco_u.loading import load_model
from yoco_u.training.config import RunConfig
from yoco_u.training.run_folder import SAMPLES, RunFolder, read_run_config, read_samples

MEASURES = "measures.json"


R = TypeVar("R")


class _Taken(BaseModel, Generic[R]):
    settings: dict[str, Any]
    result: R


class Taken(BaseModel, extra="forbid"):
    """The results of a model, by the name of the measure."""

    angular: AngularDistances | None = None
    needles: list[NeedleScore] | None = None
    tasks: list[LevelScore] | None = None

    def results(self) -> dict[str, Any]:
        """Those that were taken, as plain data."""
        return {name: one for name, one in self.model_dump().items() if one is not None}


class _Measures(BaseModel):
    angular: _Taken[AngularDistances] | None = None
    needles: _Taken[list[NeedleScore]] | None = None
    tasks: _Taken[list[LevelScore]] | None = None


def check_measures(measures: Measures, config: RunConfig, progress: bool) -> None:
    """Refuse, before any training, measures that would fail on the trained models.

    Whether needles fit into a length depends on the tokenizer, so the dataset is prepared here if it is not there yet.

    Args:
        config: of any run of the grid; all runs read one dataset.
        progress: whether to show the progress of preparing the dataset.

    Raises:
        UserError: if needles cannot be made to the lengths that are asked for, or there is no generated task to ask.
    """
    if measures.tasks is not None:
        _corpora(config)
    if measures.needles is not None:
        path = Path(config.dataset)
        index = DatasetIndex.load(path) if config.data is None else prepare(config.data, path, progress)
        check_needles(measures.needles, DocumentEncoder(load_tokenizer(index.tokenizer)), _haystack(config, measures.needles))


def measure(run: Path, measures: Measures, say: Say) -> None:
    """Measure the model in a run folder, and keep the results in its measures.json.

    A measure that is there already, taken with the same settings, is not taken again.

    Args:
        say: told if the file was damaged, so that all measures are taken again.
    """
    ways: Mapping[str, tuple[Config | None, Callable[[Path, Any], Any]]] = {
        "angular": (measures.angular, _angular),
        "needles": (measures.needles, _needles),
        "tasks": (measures.tasks, _tasks),
    }
    found = _read(run, say)
    for name, (settings, take) in ways.items():
        asked = None if settings is None else settings.model_dump(mode="json")
        if asked is not None and found.get(name, {}).get("settings") != asked:
            found[name] = {"settings": asked, "result": take(run, settings)}
            write_json(run / MEASURES, found)


def read_measures(run: Path) -> dict[str, Any]:
    """The results in a run folder by the name of the measure; empty if nothing was measured."""
    return {name: found["result"] for name, found in _read(run).items()}


def write_samples(run: Path, samples: Samples, say: Say) -> None:
    """Let the model in a run folder continue the prompts, and keep the texts in its samples.json.

    Texts that are there already, for the same prompts and sampling parameters, are not written again.

    Args:
        say: told if the file was damaged, so that all texts are written again.
    """
    settings = samples.sampling.model_dump(mode="json")
    found = read_samples(run, say)
    asked = [(prompt, settings) for prompt in samples.prompts for _ in range(samples.sampling.n)]
    if [(sample["prompt"], sample.get("settings")) for sample in found] == asked:
        return
    requests = LLM(run, dtype="float32").generate(samples.prompts, samples.sampling)
    check_outputs(requests)
    written = [
        {"prompt": prompt, "text": output.text, "tokens": len(output.token_ids), "settings": settings}
        for prompt, request in zip(samples.prompts, requests, strict=True)
        for output in request.outputs
    ]
    write_json(run / SAMPLES, written)


def _read(run: Path, say: Say | None = None) -> dict[str, dict[str, Any]]:
    taken = read_json(run / MEASURES, _Measures, _Measures(), say)
    return {name: one for name, one in taken.model_dump().items() if one is not None}


def _angular(run: Path, settings: AngularMeasure) -> dict[str, Any]:
    config = read_run_config(run)
    validation = validation_split(run, config.training.sequence_length)
    model, _ = load_model(run, find_device(config.training.device))
    return asdict(angular_distances(model, split_batches(validation, settings.tokens)))


def _needles(run: Path, settings: NeedleSettings) -> list[dict[str, Any]]:
    haystack = _haystack(read_run_config(run), settings, RunFolder(run).paths.find)
    llm = LLM(run, dtype="float32", max_model_len=max(settings.lengths))
    return [score.model_dump() for score in needle_grid(llm, settings, haystack)]


def _tasks(run: Path, settings: TaskMeasure) -> list[dict[str, Any]]:
    config = read_run_config(run)
    model, tokenizer = load_model(run, find_device(config.training.device))
    return [score.model_dump() for score in score_levels(model, tokenizer, _corpora(config), settings.answers)]


def _corpora(config: RunConfig) -> list[SyntheticCorpus]:
    """The generated tasks that a run is trained on."""
    entries = config.data.corpus if config.data is not None else ()
    if not entries or not all(map(is_synthetic, entries)):
        raise UserError(
            f"measures.tasks asks for generated tasks, but the corpus is {', '.join(entries) or 'not said'}; set data.corpus "
            "to tasks such as synthetic:p-hop, or drop the measure"
        )
    return [read_entry(entry) for entry in entries]


def _haystack(config: RunConfig, settings: NeedleSettings, find: Callable[[str], str] = str) -> str | None:
    """The text that needles are hidden in, which is the run's own corpus; None if all kinds are hidden in noise.

    Args:
        find: says how an entry of the corpus leads to its place from the working folder.
    """
    if set(settings.kinds) <= set(NOISE_KINDS):
        return None
    return load_haystack([find(entry) for entry in config.data.corpus] if config.data else ["stdlib"])
