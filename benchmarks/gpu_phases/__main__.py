"""One phase, in this process: `python -m gpu_phases PHASE FOLDER UNTIL [--dry] [--go-on]`, as `conductor.py` starts it.

With `--go-on` what has failed is not tried again, but for what was still to be tried when the process before this one ended.
"""

import importlib
import sys
from pathlib import Path

from gpu_phases.conductor import MISTAKE
from gpu_phases.machine import check_device
from gpu_phases.record import Record
from gpu_phases.scale import FULL, TOY
from yoco_u.errors import UserError


def main() -> int:
    name, folder, until, *options = sys.argv[1:]
    scale = TOY if "--dry" in options else FULL
    record = Record(Path(folder) / f"{name}.json", float(until))
    if "--go-on" not in options:
        record.retry_failures()
    try:
        check_device(scale.device, Record(Path(folder) / "machine.json"))
        importlib.import_module(f"gpu_phases.{name}").run(record, scale)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return MISTAKE
    record.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
