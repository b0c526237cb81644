"""`yoco-u bench --paper`: the paper's inference tables (arXiv 2604.01220, Tables 8 to 10) beside our own measurements.

On a GPU whole prompts are timed, and decodes of as many sequences as the paper's, or as many as fit beside each other.

On a CPU a Transformer's prefill of 256K tokens takes hours. Therefore only one chunk of a prompt is timed there, at several
depths, behind a cache that is filled without computing; the time of a whole prompt is the sum over its chunks, whose times are
interpolated between these depths. Interpolation is exact as far as the time of a chunk grows linearly with its depth, as it
does with full attention; with sliding attention it does not grow at all. The sum is a little longer than a whole prompt takes:
each chunk that is timed ends in a first new token, so the cross-decoder and the LM head run for one position of each of them.
"""

from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from yoco_u import paper
from yoco_u.architecture import Architecture
from yoco_u.bench.cases import BenchSettings, Case, Decode, Prefill
from yoco_u.bench.run import Measurement, kv_room
from yoco_u.budget import kv_bytes
from yoco_u.formatting import context_label, number

ARCHITECTURES = ("transformer", "yoco", "rins", "yoco_u")
CHUNK = 2048
"""Tokens of a prompt that are timed together on a CPU."""

PAPER: dict[str, Any] = {
    "architectures": ARCHITECTURES,
    "contexts": tuple(2**power for power in range(13, 19)),
    "batches": (1,),
}
"""The settings that `--paper` changes on a CPU."""

PAPER_ON_GPU: dict[str, Any] = {
    "size": "1.3b",
    "architectures": ("yoco_u", "yoco", "transformer", "rins"),
    "contexts": (8192, 16384, 65536, 262144),
    "batches": (32,),
    "steps": 128,
    "block_size": 256,
}
"""The settings that `--paper` changes on a GPU: those of the paper, for the most important architecture first."""


