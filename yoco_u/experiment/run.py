"""Cells trained one after another. Several processes may share a grid: none trains a cell that another one has begun."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from filelock import FileLock

from yoco_u.config import dump_yaml
from yoco_u.experiment.config import Experiment
from yoco_u.experiment.grid import GridRun
from yoco_u.experiment.measure import check_measures, measure, write_samples
from yoco_u.training import RunFolderTaken, TrainingDiverged, train
from yoco_u.training.distributed import distributed_session

Say = Callable[[str], None]


def run_cells(
    experiment: Experiment,
    cells: Sequence[GridRun],
    folder: Path,
    progress: bool = True,
    say: Say = lambda _: None,
) -> list[GridRun]:
    """Train every cell that is not finished, each in `folder`/name, let its model write the samples, and measure it.

    A cell that another process is training, or whose loss is not finite, is passed over.

    Args:
        say: is told what comes next.

    Returns:
        The cells that are not finished now.

    Raises:
        UserError: as `train` does; also if a folder holds a run of other settings, or the measures cannot be taken.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        dump_yaml(experiment, folder / "experiment.yaml")
    next_cell = next((cell for cell in cells if not is_finished(folder / cell.name)), None)
    if experiment.measures is not None and next_cell is not None:
        with distributed_session(next_cell.config.training.device) as distributed:
            distributed.on_main(partial(check_measures, experiment.measures, next_cell.config, progress))
    unfinished = []
    for number, cell in enumerate(cells, start=1):
        target, steps = folder / cell.name, cell.config.training.steps
        if has_diverged(target):
            say(f"{cell.name}: the loss was not finite; passed over (remove {target} to try again)")
            unfinished.append(cell)
            continue
        say(f"cell {number} of {len(cells)}: {cell.name} ({steps:,} steps)")
        torch.compiler.reset()  # each cell compiles its own blocks; those of all together would exceed torch's limit
        try:
            train(cell.config, target, progress=progress)
        except (RunFolderTaken, TrainingDiverged) as problem:
            say(f"{problem}; going on with the next cell")
            unfinished.append(cell)
            continue
        with distributed_session(cell.config.training.device) as distributed:
            distributed.on_main(partial(_look_at, target, experiment))
    return [cell for cell in unfinished if not is_finished(folder / cell.name)]


def _look_at(run: Path, experiment: Experiment) -> None:
    if experiment.samples is not None:
        write_samples(run, experiment.samples)
    if experiment.measures is not None:
        measure(run, experiment.measures)


def is_finished(run: Path) -> bool:
    return (run / "summary.json").exists()


def has_diverged(run: Path) -> bool:
    """Whether training stopped there because a loss or gradient was not finite."""
    return any((run / "checkpoints").glob("non-finite-step-*"))
