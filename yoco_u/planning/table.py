"""A plan as tables: one row per figure, one column per architecture."""

import re
from collections.abc import Callable, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from yoco_u.formatting import context_label, number
from yoco_u.planning.plan import Column, ContextFigures, Plan

_HEADING_WIDTH = 12

Row = tuple[str, Callable[[Column], str] | None]
"""A row's label, and the cell of each column; None for the heading of a context."""


def print_plan(console: Console, plan: Plan) -> None:
    """Print a plan: as many architectures side by side as fit the console's width, the others in further tables below."""
    hardware, settings = plan.hardware, plan.settings
    console.print(
        f"\n[bold]{escape(hardware.name)}[/bold]: {number(hardware.memory / 1e9)} GB, {number(hardware.gemm / 1e12)} TFLOP/s, "
        f"{number(hardware.bandwidth / 1e9)} GB/s; {settings.dtype}, caches {settings.kv_dtype or settings.dtype}",
        highlight=False,
    )
    rows = _rows(plan)
    labels = max(len(label) for label, _ in rows)
    room, beside = 0, list[list[str]]()
    for column in plan.columns:
        cells = _cells(column, rows)
        width = len(cells[-1]) + 2  # and what the table puts between columns
        if beside and width > room:
            console.print(_table(rows, beside), highlight=False)
            room, beside = 0, []
        room = (room if beside else console.width - labels - 3) - width
        beside.append(cells)
    console.print(_table(rows, beside), highlight=False)
    console.print(_legend(plan), highlight=False)


def _rows(plan: Plan) -> list[Row]:
    batch = plan.settings.batch
    rows: list[Row] = [("parameters, M", lambda column: number(column.parameters / 1e6))]
    if any(column.active_parameters < column.parameters for column in plan.columns):
        rows.append(("active of them, M", lambda column: number(column.active_parameters / 1e6)))
    rows += [
        ("weights, GiB", lambda column: number(column.weight_bytes / 2**30)),
        ("training state, GiB", lambda column: number(column.training_state_bytes / 2**30)),
        (f"longest context, batch {batch}", _longest_context),
    ]
    for context in sorted(set(plan.settings.contexts)):

        def told(figure: str, unit: float = 1, context: int = context) -> Callable[[Column], str]:
            return lambda column: _with_ratio(plan, column, context, figure, unit)

        def plain(value: Callable[[ContextFigures], str], context: int = context) -> Callable[[Column], str]:
            return lambda column: value(column.figures[context])

        rows += [
            (f"context {context_label(context)}", None),
            (" training GFLOP/token", told("training_flops_per_token", 1e9)),
            (" prefill GFLOP/token", told("prefill_flops_per_token", 1e9)),
            (" decode GFLOP/token", told("decode_flops_per_token", 1e9)),
            (" KV MiB/sequence", told("kv_bytes_per_sequence", 2**20)),
            (f" KV GiB, batch {batch}", plain(lambda figures: number(figures.kv_bytes / 2**30))),
            (" largest batch", plain(lambda figures: f"{figures.largest_batch:,}")),
            (" training tokens/s", told("training_tokens_per_second")),
            (" prefill tokens/s", told("prefill_tokens_per_second")),
            (f" decode tokens/s, batch {batch}", told("decode_tokens_per_second")),
        ]
    return rows


def _cells(column: Column, rows: Sequence[Row]) -> list[str]:
    """The heading of a column and its cells, all of one width, with the decimal points of numbers below each other."""
    parts = [(cell(column) if cell else "").partition(" ") for _, cell in rows]
    tails = [len(text) - len(re.split(r"[.*]", text)[0]) for text, _, _ in parts]
    ratios = max(len(ratio) for _, _, ratio in parts)
    cells = [
        text + " " * (max(tails) - tail) + (f" {ratio:>{ratios}}" if ratios else "")
        for (text, _, ratio), tail in zip(parts, tails, strict=True)
    ]
    heading = _heading(column.name)
    width = max(map(len, (*heading, *cells)))
    return ["\n".join(line.rjust(width) for line in heading), *(cell.rjust(width) for cell in cells)]


def _table(rows: Sequence[Row], columns: Sequence[Sequence[str]]) -> Table:
    """A table of columns as `_cells` gives them."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(escape(column[0]), no_wrap=True)
    for index, (label, cell) in enumerate(rows, 1):
        if cell is None:
            table.add_section()
            table.add_row(label, style="cyan")
        else:
            table.add_row(label, *(column[index] for column in columns))
    return table


def _heading(name: str) -> list[str]:
    """A name in lines, broken where a part of it ends if it is too long for one."""
    lines = [""]
    for part in re.findall(r"[^_:,]+[_:,]*|[_:,]+", name):
        if lines[-1] and len(lines[-1] + part) > _HEADING_WIDTH:
            lines.append("")
        lines[-1] += part
    return lines


def _with_ratio(plan: Plan, column: Column, context: int, figure: str, unit: float) -> str:
    figures = column.figures[context]
    unfit = "*" if figure == "decode_tokens_per_second" and not figures.fits else ""
    text = f"{number(getattr(figures, figure) / unit)}{unfit}"
    return text if column is plan.reference else f"{text} {plan.ratio(column, context, figure):.2f}x"


def _longest_context(column: Column) -> str:
    return "any" if column.largest_context is None else f"{column.largest_context:,}"


def _legend(plan: Plan) -> str:
    parts = ["Rates are the most that this hardware allows (roofline), not what software reaches."]
    if len(plan.columns) > 1:
        parts.append(f"x: multiples of {escape(plan.reference.name)}.")
    if any(not figures.fits for column in plan.columns for figures in column.figures.values()):
        parts.append("*: weights and caches exceed the memory.")
    return " ".join(parts)
