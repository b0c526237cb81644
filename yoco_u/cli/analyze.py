"""`yoco-u analyze`: loads models and text, runs the study, prints its tables and writes its files."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from yoco_u.cli import options
from yoco_u.cli.arguments import MOST_ROW_TOKENS, check_at_most, check_loops, check_row_length, check_unused
from yoco_u.cli.output import progress_bar, table_of
from yoco_u.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

    from yoco_u.analysis.output import About
    from yoco_u.analysis.study import Study, Subject
    from yoco_u.data import Batch


def analyze(
    model: options.Model,
    files: Annotated[
        list[str] | None,
        typer.Argument(metavar="FILES", help="Text, in any form that prepare reads. \\[default: the run's validation split]"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for page, JSON and PNGs. \\[default: analysis/ in the run]")
    ] = None,
    measures: Annotated[
        str | None,
        typer.Option(
            "--measures",
            help="Some of angular, lens, loss, convergence, attention, exits, drafts. \\[default: all that make sense]",
        ),
    ] = None,
    compare: Annotated[
        list[Path] | None,
        typer.Option(
            "--compare", metavar="RUN_OR_MODEL", help="Draw angular distance and loss of this model too; can be given again."
        ),
    ] = None,
    num_loops: Annotated[
        int | None, typer.Option("--num-loops", help="Look into passes with this loop count T, instead of the models' own.")
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="How many tokens of the text to look at.")] = 32768,
    sequence_length: options.SequenceLength = None,
    exit_threshold: Annotated[
        float | None,
        typer.Option("--exit-threshold", help="Tokens leave the loop below this score. \\[default: that of exits.json]"),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option("--tolerance", help="A state is steady once loops move it by less than this share. \\[default: 0.1]"),
    ] = None,
    queries: Annotated[
        int | None,
        typer.Option("--queries", min=1, help="Positions of every row from which attention is looked at. \\[default: 64]"),
    ] = None,
    text_field: options.TextField = None,
    device: options.Device = "auto",
) -> None:
    """Look inside the loops: what each layer and each loop does to the tokens.

    Angular distance over the unrolled depth, per-loop logit lens, loss against
    the number of loops run, loops to convergence per token, attention span, the
    loops after which tokens leave by yoco-u exits, and the drafts that the
    engine accepts. In float32; writes one page, one JSON file and PNGs, and
    prints the tables.

    [bold]Examples[/bold]

      yoco-u analyze runs/quickstart/yoco-u

      yoco-u analyze runs/8m a.py b.py --measures lens,loss --out analysis

      yoco-u analyze runs/8m --compare runs/8m-two-loops --compare runs/yoco
    """
    from yoco_u.analysis.output import About, check_folder, write_study
    from yoco_u.analysis.study import COMPARED, StudySettings, study
    from yoco_u.analysis.text import read_text
    from yoco_u.data.synthetic import is_synthetic
    from yoco_u.device import find_device

    check_loops([num_loops])
    check_row_length(sequence_length)
    if tolerance is not None and tolerance <= 0:
        raise UserError(f"--tolerance is {tolerance:g}; expected more than 0, such as 0.1")
    check_at_most(MOST_ROW_TOKENS, "which is all positions of the longest row", queries=queries)
    if not files or is_synthetic(files[0]):
        check_unused("it is for FILES with fields, and none are given", text_field=text_field)
    wanted = _measures(measures)
    given = {"exit_threshold": exit_threshold, "tolerance": tolerance, "queries": queries}
    for measure, option in (("exits", "exit_threshold"), ("convergence", "tolerance"), ("attention", "queries")):
        if measure not in wanted:
            check_unused(f"it is for the measure {measure}, and --measures is {measures}", **{option: given[option]})
    folder = out or model / "analysis"
    check_folder(folder)
    subjects, tokenizer = _load([model, *(compare or [])], num_loops, find_device(device))
    if "exits" in wanted:
        subjects[0] = _with_exits(subjects[0], model, exit_threshold)
    wanted, left_out = _sensible(wanted, subjects, explicit=measures is not None)
    text = read_text(model, files or [], text_field or "text", sequence_length, tokens, tokenizer)
    chosen = [[measure for measure in wanted if subject is subjects[0] or measure in COMPARED] for subject in subjects]
    with progress_bar("looking inside", sum(map(len, chosen)) * len(text.batches)) as advance:

        def counted() -> "Iterator[Batch]":
            for batch in text.batches:
                yield batch
                advance(1)

        studies = [
            study(subject, counted, StudySettings(mine, 0.1 if tolerance is None else tolerance, queries or 64), tokenizer)
            for subject, mine in zip(subjects, chosen, strict=True)
        ]
    count = sum(batch["input_ids"].numel() for batch in text.batches)
    about = About(", ".join(files) if files else "validation split", count, text.sequence_length, left_out)
    written = write_study(studies, about, folder)
    _print(studies, about, written)


def _measures(text: str | None) -> list[str]:
    from yoco_u.analysis.study import MEASURES

    wanted = list(MEASURES) if text is None else [name.strip() for name in text.split(",")]
    for name in wanted:
        if name not in MEASURES:
            raise UserError(f"--measures has {name!r}; expected some of {','.join(MEASURES)}")
    return [measure for measure in MEASURES if measure in wanted]


def _load(paths: list[Path], num_loops: int | None, device: "torch.device") -> "tuple[list[Subject], PreTrainedTokenizerFast]":
    """Load the models and their common tokenizer.

    A model has the name of its run or folder, or, if two would have the same name, its path.
    """
    from yoco_u.analysis.study import Subject
    from yoco_u.loading import is_run, load_model, model_name
    from yoco_u.training.run_folder import read_run_config

    loaded = [load_model(path, device) for path in paths]
    names = [read_run_config(path).name if is_run(path) else model_name(path) for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    tokenizer = loaded[0][1]
    for path, (_, own) in zip(paths, loaded, strict=True):
        if own.backend_tokenizer.to_str() != tokenizer.backend_tokenizer.to_str():
            raise UserError(f"{path}: its tokenizer is not that of {paths[0]}; compare models that read the same tokens")
    return [Subject(name, network, num_loops) for name, (network, _) in zip(names, loaded, strict=True)], tokenizer


def _with_exits(subject: "Subject", path: Path, threshold: float | None) -> "Subject":
    """The subject with what its `exits.json` says, or with angular distances where it has none, and the threshold, if given."""
    from dataclasses import replace

    from yoco_u.config import parse
    from yoco_u.inference.exits import Exits, find_exits, loop_problem
    from yoco_u.loading import model_folder

    if loop_problem(subject.architecture):
        return subject
    exits = find_exits(model_folder(path), subject.model.config.architecture)
    if threshold is not None and not isinstance(exits, UserError):
        without = {"num_loops": subject.architecture.num_loops, "score": "angular"}
        exits = parse(Exits, (without if exits is None else exits.model_dump()) | {"threshold": threshold}, "--exit-threshold")
    return replace(subject, exits=exits)


def _sensible(wanted: list[str], subjects: "list[Subject]", explicit: bool) -> tuple[list[str], dict[str, str]]:
    """The measures that make sense, and the reason for each that does not; an error if that one was asked for by name."""
    from yoco_u.analysis.study import why_not

    reasons = {measure: reason for measure in wanted if (reason := why_not(measure, subjects)) is not None}
    for measure, reason in reasons.items():
        if explicit:
            raise UserError(f"--measures {measure}: {reason}; leave it out")
    return [measure for measure in wanted if measure not in reasons], reasons


def _print(studies: "list[Study]", about: "About", written: list[Path]) -> None:
    from rich.console import Console
    from rich.markup import escape

    from yoco_u.analysis.tables import tables

    console = Console()
    for shown in tables(studies).values():
        for table in shown:
            drawn = table_of(*map(escape, table.head), text=len(table.head) if table.is_text else 1)
            for row in table.rows:
                drawn.add_row(*map(escape, row))
            console.print(f"\n[bold]{escape(table.title)}[/bold]", drawn, highlight=False)
    for measure, reason in about.left_out.items():
        console.print(f"left out: {measure}, as {reason}", highlight=False, markup=False, soft_wrap=True)
    for path in written:
        console.print(str(path), highlight=False, markup=False, soft_wrap=True)
