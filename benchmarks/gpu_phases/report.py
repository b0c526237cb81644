"""What all phases have found: one JSON file, and one table beside the targets."""

import re
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from gpu_phases import targets
from gpu_phases.conductor import PHASES, Conductor
from gpu_phases.record import Figure, Record
from yoco_u.files import GENERATOR, check_result, write_result, write_text
from yoco_u.folders import claim
from yoco_u.formatting import context_label, number

Figures = dict[str, Figure]
Row = tuple[str, float | None, float | None, float | None, float | None]


def check(out: Path, results: Path) -> None:
    """Claim the folder of the phases' files, and check, before anything is measured, that results may be written.

    Raises:
        UserError: if one of the folders holds files of somebody else in their places.
        OSError: if one of them cannot be written to.
    """
    claim(out, "gpu-benchmark", lambda folder: any(Record(folder / f"{phase.name}.json").figures for phase in PHASES))
    for path in (results / "gpu-unknown.json", *results.glob("gpu-*")):
        check_result(path)


def write(conductor: Conductor, results: Path) -> Path:
    """Write what is known so far to `gpu-CARD.json`, and the profile beside it as text.

    Returns:
        The path of the JSON file.
    """
    phases = {phase.name: conductor.record(phase.name) for phase in PHASES}
    environment = phases["machine"].figures.get("environment", {})
    card = re.sub(r"[^a-z0-9]+", "-", str(environment.get("device_name", "unknown")).lower()).strip("-")
    path = results / f"gpu-{card}.json"
    results.mkdir(parents=True, exist_ok=True)
    figures = {name: record.figures for name, record in phases.items()}
    found: dict[str, Any] = {
        "environment": environment,
        "complete": {name: record.complete for name, record in phases.items()},
        "rates": targets.measured_rates(figures["machine"])._asdict(),
        "targets": [dict(zip(_HEADINGS, row, strict=True)) for row in rows(figures)],
        "phases": figures,
    }
    write_result(path, found)
    profile = conductor.out / "profile.txt"
    if profile.exists():
        text = path.with_name(f"{path.stem}-profile.txt")
        check_result(text)
        write_text(text, f"Written by {GENERATOR}.\n\n{profile.read_text(encoding='utf-8')}")
    return path


_HEADINGS = ("what", "measured", "goal", "ceiling", "paper")


def rows(phases: dict[str, Figures]) -> list[Row]:
    """Each target with what was measured, None if it was not."""
    table, training = phases.get("tables", {}), phases.get("training", {})
    rates = targets.measured_rates(phases.get("machine", {}))
    found: list[Row] = []
    for kind, wanted in (("prefill", targets.prefill_targets(rates)), ("decode", targets.decode_targets(rates))):
        for target in wanted:
            measured = _tokens_per_second(table, "yoco_u", kind, target.context)
            what = f"{kind} at {context_label(target.context)}, tokens/s"
            found.append((what, measured, target.goal, target.ceiling, target.paper))
    ours = _training(training, "yoco_u 1.3b")
    gemm = phases.get("machine", {}).get("matrix products", {}).get("mean_flops_per_second")
    llama = _training(training, "llama 1.3b")
    share, ratio = (ours / base if ours and base else None for base in (gemm, llama))
    found.append(("training of 1.3B, share of GEMM", share, targets.TRAINING_OF_GEMM, 1.0, None))
    found.append(("training of 1.3B, over transformers' Llama", ratio, targets.TRAINING_OVER_LLAMA, None, None))
    return found


def show(phases: dict[str, Figures], console: Console) -> None:
    """Print the targets, then the paper's tables for all engines, as far as they were measured."""
    card, gemm, memory = targets.measured_rates(phases.get("machine", {}))
    title = f"YOCO-U beside the targets for {card}: {gemm / 1e12:,.3g} TFLOP/s, {memory / 1e12:,.3g} TB/s"
    table = _table(title, *_HEADINGS[:3], "of goal", "ceiling", "paper (H100)")
    for what, measured, goal, ceiling, paper in rows(phases):
        of_goal = f"{measured / goal:.0%}" if measured and goal else "-"
        table.add_row(what, number(measured), number(goal), of_goal, number(ceiling), number(paper))
    console.print(table)
    measured_figures = [f for name in ("tables", "peers") for f in phases.get(name, {}).values() if "tokens_per_second" in f]
    if measured_figures:
        engines = list(dict.fromkeys(figure["engine"] for figure in measured_figures))
        wide = _table("tokens/s (batch of a decode that is not 32)", "", *engines)
        for kind in ("prefill", "decode"):
            for context in sorted({f["context"] for f in measured_figures if f["kind"] == kind}):
                cells = [_cell(measured_figures, engine, kind, context) for engine in engines]
                wide.add_row(f"{kind} at {context_label(context)}", *cells)
        console.print(wide)
    for name, figure in phases.get("training", {}).items():
        if "tokens_per_second" in figure:
            rate, flops = figure["tokens_per_second"], figure["model_flops_per_second"]
            console.print(f"training, {name}: {rate:,.0f} tokens/s, {flops / 1e12:,.1f} TFLOP/s", highlight=False)


def _cell(figures: list[Figure], engine: str, kind: str, context: int) -> str:
    for figure in figures:
        if (figure["engine"], figure["kind"], figure["context"]) == (engine, kind, context):
            batch = f" ({figure['batch']})" if kind == "decode" and figure["batch"] != targets.BATCH else ""
            return number(figure["tokens_per_second"]) + batch
    return "-"


def _tokens_per_second(table: Figures, engine: str, kind: str, context: int) -> float | None:
    """Of a case as the target has it: a decode only in its batch."""
    for figure in table.values():
        same = (figure.get("engine"), figure.get("kind"), figure.get("context")) == (engine, kind, context)
        if same and (kind == "prefill" or figure["batch"] == targets.BATCH):
            return float(figure["tokens_per_second"])
    return None


def _training(training: Figures, model: str) -> float | None:
    """Model FLOP/s of the fastest way in which a model was trained."""
    rates = [f["model_flops_per_second"] for name, f in training.items() if name.startswith(f"{model},") and "failure" not in f]
    return max(rates, default=None)


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left", no_wrap=True)
    return table
