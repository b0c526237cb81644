"""Training and validation on generated documents, whose answers alone are targets."""

from pathlib import Path

import numpy as np
import pytest
import torch
from models import architecture, build
from training_runs import run_config

from yoco_u.data import DataConfig, PackedDataset, prepare
from yoco_u.training import evaluate, train
from yoco_u.training.distributed import Distributed

ALONE = Distributed(0, 1, 0, torch.device("cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("answers") / "data"
    config = DataConfig(corpus="synthetic:s5:levels=2-4:documents=60:length=48", validation_fraction=0.3)
    prepare(config, out, progress=False)
    return out


def direct_loss(model: torch.nn.Module, dataset: PackedDataset, rows: int) -> tuple[float, int]:
    """The mean loss of the digits behind `=`, one row at a time; in this task each answer is one digit."""
    equals = 1 + sorted([*range(33, 127), *range(161, 173), *range(174, 256)]).index(ord("="))  # <|endoftext|> is 0
    nats = []
    for index in range(rows):
        row = torch.from_numpy(dataset.row(index))[None]
        log_p = model(row[:, :-1], use_cache=False).logits.log_softmax(-1)
        nats += [-float(log_p[0, place, row[0, place + 1]]) for place in range(48) if row[0, place] == equals]
    return float(np.mean(nats)), len(nats)


@torch.no_grad()
@pytest.mark.parametrize("most", [None, 3 * 48, 1])
def test_the_validation_loss_is_the_mean_over_answers(folder: Path, most: int | None) -> None:
    model = build(architecture(vocab_size=257))
    dataset = PackedDataset(folder, "validation", 48, shuffle=False)
    rows = dataset.rows_per_epoch if most is None else max(1, most // 48)
    loss, count = direct_loss(model, dataset, rows)
    found = evaluate(model, dataset, most, 2, ALONE, "float32")
    assert found.tokens == count > rows
    assert found.loss == pytest.approx(loss, rel=1e-5)


def test_training_minimizes_the_loss_of_answers(folder: Path, tmp_path: Path) -> None:
    config = run_config(folder, architecture={"vocab_size": 257}, sequence_length=48, micro_batch_rows=2, steps=3)
    summary = train(config, tmp_path / "run", progress=False)
    assert 0 < summary["train_loss"] < 8
    assert summary["validation"]["loss"] < 8
