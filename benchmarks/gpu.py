"""Everything that a GPU is needed for, in one call of at most nine minutes: is it right, how fast is it, where does time go.

    python benchmarks/gpu.py                                # on a machine with one H100 or H200
    python benchmarks/gpu.py --phases tables,profiling      # only these
    python benchmarks/gpu.py --dry                          # every phase at toy size on the CPU, to see that all of it runs

Phases run in this order, each in a process of its own with a time limit: `machine` (card, versions, ceilings), `correctness`
(models, engine and kernels against the CPU; if something is wrong the call ends here and says what), `tables` (the paper's
Tables 8 to 10 at 1.3B), `profiling` (time by kernel), `training` (against transformers' Llama), `peers` (transformers, and vLLM
where it is installed), `text` (the comparison of recipes/gpu-text.yaml, as far as time is left). The file of a phase in `--out`
is written again after each figure; a call with the same `--out` goes on where the last one stopped.

In the end a table shows what was measured beside the targets, and everything is in `gpu-CARD.json` in `--results`. Wheels in
`benchmarks/wheels` (`make gpu-wheels`) are used where the machine lacks packages. The exit status is 0 if all went well, 1 if
something is wrong or failed, and 2 for a mistake, which is told in one line.
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from gpu_phases.wheels import CannotInstall, use_wheels  # noqa: E402


def main() -> int:
    chosen = _arguments()
    try:
        with use_wheels(HERE / "wheels"):
            from gpu_phases.session import run_phases

            return run_phases(chosen.phases, chosen.out, chosen.results, chosen.minutes * 60, chosen.dry)
    except CannotInstall as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="for all phases together")
    parser.add_argument("--phases", help="some of the phases, with commas between; all by default")
    parser.add_argument("--out", type=Path, help="folder of the phases' files (runs/gpu, or with --dry runs/gpu-dry)")
    parser.add_argument("--results", type=Path, help="folder of the result (benchmarks/results, or with --dry that of --out)")
    parser.add_argument("--dry", action="store_true", help="every phase at toy size on the CPU")
    chosen = parser.parse_args()
    chosen.out = chosen.out or HERE.parent / "runs" / ("gpu-dry" if chosen.dry else "gpu")
    chosen.results = chosen.results or (chosen.out if chosen.dry else HERE / "results")
    return chosen


if __name__ == "__main__":
    sys.exit(main())
