"""Arguments and options that several commands have."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from yoco_u.cli.arguments import existing_model

Model = Annotated[Path, typer.Argument(metavar="RUN_OR_MODEL", help="A run folder or a saved model.", callback=existing_model)]

Files = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="FILES",
        help="Held-out text, in any form that prepare reads, or synthetic:TASK. \\[default: the run's validation split]",
    ),
]

TextField = Annotated[
    str | None,
    typer.Option("--text-field", help="Field of JSON, CSV and Parquet files that holds the text. \\[default: text]"),
]

SequenceLength = Annotated[
    int | None, typer.Option("--sequence-length", min=1, help="Tokens per row. \\[default: the run's, or 1024]")
]

LoopCounts = Annotated[
    list[int] | None, typer.Option("--num-loops", min=1, help="Loop count T, instead of the model's own; can be given again.")
]

Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]

DType = Annotated[
    Literal["auto", "bfloat16", "float32"],
    typer.Option("--dtype", metavar="DTYPE", help="To compute in: auto, bfloat16 or float32."),
]
"""What the engine computes in."""

JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write everything as JSON.")]
