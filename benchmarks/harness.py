"""lm-evaluation-harness through our engine, and through transformers as the harness runs any Hugging Face model.

    python benchmarks/harness.py

Both answer the same questions with the same model, a preset of random weights. The tasks are `yoco_u_stdlib_choice`, multiple
choice among four lines of code with five examples drawn anew for each question and some hundred tokens of context, and
`yoco_u_stdlib_completion`, which generates 64 tokens behind five fixed examples. transformers runs the model (forward,
`generate`) at several batch sizes, of which the fastest counts. Seconds are those of `lm_eval.evaluate`: tokenizing is
included, loading is not. Every round runs all of them in turn. The scores must be the same, and so must the answers in
float32, except where two tokens are equally likely up to rounding.
"""

import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import count, parser, show, write
from lm_eval.models.huggingface import HFLM

from yoco_u import YocoUConfig, YocoUForCausalLM
from yoco_u.architecture import preset
from yoco_u.data import train_tokenizer
from yoco_u.errors import in_one_line
from yoco_u.evaluation.harness import EngineLM
from yoco_u.evaluation.harness_tasks import HowToAsk, load_tasks, run_tasks
from yoco_u.evaluation.stdlib_tasks import texts

TASKS = ("yoco_u_stdlib_choice", "yoco_u_stdlib_completion")
OURS = "engine"


def main() -> None:
    arguments = parser(__doc__, "harness")
    arguments.add_argument("--size", default="100m", help="of the preset yoco_u")
    arguments.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of both")
    arguments.add_argument("--limit", type=count, default=32, help="questions of each task")
    arguments.add_argument("--batch-sizes", type=count, nargs="+", default=[1, 8, 32], help="of transformers")
    arguments.add_argument("--rounds", type=count, default=3)
    chosen = arguments.parse_args()

    with TemporaryDirectory() as folder:
        save_model(chosen.size, Path(folder))
        models: dict[str, Any] = {OURS: EngineLM(folder, dtype=chosen.dtype, device="cpu", add_bos_token=False)}
        for batch in chosen.batch_sizes:
            models[f"transformers, batch {batch}"] = HFLM(
                folder, backend="causal", dtype=chosen.dtype, device="cpu", batch_size=batch
            )
        rows = [row for task in TASKS for row in measure(task, models, chosen.limit, chosen.rounds)]
    show(f"harness tasks, {chosen.size} in {chosen.dtype}, {chosen.limit} questions each", rows)
    total = {name: sum(row["seconds"] for row in rows if row["through"] == name) for name in models}
    peer = min((name for name in total if name != OURS), key=lambda name: total[name])
    print(f"all tasks: {total[OURS]:.1f} s against {total[peer]:.1f} s ({peer}), {total[peer] / total[OURS]:.2f} times as fast")
    settings = {key: getattr(chosen, key) for key in ("size", "dtype", "limit", "batch_sizes", "rounds")}
    write(chosen.out, {"settings": settings, "rows": rows, "seconds": total, "times_as_fast": total[peer] / total[OURS]})


def save_model(size: str, folder: Path) -> None:
    """Save a model of random weights, and a tokenizer trained on the tasks' text."""
    architecture = preset("yoco_u", size)
    torch.manual_seed(0)
    YocoUForCausalLM(YocoUConfig.from_architecture(architecture)).save_pretrained(folder)
    train_tokenizer(texts()["test"]["text"], architecture.vocab_size).save_pretrained(folder)


def measure(name: str, models: dict[str, Any], limit: int, rounds: int) -> list[dict[str, Any]]:
    """Run one task in all ways.

    Returns:
        One row per way: seconds (median of the rounds), how many times as long as ours that is, and how many answers differ
        from ours.
    """
    tasks = load_tasks([name])
    for lm in models.values():
        run_tasks(lm, tasks, HowToAsk(limit=2))
    seconds: dict[str, list[float]] = {through: [] for through in models}
    results: dict[str, Any] = {}
    for _ in range(rounds):
        for through, lm in models.items():
            start = time.perf_counter()
            results[through] = run_tasks(lm, tasks, HowToAsk(limit=limit), log_samples=True)
            seconds[through].append(time.perf_counter() - start)
    median = {through: statistics.median(found) for through, found in seconds.items()}
    return [
        {
            "task": name,
            "through": through,
            "seconds": median[through],
            "ours is faster by": median[through] / median[OURS],
            "score": f"{score(results[through], name):.6f}",
            "answers that differ": differing(results[OURS]["samples"][name], results[through]["samples"][name]),
        }
        for through in models
    ]


def score(results: dict[str, Any], name: str) -> float:
    """A task's score: accuracy, or the share of answers whose first line is right."""
    found = results["results"][name]
    return float(found["acc,none"] if "acc,none" in found else found["same_line,none"])


def differing(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> int:
    """How many questions were answered differently: by another text, or by a log-likelihood more than a thousandth away."""
    return sum(not same(a["resps"], b["resps"]) for a, b in zip(ours, theirs, strict=True))


def same(ours: list[Any], theirs: list[Any]) -> bool:
    if isinstance(ours[0][0], str):
        return ours == theirs
    return all(abs(float(a[0][0]) - float(b[0][0])) <= 1e-3 * abs(float(a[0][0])) for a, b in zip(ours, theirs, strict=True))


if __name__ == "__main__":
    in_one_line(main)
