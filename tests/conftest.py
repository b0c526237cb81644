"""For every test: one thread, fixed seeds, hypothesis without deadlines, the speed measured once; and the files' order."""

import gc
import logging
import os
import signal
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from examples import FUZZ, examples
from hypothesis import HealthCheck, settings

from yoco_u import device
from yoco_u.confined import nursery

settings.register_profile(
    "yoco_u",
    deadline=None,
    derandomize=FUZZ is None,
    max_examples=examples(40),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("yoco_u")
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

for name in ("GITHUB_ACTIONS", "FORCE_COLOR", "PY_COLORS", "COLUMNS", "TERMINAL_WIDTH"):  # which change what commands print
    os.environ.pop(name, None)
nursery._PATIENCE = 3000.0  # seconds that a process may take to compute one: beside others, at the lowest priority

# torch.compile writes thousands of lines to it, which would bury a failure. (pytest's own log level costs time in every test.)
logging.getLogger("torch.__trace").disabled = True

# Every run that is trained measures it, which takes as long as a few steps of the tests' models.
device.gemm_rate = cache(device.gemm_rate)

# The files that take longest. They come first, so that no process is left alone with one of them in the end.
SLOWEST = (
    "inference/test_engine.py",
    "inference/test_gpu_engine.py",
    "training/test_resume.py",
    "inference/test_gpu_kernels.py",
    "training/test_distributed.py",
    "inference/test_engine_sharing.py",
    "inference/test_portable_kernels.py",
    "training/test_training.py",
    "cli/test_fuzz.py",
    "inference/test_engine_faults.py",
    "cli/test_experiment_command.py",
    "analysis/test_loop_measures.py",
    "cli/test_outputs.py",
    "cli/test_imports.py",
    "inference/test_prompt_scores.py",
    "evaluation/test_harness_tasks.py",
    "analysis/test_loop_output.py",
    "serving/test_server.py",
    "serving/test_fuzzing.py",
    "inference/test_engine_properties.py",
    "cli/test_commands.py",
)
TESTS = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {TESTS / file: index for index, file in enumerate(SLOWEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # collecting garbage need not look through all that was imported, again and again
    gc.set_threshold(50_000, 20, 100)  # nor so often


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def small_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines' caches of 16 MiB unless another size is asked for: filling a GiB with zeros takes longer than most tests."""
    monkeypatch.setattr("yoco_u.inference.settings.DEFAULT_CACHE_BYTES", 2**24)


@pytest.fixture
def heard() -> Iterator[None]:
    """SIGINT as Python handles it, also where whoever started the tests ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
