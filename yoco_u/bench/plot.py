"""A benchmark as a PNG: rates of prefill and decode, and memory, over the context length."""

from collections.abc import Sequence
from pathlib import Path

from yoco_u.bench.results import Row
from yoco_u.plotting import ContextPlot


def write_plot(rows: Sequence[Row], path: Path) -> None:
    """Draw one line per engine in three panels: prefill tokens/s, decode tokens/s, peak memory of a prefill.

    Decode is drawn for the smallest batch, and dashed for the largest. All axes are logarithmic. Cases without figures leave
    gaps.
    """
    engines = list(dict.fromkeys(row.engine for row in rows))
    decodes = [row for row in rows if row.kind == "decode"]
    prefills = [row for row in rows if row.kind == "prefill"]
    batches = sorted({row.batch for row in decodes})
    dashed = f", dashed: {batches[-1]}" if len(batches) > 1 else ""
    decode = f"decode, tokens/s, batch {batches[0]}{dashed}" if batches else "decode"
    plot = ContextPlot(["prefill, tokens/s", decode, "peak memory of a prefill, MiB"])
    for index, engine in enumerate(engines):
        own = [row for row in prefills if row.engine == engine]
        plot.line(0, index, [(row.context, row.tokens_per_second) for row in own], engine)
        plot.line(2, index, [(row.context, row.peak_bytes and row.peak_bytes / 2**20) for row in own])
        for batch in {*batches[:1], *batches[-1:]}:
            shown = [row for row in decodes if row.engine == engine and row.batch == batch]
            style = "-" if batch == batches[0] else "--"
            plot.line(1, index, [(row.context, row.tokens_per_second) for row in shown], style=style)
    plot.write(path, sorted({row.context for row in rows}))
