"""Settings for every test: one thread, fixed seeds, hypothesis without deadlines and always the same examples."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "yoco_u", deadline=None, derandomize=True, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("yoco_u")
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
