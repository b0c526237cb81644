"""`yoco-u exits`."""

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from yoco_u.cli import options
from yoco_u.cli.arguments import check_can_be_written, check_loops, check_row_length, check_unused
from yoco_u.cli.output import note, print_json, progress_bar, table_of
from yoco_u.errors import UserError

if TYPE_CHECKING:
    from yoco_u.analysis.exits import ExitResult


def exits(
    model: options.Model,
    files: options.Files = None,
    mean_loops: Annotated[
        float | None,
        typer.Option("--mean-loops", help="Loops that a token shall run on average. \\[default: the middle of 1 and T]"),
    ] = None,
    num_loops: Annotated[
        int | None, typer.Option("--num-loops", min=1, help="Most loops of a token, at most 256, instead of the model's own T.")
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="How many tokens of the text to look at.")] = 32768,
    sequence_length: options.SequenceLength = None,
    text_field: options.TextField = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="Measure decoding as well, and draw loss over loops and tokens/s as PNG."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Let tokens leave the loop: fit on held-out text when another one pays.

    Fits heads that predict what more loops would change, measures the loss at
    several thresholds beside plain loop counts, in the engine, in float32 on
    the CPU, and writes exits.json into the model's folder. Requests with
    num_loops auto then run about --mean-loops loops a token. Of a generated
    task the loss is that of the answers, with the share of right ones. --plot
    draws the test-time scaling curve.

    [bold]Examples[/bold]

      yoco-u exits runs/8m

      yoco-u exits models/yoco-u held-out.txt --mean-loops 1.5

      yoco-u exits runs/8m --plot scaling.png --json > scaling.json
    """
    import torch

    from yoco_u.analysis.exits import calibrate, middle, steps
    from yoco_u.analysis.text import read_text
    from yoco_u.data.synthetic import is_synthetic
    from yoco_u.device import environment
    from yoco_u.files import check_result, write_result
    from yoco_u.inference.exits import FILE
    from yoco_u.loading import load_model, model_folder, weights_digest

    check_can_be_written(plot=plot)
    check_loops([num_loops])
    check_row_length(sequence_length)
    if not files or is_synthetic(files[0]):
        check_unused("it is for FILES with fields, and none are given", text_field=text_field)
    path = model_folder(model) / FILE
    check_result(path)
    if plot is not None and os.path.realpath(plot) == os.path.realpath(path):
        raise UserError(f"--plot {plot}: is where the exits go; name another file")
    network, tokenizer = load_model(model, torch.device("cpu"))
    text = read_text(model, files or [], text_field or "text", sequence_length, tokens, tokenizer)
    most = network.model.at_loops(num_loops).num_loops
    mean_loops = middle(most) if mean_loops is None else mean_loops
    with progress_bar("calibrating", steps(most, mean_loops)) as advance:
        found = calibrate(network, text.batches, mean_loops, num_loops, lambda: advance(1), text.answers)
    write_result(path, found.exits.model_copy(update={"model": weights_digest(model)}).model_dump(mode="json"))
    results, measured_on = found.results, {}
    if plot is not None:
        from yoco_u.analysis.scaling import rate_steps, with_rates, write_scaling_plot

        with progress_bar("decoding", rate_steps(found)) as advance:
            results = with_rates(network, found, lambda: advance(1))
        write_scaling_plot(results, plot)
        measured_on = {"dtype": str(network.dtype).removeprefix("torch."), "environment": environment(network.device)}
    if json:
        chosen = {"score": found.exits.score, "threshold": found.exits.threshold, "num_loops": found.exits.num_loops}
        print_json(
            {
                "model": str(model), "files": files or None, "tokens": found.tokens, "chosen": chosen, **measured_on,
                "results": [asdict(one) for one in results],
            }
        )  # fmt: skip
    else:
        _print_table(results)
    note(f"{found.exits.score} below {found.exits.threshold:.4g}, measured on {found.tokens:,} tokens: {path}")


def _print_table(results: "list[ExitResult]") -> None:
    from rich.console import Console

    more: list[tuple[str, Callable[[ExitResult], str]]] = []
    if results[0].accuracy is not None:
        more.append(("right", lambda one: f"{one.accuracy:.1%}"))
    if results[0].tokens_per_second is not None:
        more.append(("tokens/s", lambda one: "" if one.tokens_per_second is None else f"{one.tokens_per_second:,.0f}"))
    table = table_of("exit", "threshold", "mean loops", "loss", "change", *(heading for heading, _ in more))
    for one in results:
        threshold = "" if one.threshold is None else f"{one.threshold:.4g}"
        figures = (threshold, f"{one.mean_loops:.3f}", f"{one.loss:.4f}", f"{one.change:+.4f}")
        table.add_row(one.score or "none", *figures, *(figure(one) for _, figure in more))
    Console().print(table)
