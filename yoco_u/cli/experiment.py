"""`yoco-u experiment`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from yoco_u.cli.output import note, stops_cleanly
from yoco_u.errors import UserError

if TYPE_CHECKING:
    from yoco_u.analysis.experiment.plan import Cell


def experiment(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file that describes the grid.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="Settings of the file to change, such as 'seeds=[0]' or base.training.steps=9."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the grid. \\[default: runs/NAME of the file]")] = None,
    cell: Annotated[str | None, typer.Option("--cell", help="Train this cell alone: its name, or number in --list.")] = None,
    only: Annotated[
        str | None, typer.Option("--only", metavar="SHARD/COUNT", help="Train every COUNT-th cell from the SHARD-th on.")
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="Print the cells and train nothing.")] = False,
) -> None:
    """Train a grid of models, and judge the paper's findings by it.

    Cells are trained one after another and finished ones are skipped, so the
    same command goes on after any interruption. Several processes, on several
    machines too, may work on one folder: none takes a cell that another has.

    [bold]Examples[/bold]

      yoco-u experiment grid.yaml --out runs/grid

      yoco-u experiment grid.yaml --out runs/grid --list

      yoco-u experiment grid.yaml --out shared/grid --cell $SLURM_ARRAY_TASK_ID
    """
    from yoco_u.analysis.experiment.config import Experiment
    from yoco_u.analysis.experiment.plan import choose, expand
    from yoco_u.analysis.experiment.run import run_cells
    from yoco_u.typed import apply_overrides, load_yaml, parse

    if (cell is not None) + (only is not None) + list_ > 1:
        raise UserError("--cell, --only and --list exclude each other; give one of them")
    grid = parse(Experiment, apply_overrides(load_yaml(config), overrides or []), str(config))
    folder = out or Path("runs") / config.stem
    cells = expand(grid, folder)
    if list_:
        _print_cells(cells)
        return
    with stops_cleanly():
        unfinished = run_cells(grid, choose(cells, cell, only), folder, say=note)
    for left in unfinished:
        note(f"not finished: {left.name}")


def _print_cells(cells: "list[Cell]") -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from yoco_u.analysis.figures import scientific, short_count
    from yoco_u.budget import parameters

    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("", "cell", "parameters", "steps", "tokens", "training FLOPs"):
        table.add_column(heading, justify="left" if heading == "cell" else "right", overflow="fold")
    for number, cell in enumerate(cells):
        config = cell.config
        steps = config.training.steps
        table.add_row(
            str(number), cell.name, short_count(parameters(config.architecture).total), f"{steps:,}",
            short_count(steps * config.tokens_per_step), scientific(config.training_flops()),
        )  # fmt: skip
    Console().print(table)
    total = sum(cell.config.training_flops() for cell in cells)
    print(f"{len(cells)} cells, {scientific(total)} FLOPs of training")
