"""Perplexity over tokens of healing for runs of `talk.py`, beside the source's, with a fit that tells what more would do.

    python recipes/healing_curves.py runs/talk/healed-15 runs/talk/healed-5 runs/talk/healed-1

Runs of `healing_starts.py` too. `healing.json` and `healing.png` go to `--results`. All losses are of the first tokens of the
validation split of the runs' dataset. The fit is `loss - source = scale * tokens ** -exponent`, a straight line between
logarithms, over the evaluations within a run, whose learning rate falls to its end: a guide, not a forecast.
"""

import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from scipy.stats import linregress
from talk_card import style

from yoco_u.data import PackedDataset
from yoco_u.device import find_device
from yoco_u.errors import UserError, in_one_line, script_parser
from yoco_u.files import check_result, write_result
from yoco_u.loading import load_model
from yoco_u.plotting import colour, save_png
from yoco_u.training import RunConfig, read_metrics
from yoco_u.training.distributed import Distributed
from yoco_u.training.run_folder import RunFolder, read_run_config, run_dataset
from yoco_u.training.validation import evaluate

AIMS = {15: 1.15, 5: 1.25, 1: 1.35}
"""By the number of global KVs: the perplexity that is aimed at, as a multiple of the source's."""

MARKERS = "osv^"
MOST = 100.0
"""The logarithm of more tokens than anything is trained on."""


def main() -> None:
    arguments = script_parser(__doc__)
    arguments.add_argument("runs", type=Path, nargs="+", help="runs of talk.py with one source, such as runs/talk/healed-15")
    arguments.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "healing")
    chosen = arguments.parse_args()

    for name in ("healing.json", "healing.png"):
        check_result(chosen.results / name)
    configs = [read_run_config(run) for run in chosen.runs]
    for run, config in zip(chosen.runs, configs, strict=True):
        if config.distillation is None or config.start_from is None or config.architecture.global_kvs not in AIMS:
            kvs = ", ".join(map(str, AIMS))
            raise UserError(f"{run}: is no run of talk.py; expected one with a teacher, and with {kvs} global KVs")
        if len(evaluations(run)) < 2:
            raise UserError(f"{run}: has fewer than two evaluations, through which no line can be fitted; train it on")
    teacher = configs[0].distillation
    assert teacher is not None
    check_measured_alike(chosen.runs, configs)
    source = loss_of(RunFolder(chosen.runs[0]).paths.find(teacher.teacher), chosen.runs[0], configs[0])
    curves = [curve(run, config, source) for run, config in zip(chosen.runs, configs, strict=True)]
    chosen.results.mkdir(parents=True, exist_ok=True)
    write_result(chosen.results / "healing.json", {"source": source, "curves": curves})
    plot(source, curves, chosen.results / "healing.png")
    for one in curves:
        print(sentence(one))


def check_measured_alike(runs: list[Path], configs: list[RunConfig]) -> None:
    """Refuse runs whose losses are not of one dataset, in rows of one length, beside one source."""
    first, *others = [
        {
            "dataset": str(run_dataset(run).resolve()),
            "teacher": str(RunFolder(run).paths.find(config.distillation.teacher)) if config.distillation else None,
            "sequence_length": config.training.sequence_length,
            "evaluation_tokens": config.training.evaluation_tokens,
            "dtype": config.training.dtype,
        }
        for run, config in zip(runs, configs, strict=True)
    ]
    for run, own in zip(runs[1:], others, strict=True):
        for name in (name for name in own if own[name] != first[name]):
            raise UserError(f"{run}: {name} is {own[name]}, but {first[name]} in {runs[0]}; draw runs that share it")


def loss_of(model: str, run: Path, config: RunConfig) -> float:
    """Nats per token of a model, on what the evaluations of a run score."""
    print(f"measuring {model}", flush=True)
    training = config.training
    dataset = PackedDataset(run_dataset(run), "validation", training.sequence_length, shuffle=False)
    alone = Distributed(0, 1, 0, find_device("auto"))
    return evaluate(load_model(model, alone.device)[0], dataset, training.evaluation_tokens, 1, alone, training.dtype).loss


def evaluations(run: Path) -> list[dict[str, Any]]:
    return [record for record in read_metrics(run) if record["kind"] == "evaluation"]


def curve(run: Path, config: RunConfig, source: float) -> dict[str, Any]:
    """What a run has reached at each evaluation, and at how many tokens its fit reaches what is aimed at."""
    assert config.start_from is not None
    points = evaluations(run)
    tokens, losses = [one["tokens"] for one in points], [one["loss"] for one in points]
    if min(losses) <= source:
        raise UserError(f"{run}: reached the source's loss, {source:.4f}, so that no excess is left to fit")
    fit = linregress([math.log(n) for n in tokens], [math.log(loss - source) for loss in losses])
    kvs = config.architecture.global_kvs
    converted = loss_of(RunFolder(run).paths.find(config.start_from), run, config)
    return {
        "run": run.name, "global_kvs": kvs, "converted": converted, "tokens": tokens, "losses": losses,
        "flops": points[-1]["flops"], "times_source": math.exp(losses[-1] - source),
        "exponent": -fit.slope, "exponent_error": fit.stderr, "scale": math.exp(fit.intercept),
        "aim": AIMS[kvs], "needed": reached(fit.intercept, fit.slope, math.log(AIMS[kvs])),
    }  # fmt: skip


def reached(intercept: float, slope: float, excess: float) -> float | None:
    """The tokens at which a line through logarithms of tokens and of excess loss reaches `excess`; None if it does not."""
    power = (math.log(excess) - intercept) / slope if slope < 0 else math.inf
    return math.exp(power) if power < MOST else None


def plot(source: float, curves: list[dict[str, Any]], path: Path) -> None:
    """Perplexity over tokens: a colour for each number of global KVs, a marker for each run of that number."""
    figure = Figure(figsize=(8, 4.2), layout="constrained", dpi=150)
    axes = figure.add_subplot()
    numbers = sorted({one["global_kvs"] for one in curves}, reverse=True)
    drawn = dict.fromkeys(numbers, 0)
    for one in curves:
        kvs = one["global_kvs"]
        axes.plot(
            one["tokens"], [math.exp(loss) for loss in one["losses"]], marker=MARKERS[drawn[kvs] % len(MARKERS)], markersize=4,
            color=colour(numbers.index(kvs)), label=f"{one['run']}, {math.exp(one['converted']):,.0f} before",
        )  # fmt: skip
        drawn[kvs] += 1
    axes.axhline(math.exp(source), color="#5a5a5a", linestyle="--", label=f"the source, {math.exp(source):.1f}")
    style(axes)
    axes.set_xscale("log")
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    save_png(figure, path)


def sentence(one: dict[str, Any]) -> str:
    found, tokens, exponent = one["times_source"], one["tokens"][-1], f"{one['exponent']:.2f} +- {one['exponent_error']:.2f}"
    needed = "at no number of tokens" if one["needed"] is None else f"at {one['needed']:,.0f}"
    return (
        f"{one['run']}, {one['global_kvs']} global KVs: {found:.2f} times the source's perplexity at {tokens:,} tokens; "
        f"the excess falls as tokens to the power of -({exponent}), to {one['aim']} times {needed}"
    )


if __name__ == "__main__":
    in_one_line(main)
