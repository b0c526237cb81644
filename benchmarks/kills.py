"""Kills training at random moments, damages its files in between, and compares what comes out with a run that was left alone.

    python benchmarks/kills.py
    python benchmarks/kills.py --kills 500 --damage 0.7 --seed 1

After a kill, with the chance `--damage`, a file of the run or of its dataset is damaged: a bit is flipped, or the file is cut
or emptied. Then the same training is started again. It may go on, or refuse in one line that names the file, which is then put
back, as from a backup. A traceback is a failure, and so is a run that ends with other weights than the run that was left alone,
by as much as a bit.
"""

import contextlib
import email
import multiprocessing
import random
import shutil
import signal
import sys
import tempfile
import time
from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from common import count, parser, show, write
from rich.progress import track
from safetensors.torch import load_file

from yoco_u.architecture import preset
from yoco_u.checksums import SUMS
from yoco_u.config import parse
from yoco_u.data import DataConfig, prepare
from yoco_u.errors import UserError, in_one_line
from yoco_u.training import RunConfig, train

FORKS = multiprocessing.get_context("forkserver")
OUTCOMES = {-signal.SIGKILL: "killed", 0: "ended", 2: "refused"}
FAILURES = ("failed", "refused without a reason", "ended otherwise")


def main() -> None:
    arguments = parser(__doc__, "kills")
    arguments.add_argument("--kills", type=count, default=200)
    arguments.add_argument("--damage", type=float, default=0.5, help="chance that a file is damaged after a kill")
    arguments.add_argument("--seed", type=int, default=0)
    chosen = arguments.parse_args()
    FORKS.set_forkserver_preload(["yoco_u.training", "torch._dynamo"])
    folder = Path(tempfile.mkdtemp())
    try:
        config = configured(folder / "dataset")
        start(config, folder / "run", folder / "said.txt").join()  # starts the server that processes are forked from, too
        shutil.rmtree(folder / "run")
        begin = time.monotonic()
        start(config, folder / "reference", folder / "said.txt").join()
        duration = time.monotonic() - begin
        rows, counts = torment(config, folder, chosen, duration)
    finally:
        shutil.rmtree(folder)
    show(f"{chosen.kills} kills, in runs of {duration:.1f} s", [counts])
    show("What followed damage", rows)
    settings = {"kills": chosen.kills, "damage": chosen.damage, "seed": chosen.seed}
    write(chosen.out, {"settings": settings, **counts, "damage": rows})
    sys.exit(1 if any(counts[name] for name in FAILURES) else 0)


def configured(dataset: Path) -> RunConfig:
    """A run of a few seconds that writes many checkpoints, on text of the standard library."""
    corpus = (str(Path(email.__file__).parent),)
    prepare(DataConfig(corpus=corpus, vocab_size=300, validation_fraction=0.2), dataset, progress=False)
    data = {
        "name": "tormented",
        "architecture": preset("yoco_u", "test", vocab_size=300).model_dump(),
        "dataset": str(dataset),
        "optimizer": {"warmup_steps": 2},
        "training": {
            "steps": 60, "sequence_length": 24, "batch_rows": 4, "micro_batch_rows": 4, "dtype": "float32", "compile": "off",
            "evaluate_every": 20, "evaluation_tokens": 240, "save_every": 4, "keep_checkpoints": 3,
        },
    }  # fmt: skip
    return parse(RunConfig, data, "kills")


def torment(config: RunConfig, folder: Path, chosen: Namespace, duration: float) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Kill and damage runs, one after another; what followed each kind of damage, and how often what happened."""
    draw, run, said = random.Random(chosen.seed), folder / "run", folder / "said.txt"
    counts, table = Counter[str](), dict[str, Counter[str]]()
    whole: dict[Path, bytes] = {}  # what damaged files held, as in a backup
    latest: Path | None = None  # the file that was damaged last, until it is known what follows
    for _ in track(range(chosen.kills), "killing"):
        process = start(config, run, said)
        process.join(draw.uniform(0, 1.2 * duration))
        process.kill()
        process.join()
        outcome, text = OUTCOMES.get(process.exitcode or 0, "failed"), said.read_text(errors="replace")
        named: list[Path] = []
        if outcome == "refused":
            named = [path for path in whole if path.exists() and is_named(path, text)]
            for path in named:
                path.write_bytes(whole.pop(path))
            if not named or text.count("\n") != 1:
                outcome = "refused without a reason"
        if outcome == "ended" and not same(run, folder / "reference"):
            outcome = "ended otherwise"
        if outcome not in OUTCOMES.values():
            print(f"{outcome}, status {process.exitcode}, {latest} damaged:\n{text}", file=sys.stderr, flush=True)
        counts[outcome] += 1
        if latest is not None and (outcome != "refused" or latest in named):  # else another one was in the way
            told = outcome in ("killed", "ended") and kept_apart(latest, text)
            table.setdefault(kind_of(latest), Counter()).update(["damaged", "told" if told else outcome])
            latest = None
        if outcome not in ("killed", "refused"):
            shutil.rmtree(run)
            whole = {path: content for path, content in whole.items() if run not in path.parents}
        elif draw.random() < chosen.damage and run.exists():
            latest = draw.choice([*files(run), *files(folder / "dataset")])
            whole.setdefault(latest, latest.read_bytes())
            latest.write_bytes(damaged(latest.read_bytes(), draw))
    columns = ("damaged", "told", "refused", "killed", "ended", *FAILURES)
    return [{"file": name} | {column: table[name][column] for column in columns} for name in sorted(table)], {
        name: counts[name] for name in (*OUTCOMES.values(), *FAILURES)
    }


def is_named(path: Path, text: str) -> bool:
    """Whether an error names a damaged file. If it is the checksums, that is a file beside them, which may be the bad one."""
    return str(path) in text or (path.name == SUMS and f"{path.parent}/" in text and SUMS in text)


def start(config: RunConfig, folder: Path, said: Path) -> Any:
    """Train in another process, as `yoco-u train` does; what it says goes into a file."""
    said.write_text("")
    process = FORKS.Process(target=_train, args=(config.model_dump_json(), folder, said), daemon=True)
    process.start()
    return process


def _train(config: str, folder: Path, said: Path) -> None:
    with said.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        torch.set_num_threads(1)
        try:
            train(RunConfig.model_validate_json(config), folder)
        except UserError as error:
            file.seek(0)
            file.truncate()
            print(f"error: {error}", file=file, flush=True)
            sys.exit(2)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def damaged(content: bytes, draw: random.Random) -> bytes:
    """With a bit flipped, cut, or empty."""
    if not content:
        return b"\0"
    place = draw.randrange(len(content))
    flipped = content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]
    return draw.choice([flipped, flipped, flipped, content[:place], b""])


def kind_of(path: Path) -> str:
    """The name of a file, without what differs from one time to another."""
    if "tfevents" in path.name:
        return "TensorBoard's events"
    in_checkpoint = any(part.startswith("step-") for part in path.parts)
    return f"{'checkpoint' if in_checkpoint else path.parent.name}/{path.name}"


def kept_apart(path: Path, text: str) -> bool:
    """Whether the run says that something is wrong with a file and goes on."""
    return path.name in text or (path.parent.name.startswith("step-") and path.parent.name in text)


def same(run: Path, reference: Path) -> bool:
    """Whether two runs have ended with the same weights, bit for bit."""
    found, expected = (load_file(path / "model" / "model.safetensors") for path in (run, reference))
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


if __name__ == "__main__":
    in_one_line(main)