def paper_cases(a: Architecture, settings: BenchSettings, memory: int) -> list[Case]:
    """The cases of an architecture: its prefills, then a decode behind each context.

    On a CPU the prefills are the first chunk of a prompt, and one where the last chunk of each context begins. On a GPU they
    are whole prompts, and a batch is smaller than the settings' if its keys and values would not fit into memory beside the
    weights.

    Args:
        memory: bytes of the device.
    """
    contexts, batch, steps = sorted(settings.contexts), settings.batches[0], settings.steps
    if settings.device.startswith("cpu"):
        depths = sorted({0, *((context - 1) // CHUNK * CHUNK for context in contexts)})
        return [*(Prefill(CHUNK, depth) for depth in depths), *(Decode(context, batch, steps) for context in contexts)]
    room = kv_room(a, settings, memory)
    spare = steps + 2 * settings.block_size  # tokens of a sequence besides its context
    fitting = {c: int(room // kv_bytes(a, c + spare, settings.bytes_per_element)) for c in contexts}
    decodes = [Decode(context, max(1, min(batch, fitting[context])), steps) for context in contexts]
    return [*(Prefill(context) for context in contexts), *decodes]


def whole_prefill_seconds(context: int, chunk: int, depths: Sequence[int], seconds: Sequence[float]) -> float:
    """Seconds that the prefill of `context` tokens takes, as the sum over its chunks.

    Args:
        chunk: tokens of a chunk; the last one may be shorter and counts in proportion.
        depths: how many tokens stood before the chunks that were timed, increasing.
        seconds: how long these chunks took.
    """
    starts = np.arange(0, context, chunk)
    lengths = np.minimum(chunk, context - starts)
    return float((np.interp(starts, depths, seconds) * lengths / chunk).sum())


def our_figures(measurement: Measurement) -> tuple[paper.Table, paper.Table, paper.Table]:
    """Our figures for the three tables: prefill tokens per second, decode tokens per second, and KV in MiB of one sequence.

    Figures that were not measured are left out. KV is computed, not measured.
    """
    contexts = measurement.settings.contexts
    prefill: paper.Table = {context: {} for context in contexts}
    decode: paper.Table = {context: {} for context in contexts}
    kv: paper.Table = {context: {} for context in contexts}
    for name in dict.fromkeys(engine for engine, _ in measurement.results):
        own = [result for (engine, _), result in measurement.results.items() if engine == name]
        prefills = [(r.case, median(r.seconds)) for r in own if isinstance(r.case, Prefill) and r.seconds]
        whole = {case.tokens: seconds for case, seconds in prefills if case.depth == 0}
        chunks = [(case.depth, seconds) for case, seconds in prefills if case.tokens == CHUNK]
        for context in contexts:
            if context in whole:
                prefill[context][name] = context / whole[context]
            elif chunks and chunks[-1][0] + CHUNK >= context:
                depths, seconds = zip(*chunks, strict=True)
                prefill[context][name] = context / whole_prefill_seconds(context, CHUNK, depths, seconds)
        for result in own:
            case = result.case
            if isinstance(case, Decode):
                kv[case.context][name] = result.kv_bytes / case.batch / 2**20
                if result.seconds:
                    decode[case.context][name] = case.batch * case.steps / median(result.seconds)
    return prefill, decode, kv


def paper_json(measurement: Measurement) -> dict[str, Any]:
    """The tables as `--json` writes them: by name, our figures and the paper's, by context and architecture."""
    names = ("prefill_tokens_per_second", "decode_tokens_per_second", "kv_mebibytes")
    tables = zip(
        names,
        our_figures(measurement),
        (paper.PREFILL_TOKENS_PER_SECOND, paper.DECODE_TOKENS_PER_SECOND, paper.KV_MEBIBYTES),
        strict=True,
    )
    return {name: {"ours": ours, "paper": theirs} for name, ours, theirs in tables}


def print_paper_tables(console: Console, measurement: Measurement) -> None:
    """Print the three tables, with the paper's figures in brackets behind ours."""
    prefill, decode, kv = our_figures(measurement)
    settings = measurement.settings
    size, dtype = settings.size, settings.dtype
    where = f"{size}, {dtype} here (1.3B on an H100)"

    def show(title: str, table: Table) -> None:
        console.print(f"\n[bold]{title}[/bold]", table, highlight=False)

    show(f"Table 8. Prefill, tokens/s; {where}", _table(prefill, paper.PREFILL_TOKENS_PER_SECOND, as_ratios=True))
    show(
        f"Table 9. Decode, tokens/s; batch {settings.batches[0]}, {where[:-1]}, batch 32)",
        _table(decode, paper.DECODE_TOKENS_PER_SECOND, as_ratios=True),
    )
    show(f"Table 10. KV cache, MiB per sequence; {size} here (1.3B)", _table(kv, paper.KV_MEBIBYTES, as_ratios=False))
    console.print(
        "In brackets the paper's figures. Tokens/s of the Transformer, and of the others as multiples of it. "
        f"{_how_measured(measurement)}",
        highlight=False,
    )


def _how_measured(measurement: Measurement) -> str:
    """What a reader of the tables must know of their figures, beyond the headings."""
    cases = list(measurement.results)
    depths = {case.depth for _, case in cases if isinstance(case, Prefill)}
    if measurement.settings.device.startswith("cpu"):
        several = f"{len(depths)} depths" if len(depths) > 1 else "one depth"
        return (
            f"Prefill here: a chunk of {CHUNK:,} tokens is timed at {several} of a cache that is filled without "
            "computing, and its time summed over the prompt."
        )
    batch = measurement.settings.batches[0]
    smaller = [
        f"{engine} {context_label(case.context)} in batches of {case.batch}"
        for engine, case in cases
        if isinstance(case, Decode) and case.batch < batch
    ]
    return f"Smaller batches, for lack of memory: {', '.join(smaller)}." if smaller else "Prefill here: whole prompts."


def _table(ours: paper.Table, papers: paper.Table, as_ratios: bool) -> Table:
    """A row for each context and a column for each architecture, which are multiples of the Transformer's if `as_ratios`."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for heading in ("context", *ARCHITECTURES):
        table.add_column(heading, justify="right")
    for context in sorted(ours):
        both = ours[context], papers.get(context, {})
        cells = [" ".join(_cells(both, name, as_ratios and name != "transformer")) for name in ARCHITECTURES]
        table.add_row(context_label(context), *cells)
    return table


def _cells(both: tuple[dict[str, float], dict[str, float]], name: str, as_ratio: bool) -> tuple[str, str]:
    """Our figure of an architecture, and the paper's in brackets, or nothing if the paper has none.

    Args:
        both: our figures and the paper's, by architecture.
    """
    texts = []
    for figures in both:
        value, base = figures.get(name), figures.get("transformer")
        if as_ratio:
            texts.append(f"{value / base:.2f}x" if value is not None and base is not None else "-")
        else:
            texts.append(number(value))
    return texts[0], f"({texts[1]})" if texts[1] != "-" else ""
