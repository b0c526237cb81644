"""`yoco-u evaluate`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from yoco_u.cli import options
from yoco_u.cli.arguments import check_at_most, check_loops, check_row_length, check_unused
from yoco_u.cli.output import note, print_json, progress_bar, table_of
from yoco_u.errors import UserError

if TYPE_CHECKING:
    from yoco_u.evaluation.held_out import LoopScore
    from yoco_u.evaluation.levels import LevelScore


def evaluate(
    model: options.Model,
    files: options.Files = None,
    num_loops: Annotated[
        list[int] | None, typer.Option("--num-loops", help="Loop count T, instead of the model's own; can be given again.")
    ] = None,
    sequence_length: options.SequenceLength = None,
    text_field: options.TextField = None,
    weights: Annotated[
        Literal["int8", "int4"] | None,
        typer.Option("--weights", help="Score the weights in 8 or 4 bits as well, and print what that changes."),
    ] = None,
    answers: Annotated[
        int | None, typer.Option("--answers", min=1, help="Answers of each level of a synthetic task. \\[default: 500]")
    ] = None,
    device: options.Device = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Loss, perplexity and bits per byte of held-out text, in float32.

    Files are scored whole, every token once, against their exact bytes. With
    several loop counts there is one row for each. Of synthetic tasks the
    answers are scored, level by level, on instances that no training has. For
    tasks of lm-evaluation-harness see yoco-u tasks.

    [bold]Examples[/bold]

      yoco-u evaluate runs/quickstart/yoco-u

      yoco-u evaluate runs/quickstart/yoco-u a.py b.py --num-loops 1 --num-loops 3

      yoco-u evaluate runs/quickstart/yoco-u --weights int4 --num-loops 1 --num-loops 3

      yoco-u evaluate runs/p-hop synthetic:p-hop:levels=1-8 --num-loops 1 --num-loops 3
    """
    check_loops(num_loops or [])
    check_row_length(sequence_length)
    from yoco_u.data.synthetic import is_synthetic

    if entries := [entry for entry in files or () if is_synthetic(entry)]:
        for other in (entry for entry in files or () if not is_synthetic(entry)):
            raise UserError(f"{entries[0]} is a task and {other} a text; score one kind at a time")
        task = f"it is for texts, and {entries[0]} is a task"
        check_unused(task, weights=weights, sequence_length=sequence_length, text_field=text_field)
        from yoco_u.evaluation.levels import MOST_ANSWERS

        check_at_most(MOST_ANSWERS, "with which a share is known to 0.3%", answers=answers)
        _evaluate_levels(model, entries, num_loops or [], answers, device, json)
        return
    if answers is not None:
        raise UserError("--answers is for synthetic tasks alone; name one, such as synthetic:p-hop, or leave it out")
    if not files:
        check_unused("it is for FILES, and none are given", text_field=text_field)
    from yoco_u.evaluation.held_out import score_held_out

    found = score_held_out(
        model, files or (), num_loops=num_loops or (), sequence_length=sequence_length, text_field=text_field or "text",
        weights=weights, device=device,
    )  # fmt: skip
    if json:
        rows = [{"num_loops": result.num_loops} | result.model_dump(exclude_none=True) for result in found.results]
        print_json({"model": str(model), "files": files or None, "sequence_length": found.sequence_length, "results": rows})
        return
    note(f"{', '.join(files) if files else 'validation split'}, rows of {found.sequence_length} tokens")
    _print_table(found.results)


def _evaluate_levels(
    model: Path, entries: list[str], num_loops: list[int], answers: int | None, device: str, json: bool
) -> None:
    from yoco_u.data.synthetic import read_entry
    from yoco_u.device import find_device
    from yoco_u.evaluation.levels import ANSWERS, score_levels
    from yoco_u.loading import load_model

    corpora = [read_entry(entry) for entry in entries]
    loaded, tokenizer = load_model(model, find_device(device))
    counts = num_loops or [loaded.model.at_loops().num_loops]
    with progress_bar("levels", len(counts) * sum(len(corpus.all_levels) for corpus in corpora)) as advance:
        found = [
            (loops, score_levels(loaded, tokenizer, corpora, answers or ANSWERS, loops, advance=advance)) for loops in counts
        ]
    if json:
        results = [{"num_loops": loops, "levels": [score.model_dump() for score in scores]} for loops, scores in found]
        print_json({"model": str(model), "tasks": entries, "results": results})
        return
    _print_levels(found)


def _print_levels(found: "Sequence[tuple[int, Sequence[LevelScore]]]") -> None:
    from rich.console import Console

    table = table_of("task", "loops", "level", "right", "95% interval", "loss", "answers")
    for loops, scores in found:
        for score in scores:
            bounds = f"{score.low:.1%} to {score.high:.1%}"
            shown = (str(loops), str(score.level), f"{score.accuracy:.1%}", bounds, f"{score.loss:.4f}", f"{score.answers:,}")
            table.add_row(score.task, *shown)
    Console().print(table)


def _print_table(results: "Sequence[LoopScore]") -> None:
    from rich.console import Console

    headings = ["loops", "loss", "perplexity", "bits per byte", "tokens", "bytes"]
    if (compared := results[0].quantized) is not None:
        headings = ["loops", "loss", compared.weights, "change", "perplexity", compared.weights, "change"]
    table = table_of(*headings, text=0)
    for result in results:
        loops, loss, perplexity = str(result.num_loops), f"{result.loss:.4f}", f"{result.perplexity:.2f}"
        if (new := result.quantized) is None:
            table.add_row(loops, loss, perplexity, f"{result.bits_per_byte:.4f}", f"{result.tokens:,}", f"{result.bytes:,}")
            continue
        change, relative = f"{new.loss_change:+.5f}", f"{new.perplexity_change / result.perplexity:+.3%}"
        table.add_row(loops, loss, f"{new.loss:.4f}", change, perplexity, f"{new.perplexity:.2f}", relative)
    Console().print(table)
