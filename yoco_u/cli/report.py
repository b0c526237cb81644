"""`yoco-u report`."""

from pathlib import Path
from typing import Annotated

import typer

from yoco_u.cli.output import print_json


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="One run folder or more; two or more are compared.")],
    out: Annotated[Path | None, typer.Option("--out", help="File to write. \\[default: report.html in the first run]")] = None,
    title: Annotated[str | None, typer.Option("--title", help="Heading of the page. \\[default: the runs' names]")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON too.")] = False,
) -> None:
    """Write one self-contained HTML page: curves, comparison, samples, settings.

    The page compares two runs or more in tables, and draws their curves into
    the same plots. A run that is not finished is shown as far as it came.

    [bold]Examples[/bold]

      yoco-u report runs/8m

      yoco-u report runs/yoco runs/yoco-u --out comparison.html
    """
    from yoco_u.files import check_result
    from yoco_u.report.comparison import compare
    from yoco_u.report.run_report import write_report
    from yoco_u.training.run_folder import read_run

    target = out or runs[0] / "report.html"
    check_result(target)
    trained = [read_run(run) for run in runs]
    comparison = compare(trained)
    write_report(trained, comparison, target, title)
    if json:
        print_json(comparison.as_json() | {"report": str(target)})
    else:
        print(f"report: {target}")
