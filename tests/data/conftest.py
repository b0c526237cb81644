from pathlib import Path

import pytest
from data_samples import texts, write_json_lines

from yoco_u.data import DataConfig, prepare


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 short documents."""
    return write_json_lines(tmp_path_factory.mktemp("corpus") / "documents.jsonl", texts(200))


@pytest.fixture(scope="session")
def config(corpus_file: Path) -> DataConfig:
    """Small shards, so that every split has several."""
    return DataConfig(corpus=str(corpus_file), vocab_size=300, validation_fraction=0.2, shard_tokens=1000)


@pytest.fixture(scope="session")
def prepared(config: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "dataset"
    prepare(config, out, progress=False)
    return out
