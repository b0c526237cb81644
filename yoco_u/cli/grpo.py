"""`yoco-u grpo`."""

from pathlib import Path
from typing import Annotated

import typer

from yoco_u.cli import options
from yoco_u.cli.output import print_json
from yoco_u.cli.settings import is_override
from yoco_u.config import apply_overrides, parse


def grpo(
    model: options.Model,
    data: Annotated[
        list[str], typer.Argument(metavar="FILE... [KEY=VALUE...]", help="JSON lines with problems; then settings to change.")
    ],
    test: Annotated[
        list[Path] | None, typer.Option("--test", help="JSON lines with held-out problems; can be given again.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder of the trained model.")] = Path("runs/grpo"),
    json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Train a model on problems by the rewards of its own answers, by TRL.

    Each line of a FILE is {"prompt": ..., "answer": ...}; the prompt is a text
    or a list of messages. In each step our engine samples several answers to
    some problems, and those that are right become likelier than those that are
    not (GRPO). The same command goes on where it was stopped.

    [bold]Examples[/bold]

      yoco-u grpo runs/sft problems.jsonl --test held-out.jsonl --out runs/grpo

      yoco-u grpo runs/sft problems.jsonl "pattern='#### (.*)'" answers=16 steps=500
    """
    from yoco_u.tuning import GRPOSettings, reinforce

    changes = [one for one in data if is_override(one)]
    files = [Path(one) for one in data if one not in changes]
    settings = parse(GRPOSettings, apply_overrides({}, changes), "settings")
    summary = reinforce(model, files, settings, out, test or (), say=lambda line: None if json else print(line, flush=True))
    if json:
        print_json(summary)
    else:
        print(f"model: {out / 'model'}")
