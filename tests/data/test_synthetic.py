"""Generated tasks against solvers that know their text alone; documents, splits and targets of generated corpora."""

import json
import math
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from synthetic_solvers import S3, S5, SOLVERS, answers

from yoco_u.data import BatchLoader, Corpus, DataConfig, DatasetIndex, PackedDataset, SplitDocuments, load_tokenizer, prepare
from yoco_u.data.batches import in_answers
from yoco_u.data.synthetic import TASKS, SyntheticCorpus, document_text, read_entry
from yoco_u.data.synthetic.documents import is_held_out
from yoco_u.errors import UserError

tasks = pytest.mark.parametrize("task", TASKS)


@tasks
@given(st.integers(0), st.data())
def test_answers_are_right_and_take_as_many_steps_as_the_level_says(task: str, seed: int, data: st.DataObject) -> None:
    made = TASKS[task]
    level = data.draw(st.integers(1, min(made.highest, 12)))
    instance = made.make(Random(seed), level)
    found, steps = SOLVERS[task](instance)
    assert found == answers(instance)
    assert steps == level
    assert instance == made.make(Random(seed), level)
    assert len(instance) == len(made.make(Random(seed + 1), level))
    assert instance.isascii() and "\n" not in instance


@tasks
def test_no_answer_is_much_more_frequent_than_others(task: str) -> None:
    """A guess without a look at the question is right as rarely as if all answers were equally frequent."""
    made = TASKS[task]
    for level in (2, 5):
        drawn = Random(level)
        one = [drawn.choice(answers(made.make(drawn, level)))[-1] for _ in range(1500)]
        expected = {"p-hop": 5, "pointers": 2 * level + 1, "s3": 3, "s5": 5}.get(task, 10)
        assert len(set(one)) == expected
        share = Counter(one).most_common(1)[0][1] / len(one)
        assert share < 1 / expected + 4 * math.sqrt(1 / expected / len(one))


def test_one_answer_tells_little_about_another() -> None:
    """How often two answers of an instance are equal: as for independent ones, or less."""
    for task, level, least in (
        ("p-hop", 1, 0), ("p-hop", 8, 0), ("pointers", 5, -1), ("assignments", 6, 0.07), ("word-problems", 5, 0.07),
    ):  # fmt: skip
        drawn = Random(task)
        pairs = [answers(TASKS[task].make(drawn, level))[:2] for _ in range(1500)]
        assert least < sum(a == b for a, b in pairs) / len(pairs) < {"p-hop": 0.23}.get(task, 0.13)


def test_what_the_asked_letter_tells_of_hops() -> None:
    """After two hops one is often back at the letter that is asked for, after one never, after more as by chance."""
    for level, least, most in ((1, 0, 0), (2, 0.35, 0.45), (4, 0.2, 0.3), (8, 0.15, 0.28)):
        drawn = Random(level)
        made = [TASKS["p-hop"].make(drawn, level) for _ in range(400)]
        same = [asked == answer for one in made for asked, answer in re.findall(r"([A-E])\d+=(.);", one)]
        assert least <= sum(same) / len(same) <= most


@pytest.mark.parametrize("generators", [S3, S5])
def test_an_unknown_letter_leaves_all_images_equally_likely_and_the_letters_make_the_whole_group(
    generators: dict[str, dict[int, int]],
) -> None:
    numbers = sorted(generators["a"])
    for number in numbers:
        assert Counter(images[number] for images in generators.values()) == dict.fromkeys(numbers, 10)
    identity = tuple(numbers)
    group, new = {identity}, [identity]
    while new:
        new = [p for p in {tuple(g[i] for i in w) for w in new for g in generators.values()} if p not in group]
        group |= set(new)
    assert len(group) == math.factorial(len(numbers))
    assert identity not in {tuple(images[number] for number in numbers) for images in generators.values()}


def test_carries_run_far() -> None:
    """The longest run of columns that pass a carry on grows with the digits: a look at the next column does not suffice."""
    drawn = Random(0)
    runs = []
    for _ in range(300):
        first, second = TASKS["addition"].make(drawn, 12).split("=")[0].split("+")
        nines = "".join("9" if int(a) + int(b) == 9 else "." for a, b in zip(first, second, strict=True))
        runs.append(max(map(len, nines.split("."))))
    assert np.mean(runs) > 3


