"""A plan as a PNG: the bounds of the prefill and decode rates and the size of the caches, over the context length."""

from pathlib import Path

from yoco_u.planning.plan import Plan, figures_at
from yoco_u.plotting import ContextPlot, plain

_POINTS = 65


def write_plot(plan: Plan, path: Path) -> None:
    """Draw one line per architecture, with dots at the plan's contexts.

    Decode is dashed where weights and caches exceed the memory.
    """
    contexts = sorted(set(plan.settings.contexts))
    plot = ContextPlot(["prefill, tokens/s", f"decode, tokens/s, batch {plan.settings.batch}", "KV, MiB per sequence"])
    plot.figure.suptitle(f"{plain(plan.hardware.name)}, roofline", fontsize=10)
    for index, column in enumerate(plan.columns):
        for dots in (False, True):
            grid = contexts if dots else _between(contexts[0], contexts[-1])
            rows = [figures_at(column.architecture, context, plan.hardware, plan.settings) for context in grid]
            style, marker = ("", "o") if dots else ("-", "")
            label = "" if dots else column.name
            plot.line(0, index, [(r.context, r.prefill_tokens_per_second) for r in rows], label, style, marker)
            plot.line(2, index, [(r.context, r.kv_bytes_per_sequence / 2**20) for r in rows], "", style, marker)
            plot.line(1, index, [(r.context, r.decode_tokens_per_second if r.fits else None) for r in rows], "", style, marker)
            if not dots:
                plot.line(1, index, [(r.context, r.decode_tokens_per_second) for r in rows], "", "--", marker)
    plot.write(path, contexts)


def _between(first: int, last: int) -> list[int]:
    """Context lengths from `first` to `last`, both included, evenly spaced on a logarithmic axis."""
    return sorted({round(first * (last / first) ** (i / (_POINTS - 1))) for i in range(_POINTS)})
