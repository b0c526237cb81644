"""`yoco-u context`."""

import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from yoco_u.cli import options
from yoco_u.cli.arguments import check_can_be_written, check_loops, check_unused, existing_models, whole_numbers
from yoco_u.cli.output import note, progress_bar, table_of
from yoco_u.errors import UserError

if TYPE_CHECKING:
    from yoco_u.evaluation.context import ContextScore, Text

_CHUNK = 2048  # the most tokens that the engine computes in one step


def context(
    models: Annotated[
        list[Path],
        typer.Argument(metavar="RUN_OR_MODEL", help="Run folders or saved models to compare.", callback=existing_models),
    ],
    files: Annotated[
        list[str] | None,
        typer.Option(
            "--files",
            help="Long texts, in any form that prepare reads; can be given again. \\[default: the run's validation split]",
        ),
    ] = None,
    prefixes: Annotated[
        str, typer.Option("--prefixes", help="Tokens before the scored ones, with commas between.")
    ] = "512,1024,2048",
    last: Annotated[int, typer.Option("--last", min=1, help="Tokens that are scored behind every prefix.")] = 512,
    texts: Annotated[int | None, typer.Option("--texts", min=1, help="The most texts to score. \\[default: all]")] = None,
    num_loops: options.LoopCounts = None,
    text_field: options.TextField = None,
    device: options.Device = "auto",
    json: options.JsonFile = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw the curves as PNG.")] = None,
) -> None:
    """Loss of the same tokens behind prefixes of different lengths, in float32.

    Long documents are cut into texts of the longest prefix and the scored
    tokens; a shorter prefix is the end of a longer one. Models that are
    compared must have one tokenizer.

    [bold]Examples[/bold]

      yoco-u context runs/quickstart/yoco-u runs/quickstart/yoco --plot context.png

      yoco-u context runs/8m --files 'books/*.txt' --prefixes 2048,4096,8192
    """
    from yoco_u.evaluation.context import context_scores, text_losses
    from yoco_u.files import write_result
    from yoco_u.inference import LLM

    check_can_be_written(json=json, plot=plot)
    check_loops(num_loops or [])
    if not files:
        check_unused("it is for --files, and none are given", text_field=text_field)
    lengths = whole_numbers(prefixes, "--prefixes") or ()
    if lengths[0] < 1 or any(longer <= shorter for shorter, longer in pairwise(lengths)):
        raise UserError(f"--prefixes is {prefixes}; expected rising whole numbers from 1 on, such as 2048,4096,8192")
    cut = _same_texts(models, files, text_field or "text", max(lengths) + last, texts)
    documents = [text.document for text in cut]
    results: list[dict[str, Any]] = []
    for model in models:
        llm = LLM(
            model, device=device, dtype="float32", max_model_len=max(lengths) + last, max_batched_tokens=_CHUNK,
            prefix_caching=False,
        )  # fmt: skip
        counts = num_loops or [llm.engine.num_loops]
        with progress_bar(f"{model}", len(counts) * len(cut)) as advance:
            for loops in counts:
                losses = text_losses(llm, [text.token_ids for text in cut], lengths, last, loops, lambda: advance(1))
                scores = context_scores(losses, lengths, documents)
                results.append({"model": str(model), "num_loops": loops, "scores": scores, "text_losses": losses.tolist()})
    note(
        f"{', '.join(files) if files else 'validation split'}: {len(cut)} texts of "
        f"{len(set(documents))} documents, the last {last} tokens of each"
    )
    labels = _labels(models)
    curves = [(labels[result["model"]], result["num_loops"], result["scores"]) for result in results]
    _print_table(curves)
    if json is not None:
        rows = [result | {"scores": [score.model_dump() for score in result["scores"]]} for result in results]
        write_result(json, {"files": files, "last": last, "texts": len(cut), "documents": documents, "results": rows})
    if plot is not None:
        from yoco_u.evaluation.plots import write_context_plot

        write_context_plot([(f"{label}, T={loops}", scores) for label, loops, scores in curves], last, plot)


def _same_texts(
    models: Sequence[Path], files: Sequence[str] | None, text_field: str, tokens: int, limit: int | None
) -> "list[Text]":
    """The texts to score, as tokens.

    Raises:
        UserError: if they are not the same tokens for all models, so that the losses could not be compared.
    """
    first, *others = models
    found = _texts(first, files, text_field, tokens, limit)
    for other in others:
        if _texts(other, files, text_field, tokens, limit) != found:
            raise UserError(
                f"{other}: reads other tokens than {first}, so their losses cannot be compared; compare models of one "
                "tokenizer, and name --files if their validation splits differ"
            )
    return found


def _texts(model: Path, files: Sequence[str] | None, text_field: str, tokens: int, limit: int | None) -> "list[Text]":
    from yoco_u.evaluation.context import take_texts
    from yoco_u.evaluation.held_out import read_documents
    from yoco_u.loading import model_folder

    model_folder(model)
    return take_texts(read_documents(model, files or (), text_field), tokens, limit)


def _labels(models: Sequence[Path]) -> dict[str, str]:
    """For each path the part of it that differs between the models."""
    common = os.path.commonpath([model.absolute().parent for model in models])
    return {str(model): os.path.relpath(model.absolute(), common) for model in models}


def _print_table(curves: "Sequence[tuple[str, int, list[ContextScore]]]") -> None:
    from rich.console import Console
    from rich.markup import escape

    table = table_of("model", "loops", "prefix", "loss", "perplexity", "change")
    table.columns[0].overflow = "fold"
    for label, loops, scores in curves:
        for place, score in enumerate(scores):
            error = "" if score.change_error is None else f" ± {score.change_error:.4f}"
            table.add_row(
                *((escape(label), str(loops)) if place == 0 else ("", "")),
                f"{score.prefix:,}",
                f"{score.loss:.4f}",
                f"{score.perplexity:.2f}",
                f"{score.change:+.4f}{error}" if place else "",
                end_section=place == len(scores) - 1,
            )
    Console().print(table)
