"""`yoco-u evaluate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from yoco_u.cli.arguments import names
from yoco_u.cli.output import note, print_json
from yoco_u.cli.tasks import evaluate_on_tasks
from yoco_u.errors import UserError

if TYPE_CHECKING:
    from yoco_u.evaluation import Score
    from yoco_u.model import YocoUForCausalLM
    from yoco_u.training.distributed import Distributed

_DEFAULT_LENGTH = 1024
_TASKS = "Tasks of lm-evaluation-harness"


def evaluate(
    model: Annotated[Path, typer.Argument(metavar="RUN_OR_MODEL", help="A run folder or a saved model.")],
    files: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FILES", help="Held-out text, in any form that prepare reads. \\[default: the run's validation split]"
        ),
    ] = None,
    num_loops: Annotated[
        list[int] | None, typer.Option("--num-loops", help="Loop count T, instead of the model's own; can be given again.")
    ] = None,
    sequence_length: Annotated[
        int | None,
        typer.Option(
            "--sequence-length",
            min=1,
            help="Tokens per row. \\[default: the run's, or 1024] Of tasks, tokens of context and answer. \\[default: 2048]",
        ),
    ] = None,
    text_field: Annotated[
        str, typer.Option("--text-field", help="Column of JSON lines and Parquet files that holds the text.")
    ] = "text",
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights", help="int8: score the weights in int8 as well, and print what that changes; tasks run in int8 alone."
        ),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
    tasks: Annotated[
        str | None,
        typer.Option("--tasks", rich_help_panel=_TASKS, help="Names of tasks or groups, with commas between; instead of loss."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, rich_help_panel=_TASKS, help="So many questions of each task.")
    ] = None,
    fewshot: Annotated[
        int | None,
        typer.Option("--fewshot", min=0, rich_help_panel=_TASKS, help="Examples before a question. \\[default: the task's]"),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", min=1, rich_help_panel=_TASKS, help="Tokens of an answer. \\[default: the task's]"),
    ] = None,
    include_path: Annotated[
        Path | None,
        typer.Option("--include-path", metavar="DIR", rich_help_panel=_TASKS, help="Folder of task files (YAML) of yours."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="DIR", rich_help_panel=_TASKS, help="Folder of NAME.jsonl files for yoco_u_math."),
    ] = None,
    dtype: Annotated[
        Literal["auto", "bfloat16", "float32"] | None,
        typer.Option("--dtype", rich_help_panel=_TASKS, help="To compute in. \\[default: float32]"),
    ] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", rich_help_panel=_TASKS, help="Ask through the tokenizer's chat template.")
    ] = False,
    run_generated_code: Annotated[
        bool,
        typer.Option("--run-generated-code", rich_help_panel=_TASKS, help="Agree to run programs that the model writes."),
    ] = False,
) -> None:
    """Loss, perplexity and bits per byte of held-out text, in float32; or tasks.

    Files are scored whole, every token once, against their exact bytes. With
    several loop counts there is one row for each.

    Tasks are those of lm-evaluation-harness, and yoco_u_paper and
    yoco_u_comparison (the paper's), yoco_u_stdlib (needs no download) and
    yoco_u_math (over files of yours).

    [bold]Examples[/bold]

      yoco-u evaluate runs/quickstart/yoco-u

      yoco-u evaluate runs/quickstart/yoco-u a.py b.py --num-loops 1 --num-loops 3

      yoco-u evaluate runs/quickstart/yoco-u --weights int8 --num-loops 1 --num-loops 3

      yoco-u evaluate runs/quickstart/yoco-u --tasks yoco_u_stdlib --limit 100
    """
    from yoco_u.inference.quantization import quantize, require_torchao
    from yoco_u.loading import load_model
    from yoco_u.training.distributed import distributed_session

    for loops in num_loops or []:
        if loops < 1:
            raise UserError(f"--num-loops is {loops}; expected a whole number of at least 1")
    if weights not in (None, "int8"):
        raise UserError(f"--weights is {weights}; expected int8, or leave it out")
    if weights == "int8":
        require_torchao()
    how = {"limit": limit, "fewshot": fewshot, "max_tokens": max_tokens}
    consent = {"chat_template": chat_template, "run_generated_code": run_generated_code}
    places = {"include_path": include_path, "data": data}
    if tasks is not None:
        if files:
            raise UserError("FILES are scored without --tasks; leave out one of them")
        settings = {"max_length": sequence_length, "weights": weights, "dtype": dtype, "device": device}
        evaluate_on_tasks(model, names(tasks) or (), num_loops, how | consent, settings, json, **places)
        return
    for option, value in (how | consent | places | {"dtype": dtype}).items():
        if value:
            raise UserError(f"--{option.replace('_', '-')} does nothing without --tasks; name tasks")
    with distributed_session(device) as distributed:
        network, tokenizer = load_model(model, distributed.device)
        length = sequence_length or _sequence_length(model)
        counts = num_loops or [network.config.architecture.num_loops]

        def scores() -> "list[Score]":
            return [_score(network, tokenizer, model, files or [], text_field, length, n, distributed) for n in counts]

        results = [{"num_loops": loops} | score.model_dump() for loops, score in zip(counts, scores(), strict=True)]
        if weights == "int8":
            quantize(network)
            for row, score in zip(results, scores(), strict=True):
                row["int8"] = _changes(row, score)
    if json:
        print_json({"model": str(model), "files": files or None, "sequence_length": length, "results": results})
        return
    note(f"{', '.join(files) if files else 'validation split'}, rows of {length} tokens")
    _print_table(results)


def _score(
    weights: "YocoUForCausalLM",
    tokenizer: Any,
    model: Path,
    files: list[str],
    text_field: str,
    length: int,
    loops: int,
    distributed: "Distributed",
) -> "Score":
    from yoco_u.data import Corpus, DocumentEncoder, PackedDataset
    from yoco_u.evaluation import score_documents, score_split
    from yoco_u.loading import is_run
    from yoco_u.training.run_folder import read_run_config

    if files:
        return score_documents(weights, DocumentEncoder(tokenizer), Corpus(files, text_field).documents(), length, loops)
    if not is_run(model):
        raise UserError(f"{model}: a saved model has no validation split; name files to evaluate on")
    validation = PackedDataset(read_run_config(model).dataset, "validation", length, shuffle=False)
    return score_split(weights, validation, distributed, loops)


def _changes(before: dict[str, Any], after: "Score") -> dict[str, float]:
    """The figures of int8 weights, and how much they are above those in float32."""
    return {
        "loss": after.loss,
        "perplexity": after.perplexity,
        "bits_per_byte": after.bits_per_byte,
        "loss_change": after.loss - before["loss"],
        "perplexity_change": after.perplexity - before["perplexity"],
    }


def _sequence_length(model: Path) -> int:
    from yoco_u.loading import is_run
    from yoco_u.training.run_folder import read_run_config

    return read_run_config(model).training.sequence_length if is_run(model) else _DEFAULT_LENGTH


def _print_table(results: list[dict[str, Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    quantized = any("int8" in row for row in results)
    table = Table(box=box.SIMPLE_HEAD)
    headings = ["loops", "loss", "perplexity", "bits per byte", "tokens", "bytes"]
    if quantized:
        headings = ["loops", "loss", "int8", "change", "perplexity", "int8", "change"]
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in results:
        loops, loss, perplexity = str(row["num_loops"]), f"{row['loss']:.4f}", f"{row['perplexity']:.2f}"
        if quantized:
            new = row["int8"]
            change, relative = f"{new['loss_change']:+.5f}", f"{new['perplexity_change'] / row['perplexity']:+.3%}"
            table.add_row(loops, loss, f"{new['loss']:.4f}", change, perplexity, f"{new['perplexity']:.2f}", relative)
        else:
            table.add_row(loops, loss, perplexity, f"{row['bits_per_byte']:.4f}", f"{row['tokens']:,}", f"{row['bytes']:,}")
    Console().print(table)
