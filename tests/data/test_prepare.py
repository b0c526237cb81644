import itertools
import json
import shutil
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from data_samples import texts, write_json_lines
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from yoco_u.config import dump_yaml, load_yaml, parse
from yoco_u.data import (
    Corpus,
    DataConfig,
    DatasetIndex,
    PackedDataset,
    SplitDocuments,
    check_vocabulary,
    load_tokenizer,
    prepare,
    split_of,
)
from yoco_u.errors import UserError
from yoco_u.folders import beside, mark

module = sys.modules["yoco_u.data.prepare"]


def stored(folder: Path, split: str) -> list[list[int]]:
    """The documents of a split as lists of ids, read without the package's own reader."""
    index = json.loads((folder / "dataset.json").read_text())
    documents = []
    for number, shard in enumerate(index["splits"][split]["shards"]):
        tokens = np.fromfile(folder / f"{split}-{number:05d}.bin", dtype=index["dtype"])
        offsets = np.load(folder / f"{split}-{number:05d}.offsets.npy")
        assert (len(tokens), len(offsets)) == (shard["tokens"], shard["documents"] + 1)
        documents += [tokens[a:b].tolist() for a, b in itertools.pairwise(offsets)]
    return documents


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_document_is_stored_once_in_its_split(prepared, config):
    index = DatasetIndex.load(prepared)
    tokenizer = load_tokenizer(index.tokenizer)
    expected: dict[str, list[str]] = {"train": [], "validation": []}
    for source, text in Corpus(config.corpus).documents():
        expected[split_of(source, config.validation_fraction, config.seed)].append(text)
    assert 20 <= len(expected["validation"]) <= 60
    for split in ("train", "validation"):
        documents = stored(prepared, split)
        assert [tokenizer.decode(document[1:]) for document in documents] == expected[split]
        assert all(document.count(index.eot_id) == 1 and document[0] == index.eot_id for document in documents)
        totals = index.split(split)
        assert totals.documents == len(documents)
        assert totals.tokens == sum(map(len, documents))
        assert totals.bytes == sum(len(text.encode()) for text in expected[split])
        assert totals.bytes_per_token == totals.bytes / totals.tokens
    assert len(index.split("train").shards) > 3
    assert index.dtype == "uint16"
    assert index.vocab_size == len(tokenizer) == 300
    assert index.config == config


