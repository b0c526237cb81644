"""Learning rate, initialisation and loop gate of the quickstart's models, chosen in the same way for each architecture.

Every combination is a training run of its own, on the quickstart's corpus with the quickstart's base settings. Learning rates
come first, all at one initialisation, then the other initialisations at each architecture's best rate.

    python benchmarks/sweep.py

prints the table and writes it as JSON. Finished runs in `--runs` are not trained again.
"""

import shutil
from pathlib import Path
from typing import Any

from common import count, parser, write
from rich.console import Console
from rich.table import Table

from yoco_u.config import load_yaml, parse
from yoco_u.errors import in_one_line
from yoco_u.training import train
from yoco_u.training.config import RunConfig

QUICKSTART = Path(__file__).parent.parent / "yoco_u" / "configs" / "quickstart.yaml"

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "yoco": {"preset": "yoco"},
    "yoco_u": {"preset": "yoco_u", "loops": 3},
    "yoco_u gate 0.05": {"preset": "yoco_u", "loops": 3, "loop_gate": 0.05},
    "yoco_u gate 0.3": {"preset": "yoco_u", "loops": 3, "loop_gate": 0.3},
}


def main() -> None:
    arguments = parser(__doc__, "sweep")
    arguments.add_argument("--steps", type=count, default=500)
    arguments.add_argument("--rates", type=float, nargs="+", default=[4e-3, 8e-3, 1.6e-2, 3.2e-2])
    arguments.add_argument("--ranges", type=float, nargs="+", default=[0.05, 0.125, 0.2])
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    arguments.add_argument("--runs", type=Path, default=Path("runs/sweep"))
    chosen = arguments.parse_args()

    found: list[dict[str, Any]] = []
    middle = chosen.ranges[len(chosen.ranges) // 2]
    for name in chosen.architectures:
        for seed in chosen.seeds:
            rows = [run(name, rate, middle, seed, chosen.steps, chosen.runs) for rate in chosen.rates]
            best = min(rows, key=lambda row: row["validation_loss"])["learning_rate"]
            rows += [run(name, best, std, seed, chosen.steps, chosen.runs) for std in chosen.ranges if std != middle]
            found += rows
            write(chosen.out, {"steps": chosen.steps, "runs": found})
    show(found)


def run(name: str, rate: float, std: float, seed: int, steps: int, folder: Path) -> dict[str, Any]:
    """Train one combination and return its figures."""
    base = load_yaml(QUICKSTART)["base"]
    settings = base | {
        "name": f"{name}, learning rate {rate}, std {std}, seed {seed}",
        "architecture": {"size": "quickstart"} | ARCHITECTURES[name],
        "initializer_range": std,
        "dataset": str(folder / "dataset"),
        "optimizer": base["optimizer"] | {"learning_rate": rate},
        "training": base["training"] | {"steps": steps, "seed": seed, "save_every": steps, "evaluate_every": steps},
    }
    target = folder / f"{name}-{rate}-{std}-{seed}-{steps}".replace(" ", "-")
    summary = train(parse(RunConfig, settings, "sweep"), target)
    shutil.rmtree(target / "checkpoints", ignore_errors=True)
    return {
        "architecture": name,
        "learning_rate": rate,
        "initializer_range": std,
        "seed": seed,
        "tokens": summary["tokens"],
        "flops": summary["flops"],
        "train_loss": summary["train_loss"],
        "validation_loss": summary["validation"]["loss"],
        "bits_per_byte": summary["validation"]["bits_per_byte"],
    }


def show(found: list[dict[str, Any]]) -> None:
    """Print all runs, with the best run of each architecture in bold."""
    table = Table("architecture", "learning rate", "std", "seed", "tokens", "validation loss", "bits per byte")
    for row in found:
        best = min(r["validation_loss"] for r in found if r["architecture"] == row["architecture"]) == row["validation_loss"]
        table.add_row(
            row["architecture"], f"{row['learning_rate']:g}", f"{row['initializer_range']:g}", str(row["seed"]),
            f"{row['tokens']:,}", f"{row['validation_loss']:.4f}", f"{row['bits_per_byte']:.4f}",
            style="bold" if best else None,
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    in_one_line(main)
