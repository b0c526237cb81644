"""Judges the kept results of our grids again, by the findings and statistics of today, and writes them anew.

python recipes/judge_again.py recipes/results/tokens.json

The runs are not made again: verdicts, intervals and fits are computed from the losses and measures that each file holds.
"""

from pathlib import Path
from typing import Any

from yoco_u.errors import in_one_line, script_parser
from yoco_u.experiment.kept import judge_again
from yoco_u.files import read_json, write_json


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("reports", nargs="+", type=Path, metavar="REPORT", help="report.json of a grid")
    reports = {path: read_json(path, dict[str, Any]) for path in parser.parse_args().reports}
    judged = {path: judge_again(kept, str(path)).as_json() for path, kept in reports.items()}
    for path, kept in reports.items():
        said = {key: kept[key] for key in ("generator",) if key in kept}
        write_json(path, said | judged[path])
        print(path)


if __name__ == "__main__":
    in_one_line(main)
