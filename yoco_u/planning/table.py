"""A plan as tables: one row per figure, one column per architecture."""

from collections.abc import Callable, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from yoco_u.architecture import STAGES
from yoco_u.formatting import context_label, number
from yoco_u.planning.plan import Column, ContextFigures, Plan

_LABEL_WIDTH, _COLUMN_WIDTH = 26, 14


def print_plan(console: Console, plan: Plan) -> None:
    """Print a plan: as many architectures side by side as fit the console's width, the others in further tables below."""
    hardware, settings = plan.hardware, plan.settings
    console.print(
        f"\n[bold]{escape(hardware.name)}[/bold]: {number(hardware.memory / 1e9)} GB, {number(hardware.gemm / 1e12)} TFLOP/s, "
        f"{number(hardware.bandwidth / 1e9)} GB/s; {settings.dtype}, caches {settings.kv_dtype or settings.dtype}",
        highlight=False,
    )
    count = max(1, (console.width - _LABEL_WIDTH) // _COLUMN_WIDTH)
    for first in range(0, len(plan.columns), count):
        console.print(_table(plan, plan.columns[first : first + count]), highlight=False)
    console.print(_legend(plan), highlight=False)


def _table(plan: Plan, columns: Sequence[Column]) -> Table:
    batch = plan.settings.batch
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(escape(_heading(column.name)), justify="right", overflow="fold")

    def add(label: str, cell: Callable[[Column], str]) -> None:
        table.add_row(label, *(cell(column) for column in columns))

    add("parameters, M", lambda column: number(column.parameters / 1e6))
    if any(column.active_parameters < column.parameters for column in plan.columns):
        add("active of them, M", lambda column: number(column.active_parameters / 1e6))
    add("weights, GiB", lambda column: number(column.weight_bytes / 2**30))
    add("training state, GiB", lambda column: number(column.training_state_bytes / 2**30))
    add(f"longest context, batch {batch}", _longest_context)
    for context in sorted(set(plan.settings.contexts)):
        table.add_section()
        table.add_row(f"context {context_label(context)}", style="cyan")

        def told(figure: str, unit: float = 1, context: int = context) -> Callable[[Column], str]:
            return lambda column: _with_ratio(plan, column, context, figure, unit)

        def plain(value: Callable[[ContextFigures], str], context: int = context) -> Callable[[Column], str]:
            return lambda column: value(column.figures[context])

        add(" training GFLOP/token", told("training_flops_per_token", 1e9))
        add(" prefill GFLOP/token", told("prefill_flops_per_token", 1e9))
        add(" decode GFLOP/token", told("decode_flops_per_token", 1e9))
        add(" KV MiB/sequence", told("kv_bytes_per_sequence", 2**20))
        add(f" KV GiB, batch {batch}", plain(lambda figures: number(figures.kv_bytes / 2**30)))
        add(" largest batch", plain(lambda figures: f"{figures.largest_batch:,}"))
        add(" training tokens/s", told("training_tokens_per_second"))
        add(" prefill tokens/s", told("prefill_tokens_per_second"))
        add(f" decode tokens/s, batch {batch}", told("decode_tokens_per_second"))
    return table


def _heading(name: str) -> str:
    """A preset's name with spaces, at which a narrow column can break it; any other name as it is."""
    if name.partition(":")[0] not in STAGES:
        return name
    return name.replace("_", " ").replace(":", ": ").replace(",", ", ")


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
