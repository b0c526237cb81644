"""`yoco-u bench`."""

import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from yoco_u.cli import options
from yoco_u.cli.arguments import check_can_be_written, check_unused, names, parse_options, whole_numbers
from yoco_u.errors import UserError

if TYPE_CHECKING:
    from yoco_u.bench.cases import Case
    from yoco_u.bench.engines import BenchEngine
    from yoco_u.bench.run import Benchmark


def bench(
    quick: Annotated[bool, typer.Option("--quick", help="Two architectures, short contexts, one round: minutes.")] = False,
    size: Annotated[str | None, typer.Option("--size", help="Size of the presets. \\[default: 100m]")] = None,
    architectures: Annotated[
        str | None,
        typer.Option("--architectures", help="Presets, with commas between. \\[default: yoco_u,yoco,transformer,rins]"),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="RUN_OR_MODEL", help="Measure this instead of presets of random weights.")
    ] = None,
    num_loops: Annotated[int | None, typer.Option("--num-loops", help="Loop count T, instead of the models' own.")] = None,
    contexts: Annotated[
        str | None, typer.Option("--contexts", help="Tokens, with commas between. \\[default: 4096,32768,131072]")
    ] = None,
    batches: Annotated[str | None, typer.Option("--batches", help="Sequences decoded together. \\[default: 1,16]")] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or a GPU, for all engines.")] = "auto",
    dtype: Annotated[str | None, typer.Option("--dtype", help="bfloat16 or float32. \\[default: bfloat16]")] = None,
    weights: Annotated[
        str | None, typer.Option("--weights", help="bfloat16, or int8 for ours and llama.cpp. \\[default: bfloat16]")
    ] = None,
    peers: Annotated[
        str | None, typer.Option("--peers", help="auto, none, or of transformers,llama.cpp,vllm. \\[default: auto]")
    ] = None,
    peer_python: Annotated[
        list[str] | None,
        typer.Option("--peer-python", metavar="PEER=PYTHON", help="Interpreter that has this peer; can be given again."),
    ] = None,
    paper: Annotated[
        bool, typer.Option("--paper", help="The paper's inference tables beside ours, over 8K to 256K, without peers.")
    ] = False,
    rounds: Annotated[int | None, typer.Option("--rounds", help="How often cheap cases are measured. \\[default: 3]")] = None,
    time_limit: Annotated[
        float | None, typer.Option("--time-limit", help="Seconds that one case may take. \\[default: 600]")
    ] = None,
    json: options.JsonFile = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw the curves as PNG.")] = None,
) -> None:
    """Measure prefill, decode and memory, ours and that of installed peers.

    Every engine runs in a process of its own. Peers run a Llama of equal
    parameters. Shares are of what the CPU or GPU can do, measured in between.

    [bold]Examples[/bold]

      yoco-u bench --quick

      yoco-u bench --json bench.json --plot bench.png

      yoco-u bench --peers vllm --peer-python vllm=~/vllm/bin/python

      yoco-u bench --paper --size 1.3b
    """
    from yoco_u.bench.cases import QUICK, BenchSettings, cases_of
    from yoco_u.bench.engines import find_peers, our_engines, peer_engines
    from yoco_u.bench.paper_tables import PAPER, PAPER_ON_GPU, paper_cases
    from yoco_u.bench.run import Benchmark
    from yoco_u.device import find_device, memory_bytes

    if model is not None and (architectures or size or paper):
        raise UserError("--model measures one checkpoint; leave out --architectures, --size and --paper")
    if paper and architectures:
        raise UserError("--paper measures the paper's architectures; leave out --architectures")
    if paper:
        check_unused("--paper measures without peers", peer_python=peer_python, peers=peers)
    if peers == "none":
        check_unused("--peers is none", peer_python=peer_python)
    if paper and batches and len(whole_numbers(batches, "--batches") or ()) > 1:
        raise UserError(f"--paper measures one batch; give one with --batches, not {batches}")
    if paper and plot:
        raise UserError("--plot draws engines beside each other, not the paper's tables; leave out --plot or --paper")
    check_can_be_written(json=json, plot=plot)
    given: dict[str, Any] = {
        "size": size, "architectures": names(architectures), "model": model, "num_loops": num_loops,
        "contexts": whole_numbers(contexts, "--contexts"), "batches": whole_numbers(batches, "--batches"), "dtype": dtype,
        "weights": weights, "rounds": rounds, "time_limit": time_limit,
    }  # fmt: skip
    where = find_device(device)
    if where.type not in ("cpu", "cuda"):
        raise UserError(f"--device {device}: the benchmark measures CPUs and CUDA GPUs; give auto, cpu or cuda")
    on_gpu = where.type == "cuda"
    tables = PAPER_ON_GPU if on_gpu else PAPER
    defaults = {"device": str(where)} | (QUICK if quick else {}) | (tables if paper else {})
    settings = parse_options(BenchSettings, defaults | {k: v for k, v in given.items() if v is not None})
    engines, absent = our_engines(settings), list[str]()
    if num_loops is not None and num_loops > 1 and not any(engine.architecture.looped_stages for engine in engines):
        raise UserError(f"--num-loops {num_loops}: none of {', '.join(engine.name for engine in engines)} loops; drop it")
    if not paper:
        pythons = _pythons(peer_python or [])
        there, absent = find_peers(peers or "auto", pythons, on_gpu)
        engines += peer_engines(settings, engines[0].architecture, there, pythons)
    memory = memory_bytes(where)
    cases = {e.name: paper_cases(e.architecture, settings, memory) if paper else cases_of(settings) for e in engines}
    benchmark = Benchmark(settings, engines, cases)
    try:
        _run_with_progress(benchmark)
    finally:
        _report(benchmark, absent, paper, json, plot)


