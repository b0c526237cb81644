"""`yoco-u needles`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from yoco_u.cli import options
from yoco_u.cli.arguments import check_can_be_written, check_loops, check_unused, names, parse_options, whole_numbers
from yoco_u.cli.output import progress_bar, table_of

if TYPE_CHECKING:
    from yoco_u.evaluation.needle_grid import NeedleScore


def needles(
    model: options.Model,
    kinds: Annotated[
        str | None,
        typer.Option(
            "--kinds", help="single_1, single_2, multi_key, multi_value or variable_tracking, with commas. \\[default: all]"
        ),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option("--lengths", help="Tokens of prompt and output, with commas between. \\[default: 1024,4096]"),
    ] = None,
    depths: Annotated[
        int | None, typer.Option("--depths", help="Number of depths, from beginning to end. \\[default: 5]")
    ] = None,
    samples: Annotated[int | None, typer.Option("--samples", help="Needles at each depth. \\[default: 10]")] = None,
    haystack: Annotated[
        list[str] | None,
        typer.Option(
            "--haystack", help="Text to hide in, in any form that prepare reads; can be given again. \\[default: stdlib]"
        ),
    ] = None,
    text_field: options.TextField = None,
    digits: Annotated[int | None, typer.Option("--digits", help="Digits of the hidden numbers. \\[default: 7]")] = None,
    values: Annotated[
        Literal["numbers", "words"] | None,
        typer.Option("--values", help="What is hidden under a key; variables have numbers. \\[default: numbers]"),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Another one gives other needles. \\[default: 0]")] = None,
    num_loops: Annotated[int | None, typer.Option("--num-loops", help="Loop count T, instead of the model's own.")] = None,
    dtype: options.DType = "auto",
    device: options.Device = "auto",
    json: options.JsonFile = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw heat maps as PNG.")] = None,
) -> None:
    """Find facts hidden in long texts (RULER's needles), over lengths and depths.

    Recall is the share of the values that the greedy output contains. Likeliest
    is the share of the right answer's tokens that are the model's first choice,
    each behind the right ones; it rises first in small models.

    [bold]Examples[/bold]

      yoco-u needles runs/8m --plot needles.png

      yoco-u needles runs/8m --kinds single_1,multi_key --lengths 512,2048,8192 --samples 50 --num-loops 5 --json needles.json
    """
    from yoco_u.evaluation.needle_grid import NeedleSettings, needle_grid
    from yoco_u.evaluation.needles import NOISE_KINDS, load_haystack
    from yoco_u.files import write_result
    from yoco_u.inference import LLM

    check_can_be_written(json=json, plot=plot)
    given: dict[str, Any] = {
        "kinds": names(kinds), "lengths": whole_numbers(lengths, "--lengths"), "depths": depths, "samples": samples,
        "digits": digits, "values": values, "seed": seed,
    }  # fmt: skip
    settings = parse_options(NeedleSettings, given)
    check_loops([num_loops])
    in_text = set(settings.kinds) - set(NOISE_KINDS)
    if not in_text:
        noise = f"it is for kinds that are hidden in a text, and --kinds is {kinds}"
        check_unused(noise, haystack=haystack, text_field=text_field)
    if not haystack:
        check_unused("it is for --haystack, and none is given", text_field=text_field)
    llm = LLM(model, device=device, dtype=dtype, num_loops=num_loops, max_model_len=max(settings.lengths))
    entries = haystack or ["stdlib"]
    text = load_haystack(entries, text_field or "text") if in_text else None
    with progress_bar("needles", settings.count) as advance:
        scores = needle_grid(llm, settings, text, num_loops, advance)
    _print_tables(scores)
    if json is not None:
        write_result(
            json,
            {
                "model": str(model), "num_loops": llm.engine.num_loops, "haystack": entries,
                "settings": settings.model_dump(mode="json"), "cells": [score.model_dump() for score in scores],
            },
        )  # fmt: skip
    if plot is not None:
        from yoco_u.evaluation.plots import write_needle_plot

        write_needle_plot(scores, plot)


def _print_tables(scores: "Sequence[NeedleScore]") -> None:
    """Print a table for each kind of needle: the recall at each depth, then the means over all depths."""
    from rich.console import Console

    console = Console()
    for kind in dict.fromkeys(score.kind for score in scores):
        own = [score for score in scores if score.kind == kind]
        depths = list(dict.fromkeys(score.depth for score in own))
        headings = ("length", *(f"{depth:.0%}" for depth in depths), "mean", "likeliest", "loss")
        style = {"title": f"{kind}: recall by depth", "title_justify": "left", "title_style": "bold"}
        table = table_of(*headings, text=0, **style)
        for length in dict.fromkeys(score.length for score in own):
            row = [score for score in own if score.length == length]
            recall, accuracy, loss = (
                sum(values) / len(row) for values in zip(*((s.recall, s.token_accuracy, s.loss) for s in row), strict=True)
            )
            shares = [score.recall for score in row] + [recall, accuracy]
            table.add_row(f"{length:,}", *(f"{share:.0%}" for share in shares), f"{loss:.3f}")
        console.print(table)
