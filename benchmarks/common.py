"""What the benchmarks share: repeated timing, prompts, tables and JSON."""

import argparse
import random
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from yoco_u.analysis import scaling
from yoco_u.device import environment
from yoco_u.errors import UserError, script_parser
from yoco_u.files import check_result, write_result
from yoco_u.inference import Engine, RequestOutput, SamplingParams

RESULTS = Path(__file__).parent / "results"


def seconds(call: Callable[[], object], repeats: int) -> list[float]:
    """Wall-clock seconds of each of `repeats` calls, after one call that warms up."""
    call()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return found


def standard_library_prompts(tokenizer: Any, lengths: Sequence[int]) -> list[list[int]]:
    """One prompt of each length in tokens, cut at random places from the Python standard library."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:40]
    text = "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    draw = random.Random(0)
    begins = [draw.randrange(len(tokens) - length) for length in lengths]
    return [tokens[begin : begin + length] for begin, length in zip(begins, lengths, strict=True)]


def decode(
    subject: Engine, batch: int, chosen: argparse.Namespace, sampling: dict[str, Any]
) -> tuple[float, list[RequestOutput]]:
    """Decode a batch behind random prompts, see `scaling.decode`.

    Args:
        chosen: has `context`, the tokens of each prompt, and `tokens`, those of each output.
        sampling: fields of `SamplingParams`.
    """
    generator = torch.Generator().manual_seed(1)
    vocabulary = subject.architecture.vocab_size
    prompts = torch.randint(vocabulary, (batch, chosen.context), generator=generator).tolist()
    params = SamplingParams(max_tokens=chosen.tokens, ignore_eos=True, seed=0, **sampling)
    return scaling.decode(subject, prompts, params)


def parser(description: str | None, name: str) -> argparse.ArgumentParser:
    """A parser with the option that all benchmarks have: `--out`, by default `results/NAME.json`.

    That it may not be written is a `UserError`, as any other mistake.
    """
    found = script_parser(description)
    found.add_argument("--out", type=_result, default=str(RESULTS / f"{name}.json"), help="JSON file to write")
    return found


def _result(text: str) -> Path:
    try:
        check_result(Path(text))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return Path(text)


def count(text: str) -> int:
    """An option that is a number of things, at least one."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"is {number}; expected at least 1")
    return number


def counts(text: str) -> list[int]:
    """An option that is several such numbers, with commas between."""
    return [count(part) for part in text.split(",")]


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows as a table, unless there are none; all have the keys of the first, which are the headings."""
    if not rows:
        return
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else f"{value}" for value in row.values()))
    Console(width=140).print(table)


def write(path: Path, results: dict[str, Any]) -> None:
    """Write results as JSON, together with the versions and the hardware that they were measured with."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_result(path, {"environment": environment(torch.device("cpu"))} | results)
