"""A disk that is full from some write on: training ends with an error that names it, and goes on once there is space."""

import errno
from pathlib import Path

import pytest
from failing_disk import failing_disk
from training_runs import deterministic, run_config

from yoco_u.training import RunConfig, train

TRIES = 5


@pytest.fixture(scope="module")
def config(dataset: Path) -> RunConfig:
    return run_config(dataset, steps=2, save_every=1, evaluate_every=2, optimizer_warmup_steps=0)


@pytest.fixture(scope="module")
def whole(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A run on a sound disk, and how often it wrote."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with failing_disk(folder.parent) as disk:
        train(config, folder, progress=False)
    return folder, disk.writes


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's thread meets it as well
@pytest.mark.parametrize("part", range(TRIES))
def test_wherever_the_disk_is_full_the_run_goes_on_from_there(
    config: RunConfig, whole: tuple[Path, int], tmp_path: Path, part: int
) -> None:
    reference, writes = whole
    folder = tmp_path / "run"
    first = 1 + part * (writes - 6) // (TRIES - 1)  # the last ones remove a folder that nobody needs
    with failing_disk(tmp_path, first, errno.ENOSPC, lasting=True), pytest.raises(OSError) as raised:
        train(config, folder, progress=False)
    assert raised.value.errno == errno.ENOSPC
    assert str(raised.value.filename).startswith(str(folder))
    train(config, folder, progress=False)
    assert deterministic(folder) == deterministic(reference)
    weights = [(path / "model" / "model.safetensors").read_bytes() for path in (folder, reference)]
    assert weights[0] == weights[1]