def test_the_result_depends_on_nothing_but_the_config(prepared, config, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BATCH_CHARACTERS", 500)
    for workers in (1, 3):
        prepare(config, tmp_path / str(workers), progress=False, workers=workers)
        assert contents(tmp_path / str(workers)) == contents(prepared)


def test_the_seed_changes_the_split_and_more_documents_do_not():
    sources = [f"a.jsonl:{n}" for n in range(1000)]
    splits = [split_of(source, 0.1, 0) for source in sources]
    assert 60 < splits.count("validation") < 140
    assert splits != [split_of(source, 0.1, 1) for source in sources]
    wider = [split_of(source, 0.3, 0) for source in sources]
    assert all(wide == "validation" for wide, split in zip(wider, splits, strict=True) if split == "validation")


@given(st.text(), st.floats(0, 1, exclude_max=True), st.integers(0))
def test_any_name_has_a_split(source, fraction, seed):
    split = split_of(source, fraction, seed)
    assert split == "train" or fraction > 0


def test_an_equal_config_finds_the_dataset_and_another_is_refused(prepared, config, tmp_path, capsys):
    folder = shutil.copytree(prepared, tmp_path / "dataset")
    before = contents(folder)
    assert prepare(config, folder).splits == DatasetIndex.load(prepared).splits
    assert "remove it to read the corpus anew" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(UserError, match=r"another config \(vocab_size 300, now 310; seed 0, now 5\)"):
        prepare(config.model_copy(update={"vocab_size": 310, "seed": 5}), folder, progress=False)
    assert contents(folder) == before


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_no_dataset_is_not_touched(config, tmp_path, kind):
    out = tmp_path / "out"
    precious = out
    if kind == "folder":
        out.mkdir()
        precious = out / "precious.txt"
    precious.write_text("precious")
    with pytest.raises(UserError, match="out: exists and is no prepared dataset"):
        prepare(config, out, progress=False)
    assert precious.read_text() == "precious"


@pytest.mark.parametrize("place", ["train_tokenizer", "_check_splits", "ShardWriter.add", "DatasetIndex.save"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_run_leaves_nothing(config, tmp_path, monkeypatch, place, error):
    calls = 0

    def fail(*_: object) -> None:
        nonlocal calls
        calls += 1
        raise error

    with monkeypatch.context() as patch:
        owner, _, name = place.rpartition(".")
        patch.setattr(getattr(module, owner) if owner else module, name, fail)
        with pytest.raises(error):
            prepare(config, tmp_path / "out", progress=False)
    assert calls
    assert [path for path in tmp_path.iterdir() if path.suffix != ".lock"] == []
    prepare(config, tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_run_left_is_cleared_away(prepared, config, tmp_path):
    partial = beside(tmp_path / "out")
    partial.mkdir()
    mark(partial)
    (partial / "train-00009.bin").write_bytes(b"half")
    prepare(config, tmp_path / "out", progress=False)
    assert not partial.exists()
    assert contents(tmp_path / "out") == contents(prepared)


def test_a_corrupt_line_stops_with_its_place(tmp_path):
    path = write_json_lines(tmp_path / "bad.jsonl", texts(60))
    lines = path.read_text().splitlines()
    lines[40] = lines[40][:-1]
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"bad.jsonl:41: not valid JSON"):
        prepare(DataConfig(corpus=str(path), vocab_size=300), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("existing", [False, True])
def test_empty_splits(prepared, tmp_path, existing):
    tokenizer = str(prepared / "tokenizer") if existing else None
    empty, one = tmp_path / "empty.txt", tmp_path / "one.txt"
    empty.write_text("")
    one.write_text("some text of one document\n")

    def attempt(**settings: object) -> None:
        prepare(parse(DataConfig, {"tokenizer": tokenizer, **settings}, "test"), tmp_path / "out", progress=False)

    with pytest.raises(UserError, match=r"empty.txt: the corpus is empty"):
        attempt(corpus=str(empty))
    with pytest.raises(UserError, match=r"none of the 1 documents fell to the validation split .* give more documents or a"):
        attempt(corpus=str(one), validation_fraction=1e-12)
    with pytest.raises(UserError, match=r"no document is left for training"):
        attempt(corpus=str(one), validation_fraction=1 - 1e-12)
    with pytest.raises(UserError, match=r"empty.txt: the validation corpus is empty"):
        attempt(corpus=str(one), validation_corpus=str(empty))
    with pytest.raises(UserError, match=r"one.txt: in both corpus and validation_corpus"):
        attempt(corpus=[str(tmp_path)], validation_corpus=[str(one)])
    assert not (tmp_path / "out").exists()
    attempt(corpus=str(one), validation_fraction=0)
    index = DatasetIndex.load(tmp_path / "out")
    assert list(index.splits) == ["train"]
    with pytest.raises(UserError, match=r"no validation split, there is train; prepare with validation_fraction"):
        index.split("validation")


def test_a_validation_corpus_of_its_own_and_an_existing_tokenizer(prepared, corpus_file, tmp_path):
    held_out = write_json_lines(tmp_path / "held_out.jsonl", texts(5, seed=9))
    config = DataConfig(corpus=str(corpus_file), validation_corpus=str(held_out), tokenizer=str(prepared / "tokenizer"))
    index = prepare(config, tmp_path / "out", progress=False)
    assert (index.split("train").documents, index.split("validation").documents) == (200, 5)
    tokenizer = load_tokenizer(index.tokenizer)
    assert [tokenizer.decode(ids[1:]) for ids in stored(tmp_path / "out", "validation")] == texts(5, seed=9)
    assert tokenizer.get_vocab() == load_tokenizer(prepared / "tokenizer").get_vocab()


def word_tokenizer(folder: Path, words: int) -> str:
    """A tokenizer that was not trained here: of whole words, with an eos token that is an ordinary word of its vocabulary."""
    vocabulary = {"</s>": 0, "<unk>": 1, **{f"w{n}": n + 2 for n in range(words)}}
    backend = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    return str(folder)


def test_a_large_vocabulary_takes_four_bytes(tmp_path):
    corpus = write_json_lines(tmp_path / "c.jsonl", ["w0 w65534 w69999", "w1"])
    settings = {"corpus": str(corpus), "validation_fraction": 0}
    for words, dtype in [(65534, "uint16"), (70000, "uint32")]:
        tokenizer = word_tokenizer(tmp_path / f"t{words}", words)
        index = prepare(DataConfig(tokenizer=tokenizer, **settings), tmp_path / f"{words}", progress=False)
        assert (index.vocab_size, index.dtype) == (words + 2, dtype)
    assert stored(tmp_path / "70000", "train") == [[0, 2, 65536, 70001], [0, 3]]
    with pytest.raises(UserError, match=r"70000.dataset.json: the tokenizer has 70002 tokens but .* is 4096; set"):
        check_vocabulary(index, 4096)
    check_vocabulary(index, 70002)


def test_the_largest_id_counts_where_ids_have_gaps(tmp_path):
    corpus = write_json_lines(tmp_path / "c.jsonl", ["a b", "b b a", "<added>"])
    backend = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1, "b": 70000}, "a"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>").save_pretrained(tmp_path / "t")
    config = DataConfig(corpus=str(corpus), tokenizer=str(tmp_path / "t"), validation_fraction=0)
    index = prepare(config, tmp_path / "out", progress=False)
    assert (index.vocab_size, index.dtype) == (70001, "uint32")
    assert stored(tmp_path / "out", "train") == [[0, 1, 70000], [0, 70000, 70000, 1], [0, 1]]
    with pytest.raises(UserError, match=r"the tokenizer has 70001 tokens but the model's vocab_size is 4096; set"):
        check_vocabulary(index, 4096)


def test_ids_beyond_the_vocabulary_are_refused(prepared, tmp_path):
    index = DatasetIndex.load(prepared)
    shutil.copytree(prepared, tmp_path / "d")
    smaller = index.model_copy(update={"vocab_size": 250})
    smaller.save(tmp_path / "d")
    dataset = PackedDataset(tmp_path / "d", "train", 64, shuffle=False)
    for read in (
        lambda: list(SplitDocuments(tmp_path / "d", "train")),
        lambda: [dataset.row(n) for n in range(dataset.rows_per_epoch)],
    ):
        with pytest.raises(UserError, match=r"d: token \d+ of the train split is beyond the vocabulary of 250; the dataset is"):
            read()
    for eot in (-1, 300):
        with pytest.raises(UserError, match=rf"dataset.json: eot_id is {eot}, beyond the vocabulary of 300"):
            check_vocabulary(index.model_copy(update={"eot_id": eot}), 4096)


def test_a_byte_order_mark_is_no_byte_of_the_text(tmp_path):
    for name, text in [("a.txt", "text"), ("b.py", "x = 1"), ("c.csv", "text\nabc\n"), ("d.jsonl", '{"text": "de"}')]:
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
    index = prepare(DataConfig(corpus=str(tmp_path), vocab_size=257, validation_fraction=0), tmp_path / "out", progress=False)
    assert index.split("train").bytes == len("textx = 1abcde")


def test_a_text_that_spells_the_separator(tmp_path):
    corpus = write_json_lines(tmp_path / "c.jsonl", ["w0", "w1 </s> w2"])
    tokenizer = word_tokenizer(tmp_path / "t", 5)
    with pytest.raises(UserError, match=r"c.jsonl:2: the text spells the token that separates documents"):
        prepare(DataConfig(corpus=str(corpus), tokenizer=tokenizer, validation_fraction=0), tmp_path / "o", progress=False)


def test_the_tokenizer_learns_from_a_seeded_sample_of_training_documents(tmp_path, monkeypatch):
    seen: list[list[str]] = []

    def train(sample: list[str], vocab_size: int) -> object:
        seen.append(list(sample))
        raise RuntimeError

    monkeypatch.setattr(module, "train_tokenizer", train)
    monkeypatch.setattr(module, "SAMPLE_CHARACTERS", 2000)
    path = write_json_lines(tmp_path / "c.jsonl", texts(300))
    for seed in (0, 0, 1):
        with pytest.raises(RuntimeError):
            prepare(DataConfig(corpus=str(path), validation_fraction=0.5, seed=seed), tmp_path / "out", progress=False)
    documents = dict(Corpus([str(path)]).documents())
    assert seen[0] == seen[1] != seen[2]
    assert 1500 < sum(map(len, seen[0])) <= 2000
    trained = {text for source, text in documents.items() if split_of(source, 0.5, 0) == "train"}
    assert set(seen[0]) < trained


def test_a_standard_library_is_prepared_without_what_does_not_belong(tmp_path, monkeypatch):
    real = Path(sysconfig.get_paths()["stdlib"])
    root = tmp_path / "lib"
    packages = ("json", "logging", "html", "email")
    for package in packages:
        shutil.copytree(real / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ("site-packages/a.py", "__pycache__/b.py", "lib2to3/tests/data/c.py", "data.txt"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text("no = 1\n")
    (root / "bad.py").write_bytes(b"broken = '\xff'\n")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(root)})
    index = prepare(DataConfig(vocab_size=512, validation_fraction=0.2), tmp_path / "out", progress=False)
    expected = [path for name in packages for path in (root / name).rglob("*.py")]
    assert sum(split.documents for split in index.splits.values()) == sum(path.stat().st_size > 0 for path in expected)
    assert sum(split.bytes for split in index.splits.values()) == sum(path.stat().st_size for path in expected)
    assert 1.5 < index.split("train").bytes_per_token < 3.5
    shutil.rmtree(root)
    with pytest.raises(UserError, match=r"lib: this Python has no .py sources of its standard library"):
        prepare(DataConfig(), tmp_path / "none", progress=False)


def test_configs_round_trip_and_refuse_nonsense(config, tmp_path):
    dump_yaml(config, tmp_path / "c.yaml")
    assert parse(DataConfig, load_yaml(tmp_path / "c.yaml"), "c.yaml") == config
    assert DataConfig().corpus == ("stdlib",)
    for settings, message in [
        ({"corpus": []}, "corpus"),
        ({"vocab_size": 256}, "vocab_size"),
        ({"validation_fraction": 1}, "validation_fraction"),
        ({"seed": -1}, "seed"),
        ({"tokeniser": "x"}, "did you mean tokenizer"),
    ]:
        with pytest.raises(UserError, match=message):
            parse(DataConfig, settings, "test")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no prepared dataset here"),
        ("{", "not JSON"),
        ("[]", "should be a valid dictionary"),
        ('{"format": 2}', "dataset format 2, expected 1"),
        ('{"format": 1, "dtype": "uint8"}', "dtype"),
    ],
)
def test_a_bad_index(tmp_path, text, message):
    if text is not None:
        (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(UserError, match=message):
        DatasetIndex.load(tmp_path)