@tasks
def test_instances_of_tests_never_occur_in_training(task: str) -> None:
    made = TASKS[task]
    for level in (1, 2):
        settings = read_entry(f"synthetic:{task}:levels={level}")
        seen = [
            {re.sub("=[^;]*;", "=;", line) for number in range(12) for line in text(settings, level, number, held_out)}
            for held_out in (False, True)
        ]
        assert seen[0] and seen[1]
        assert not seen[0] & seen[1]
    drawn = Random(task)
    many = [is_held_out(task, made.make(drawn, 5)) for _ in range(1000)]
    assert 85 < sum(many) < 165


def text(settings: SyntheticCorpus, level: int, number: int, held_out: bool) -> list[str]:
    return document_text(settings, level, number, held_out).rstrip("\n").split("\n")


def test_whether_an_instance_is_held_out_does_not_depend_on_its_answers() -> None:
    assert all(is_held_out("s5", f"ab{n}=1;") == is_held_out("s5", f"ab{n}=4;") for n in range(100))


@given(st.sampled_from(sorted(TASKS)), st.integers(41, 400), st.booleans(), st.integers(0))
def test_documents_are_exactly_as_long_as_asked_for(task: str, length: int, held_out: bool, number: int) -> None:
    level = 1
    settings = read_entry(f"synthetic:{task}:levels={level}:length={length}")
    made = document_text(settings, level, number, held_out)
    assert len(made) == length - 1
    lines = made.rstrip("\n").split("\n")
    assert len(lines) == (length - 1) // (len(lines[0]) + 1)
    assert all(SOLVERS[task](line) == (answers(line), level) for line in lines)


@pytest.mark.parametrize(
    ("entry", "error"),
    [
        ("synthetic:hop", "synthetic:hop: no such task; did you mean p-hop"),
        ("synthetic:p-hop:levels=0-3", "levels 0-3: expected a range within 1-32"),
        ("synthetic:s3:levels=5-4", "levels 5-4: expected a range"),
        ("synthetic:p-hop:levels=easy", "easy: expected a level or a range of them, such as 3 or 1-8"),
        ("synthetic:p-hop:length=20", "length 20 is too short for level 4, which needs 56"),
        ("synthetic:p-hop:level=3", "unknown key level: did you mean levels?"),
        ("synthetic:p-hop:levels=1-2:levels=3", "levels comes twice; give it once"),
        ("synthetic:p-hop:easy", "easy: expected levels=1-8"),
    ],
)
def test_a_wrong_entry_is_refused(entry: str, error: str) -> None:
    with pytest.raises(UserError) as raised:
        Corpus([entry])
    assert error in str(raised.value)


ENTRIES = ("synthetic:p-hop:levels=1-3:documents=120:length=64", "synthetic:addition:levels=2-6:documents=80:length=64")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synthetic") / "data"
    prepare(DataConfig(corpus=ENTRIES, validation_fraction=0.2), out, progress=False)
    return out


def test_validation_has_the_instances_of_tests(folder: Path) -> None:
    index = DatasetIndex.load(folder)
    tokenizer = load_tokenizer(index.tokenizer)
    assert index.vocab_size == 257
    for split, held_out in (("train", False), ("validation", True)):
        documents = list(SplitDocuments(folder, split))  # type: ignore[arg-type]
        assert len(documents) > 20 and {len(document) for document in documents} == {64}
        kinds = set()
        for document in documents:
            for line in tokenizer.decode(document[1:]).rstrip("\n").split("\n"):
                task = "p-hop" if "?" in line else "addition"
                assert is_held_out(task, line) == held_out
                assert SOLVERS[task](line)[0] == answers(line)
                kinds.add(task)
        assert len(kinds) == 2


