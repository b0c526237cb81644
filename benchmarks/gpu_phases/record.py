"""What a phase has found, in a JSON file that is written again after each figure: a phase that is killed loses one figure."""

import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from yoco_u.errors import first_line
from yoco_u.files import read_json, write_json
from yoco_u.formatting import as_json_numbers

Figure = dict[str, Any]

LEFT_OUT = "left out"
"""How the failure of a figure begins for which no time was left."""

BROKEN = 3
"""Exit status of a phase whose GPU answered no more behind the failure of a figure. Another process can go on behind it."""


class Record:
    """The figures of one phase, by name.

    A figure that an earlier process has measured is not measured again, unless it is to be repeated: then it stays as it is
    until the new one is there, so that a failure is not forgotten if the phase is killed before.

    Args:
        path: of the JSON file.
        until: when the phase is killed, in seconds since the epoch.
    """

    def __init__(self, path: Path, until: float = float("inf")) -> None:
        self.path, self._until = path, until
        found = read_json(path, dict[str, Any], {})
        self.figures: dict[str, Figure] = found.get("figures", {})
        self.complete: bool = found.get("complete", False)  # whether the phase ran to its end, even if figures failed
        self._again: set[str] = set(found.get("again", ()))  # figures of an earlier process that are to be repeated

    @property
    def remaining(self) -> float:
        """Seconds until the phase is killed."""
        return self._until - time.time()

    def measure(self, name: str, figure: Callable[[], Figure], least: float = 0.0) -> Figure:
        """Measure a figure and keep it; what is raised becomes its `failure`.

        An error inside a kernel breaks the process's GPU for good, and every later figure would fail with it. So the process
        ends then, with the status `BROKEN`.

        Args:
            least: seconds that it takes at the least; it is left out if fewer remain.
        """
        if self.is_due(name):
            if self.remaining < least:
                if name not in self.figures:
                    self.keep(name, {"failure": f"{LEFT_OUT}: {self.remaining:.0f} s remained of the phase"})
                self._again.discard(name)
                return self.figures[name]
            begin = time.monotonic()
            try:
                found = figure()
            except Exception as error:
                traceback.print_exc()
                found = {"failure": f"{type(error).__name__}: {first_line(error)}"}
            self.keep(name, found | {"took_seconds": round(time.monotonic() - begin, 2)})
            if "failure" in found and _gpu_is_broken():
                os._exit(BROKEN)  # at once: what is left on the GPU cannot be freed
        return self.figures[name]

    def keep(self, name: str, figure: Figure) -> None:
        """Keep a figure that has been measured, and show it. Numbers that are not finite become None."""
        self.figures[name] = as_json_numbers(figure)
        self._again.discard(name)
        self._write()
        shown = ", ".join(f"{key} {_short(value)}" for key, value in figure.items() if not isinstance(value, dict | list))
        print(f"  {name}: {shown}", flush=True)

    @property
    def is_done(self) -> bool:
        """Whether there is nothing to measure any more."""
        return self.complete and not any(map(_to_repeat, self.figures.values()))

    def is_due(self, name: str) -> bool:
        """Whether a figure is still to be measured."""
        return name not in self.figures or name in self._again

    def retry_failures(self) -> None:
        """Let `measure` try again what has failed or was found wrong."""
        self.repeat(*(name for name, figure in self.figures.items() if _to_repeat(figure)))

    def repeat(self, *names: str) -> None:
        """Let `measure` measure figures again, where they are known."""
        self._again |= self.figures.keys() & set(names)
        self.complete = False

    def finish(self) -> None:
        """Note that the phase has measured all that it was to measure. What was to be repeated and was not asked for goes."""
        self.figures = {name: figure for name, figure in self.figures.items() if name not in self._again}
        self._again.clear()
        self.complete = True
        self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {"complete": self.complete, "again": sorted(self._again), "figures": self.figures})


def _to_repeat(figure: Figure) -> bool:
    return "failure" in figure or bool(figure.get("wrong"))


def _gpu_is_broken() -> bool:
    torch = sys.modules.get("torch")  # without which no GPU was used
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value}"
