"""Grids without training: run folders with made-up curves, and the results that are read from them."""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from yoco_u.config import dump_yaml, parse
from yoco_u.experiment.config import Experiment
from yoco_u.experiment.grid import GridRun, expand
from yoco_u.experiment.report import write_report
from yoco_u.experiment.results import Results, read_results
from yoco_u.experiment.summary import Summary, summarize
from yoco_u.training.metrics import missing_steps

Loss = Callable[[GridRun, float], float]
"""The validation loss of a run after a share of its tokens, from 0 to 1."""

POINTS = 16


def grid(models: dict[str, Any], seeds: Sequence[int] = (0, 1, 2), data: Any = None, **settings: Any) -> Experiment:
    base = {
        "data": data,
        "architecture": {"size": "test"},
        "optimizer": {"warmup_steps": 0},
        "training": {"steps": 1600, "sequence_length": 32, "batch_rows": 4, "micro_batch_rows": 4},
    }
    experiment = {"title": "Made <up>", "base": base, "models": models, "seeds": list(seeds)} | settings
    return parse(Experiment, experiment, "grid")


def preset(name: str, **settings: Any) -> dict[str, Any]:
    plan = {key: settings.pop(key) for key in ("match", "vary", "role", "label") if key in settings}
    return {"settings": {"architecture": {"preset": name} | settings}} | plan


SPEED = {"gradient_norm": 1.0, "learning_rate": 0.01, "tokens_per_second": 100.0, "mfu": 0.5}


def write_run(run: GridRun, folder: Path, loss: Loss, done: float = 1.0) -> None:
    """A run folder as training leaves it after the share `done` of the steps."""
    target, config = folder / run.name, run.config
    target.mkdir(parents=True)
    dump_yaml(config, target / "config.yaml")
    records = []
    for number in range(1, POINTS + 1):
        step = round(config.training.steps * number / POINTS)
        if number / POINTS > done:
            break
        common = {"step": step, "tokens": step * config.tokens_per_step, "flops": config.training_flops(step)}
        records.append({"kind": "train", "loss": 3.0, "seconds": 0.5 * number} | SPEED | common)
        found = loss(run, number / POINTS)
        others = {f"loss_at_{loops}": found + 0.1 * loops for loops in config.training.evaluate_loops}
        records.append({"kind": "evaluation", "perplexity": 2.0, "bits_per_byte": 1.0, "loss": found} | others | common)
    (target / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if done == 1:
        summary = {"name": "a", "steps": step, "steps_without_metrics": missing_steps(records, step)}
        (target / "summary.json").write_text(json.dumps(summary))


def write_grid(experiment: Experiment, folder: Path, loss: Loss) -> list[GridRun]:
    runs = expand(experiment, folder)
    for run in runs:
        write_run(run, folder, loss)
    return runs


def results_of(experiment: Experiment, folder: Path, loss: Loss) -> Results:
    return read_results(write_grid(experiment, folder, loss), folder)


def report_on(experiment: Experiment, runs: Sequence[GridRun], folder: Path) -> Summary:
    """Write the report of a grid as the command does, and return what it shows."""
    summary = summarize(experiment, read_results(runs, folder))
    write_report(summary, folder)
    return summary


def noise(run: GridRun, scale: float = 0.002) -> float:
    """A small number, different for every run and the same every time."""
    return random.Random(run.name).uniform(-scale, scale)


def finals(losses: dict[str, float], spread: float = 0.002) -> Loss:
    """Curves that fall to the final loss of each model, by its name; every seed shifts all models alike."""

    def loss(run: GridRun, share: float) -> float:
        return losses[run.model] + 0.05 * run.seed + noise(run, spread) + 0.4 * (1 / share - 1) * 0.1

    return loss
