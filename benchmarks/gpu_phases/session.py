"""One call of `benchmarks/gpu.py`: its phases, what they tell, and how it ends."""

import sys
from pathlib import Path

from rich.console import Console

from gpu_phases import report
from gpu_phases.conductor import PHASES, Conductor
from gpu_phases.record import LEFT_OUT
from yoco_u.config import did_you_mean
from yoco_u.errors import UserError, describe_system_error


def run_phases(names: str | None, out: Path, results: Path, seconds: float, dry: bool) -> int:
    """Run phases and report on them.

    Args:
        names: phases with commas between; None for all.

    Returns:
        The exit status.
    """
    try:
        chosen = _chosen(names)
        report.check(out, results)
        return _run(chosen, Conductor(out, seconds, dry), results)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"error: {describe_system_error(error)}", file=sys.stderr)
    return 2


def _run(names: list[str], conductor: Conductor, results: Path) -> int:
    console, status = Console(width=150), 0
    for phase in PHASES:
        if phase.name not in names:
            continue
        print(f"{phase.name}:", flush=True)
        ended = conductor.run(phase)
        if ended == "mistake":  # which the phase has told
            return 2
        print(f"{phase.name}: {ended}", flush=True)
        path = report.write(conductor, results)
        if ended == "failed":
            status = 1
        if phase.name == "correctness" and (found := _wrong(conductor, ended)):
            print(f"wrong, so nothing is timed; --phases {','.join(p.name for p in PHASES[2:])} measures in spite of it:")
            print("\n".join(f"  {line}" for line in found), flush=True)
            return 1
    report.show({phase.name: conductor.record(phase.name).figures for phase in PHASES}, console)
    print(f"everything is in {path}")
    return status


def _wrong(conductor: Conductor, ended: str) -> list[str]:
    """One line for each check that found something wrong or failed. Checks that no time was left for are not wrong.

    Args:
        ended: how the phase ended, as of `Conductor.run`.
    """
    record = conductor.record("correctness")
    if not record.figures:
        return ["no check was made; see the messages above"]
    if ended == "failed":
        return [f"the process of the checks ended behind {len(record.figures)} of them; see the messages above"]
    if not record.complete:
        print(f"  time was left for {len(record.figures)} checks only")
    lines = []
    for name, figure in record.figures.items():
        failure = figure.get("failure", "")
        if failure and not failure.startswith(LEFT_OUT):
            lines.append(f"{name}: {failure}")
        elif figure.get("wrong"):
            where = f" in {figure['where']}" if figure.get("where") else ""
            error = "not finite" if figure["error"] is None else f"{figure['error']:.3g}"
            lines.append(f"{name}: error {error}, at most {figure['limit']:.3g} is right{where}")
    return lines


def _chosen(names: str | None) -> list[str]:
    known = [phase.name for phase in PHASES]
    chosen = known if names is None else [name.strip() for name in names.split(",")]
    for name in chosen:
        if name not in known:
            raise UserError(f"unknown phase {name!r}: {did_you_mean(name, known)}")
    return chosen