def _run_with_progress(benchmark: "Benchmark") -> None:
    """Measure everything, under a progress bar on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from yoco_u.formatting import context_label

    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("ceilings", total=len(benchmark.measurement.results) * benchmark.settings.rounds)
        seen = -1

        def show(engine: "BenchEngine", case: "Case | None") -> None:
            nonlocal seen
            if case is None:
                bar.update(task, description=f"{engine.name}: starting")
                return
            seen += 1
            batch = f", batch {case.batch}" if case.kind == "decode" else ""
            bar.update(task, completed=seen, description=f"{engine.name}: {case.kind} {context_label(case.context)}{batch}")

        benchmark.run(show)


def _report(benchmark: "Benchmark", absent: list[str], paper: bool, json: Path | None, plot: Path | None) -> None:
    """Print and write what was measured, which after an interrupt is a part. Where one of these fails, the others are done.

    Args:
        absent: names of the peers that are not installed.
        paper: whether the paper's tables were asked for.
    """
    from rich.console import Console

    from yoco_u.bench.ceilings import unsteady
    from yoco_u.bench.paper_tables import paper_json, print_paper_tables
    from yoco_u.bench.results import as_json, rows_of
    from yoco_u.bench.table import print_failures, print_tables
    from yoco_u.files import write_result

    measurement, console = benchmark.measurement, Console()
    if not measurement.ceilings:
        return
    with ExitStack() as last_one_first:
        if plot is not None:
            from yoco_u.bench.plot import write_plot

            last_one_first.callback(write_plot, rows_of(measurement), plot)
        if json is not None:
            told = as_json(measurement) | ({"paper": paper_json(measurement)} if paper else {})
            last_one_first.callback(write_result, json, told)
        if paper:
            print_paper_tables(console, measurement)
            print_failures(console, measurement)
        else:
            print_tables(console, measurement, absent)
        for line in unsteady(measurement.ceilings):
            console.print(line, style="yellow", highlight=False)


def _pythons(given: list[str]) -> dict[str, str]:
    """Paths of interpreters by peer, from `--peer-python` as it was given.

    Raises:
        UserError: if a value is not PEER=PYTHON, or names no program.
    """
    found = {}
    for entry in given:
        name, separator, python = entry.partition("=")
        if not separator:
            raise UserError(f"--peer-python {entry}: expected PEER=PYTHON, such as vllm=/opt/vllm/bin/python")
        path = shutil.which(os.path.expanduser(python))
        if path is None:
            raise UserError(f"--peer-python {entry}: no such program; give the path of a Python interpreter")
        found[name] = os.path.abspath(path)
    return found
