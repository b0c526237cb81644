"""Numbers as tables and plots show them."""


def context_label(tokens: int) -> str:
    """131072 -> 128K"""
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else f"{tokens:,}"


def number(value: float | None) -> str:
    """Three figures at least: 1,234 or 56.7"""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
