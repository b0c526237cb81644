import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from yoco_u.data import DataConfig, prepare


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus so regular that any model learns something of it in a few steps.

    The corpus is named relative to its own folder: the split depends on the names of documents, so the data are the same in
    every run of the tests, whatever the temporary folder is called.
    """
    folder = tmp_path_factory.mktemp("training-data")
    lines = [json.dumps({"text": f"def add_{n}(left, right):\n    return left + right + {n}\n" * 3}) for n in range(60)]
    (folder / "functions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    config = DataConfig(corpus="functions.jsonl", vocab_size=300, validation_fraction=0.2)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        prepare(config, folder / "dataset", progress=False)
    return folder / "dataset"


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Tests that compare exact results need one number of threads, because it changes the order of sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
