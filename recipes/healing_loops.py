"""What loops bring a converted model: middle layers looped, their gates opened in several ways, and no loop, at equal FLOPs.

    python recipes/talk.py --no-chat
    python recipes/healing_loops.py --steps 60

Stands on the model that `talk.py` has healed, in whose `--out` all runs lie. Layers 6 to 12 of the self-decoder are looped:
further loops get what these layers always get, where the first layer would get states in place of embeddings. The gates begin
at 0.1, which costs nothing yet. `fixed` trains with T = 3; `grown` with 1, 2, then 3 (the curriculum of arXiv 2511.07384);
`drawn` with a T drawn for each step; `none` has no loop. Each spends the FLOPs of `--steps` steps at T = 3. `loops.json` and
`loops.png` go to `--results`.
"""

import json
import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from talk import run, texts_of, train, write_config
from talk_card import style

from yoco_u.cli.settings import load_run_config
from yoco_u.errors import UserError, in_one_line, script_parser
from yoco_u.files import check_result, write_result, write_text
from yoco_u.folders import check_claim, claim
from yoco_u.plotting import colour, save_png
from yoco_u.training import read_metrics

HEALED = "healed-15"
STAGES = [
    {"attention": "sliding", "layers": 5},
    {"attention": "sliding", "layers": 7, "loops": 3, "loop_gate": 0.1},
    {"attention": "sliding", "layers": 3},
    {"attention": "cross", "layers": 15},
]
WAYS: dict[str, dict[str, Any]] = {
    "none": {},
    "fixed": {"evaluate_loops": [1, 2]},
    "grown": {"evaluate_loops": [1, 2], "loop_schedule": [{"until": 0.25, "loops": 1}, {"until": 0.5, "loops": 2}]},
    "drawn": {"evaluate_loops": [1, 2], "loop_draw": {"distribution": "uniform", "least": 1, "most": 3}},
}


def main() -> None:
    arguments = script_parser(__doc__)
    arguments.add_argument("--steps", type=int, default=60, help="steps of 2,048 tokens at T = 3, whose FLOPs all spend")
    arguments.add_argument("--out", type=Path, default=Path("runs/talk"), help="the folder of talk.py")
    arguments.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "healing")
    chosen = arguments.parse_args()

    for name in ("loops.json", "loops.png"):
        check_result(chosen.results / name)
    if chosen.steps < 4:
        raise UserError(f"--steps is {chosen.steps}; expected at least 4, so that each phase of `grown` has one")
    out: Path = chosen.out
    check_claim(out, "talk")
    plain, looped = out / HEALED / "model", out / "looped-15"
    if not plain.exists():
        raise UserError(f"{plain} not found; run recipes/talk.py --no-chat first")
    claim(out, "talk")
    if not looped.exists():
        run("convert", out / HEALED, f"stages={json.dumps(STAGES)}", "--kv", "mean", "--out", looped)
    text = texts_of(out)
    runs, flops = {}, 0.0
    for way in ("fixed", "none", "grown", "drawn"):
        heal = out / f"loops-{way}"
        path = write_config(out, heal.name, plain if way == "none" else looped, text)
        config = json.loads(path.read_text())
        config["optimizer"]["learning_rate"] = 1e-4
        config["training"] |= {"evaluate_every": 20, "keep_checkpoints": 1} | WAYS[way]
        write_text(path, json.dumps(config, indent=2))
        flops = flops or flops_of(path, chosen.steps)
        train(path, heal, steps_for(path, flops))
        runs[way] = [record for record in read_metrics(heal) if record["kind"] == "evaluation"]
    chosen.results.mkdir(parents=True, exist_ok=True)
    write_result(chosen.results / "loops.json", {"flops": flops, "evaluations": runs})
    plot(runs, chosen.results / "loops.png")
    for way, records in runs.items():
        print(f"{way}: " + ", ".join(f"{key} {value:.4f}" for key, value in records[-1].items() if key.startswith("loss")))


def flops_of(config: Path, steps: int) -> float:
    return load_run_config(str(config), [f"training.steps={steps}", "optimizer.warmup_steps=0"]).training_flops()


def steps_for(config: Path, flops: float) -> int:
    """The number of steps whose FLOPs come nearest to `flops`."""
    steps = max(1, round(flops / flops_of(config, 100) * 100))
    return min((max(1, steps - 1), steps, steps + 1), key=lambda n: abs(flops_of(config, n) - flops))


def plot(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    figure = Figure(figsize=(6.5, 4.2), layout="constrained", dpi=150)
    axes = figure.add_subplot()
    for index, (way, records) in enumerate(runs.items()):
        flops, losses = [one["flops"] for one in records], [math.exp(one["loss"]) for one in records]
        axes.plot(flops, losses, marker="o", markersize=3, color=colour(index), label=way)
    style(axes)
    axes.set_xlabel("FLOPs of healing")
    axes.legend(frameon=False)
    save_png(figure, path)


if __name__ == "__main__":
    in_one_line(main)
