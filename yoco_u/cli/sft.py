"""`yoco-u sft`."""

from pathlib import Path
from typing import Annotated

import typer

from yoco_u.cli.arguments import existing_model
from yoco_u.cli.output import print_json
from yoco_u.cli.settings import is_override
from yoco_u.config import apply_overrides, parse


def sft(
    model: Annotated[
        Path, typer.Argument(metavar="RUN_OR_MODEL", help="A run or saved model with a chat template.", callback=existing_model)
    ],
    data: Annotated[
        list[str], typer.Argument(metavar="FILE... [KEY=VALUE...]", help="JSON lines with messages; then settings to change.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder of the fine-tuned model.")] = Path("runs/sft"),
    json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Fine-tune a model on chats, by TRL.

    Each line of a FILE is {"messages": [{"role": "user", "content": ...}, ...]}.
    The model's chat template writes it, and only what the assistant says is
    learned. Chats are packed into rows without seeing each other. The same
    command goes on where it was stopped.

    [bold]Examples[/bold]

      yoco-u sft runs/talk/healed-15 chats.jsonl --out runs/sft

      yoco-u sft runs/talk/healed-15 chats.jsonl lora_rank=16 learning_rate=2e-4 epochs=3
    """
    from yoco_u.tuning import SFTSettings, fine_tune

    changes = [one for one in data if is_override(one)]
    files = [Path(one) for one in data if one not in changes]
    settings = parse(SFTSettings, apply_overrides({}, changes), "settings")
    summary = fine_tune(model, files, settings, out, say=lambda line: None if json else print(line, flush=True))
    if json:
        print_json(summary)
    else:
        print(f"model: {out / 'model'}")
