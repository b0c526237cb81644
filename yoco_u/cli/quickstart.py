"""`yoco-u quickstart`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from yoco_u.cli.output import note, print_json, stops_cleanly, table_of
from yoco_u.cli.settings import PACKAGED
from yoco_u.errors import UserError

if TYPE_CHECKING:
    from yoco_u.experiment.grid import GridRun
    from yoco_u.report.comparison import Comparison


def quickstart(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings to change in every run, such as training.steps=100."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for everything.")] = Path("runs/quickstart"),
    config: Annotated[Path, typer.Option("--config", help="Another experiment to run.", show_default=False)] = PACKAGED
    / "quickstart.yaml",
    json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON, without progress.")] = False,
) -> None:
    """Train YOCO-U and its twin without the loop, compare them and write a report.

    Needs nothing but this command: the corpus is the Python standard library's
    own sources. YOCO is trained twice, for as many steps as YOCO-U and for as
    many FLOPs. What is finished already is used again; an interrupted run
    continues.

    [bold]Examples[/bold]

      yoco-u quickstart

      yoco-u quickstart training.steps=200 --out runs/short
    """
    from yoco_u.config import load_yaml, parse
    from yoco_u.experiment.config import Experiment
    from yoco_u.experiment.grid import expand
    from yoco_u.experiment.run import claim_experiment, is_finished, train_runs
    from yoco_u.report.comparison import compare
    from yoco_u.report.run_report import write_report
    from yoco_u.training.run_folder import read_run

    experiment = parse(Experiment, load_yaml(config), str(config))
    runs = expand(experiment, out, overrides or [])
    claim_experiment(out, experiment.sizes)
    say: Callable[[str], None] = (lambda _: None) if json else note
    if not all(is_finished(out / run.name) for run in runs):
        _announce(runs, say)
    with stops_cleanly():
        unfinished = train_runs(experiment, runs, out, progress=not json, say=say)
    if unfinished:
        raise UserError(f"{out / unfinished[0].name}: the run did not finish: another process trains it, or its loss diverged")
    trained, report = [read_run(out / run.name) for run in runs], out / "report.html"
    comparison = compare(trained)
    write_report(trained, comparison, report, experiment.title)
    if json:
        print_json(comparison.as_json() | {"report": str(report)})
        return
    _print(comparison, out, report, runs[-1].name)


def _announce(runs: "Sequence[GridRun]", say: Callable[[str], None]) -> None:
    from yoco_u.device import find_device, multiplies_bfloat16
    from yoco_u.formatting import short_count

    tokens = short_count(sum(run.config.tokens for run in runs))
    say(f"{len(runs)} runs of {tokens} tokens in all; each shows how long it still takes")
    if not multiplies_bfloat16(find_device(runs[0].config.training.device)):
        say("no bfloat16 in hardware: float32 takes a few times as long; training.steps=200 is a short look")


def _print(comparison: "Comparison", out: Path, report: Path, model: str) -> None:
    from rich.console import Console

    console = Console(markup=False)
    table = table_of("", *(run.name for run in comparison.runs))
    for label, texts in comparison.table():
        table.add_row(label, *texts)
    console.print(table)
    console.print(comparison.headline, highlight=False)
    console.print(f"\nreport:  {report}\nsamples: {out / model / 'samples.json'}", highlight=False, soft_wrap=True)
    console.print(f"try:     yoco-u generate {out / model} --prompt 'def '", highlight=False, soft_wrap=True)
