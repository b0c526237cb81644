"""`yoco-u experiment`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from yoco_u.cli.arguments import check_at_most, check_unused
from yoco_u.cli.output import is_first_process, note, stops_cleanly
from yoco_u.errors import UserError

if TYPE_CHECKING:
    from yoco_u.experiment.config import Experiment
    from yoco_u.experiment.grid import GridRun
    from yoco_u.experiment.results import RunResult
    from yoco_u.experiment.summary import Summary


def experiment(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file that describes the grid.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="Settings of the file to change, such as 'seeds=[0]' or base.training.steps=9."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the grid. \\[default: runs/NAME of the file]")] = None,
    run: Annotated[str | None, typer.Option("--run", help="Train this run alone: its name, or number in --list.")] = None,
    only: Annotated[
        str | None, typer.Option("--only", metavar="SHARD/COUNT", help="Train every COUNT-th run from the SHARD-th on.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", min=1, help="Train as many runs at once, each in a process of its own.")
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option("--minutes", min=0, help="Stop after this time; what is under way then keeps a checkpoint."),
    ] = None,
    kept: Annotated[
        Path | None,
        typer.Option("--kept", metavar="REPORT.JSON", help="A report of this grid, whose finished runs are not trained again."),
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="Print the runs and train nothing.")] = False,
    report: Annotated[bool, typer.Option("--report", help="Write the report of what is there and train nothing.")] = False,
) -> None:
    """Train a grid of models, and judge the paper's findings by it.

    Runs are trained one after another and finished ones are skipped, so the
    same command goes on after any interruption. Several processes, on several
    machines too, may share one folder: no run is trained by two of them.
    Without --run and --only, a report is written at the end. --jobs fills a GPU
    that one small model leaves idle. --kept goes on where the folder of a grid
    is gone, but for its report.

    [bold]Examples[/bold]

      yoco-u experiment grid.yaml --out runs/grid

      yoco-u experiment grid.yaml --out runs/grid --list

      yoco-u experiment grid.yaml --out shared/grid --run $SLURM_ARRAY_TASK_ID

      yoco-u experiment grid.yaml --out runs/grid --jobs 8 --minutes 30

      yoco-u experiment grid.yaml --out runs/grid --report

      yoco-u experiment grid.yaml --out runs/more --kept runs/grid/report.json 'seeds=[0, 1, 2, 3, 4]'
    """
    from yoco_u.config import apply_overrides, load_yaml, parse

    settings = apply_overrides(load_yaml(config), overrides or [])
    from yoco_u.experiment.config import Experiment
    from yoco_u.experiment.grid import choose, expand
    from yoco_u.experiment.kept import finished_elsewhere
    from yoco_u.experiment.run import claim_experiment, train_runs

    several = jobs is not None or minutes is not None
    if (run is not None) + (only is not None) + list_ + report + several > 1:
        raise UserError("--run, --only, --list, --report, and --jobs with --minutes exclude each other; give one of them")
    grid = parse(Experiment, settings, str(config))
    folder = out or Path("runs") / config.stem
    runs = expand(grid, folder)
    check_at_most(len(runs), "the runs of the grid: no more than one process trains each", jobs=jobs)
    if list_:
        check_unused("--list prints all runs of the grid", kept=kept)
        _print_runs(runs)
        return
    elsewhere = finished_elsewhere(kept, grid, folder) if kept else {}
    to_train = [run for run in runs if run.name not in elsewhere]
    chosen = [run for run in choose(runs, run, only) if run.name not in elsewhere]
    if not report:
        claim_experiment(folder, grid.sizes)
    if several:
        command = ["experiment", str(config), *(overrides or []), "--out", str(folder), "--only", "1/1"]
        _train_in_processes([*command, *(["--kept", str(kept)] if kept else [])], to_train, folder, jobs or 1, minutes)
    elif not report:
        with stops_cleanly():
            datasets = {one.report: one.dataset for one in elsewhere.values() if one.report and one.dataset}
            unfinished = train_runs(grid, to_train, folder, chosen, say=note, datasets=datasets)
        for left in unfinished:
            note(f"not finished: {left.name}")
        if run is not None or only is not None or not is_first_process():
            return
    _report(grid, runs, folder, elsewhere)


def _train_in_processes(command: list[str], runs: "list[GridRun]", folder: Path, jobs: int, minutes: float | None) -> None:
    from yoco_u.experiment.jobs import run_jobs
    from yoco_u.experiment.run import is_finished

    def left() -> "list[GridRun]":
        return [run for run in runs if not is_finished(folder / run.name)]

    told = len(runs)

    def watch() -> None:
        nonlocal told
        now = len(left())
        if now != told:
            told = now
            note(f"{len(runs) - now} of {len(runs)} runs are finished")

    note(f"{jobs} process{'es' if jobs > 1 else ''}, which write to {folder}/job-*.log")
    if not run_jobs(command, jobs, folder, minutes, watch):
        note(f"stopped after {minutes:g} minutes; run the same command again to continue")
    unfinished = left()
    for run in unfinished:
        note(f"not finished: {run.name}")
    if runs and len(unfinished) == len(runs):
        raise typer.Exit


def _report(grid: "Experiment", runs: "list[GridRun]", folder: Path, elsewhere: "dict[str, RunResult]") -> None:
    from yoco_u.experiment.report import write_report
    from yoco_u.experiment.results import read_results
    from yoco_u.experiment.run import REPORT, check_report
    from yoco_u.experiment.sizes import summarize_sizes
    from yoco_u.experiment.sizes_report import headline, write_sizes_report
    from yoco_u.experiment.summary import summarize

    check_report(folder, grid.sizes)
    results = read_results(runs, folder, elsewhere)
    if grid.sizes:
        over_sizes = summarize_sizes(grid, results)
        write_sizes_report(over_sizes, folder)
        print(headline(over_sizes))
    else:
        summary = summarize(grid, results)
        write_report(summary, folder)
        _print_findings(summary)
    print(f"report: {folder / REPORT}.html, .json and .png")


def _print_findings(summary: "Summary") -> None:
    from rich.console import Console

    console = Console()
    console.print(summary.headline, highlight=False)
    for judged in summary.judged:
        if judged.outcome.numbers:
            console.print(f"\n[bold]{judged.outcome.verdict}[/bold]: {judged.finding.statement}", highlight=False)
            console.print(judged.outcome.text, highlight=False, markup=False)
    console.print()


def _print_runs(runs: "list[GridRun]") -> None:
    from yoco_u.budget import parameters
    from yoco_u.formatting import scientific, short_count

    wide = max(len(run.name) for run in runs)
    print(f"{'':>4}  {'run':<{wide}}  parameters    steps   tokens  training FLOPs")
    for number, run in enumerate(runs):
        config, steps = run.config, run.config.training.steps
        counts = f"{short_count(parameters(config.architecture).total):>10}  {steps:>7,}"
        cost = f"{short_count(config.tokens):>7}  {scientific(config.training_flops()):>14}"
        print(f"{number:>4}  {run.name:<{wide}}  {counts}  {cost}")
    total = sum(run.config.training_flops() for run in runs)
    print(f"{len(runs)} runs, {scientific(total)} FLOPs of training")
