"""Tiny training runs, in this process or in other processes."""

import gc
import os
import socket
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from flash import use_flash
from forked import FORKS
from own_signals import signal_at
from torch.nn.parallel import DistributedDataParallel

from yoco_u.architecture import preset
from yoco_u.config import parse
from yoco_u.errors import UserError
from yoco_u.training import RunConfig, read_metrics, train, trainer

STEPS = 6


def run_config(dataset: Path, name: str = "yoco_u", architecture: dict[str, Any] | None = None, **settings: Any) -> RunConfig:
    """The config of a preset at size `test`; settings named `optimizer_...` belong to `optimizer`, the others to `training`."""
    optimizer = {k.removeprefix("optimizer_"): settings.pop(k) for k in list(settings) if k.startswith("optimizer_")}
    training = {
        "steps": STEPS, "sequence_length": 24, "batch_rows": 4, "micro_batch_rows": 4, "dtype": "float32", "compile": "off",
        "evaluate_every": 3, "evaluation_tokens": 240, "save_every": 2, "keep_checkpoints": 100,
    } | settings  # fmt: skip
    data = {
        "name": name,
        "architecture": preset(name, "test", **({"vocab_size": 300} | (architecture or {}))).model_dump(),
        "dataset": str(dataset),
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 2} | optimizer,
        "training": training,
    }
    return parse(RunConfig, data, "test")


def losses(folder: Path, kind: str = "train") -> list[float]:
    return [record["loss"] for record in read_metrics(folder) if record["kind"] == kind]


def deterministic(folder: Path) -> list[dict[str, Any]]:
    """The records of a run without the values that depend on time."""
    clock = {"tokens_per_second", "model_flops_per_second", "mfu", "seconds"}
    return [{k: v for k, v in record.items() if k not in clock} for record in read_metrics(folder)]


def start(
    config: RunConfig,
    folder: Path,
    rank: int = 0,
    world_size: int = 1,
    port: int = 0,
    *,
    own_signal: tuple[str, int] | None = None,
    gpu_path: bool = False,
) -> BaseProcess:
    """Train in another process.

    Args:
        own_signal: at which moment it sends itself which signal, as arguments of `signal_at`.
        gpu_path: whether it goes the way of GPUs, see `flash.use_flash`.
    """
    arguments = (config.model_dump_json(), folder, rank, world_size, port, own_signal, gpu_path)
    process = FORKS.Process(target=_child, args=arguments, daemon=True)
    process.start()
    return process


def train_on_ranks(config: RunConfig, folder: Path, world_size: int = 2, gpu_path: bool = False) -> list[int | None]:
    """Train in processes with the environment that torchrun makes, and return their exit codes. `gpu_path` as in `start`.

    A process fails if a DDP model still exists when its process group is destroyed, because freeing that model later may hang
    the process: see `distributed_session`.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [start(config, folder, rank, world_size, port, gpu_path=gpu_path) for rank in range(world_size)]
    for process in ranks:
        process.join(timeout=120)
    return [process.exitcode for process in ranks]


def _child(
    config: str, folder: Path, rank: int, world_size: int, port: int, own_signal: tuple[str, int] | None, gpu_path: bool
) -> None:
    gc.freeze()  # what was imported before the fork, so that collecting garbage does not look through it
    torch.set_num_threads(1)
    trainer.gemm_rate = lambda device, dtype: 1e9  # which takes as long as a few steps, and changes nothing that is compared
    if gpu_path:
        use_flash(pytest.MonkeyPatch())
    if own_signal:
        signal_at(*own_signal)
    if world_size > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        dist.destroy_process_group = _destroy_without_models
    try:
        train(RunConfig.model_validate_json(config), folder, progress=False)
    except UserError as error:
        folder.mkdir(exist_ok=True)
        (folder / f"error-{rank}.txt").write_text(str(error), encoding="utf-8")
        raise SystemExit(2) from None


def _destroy_without_models(destroy: Callable[[], None] = dist.destroy_process_group) -> None:
    models = [thing for thing in gc.get_objects() if type(thing) is DistributedDataParallel]
    destroy()
    assert not models
