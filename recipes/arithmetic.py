"""Reinforcement learning on sums: a small YOCO-U that is sometimes right learns from its own answers, with three seeds.

    python recipes/arithmetic.py

The problems are all sums of two numbers below 100, such as `58+67=`. A tenth is held out from both kinds of training. A model
trains on the texts of the others until it is right sometimes, and then by `yoco-u grpo`, which tells it only whether an answer
of its own is right. What is made lies in `--out`, and the same command goes on where it was stopped; curves go to `--results`.
"""

import itertools
import json
import random
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from yoco_u.cli import main as yoco_u
from yoco_u.errors import in_one_line, script_parser
from yoco_u.files import check_result, write_result, write_text
from yoco_u.folders import claim
from yoco_u.plotting import colour, open_frame, save_png

BELOW = 100
SEEDS = (0, 1, 2)
TRAIN: dict[str, Any] = {
    "name": "sums",
    "architecture": {
        "preset": "yoco_u", "size": "quickstart", "layers": 4, "loops": 2, "loop_gate": 0.05, "window": 16, "vocab_size": 257,
        "hidden_size": 64, "intermediate_size": 192,
    },
    "initializer_range": 0.05,
    "optimizer": {"learning_rate": 4e-3, "warmup_steps": 50, "weight_decay": 0.1, "schedule": "cosine"},
    "training": {
        "steps": 800, "sequence_length": 256, "batch_rows": 8, "micro_batch_rows": 8, "dtype": "float32",
        "evaluate_every": 100, "evaluation_tokens": 4096, "save_every": 100,
    },
}  # fmt: skip
GRPO = {
    "steps": 100, "problems": 32, "answers": 8, "micro_batch_rows": 256, "max_tokens": 5, "learning_rate": 2e-5,
    "test_every": 20, "save_every": 50,
}  # fmt: skip


def main() -> None:
    arguments = script_parser(__doc__)
    arguments.add_argument("--out", type=Path, default=Path("runs/arithmetic"))
    arguments.add_argument("--results", type=Path, help="where curves.json and curves.png go; the folder of --out by default")
    chosen = arguments.parse_args()
    out: Path = chosen.out
    results = chosen.results or out
    for name in ("curves.json", "curves.png"):
        check_result(results / name)
    claim(out, "arithmetic")
    training, held_out = problems()
    write_lines(out / "problems.jsonl", training)
    write_lines(out / "held-out.jsonl", held_out)
    write_lines(out / "texts.jsonl", [{"text": one["prompt"] + one["answer"]} for one in training])
    data = {"corpus": [str(out / "texts.jsonl")], "vocab_size": 257, "validation_fraction": 0.02}
    write_text(out / "train.yaml", json.dumps(TRAIN | {"dataset": str(out / "data"), "data": data}, indent=2))
    run("train", out / "train.yaml", "--out", out / "sums")
    for seed in SEEDS:
        settings = [f"{key}={value}" for key, value in (GRPO | {"seed": seed}).items()]
        files = [out / "problems.jsonl", *settings, "--test", out / "held-out.jsonl"]
        run("grpo", out / "sums", *files, "--out", out / f"grpo-{seed}")
    summaries = [json.loads((out / f"grpo-{seed}" / "summary.json").read_text()) for seed in SEEDS]
    results.mkdir(parents=True, exist_ok=True)
    write_result(results / "curves.json", {"train": TRAIN, "grpo": GRPO, "seeds": dict(zip(SEEDS, summaries, strict=True))})
    draw(summaries, results / "curves.png")


def problems() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """All problems in random order: those to train on, and the tenth that is held out."""
    pairs = list(itertools.product(range(BELOW), repeat=2))
    random.Random(0).shuffle(pairs)
    made = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in pairs]
    return made[len(made) // 10 :], made[: len(made) // 10]


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def run(*command: Any) -> None:
    """Run a command of yoco-u; end with its status if it fails."""
    line = [str(part) for part in command]
    print("$ yoco-u", *line, flush=True)
    if status := yoco_u(line):
        raise SystemExit(status)


def draw(summaries: list[dict[str, Any]], path: Path) -> None:
    """The share of right answers: sampled ones of each step, in means of ten, and greedy ones to held-out problems."""
    figure = Figure(figsize=(9, 3.6), layout="constrained", dpi=150)
    sampled, greedy = figure.subplots(1, 2, sharey=True)
    for number, (seed, summary) in enumerate(zip(SEEDS, summaries, strict=True)):
        rewards = [one["reward"] for one in summary["rewards"]]
        means = [sum(rewards[end - 10 : end]) / 10 for end in range(10, len(rewards) + 1)]
        sampled.plot(range(10, len(rewards) + 1), means, color=colour(number), label=f"seed {seed}")
        tests = summary["tests"]
        greedy.plot([one["step"] for one in tests], [one["reward"] for one in tests], color=colour(number), marker="o", ms=3)
    sampled.set(title="sampled answers in training (mean of 10 steps)", xlabel="steps of GRPO", ylabel="right", ylim=(0, 1))
    greedy.set(title="greedy answers, 1,000 held-out sums", xlabel="steps of GRPO")
    sampled.legend(frameon=False)
    for axes in (sampled, greedy):
        open_frame(axes, grid=0.2)
    save_png(figure, path)


if __name__ == "__main__":
    in_one_line(main)
