"""`yoco-u plan`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from yoco_u.cli.arguments import check_can_be_written, check_unused, parse_options, whole_numbers
from yoco_u.cli.output import note, stops_cleanly

_DEFAULT = ("yoco_u", "yoco", "transformer", "rins")


def plan(
    architectures: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="ARCHITECTURE",
            help="Presets (settings after a colon: yoco_u:loops=5), config files, run folders, saved models; or one "
            "experiment's file, with KEY=VALUE settings. \\[default: yoco_u yoco transformer rins]",
        ),
    ] = None,
    size: Annotated[str | None, typer.Option("--size", help="Size of the presets. \\[default: 1.3b]")] = None,
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
    allows at most. Nothing is trained or loaded. Of an experiment it tells how
    long each run takes; on this machine (--hardware this) it tries a few steps.

    [bold]Examples[/bold]

      yoco-u plan

      yoco-u plan yoco_u:loops=1 yoco_u yoco_u:loops=5 --size 100m --hardware this

      yoco-u plan runs/8m transformer:size=8m --context 32768 --batch 8 --hardware a100 --json plan.json

      yoco-u plan recipes/gpu-text.yaml --hardware h200
    """
    from rich.console import Console

    from yoco_u.files import write_result
    from yoco_u.planning.candidates import find_architecture, takes_size
    from yoco_u.planning.hardware import THIS, find_hardware
    from yoco_u.planning.plan import PlanSettings, make_plan
    from yoco_u.planning.table import print_plan

    check_can_be_written(json=json, plot=plot)
    if architectures and _is_experiment(Path(architectures[0])):
        why = f"the runs of {architectures[0]} say what they train"
        check_unused(why, size=size, context=context, batch=batch, dtype=dtype, kv_dtype=kv_dtype, plot=plot)
        _plan_experiment(Path(architectures[0]), architectures[1:], hardware, json)
        return
    given: dict[str, Any] = {
        "contexts": whole_numbers(context, "--context"), "batch": batch, "dtype": dtype, "kv_dtype": kv_dtype
    }  # fmt: skip
    settings = parse_options(PlanSettings, given, contexts="context")
    if not any(takes_size(name) for name in architectures or _DEFAULT):
        check_unused("no ARCHITECTURE is a preset without a size of its own", size=size)
    candidates = {name: find_architecture(name, size or "1.3b") for name in architectures or _DEFAULT}
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
        write_result(json, found.as_json())
    if plot is not None:
        from yoco_u.planning.plot import write_plot

        write_plot(found, plot)


def _is_experiment(file: Path) -> bool:
    """Whether the file is an experiment's; what cannot be read as one is left to the errors of architectures."""
    from yoco_u.config import load_yaml

    return file.suffix in (".yaml", ".yml") and file.is_file() and "models" in load_yaml(file)


def _plan_experiment(file: Path, overrides: list[str], hardware: str, json: Path | None) -> None:
    from yoco_u.config import apply_overrides, load_yaml, parse
    from yoco_u.experiment.config import Experiment
    from yoco_u.experiment.duration import ASSUMED_SHARE, assumed_rate, measured_rate, predict
    from yoco_u.experiment.grid import expand
    from yoco_u.files import write_result
    from yoco_u.formatting import duration, number, scientific
    from yoco_u.planning.hardware import THIS, find_hardware

    grid = parse(Experiment, apply_overrides(load_yaml(file), overrides), str(file))
    runs = expand(grid, Path("runs") / file.stem)
    if hardware == THIS:
        rate, basis = measured_rate(note), "this machine, measured in a few steps of each model"
    else:
        rate = assumed_rate(hardware)
        machine = find_hardware(hardware, runs[0].config.training.dtype)
        basis = f"{ASSUMED_SHARE:.0%} of {number(machine.gemm / 1e12)} TFLOP/s, the peak of {machine.name}, are assumed"
    with stops_cleanly():
        times = predict(runs, rate)
    wide = max(len(run.name) for run in runs)
    print(f"{'run':<{wide}}      FLOPs  minutes")
    for time in times:
        print(f"{time.run.name:<{wide}}  {scientific(time.flops):>9}  {number(time.seconds / 60):>7}")
    total = sum(time.seconds for time in times)
    flops = scientific(sum(time.flops for time in times))
    print(f"{len(runs)} runs, {flops} FLOPs, {duration(total)} one after another\n({basis})")
    if json is not None:
        write_result(json, {"basis": basis, "minutes": total / 60, "runs": [time.as_json() for time in times]})
