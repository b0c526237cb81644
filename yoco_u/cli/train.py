"""`yoco-u train`."""

from pathlib import Path
from typing import Annotated

import typer

from yoco_u.cli.output import is_first_process, print_json, stops_cleanly
from yoco_u.cli.settings import load_run_config


def train(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, or the name of a packaged config.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings to change, such as training.steps=100.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Run folder. \\[default: runs/NAME]")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the run's summary as JSON, without progress.")] = False,
) -> None:
    """Train a model, or continue a run that was interrupted.

    The dataset is prepared first if it is not there. The same command on the
    same folder goes on from the newest complete checkpoint. Under torchrun all
    processes share the work.

    [bold]Examples[/bold]

      yoco-u train 8m

      yoco-u train my.yaml training.steps=100 architecture.loops=2 --out runs/a

      torchrun --nproc-per-node 8 -m yoco_u.cli train 1.3b --out runs/1.3b
    """
    run = load_run_config(config, overrides or [])
    from yoco_u.training import train as train_run

    folder = out or Path("runs") / run.name
    with stops_cleanly():
        summary = train_run(run, folder, progress=not json)
    if not is_first_process():
        return
    if json:
        print_json(summary)
    else:
        print(f"run folder: {folder}")
