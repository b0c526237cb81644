"""`yoco-u plan`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from yoco_u.cli.arguments import check_can_be_written, whole_numbers

_DEFAULT = ("yoco_u", "yoco", "transformer", "rins")


def plan(
    architectures: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="ARCHITECTURE",
            help="Presets (settings after a colon: yoco_u:loops=5), config files, run folders, saved models. "
            "\\[default: yoco_u yoco transformer rins]",
        ),
    ] = None,
    size: Annotated[str, typer.Option("--size", help="Size of the presets.")] = "1.3b",
    context: Annotated[
        str | None, typer.Option("--context", help="Tokens, with commas between. \\[default: 8192,65536,262144]")
    ] = None,
    batch: Annotated[int | None, typer.Option("--batch", help="Sequences decoded together. \\[default: 32]")] = None,
    hardware: Annotated[
        str,
        typer.Option(
            "--hardware",
            help="A GPU by name (h100, a100, l40s, rtx-4090, mi300x ...), this (measured now), or a line such as "
            "memory=24GiB,gemm=900e9,bandwidth=46e9.",
        ),
    ] = "h100",
    dtype: Annotated[str | None, typer.Option("--dtype", help="bfloat16 or float32. \\[default: bfloat16]")] = None,
    kv_dtype: Annotated[
        str | None, typer.Option("--kv-dtype", help="Of the caches: bfloat16, float32 or int8. \\[default: as --dtype]")
    ] = None,
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write every figure as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw rates and KV as PNG.")] = None,
) -> None:
    """What architectures cost, by arithmetic: parameters, FLOPs, memory, rates.

    Prints architectures side by side: parameters, training state, FLOPs per
    token, KV caches, what fits into memory, and the rates that the hardware
    allows at most. Nothing is trained or loaded.

    [bold]Examples[/bold]

      yoco-u plan

      yoco-u plan yoco_u:loops=1 yoco_u yoco_u:loops=5 --size 100m --hardware this

      yoco-u plan runs/8m transformer:size=8m --context 32768 --batch 8 --hardware a100 --json plan.json
    """
    from rich.console import Console

    from yoco_u.config import parse
    from yoco_u.files import write_json
    from yoco_u.planning.candidates import find_architecture
    from yoco_u.planning.hardware import THIS, find_hardware
    from yoco_u.planning.plan import PlanSettings, make_plan
    from yoco_u.planning.table import print_plan

    check_can_be_written(json=json, plot=plot)
    given: dict[str, Any] = {
        "contexts": whole_numbers(context, "--context"), "batch": batch, "dtype": dtype, "kv_dtype": kv_dtype
    }  # fmt: skip
    settings = parse(PlanSettings, {key: value for key, value in given.items() if value is not None}, "options")
    candidates = {name: find_architecture(name, size) for name in architectures or _DEFAULT}
    if hardware == THIS:
        from yoco_u.planning.this_machine import this_machine

        machine = this_machine(settings.dtype)
    else:
        machine = find_hardware(hardware, settings.dtype)
    found = make_plan(candidates, machine, settings)
    console = Console()
    print_plan(console, found)
    if hardware == THIS:
        console.print(f"This machine again, without measuring: --hardware {machine.line}", highlight=False, soft_wrap=True)
    if json is not None:
        write_json(json, found.as_json())
    if plot is not None:
        from yoco_u.planning.plot import write_plot

        write_plot(found, plot)
