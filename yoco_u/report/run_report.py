"""The page about one run or more: comparison, curves, samples, settings and environment."""

from pathlib import Path
from typing import Any

from yoco_u.plotting import PALETTE, css_dashes
from yoco_u.report.comparison import Comparison
from yoco_u.report.page import as_yaml, render_page, write_page
from yoco_u.report.plots import loss_plot, step_plot
from yoco_u.training.run_folder import Run

_LABELS = {
    "memory_bytes": "memory",
    "validation": "validation text",
    "run": "id of the run",
    "gemm_flops_per_second": "matrix products",
}


def write_report(runs: list[Run], comparison: Comparison, target: Path, title: str | None = None) -> None:
    """Write the page to a file, whole or not at all.

    Args:
        comparison: the runs, compared.
        title: heading of the page; by default the names of the runs.

    Raises:
        UserError: if the file cannot be written.
    """
    write_page(target, render(runs, comparison, title or ", ".join(run.name for run in comparison.runs)))


def render(runs: list[Run], comparison: Comparison, title: str) -> str:
    """The HTML of the page."""
    return render_page(
        "report.html.jinja",
        title=title,
        comparison=comparison,
        table=comparison.table(),
        numeric={label for label, _ in comparison.table()} - {"architecture"},
        styles=[{"colour": i % len(PALETTE), "dash": css_dashes(i)} for i in range(len(runs))],
        without_lines=[own.name for own, run in zip(comparison.runs, runs, strict=True) if not run.config.loss_is_of_text],
        loss_plots=[
            ("Loss against tokens", loss_plot(runs, "tokens", "training tokens")),
            ("Loss against FLOPs", loss_plot(runs, "flops", "training FLOPs")),
        ],
        step_plots=[
            ("Learning rate", step_plot(runs, "learning_rate", "learning rate")),
            ("Gradient norm", step_plot(runs, "gradient_norm", "norm before clipping", smooth=True, log=True)),
            ("Throughput", step_plot(runs, "tokens_per_second", "tokens/s", smooth=True)),
        ],
        samples=_samples(runs, [run.name for run in comparison.runs]),
        settings=[(own.name, as_yaml(run.config)) for own, run in zip(comparison.runs, runs, strict=True)],
        environment=_environment(runs),
    )


def _samples(runs: list[Run], names: list[str]) -> list[tuple[str, list[tuple[int, str, str]]]]:
    """For each prompt, the number and name of every run that continued it, with its text."""
    prompts = dict.fromkeys(sample["prompt"] for run in runs for sample in run.samples)
    return [
        (
            prompt,
            [
                (i, names[i], sample["text"])
                for i, run in enumerate(runs)
                for sample in run.samples
                if sample["prompt"] == prompt
            ],
        )
        for prompt in prompts
    ]


def _environment(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """Rows of a table: a label, and one text for each run, or a single one where all runs agree."""
    flat = [{key: value for key, value in run.environment.items() if not isinstance(value, (dict, list))} for run in runs]
    keys = dict.fromkeys(key for found in flat for key in found)
    rows = []
    for key in keys:
        texts = [_text(key, found.get(key)) for found in flat]
        rows.append((_LABELS.get(key, key.replace("_", " ")), texts[:1] if len(set(texts)) == 1 else texts))
    return rows


def _text(key: str, value: Any) -> str:
    if key == "memory_bytes" and isinstance(value, int):
        return f"{value / 2**30:.1f} GiB"
    if key == "gemm_flops_per_second" and isinstance(value, float):
        return f"{value / 1e9:,.0f} GFLOP/s"
    if key in ("validation", "run") and isinstance(value, str):
        return value[:12]
    return "" if value is None else str(value)