def test_answers_alone_are_targets(folder: Path) -> None:
    dataset = PackedDataset(folder, "train", 128, seed=3)
    tokenizer = load_tokenizer(dataset.index.tokenizer)
    batch = BatchLoader(dataset, 8).batch(0)
    for inputs, labels, row in zip(batch["input_ids"], batch["shift_labels"], map(dataset.row, range(8)), strict=True):
        assert inputs.tolist() == row[:-1].tolist()
        marked, inside = [], False
        for token in tokenizer.convert_ids_to_tokens(row.tolist()):
            inside = inside and token != ";"
            marked.append(inside)
            inside = inside or token == "="
        assert labels.tolist() == [token if mark else -100 for token, mark in zip(row[1:], marked[1:], strict=True)]
    assert batch["document_ids"].max() == 2


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40))
def test_the_targets_of_any_tokens(tokens: list[int]) -> None:
    """1 begins an answer, and 2 ends it; a second 1 belongs to no answer."""
    expected, inside = [], False
    for token in tokens:
        if token in (1, 2):
            inside = token == 1
        expected.append(inside and token != 1)
    assert in_answers(torch.tensor([tokens]), 1, 2)[0].tolist() == expected


def test_rows_that_cut_documents_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="rows of 96 tokens would cut documents of 64 tokens"):
        PackedDataset(folder, "train", 96)
    mixed = ["synthetic:s3:documents=30:length=32", "synthetic:s5:documents=30:length=64"]
    prepare(DataConfig(corpus=mixed, validation_fraction=0.3), tmp_path / "data", progress=False)
    with pytest.raises(UserError, match="documents of 32, 64 tokens"):
        PackedDataset(tmp_path / "data", "train", 64)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"corpus": ["synthetic:s3", "stdlib"]}, "synthetic:s3 and stdlib: generated documents and others do not mix"),
        ({"corpus": "synthetic:s3", "validation_corpus": "a.txt"}, "do not mix"),
        (
            {"corpus": "synthetic:s3", "tokenizer": "gpt2"},
            "are bytes; leave data.tokenizer out",
        ),
    ],
)
def test_what_does_not_go_with_generated_documents_is_refused(settings: dict, error: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=error):
        prepare(DataConfig(**settings), tmp_path / "data", progress=False)


def test_harder_levels_for_validation(tmp_path: Path) -> None:
    config = DataConfig(
        corpus="synthetic:s5:levels=2-3:documents=20:length=40",
        validation_corpus="synthetic:s5:levels=4:documents=20:length=40",
    )
    prepare(config, tmp_path / "data", progress=False)
    tokenizer = load_tokenizer(tmp_path / "data" / "tokenizer")
    for split, levels, held_out in (("train", {2, 3}, False), ("validation", {4}, True)):
        documents = SplitDocuments(tmp_path / "data", split)  # type: ignore[arg-type]
        lines = [line for document in documents for line in tokenizer.decode(document[1:]).rstrip("\n").split("\n")]
        assert {SOLVERS["s5"](line)[1] for line in lines} == levels
        assert {is_held_out("s5", line) for line in lines} == {held_out}


def test_low_levels_are_more_frequent() -> None:
    """Of levels 2 to 4 the lowest comes with 1/3 + 1/6 + 1/9, the next with 1/6 + 1/9, the highest with 1/9."""
    settings, draw = read_entry("synthetic:s3:levels=2-4"), Random(0)
    counts = Counter(settings.draw_level(draw) for _ in range(3600))
    assert [round(counts[level] / 100) for level in (2, 3, 4)] == [22, 10, 4]


def test_the_same_entry_gives_the_same_documents_and_another_seed_others() -> None:
    entry = "synthetic:p-hop:documents=5"
    first, again, other = ([d.text for d in Corpus([e]).documents()] for e in (entry, entry, entry + ":seed=1"))
    assert first == again
    assert not {*first} & {*other}
    assert Corpus([entry]).size == sum(map(len, first))
    assert [d.source for d in Corpus([entry]).documents()] == [f"{entry}:{n}" for n in range(1, 6)]
    assert all(a != b for a, b in pairwise(first))


def test_indexes_of_before_have_all_targets(prepared: Path) -> None:
    assert "answers" in json.loads((prepared / "dataset.json").read_text())
    assert DatasetIndex.load(prepared).answers is None
