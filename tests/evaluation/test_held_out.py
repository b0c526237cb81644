"""Held-out texts are read for a run as those of its dataset were: by evaluate, context, analyze and exits."""

import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from models import architecture, build

from yoco_u.analysis.text import read_text
from yoco_u.config import dump_yaml
from yoco_u.data import DataConfig, DatasetIndex, DocumentEncoder, load_tokenizer, prepare, train_tokenizer
from yoco_u.data.tokenizer import END_OF_TEXT
from yoco_u.errors import UserError
from yoco_u.evaluation.held_out import document_encoder, read_documents, score_held_out
from yoco_u.training.config import RunConfig
from yoco_u.training.run_folder import has_special_tokens, read_run_config

CHATS = [f"<|user|>What is {i}?<|end|>\n<|assistant|>It is {i}.<|end|>\n" for i in range(12)]
TASK = "synthetic:s3:levels=2:documents=60:length=32"
LENGTH = 32


def make_run(folder: Path, data: DataConfig, says_data: bool = True) -> Path:
    """A run of no step: its config, its dataset, and a model of random weights."""
    prepare(data, folder / "data", progress=False)
    tokenizer = load_tokenizer(folder / "data" / "tokenizer")
    model = build(architecture(vocab_size=max(tokenizer.get_vocab().values()) + 1))
    model.save_pretrained(folder / "run" / "model")
    tokenizer.save_pretrained(folder / "run" / "model")
    settings = {
        "name": "run",
        "dataset": str(folder / "data"),
        "data": data if says_data else None,
        "architecture": {"preset": "yoco_u", "size": "test", "vocab_size": 512},
        "training": {"steps": 200, "sequence_length": LENGTH},
    }
    dump_yaml(RunConfig.model_validate(settings), folder / "run" / "config.yaml")
    return folder / "run"


@pytest.fixture(params=[(True, True), (True, False), (False, True)], ids=["special", "in the dataset", "plain"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    special, says_data = request.param
    tokenizer = train_tokenizer(CHATS, 300)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|end|>"]})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    for name, chats in (("train", CHATS[:4]), ("held", CHATS[4:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": chat}) + "\n" for chat in chats))
    data = DataConfig(
        corpus=str(tmp_path / "train.jsonl"), validation_corpus=str(tmp_path / "held.jsonl"),
        tokenizer=str(tmp_path / "tokenizer"), special_tokens=special,
    )  # fmt: skip
    return make_run(tmp_path, data, says_data)


def test_the_text_of_the_validation_split_is_read_as_the_split_is(run: Path, tmp_path: Path) -> None:
    tokenizer, held = load_tokenizer(tmp_path / "tokenizer"), [str(tmp_path / "held.jsonl")]
    split, texts = ([ids.tolist() for ids in read_documents(run, files)] for files in ((), held))
    assert split == texts == [ids.tolist() for ids in document_encoder(run, tokenizer).encode(CHATS[4:])]
    [batch] = read_text(run, held, "text", 4096, 4096, tokenizer).batches
    assert batch["input_ids"][0].tolist() == np.concatenate(split).tolist()
    [score] = score_held_out(run, held).results
    assert score.tokens == DatasetIndex.load(tmp_path / "data").split("validation").tokens


def test_a_saved_model_reads_special_tokens_as_text(run: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    [ids, *_] = read_documents(run / "model", [str(tmp_path / "held.jsonl")])
    assert not set(ids[1:].tolist()) & set(tokenizer.all_special_ids)
    with pytest.raises(UserError, match="a saved model has no validation split; name --files"):
        read_documents(run / "model", ())


def test_a_text_that_spells_the_separator_is_refused_where_it_would_part_it(run: Path, tmp_path: Path) -> None:
    """As `prepare` refuses it; as ordinary characters it stays whole."""
    tokenizer, file = load_tokenizer(tmp_path / "tokenizer"), tmp_path / "spells.jsonl"
    file.write_text(json.dumps({"text": "one"}) + "\n" + json.dumps({"text": f"two {END_OF_TEXT} three"}) + "\n")
    special = has_special_tokens(run)
    for read in (
        lambda: score_held_out(run, [str(file)]),
        lambda: list(read_documents(run, [str(file)])),
        lambda: read_text(run, [str(file)], "text", LENGTH, 4096, tokenizer),
    ):
        message = r"spells.jsonl:2: the text spells the token that separates documents, which special_tokens encodes"
        with pytest.raises(UserError, match=message) if special else nullcontext():
            read()


@pytest.mark.parametrize("noted", [True, False])
def test_texts_are_read_where_the_dataset_is_gone(run: Path, tmp_path: Path, noted: bool) -> None:
    """As they were before, unless nothing says it any more: then as text, as all were before there was such a setting."""
    tokenizer, held = load_tokenizer(tmp_path / "tokenizer"), [str(tmp_path / "held.jsonl")]
    before = [ids.tolist() for ids in read_documents(run, held)]
    config = read_run_config(run)
    if noted:
        known = DatasetIndex.load(tmp_path / "data").config.special_tokens
        (run / "environment.json").write_text(json.dumps({"special_tokens": known}))
    (tmp_path / "data").rename(tmp_path / "moved")
    plain = [ids.tolist() for ids in DocumentEncoder(tokenizer).encode(CHATS[4:])]
    found = [ids.tolist() for ids in read_documents(run, held)]
    assert found == (before if noted or config.data else plain)
    [batch] = read_text(run, held, "text", 4096, 4096, tokenizer).batches
    assert batch["input_ids"][0].tolist() == np.concatenate(found).tolist()
    for score in (score_held_out, read_documents):
        with pytest.raises(UserError, match="its dataset is not in"):
            score(run, ())


def test_answers_count_as_their_bytes(tmp_path: Path) -> None:
    """All documents but the last fill the rows, and each character of an answer is one target."""
    run = make_run(tmp_path, DataConfig(corpus=TASK, validation_fraction=0.2))
    documents = [ids.tolist() for ids in read_documents(run, ())]
    assert {len(ids) for ids in documents} == {LENGTH}
    tokenizer = load_tokenizer(tmp_path / "data" / "tokenizer")
    texts = [tokenizer.decode(ids[1:]) for ids in documents[:-1]]
    answers = sum(len(part.split(";")[0]) for text in texts for part in text.split("=")[1:])
    [score] = score_held_out(run).results
    assert (score.documents, score.tokens, score.bytes) == (len(texts), answers, answers)
    assert score.bits_per_byte == pytest.approx(score.loss / np.log(2))
