"""How a worker and `yoco-u bench` talk: in turns, over stdin and stdout, with one JSON value per line.

A worker may run under an interpreter that has neither yoco_u nor its dependencies, so this module uses the standard library
alone.

    to the worker       from the worker
    the job             {"about": {...}} when the engine is ready for cases, or {"error": "..."} and the worker ends
    a case              {"seconds": ...}, or {"error": "..."} and the worker goes on
    end of file         the worker ends

A job holds `model` (the shape of a Llama; for our engine the architecture), `dtype`, `weights`, `device` (as torch names it),
`threads`, `folder` (empty, for the worker's files) and `cases`, all that will come. On a GPU an answer has `gpu_peak_bytes` as
well: the most memory that the engine has held during the case, if the worker can tell. There are two kinds of cases:

    {"kind": "prefill", "tokens", "depth"}              the seconds are those until the first new token is known
    {"kind": "decode", "context", "batch", "steps"}     the seconds are those of all steps
"""

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

Job = dict[str, Any]
Case = dict[str, Any]
Run = Callable[[Case], dict[str, Any]]


def serve(start: Callable[[Job], tuple[Run, dict[str, Any]]]) -> None:
    """Read a job and cases, and answer them, until stdin ends. What the engine itself prints goes to stderr.

    Args:
        start: makes the engine for a job. It returns the function that runs a case and gives the answer to it, and the facts
            about the engine that go into `about`.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(values: dict[str, Any]) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    try:
        run, about = start(json.loads(sys.stdin.readline()))
    except Exception as error:
        traceback.print_exc()
        answer({"error": reason(error)})
        return
    answer({"about": about})
    for line in sys.stdin:
        try:
            result = run(json.loads(line))
        except Exception as error:
            traceback.print_exc()
            result = {"error": reason(error)}
        answer({**result, "max_rss_bytes": max_rss_bytes()})


def reason(error: Exception) -> str:
    """An exception in one line: its name, and the first line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def longest(job: Job) -> int:
    """Tokens of the longest sequence in the job's cases, new ones included."""
    return max(map(_length, job["cases"]))


def most_tokens(job: Job) -> int:
    """Tokens that the job's largest case keeps in caches at once."""
    return max(_length(case) * case.get("batch", 1) for case in job["cases"])


def _length(case: Case) -> int:
    if case["kind"] == "prefill":
        return case["depth"] + case["tokens"] + 1
    return case["context"] + case["steps"] + 8  # and room for the steps that warm up


def forget_peak() -> None:
    """Set this process's peak memory back to what it holds now, so that setting up a case does not count (Linux only)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def max_rss_bytes() -> int | None:
    """The most resident memory that this process has held since it began; None where the system does not tell it."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
