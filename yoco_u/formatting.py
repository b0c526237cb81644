"""Numbers as tables, plots, messages and JSON show them. Each docstring is an example."""

import math
from typing import Any


def context_label(tokens: int) -> str:
    """131072 -> 128K"""
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else f"{tokens:,}"


def number(value: float | None) -> str:
    """1234.2 -> 1,234, 56.78 -> 56.8, None -> -"""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def short_count(number: float) -> str:
    """1234567 -> 1.23M"""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g}{unit}" if number < 999.5 * size else f"{number / size:.0f}{unit}"
    return f"{number:g}"


def scientific(number: float) -> str:
    """123456789 -> 1.23e8"""
    mantissa, exponent = f"{number:.2e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def short_bytes(number: float) -> str:
    """65011712 -> 62.0 MiB"""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if number >= 1024**power:
            return f"{number / 1024**power:.1f} {unit}"
    return f"{number:.0f} B"


def duration(seconds: float) -> str:
    """3723 -> 1 h 02 min"""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def as_json_numbers(value: Any) -> Any:
    """{"a": [nan, 1.0]} -> {"a": [None, 1.0]}, as JSON has neither NaN nor infinity"""
    if isinstance(value, dict):
        return {key: as_json_numbers(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json_numbers(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
