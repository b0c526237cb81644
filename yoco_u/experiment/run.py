"""Trains the runs of a grid one after another. Several processes may share a grid: no run is trained by two of them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from filelock import FileLock

from yoco_u.config import dump_yaml
from yoco_u.data import prepare
from yoco_u.data.index import INDEX, DatasetIndex
from yoco_u.errors import UserError
from yoco_u.experiment.config import Experiment, Measures
from yoco_u.experiment.grid import GridRun
from yoco_u.experiment.measure import check_measures, measure, write_samples
from yoco_u.files import Say, check_result
from yoco_u.folders import claim
from yoco_u.training import RunFolderTaken, TrainingDiverged, train
from yoco_u.training.distributed import distributed_session
from yoco_u.training.run_folder import RunFolder

REPORT = "report"
"""File name of the report in the experiment's folder, without the endings .html, .json and .png."""

_CONFIG, _LOCK = "experiment.yaml", ".lock"


def train_runs(
    experiment: Experiment,
    runs: Sequence[GridRun],
    folder: Path,
    chosen: Sequence[GridRun] | None = None,
    progress: bool = True,
    say: Say = lambda _: None,
    datasets: Mapping[Path, str | None] | None = None,
) -> list[GridRun]:
    """Train every run that is not finished, each in `folder`/name; then let its model write the samples, and measure it.

    A run that another process is training or measuring, or whose loss became non-finite, is passed over.

    Args:
        runs: all runs of the grid, which have to be trained on one dataset.
        folder: of the experiment, see `claim_experiment`.
        chosen: those to train; all by default.
        say: called with a line of text before each run, and where one is passed over.
        datasets: digests of those that other runs of the grid were trained on, by where that is noted.

    Returns:
        The runs that are still not finished.

    Raises:
        UserError: as `train` does; also if a folder holds a run of other settings, runs were trained on another dataset than
            there is now, or the measures cannot be taken.
    """
    chosen = runs if chosen is None else chosen
    with FileLock(folder / _LOCK):
        dump_yaml(experiment, folder / _CONFIG)
    if experiment.measures is not None and chosen:
        with distributed_session(chosen[0].config.training.device) as distributed:
            distributed.on_main(partial(_check_measures, experiment.measures, chosen, folder, progress))
    unfinished = []
    for number, run in enumerate(chosen, start=1):
        target, steps = folder / run.name, run.config.training.steps
        with distributed_session(run.config.training.device) as distributed:
            passed_over = distributed.on_main(partial(has_diverged, target))
            if not passed_over:
                distributed.on_main(partial(_check_dataset, run, runs, folder, progress, datasets or {}))
        if passed_over:
            say(f"{run.name}: the loss was not finite; passed over (remove {target} to try again)")
            unfinished.append(run)
            continue
        say(f"run {number} of {len(chosen)}: {run.name} ({steps:,} steps)")
        torch.compiler.reset()  # each run compiles its own blocks; those of all runs together would exceed torch's limit
        try:
            train(run.config, target, progress=progress)
            with distributed_session(run.config.training.device) as distributed:
                distributed.on_main(partial(_sample_and_measure, target, experiment, say))
        except (RunFolderTaken, TrainingDiverged) as problem:
            say(f"{problem}; going on with the next run")
            unfinished.append(run)
    return [run for run in unfinished if not is_finished(folder / run.name)]  # another process may have finished some by now


def claim_experiment(folder: Path, sizes: Iterable[str] = ()) -> None:
    """Make the folder of an experiment, before anything is computed.

    Args:
        sizes: those of the grid, which have a report each.

    Raises:
        UserError: if it holds anything but an experiment, or something of somebody else where the report goes.
    """
    claim(folder, "experiment", lambda old: all((old / name).is_file() for name in (_CONFIG, _LOCK)))
    check_report(folder, sizes)


def check_report(folder: Path, sizes: Iterable[str] = ()) -> None:
    """Check, before anything is computed, that the report can be written; arguments and errors as of `claim_experiment`."""
    for place in (folder, *(folder / size for size in sizes)):
        for ending in ("html", "json", "png"):
            check_result(place / f"{REPORT}.{ending}")


def _sample_and_measure(folder: Path, experiment: Experiment, say: Say) -> None:
    """As one process at a time does, so that no measure is taken twice, or lost where another one is written."""
    with RunFolder(folder).hold():
        if experiment.samples is not None:
            write_samples(folder, experiment.samples, say)
        if experiment.measures is not None:
            measure(folder, experiment.measures, say)


def _check_measures(measures: Measures, runs: Iterable[GridRun], folder: Path, progress: bool) -> None:
    """As `check_measures` does, by the first run that is not finished, if there is one."""
    first = next((run for run in runs if not is_finished(folder / run.name)), None)
    if first is not None:
        check_measures(measures, first.config, progress)


def _check_dataset(
    run: GridRun, runs: Iterable[GridRun], folder: Path, progress: bool, datasets: Mapping[Path, str | None]
) -> None:
    """Refuse, before a run is trained, a dataset that is not that of the others, as one that is prepared anew may be."""
    target = folder / run.name
    if is_finished(target):
        return
    known = {**datasets, **{folder / other.name: dataset_of(folder / other.name) for other in runs}}
    if not any(known.values()):
        return
    config = RunFolder(target).located(run.config)
    dataset = Path(config.dataset)
    if config.data is not None and not (dataset / INDEX).exists():
        prepare(config.data, dataset, progress)
    if (dataset / INDEX).exists():
        known[dataset] = DatasetIndex.load(dataset).digest
    check_one_dataset(known)


def check_one_dataset(digests: Mapping[Path, str | None]) -> None:
    """Check that the runs of a grid were trained on one dataset, as far as they have noted it.

    Args:
        digests: of the dataset of each, by the folder of the run, or by that of a dataset.

    Raises:
        UserError: if two differ.
    """
    found = {digest: place for place, digest in digests.items() if digest is not None}
    if len(found) > 1:
        one, other = sorted(found.values())[:2]
        raise UserError(
            f"{one} and {other}: the dataset was another one for each; bring it back, or begin the grid in a new folder"
        )


def dataset_of(folder: Path) -> str | None:
    """The digest of the dataset that the run in this folder noted; None if it has not."""
    return RunFolder(folder).noted("dataset")


def is_finished(folder: Path) -> bool:
    """Whether the run in this folder was trained to its end."""
    return RunFolder(folder).read_summary() is not None


def has_diverged(folder: Path) -> bool:
    """Whether the run in this folder stopped because a loss or a gradient was not finite, and has not gone beyond since."""
    checkpoints = folder / "checkpoints"
    diverged, saved = _last_step(checkpoints, r"non-finite-step-(\d+)(?:-\d+)?"), _last_step(checkpoints, r"step-(\d+)")
    return diverged is not None and diverged >= (saved or 0) and not is_finished(folder)


def _last_step(checkpoints: Path, names: str) -> int | None:
    """The last step of which there is a checkpoint, by the pattern of the names of complete ones; None if there is none."""
    found = (re.fullmatch(names, path.name) for path in checkpoints.glob("*"))
    return max((int(name[1]) for name in found if name), default=None)
