"""One self-contained HTML page about one run or more."""

import os
from pathlib import Path
from typing import Any

import yaml

from yoco_u.errors import UserError
from yoco_u.plotting import PALETTE, dashes
from yoco_u.report.comparison import Comparison, compare
from yoco_u.report.page import render_page, write_page
from yoco_u.report.plots import loss_plot, step_plot
from yoco_u.training.run_folder import Run

_LABELS = {"memory_bytes": "memory", "gemm_flops_per_second": "matrix products"}


def write_report(runs: list[Run], out: str | os.PathLike[str], title: str | None = None) -> Comparison:
    """Write the page beside, then rename.

    Args:
        title: by default the names of the runs.

    Raises:
        UserError: if a run has no training step, or the file cannot be written.
    """
    target = Path(out)
    for run in runs:
        if not run.kind("train"):
            raise UserError(f"{run.folder}: the run has no training step yet; run `yoco-u train` first")
    figures = compare(runs)
    write_page(target, render(runs, figures, title or ", ".join(run.config.name for run in runs)))
    return figures


def render(runs: list[Run], figures: Comparison, title: str) -> str:
    """The page as text."""
    return render_page(
        "report.html.jinja",
        title=title,
        figures=figures,
        table=figures.table(),
        numeric={label for label, _ in figures.table()} - {"architecture"},
        styles=[{"colour": i % len(PALETTE), "dash": dashes(i)} for i in range(len(runs))],
        loss_plots=[
            ("Loss against tokens", loss_plot(runs, "tokens", "training tokens")),
            ("Loss against FLOPs", loss_plot(runs, "flops", "training FLOPs")),
        ],
        step_plots=[
            ("Learning rate", step_plot(runs, "learning_rate", "learning rate")),
            ("Gradient norm", step_plot(runs, "gradient_norm", "norm before clipping", smooth=True, log=True)),
            ("Throughput", step_plot(runs, "tokens_per_second", "tokens/s", smooth=True)),
        ],
        samples=_samples(runs),
        settings=[(run.config.name, _yaml(run.config.model_dump(mode="json"))) for run in runs],
        environment=_environment(runs),
    )


def _samples(runs: list[Run]) -> list[tuple[str, list[tuple[int, str, str]]]]:
    """By prompt: the number, name and text of each run that answered it."""
    prompts = dict.fromkeys(sample["prompt"] for run in runs for sample in run.samples)
    return [
        (
            prompt,
            [
                (i, run.config.name, sample["text"])
                for i, run in enumerate(runs)
                for sample in run.samples
                if sample["prompt"] == prompt
            ],
        )
        for prompt in prompts
    ]


def _environment(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """Rows of a table: one cell where all runs agree, one a run where they differ."""
    flat = [{key: value for key, value in run.environment.items() if not isinstance(value, (dict, list))} for run in runs]
    keys = dict.fromkeys(key for found in flat for key in found)
    rows = []
    for key in keys:
        cells = [_cell(key, found.get(key)) for found in flat]
        rows.append((_LABELS.get(key, key.replace("_", " ")), cells[:1] if len(set(cells)) == 1 else cells))
    return rows


def _cell(key: str, value: Any) -> str:
    if key == "memory_bytes" and isinstance(value, int):
        return f"{value / 2**30:.1f} GiB"
    if key == "gemm_flops_per_second" and isinstance(value, float):
        return f"{value / 1e9:,.0f} GFLOP/s"
    return "" if value is None else str(value)


def _yaml(data: dict[str, Any]) -> str:
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)
