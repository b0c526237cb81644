"""Cells trained one after another. Several processes may share a grid: none trains a cell that another one has begun."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from filelock import FileLock

from yoco_u.analysis.experiment.config import Experiment, Samples
from yoco_u.analysis.experiment.plan import Cell
from yoco_u.files import write_json
from yoco_u.inference import LLM
from yoco_u.runs import SAMPLES, read_json
from yoco_u.training import RunFolderTaken, TrainingDiverged, train
from yoco_u.training.distributed import distributed_session
from yoco_u.typed import dump_yaml

Say = Callable[[str], None]


def run_cells(
    experiment: Experiment,
    cells: Sequence[Cell],
    folder: Path,
    progress: bool = True,
    say: Say = lambda _: None,
) -> list[Cell]:
    """Train every cell that is not finished, each in `folder`/name, and let its model write the samples.

    A cell that another process is training, or whose loss is not finite, is passed over.

    Args:
        say: is told what comes next.

    Returns:
        The cells that are not finished now.

    Raises:
        UserError: as `train` does; also if a folder holds a run of other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        dump_yaml(experiment, folder / "experiment.yaml")
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
        if experiment.samples is not None:
            with distributed_session(cell.config.training.device) as distributed:
                distributed.on_main(partial(write_samples, target, experiment.samples))
    return unfinished


def has_diverged(run: Path) -> bool:
    """Whether training stopped there because a loss or gradient was not finite."""
    return any((run / "checkpoints").glob("non-finite-step-*"))


def write_samples(run: Path, samples: Samples) -> None:
    """Let the model of a run write, and keep it in samples.json; nothing happens if the same was asked before."""
    settings = samples.sampling.model_dump(mode="json")
    found = read_json(run / SAMPLES, [])
    if [(sample["prompt"], sample["settings"]) for sample in found] == [(prompt, settings) for prompt in samples.prompts]:
        return
    requests = LLM(run, dtype="float32").generate(samples.prompts, samples.sampling)
    written = [
        {"prompt": prompt, "text": output.text, "tokens": len(output.token_ids), "settings": settings}
        for prompt, request in zip(samples.prompts, requests, strict=True)
        for output in request.outputs
    ]
    write_json(run / SAMPLES, written)
