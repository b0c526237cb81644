"""The tables that a benchmark prints."""

from collections.abc import Callable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from yoco_u.bench.results import Row, rows_of
from yoco_u.bench.run import Measurement
from yoco_u.formatting import context_label, number

_BUSY_CPUS = 0.2  # if other processes keep more CPUs busy than this, the figures are not to be trusted


def print_tables(console: Console, measurement: Measurement, absent: Sequence[str] = ()) -> None:
    """Print the table of prefills, the table of decodes, and why cases have no figures.

    Args:
        absent: names of the peers that are not installed.
    """
    if not measurement.ceilings:
        return
    rows = rows_of(measurement)
    prefills, decodes = ([row for row in rows if row.kind == kind] for kind in ("prefill", "decode"))
    (gemm, memory, _), dtype = measurement.ceiling, measurement.settings.dtype
    if prefills:
        title = f"Prefill of one prompt, {dtype}; the machine's matrix products: {gemm / 1e9:,.0f} GFLOP/s"
        console.print(f"\n[bold]{title}[/bold]", _table(prefills, "GFLOP/s", "of GEMM"), highlight=False)
    if decodes:
        title = f"Decode behind a context, {dtype}; the machine's memory: {memory / 1e9:,.1f} GB/s"
        console.print(f"\n[bold]{title}[/bold]", _table(decodes, "GB/s", "of memory"), highlight=False)
    ratio = f"ratio: how many times as fast {rows[0].engine} is; peers run a Llama of equal parameters"
    console.print(ratio, highlight=False, markup=False)
    print_failures(console, measurement)
    if absent:
        console.print(f"not installed: {', '.join(absent)}", highlight=False)


def _table(rows: Sequence[Row], rate: str, share: str) -> Table:
    """Rows in groups, one for each context and batch, which its heading names.

    Args:
        rate, share: headings of the columns of `Row.rate` and `Row.of_ceiling`.
    """
    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("tokens/s", _tokens_per_second),
        (rate, lambda row: _number(row.rate, lambda value: f"{value / 1e9:,.1f}")),
        (share, lambda row: _number(row.of_ceiling, lambda value: f"{value:.0%}")),
        ("ratio", lambda row: _number(row.reference_ratio, lambda value: f"{value:.2f}x")),
        ("peak MiB", lambda row: _number(row.peak_bytes, lambda value: f"{value / 2**20:,.0f}")),
        ("KV MiB", lambda row: f"{row.kv_bytes / 2**20:,.1f}"),
    ]
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    table.add_column("", no_wrap=True)
    for heading, _ in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    before = None
    for row in rows:
        group = (row.context, row.batch)
        if group != before:
            if before is not None:
                table.add_section()
            batch = f", batch {row.batch}" if row.kind == "decode" else ""
            table.add_row(f"context {context_label(row.context)}{batch}", style="cyan")
            before = group
        style = "bold" if row.engine == rows[0].engine else None
        table.add_row(f" {escape(row.engine)}", *(value(row) for _, value in columns), style=style)
    return table


def _tokens_per_second(row: Row) -> str:
    if row.tokens_per_second is None and row.failure is not None:
        return row.failure.partition(":")[0]
    return number(row.tokens_per_second)


def print_failures(console: Console, measurement: Measurement) -> None:
    """Print a warning if the machine had other work, and one line for each reason why an engine's cases were not measured."""
    busiest = max(ceilings.busy for ceilings in measurement.ceilings)
    if busiest > _BUSY_CPUS:
        console.print(
            f"other processes kept up to {busiest:.1f} CPUs busy: some engines suffer more from that than others, so measure "
            "again on an idle machine",
            style="yellow",
            highlight=False,
        )
    for line in _failures(rows_of(measurement)):
        console.print(escape(line), highlight=False)


def _failures(rows: Sequence[Row]) -> list[str]:
    cases: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.failure is not None:
            batch = f", batch {row.batch}" if row.kind == "decode" else ""
            cases.setdefault((row.engine, row.failure), []).append(f"{row.kind} {context_label(row.context)}{batch}")
    return [f"{engine}: {failure} ({'; '.join(which)})" for (engine, failure), which in cases.items()]


def _number(value: Any, form: Callable[[Any], str]) -> str:
    return "-" if value is None else form(value)
