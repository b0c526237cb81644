"""What checkpoints cost: how long training stands still, how much slower it goes meanwhile, and how fast one is verified.

    python benchmarks/checkpoints.py

A checkpoint of a model and its AdamW state in float32 is written several times: with training waiting until it is on the disk,
and in the background. Training stands still while the state is copied; then matrix products stand for it, whose time with and
without a writer tells what the writer takes from them. Last, the checksums are verified and the bytes read, both from the disk
(the system's cache is emptied of them before) and from memory. Run it on the disk that matters, with --folder.
"""

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import count, parser, show, write

from yoco_u import YocoUConfig, YocoUForCausalLM
from yoco_u.architecture import preset
from yoco_u.checksums import verify_checksums
from yoco_u.errors import in_one_line
from yoco_u.training.checkpoint import Checkpoints, TrainerState, step_name
from yoco_u.training.distributed import Distributed
from yoco_u.training.optimizer import build_optimizer
from yoco_u.training.settings import OptimizerConfig

_CHUNK = 2**22


def main() -> None:
    arguments = parser(__doc__, "checkpoints")
    arguments.add_argument("--size", default="100m")
    arguments.add_argument("--rounds", type=count, default=5)
    arguments.add_argument("--folder", type=Path, help="where to write; by default the system's folder for temporary files")
    chosen = arguments.parse_args()
    folder = Path(tempfile.mkdtemp(dir=chosen.folder))
    try:
        rows = measure(chosen.size, chosen.rounds, folder)
    finally:
        shutil.rmtree(folder)
    show(f"checkpoints of YOCO-U, {chosen.size}", rows)
    write(chosen.out, {"size": chosen.size, "rounds": chosen.rounds, "rows": rows})


def measure(size: str, rounds: int, folder: Path) -> list[dict[str, object]]:
    architecture = preset("yoco_u", size)
    model = YocoUForCausalLM(YocoUConfig.from_architecture(architecture))
    optimizer = build_optimizer(model, OptimizerConfig())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # makes its state
    alone = Distributed(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    checkpoints = Checkpoints(folder, alone)
    state = TrainerState(seed=0, world_size=1, architecture=architecture)
    number = 0

    def save() -> None:
        nonlocal number
        number += 1
        checkpoints.save(step_name(number), model, optimizer, state, keep=1)

    def save_and_wait() -> None:
        save()
        checkpoints.wait()

    first = seconds(save)  # allocates the copy
    checkpoints.wait()
    blocking, stalls, lost = [], [], []
    product = seconds(products)
    for _ in range(rounds):
        blocking.append(seconds(save_and_wait))
        product = min(product, *(seconds(products) for _ in range(5)))
        stalls.append(seconds(save))
        begin, count = time.perf_counter(), 0
        while checkpoints.writing:
            products()
            count += 1
        lost.append(max(0.0, time.perf_counter() - begin - count * product))
        checkpoints.wait()
    checkpoints.close()

    newest = folder / step_name(number)
    files = [path for path in newest.iterdir() if path.is_file()]
    gigabytes = sum(path.stat().st_size for path in files) / 1e9
    verified = rates(lambda: verify_checksums(newest, ""), files, gigabytes, rounds)
    read = rates(lambda: read_all(files), files, gigabytes, rounds)
    whole = statistics.median(blocking)
    return [
        {"": "blocking write", "seconds": whole, "share of it": 1.0, "GB/s": gigabytes / whole},
        {"": "stall, the first time", "seconds": first, "share of it": first / whole, "GB/s": gigabytes / first},
        *(
            {"": name, "seconds": value, "share of it": value / whole, "GB/s": gigabytes / value if value else 0.0}
            for name, value in (("stall", statistics.median(stalls)), ("lost beside the writer", statistics.median(lost)))
        ),
        *(
            {"": name, "seconds": gigabytes / rate, "share of it": gigabytes / rate / whole, "GB/s": rate}
            for name, rate in (
                ("verify, from the disk", verified[0]),
                ("read, from the disk", read[0]),
                ("verify, from memory", verified[1]),
                ("read, from memory", read[1]),
            )
        ),
    ]


def seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def products() -> None:
    """Work for all cores, for some tens of milliseconds."""
    a = torch.ones(1024, 1024)
    for _ in range(4):
        torch.mm(a, a)


def rates(call: Callable[[], object], files: list[Path], gigabytes: float, rounds: int) -> tuple[float, float]:
    """GB/s with the files on the disk alone, and with the files in memory; medians."""
    cold, warm = [], []
    for _ in range(rounds):
        for path in files:
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        cold.append(gigabytes / seconds(call))
        warm.append(gigabytes / seconds(call))
    return statistics.median(cold), statistics.median(warm)


def read_all(files: list[Path]) -> None:
    buffer = bytearray(_CHUNK)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


if __name__ == "__main__":
    in_one_line(main)
