"""What the benchmarks share: repeated timing, the machine's own ceiling, tables and JSON."""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from yoco_u.training.machine import environment, gemm_rate

RESULTS = Path(__file__).parent / "results"


def seconds(call: Callable[[], object], repeats: int) -> list[float]:
    """Wall-clock seconds of each of `repeats` calls, after one that is not counted."""
    call()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return found


def bf16_gemm_rate() -> float:
    """Best bfloat16 GEMM rate of the CPU now, FLOP/s."""
    return gemm_rate(torch.device("cpu"), torch.bfloat16)


def parser(description: str | None, name: str) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--out", type=Path, default=RESULTS / f"{name}.json", help="JSON file to write")
    return found


def show(title: str, rows: list[dict[str, Any]]) -> None:
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else f"{value}" for value in row.values()))
    Console(width=140).print(table)


def write(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"environment": environment(torch.device("cpu"))} | results, indent=1)
    path.write_text(text + "\n", encoding="utf-8")
