"""Needles for any tokenizer: exactly as long as asked, where asked, and with one right answer."""

import re
from pathlib import Path

import pytest
from examples import examples
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from yoco_u.data import DocumentEncoder, train_tokenizer
from yoco_u.errors import UserError
from yoco_u.evaluation.needles import (
    KINDS,
    NOISE,
    NOISE_KINDS,
    PLACE_TOLERANCE,
    SLACK,
    Kind,
    Needle,
    NeedleMaker,
    load_haystack,
)

CODE = "".join(f"def täglich_{i}(x, y):\n    return x * {i} + y  # 数 🦉 and some more words\n\n" for i in range(120))
PROSE = " ".join(f"The {i}th sentence goes on, as sentences do, for some words. Does it end?" for i in range(200))
HAYSTACKS = {"code": CODE, "prose": PROSE, "short": "one line\nand another\n", "unbroken": "abcdefghij" * 500}


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=["<s>", "<unk>"], unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator([CODE, PROSE, NOISE, "0123456789"], trainer)
    return tokenizer


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=["<s>", "<unk>"], show_progress=False)
    tokenizer.train_from_iterator([CODE, PROSE, NOISE, "0123456789"], trainer)
    return tokenizer


def words() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "<unk>": 1, "the": 2}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def encoder(tokenizer: Tokenizer | PreTrainedTokenizerFast) -> DocumentEncoder:
    if isinstance(tokenizer, Tokenizer):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<s>")
    return DocumentEncoder(tokenizer)


BPE = encoder(train_tokenizer([CODE, PROSE], 500))
ENCODERS = {
    "bpe": BPE,
    "bytes": encoder(train_tokenizer(["x"], 257)),
    "unigram": encoder(unigram()),
    "word piece": encoder(word_piece()),
    "words": encoder(words()),
}

settings_of_makers = st.fixed_dictionaries(
    {
        "haystack": st.sampled_from(sorted(HAYSTACKS)).map(HAYSTACKS.__getitem__),
        "digits": st.integers(4, 9),
        "values": st.sampled_from(["numbers", "words"]),
    }
)
needles = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(KINDS),
        "length": st.integers(1300, 2500),
        "depth": st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(0, 1)),
        "seed": st.integers(0, 10**6),
    }
)


def make(kind: Kind = "single_2", length: int = 700, depth: float = 0.5, seed: int = 0, haystack: str | None = CODE) -> Needle:
    return NeedleMaker(BPE, haystack).make(kind, length, depth, seed)


def body(needle: Needle) -> str:
    """The haystack with the hidden facts."""
    head = "in the following text.\n\n" if needle.kind == "variable_tracking" else "afterwards.\n"
    start = needle.prompt.index(head) + len(head)
    return needle.prompt[start : needle.prompt.rindex("\nQuestion: " if needle.kind == "variable_tracking" else "\nWhat ")]


def places(needle: Needle) -> list[float]:
    """The number of haystack characters before each fact, and at the end that of the whole haystack."""
    text, found, before = body(needle), [], 0
    for fact in needle.facts:
        assert text.count(fact) == 1
        found.append(text.index(fact) - before)
        before += len(fact) + 1
    return [*found, len(text) - before]


@settings(max_examples=examples(40))
@given(st.sampled_from(sorted(ENCODERS)), settings_of_makers, needles)
def test_the_length_is_exact_and_the_same_arguments_give_the_same(tokenizer: str, chosen: dict, given: dict) -> None:
    encoder = ENCODERS[tokenizer]
    assume(chosen["haystack"] != HAYSTACKS["unbroken"] or "word" not in tokenizer)  # tokenizers of words read it as one token
    needle = NeedleMaker(encoder, **chosen).make(**given)
    assert len(needle.prompt_ids) + needle.max_tokens == given["length"]
    assert needle.max_tokens == len(needle.answer_ids) + SLACK
    assert needle.prompt_ids == encoder.encode([needle.prompt])[0].tolist()
    assert needle.prompt_ids + needle.answer_ids == encoder.encode([needle.document])[0].tolist()
    assert needle == NeedleMaker(encoder, **chosen).make(**given)


@settings(max_examples=examples(30))
@given(settings_of_makers, needles)
def test_facts_lie_at_their_depths(chosen: dict, given: dict) -> None:
    """The fact that is asked for lies at the depth; several lie at even distances from there to the end."""
    needle = NeedleMaker(BPE, **chosen).make(**given)
    *found, size = places(needle)
    count, depth = len(needle.facts), given["depth"]
    wanted = [depth + (1 - depth) * i / count for i in range(count)]
    if needle.kind == "multi_key":
        [(asked, place)] = [(fact, at) for fact, at in zip(needle.facts, found, strict=True) if needle.answers[0] in fact]
        found, wanted = [place], [depth]
        name = chosen["values"].removesuffix("s")
        assert f"special magic {name} for {asked.split()[7]} mentioned" in needle.prompt
    for place, share in zip(found, wanted, strict=True):
        assert abs(place - share * size) <= PLACE_TOLERANCE + 10


@settings(max_examples=examples(30))
@given(settings_of_makers, needles)
def test_the_answer_is_in_the_text_once(chosen: dict, given: dict) -> None:
    needle = NeedleMaker(BPE, **chosen).make(**given)
    assert needle.answer == " " + ", ".join(needle.answers)
    if needle.kind == "variable_tracking":
        assignments = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", body(needle)))
        [value] = set(re.findall(r"assigned the value (\d+)", needle.prompt))
        names, current = [], value
        while current in assignments.values():
            [current] = [name for name, before in assignments.items() if before == current]
            names.append(current)
        assert tuple(names) == needle.answers and len(names) == len(assignments) == 5
        assert len(value) == chosen["digits"] and body(needle).count(value) == 1
        return
    name, form = ("number", rf"\d{{{chosen['digits']}}}") if chosen["values"] == "numbers" else ("word", "[a-z]+-[a-z]+")
    for answer in needle.answers:
        assert re.fullmatch(form, answer) and needle.prompt.count(answer) == 1
    [key] = set(re.findall(rf"magic {name}s? for (\S+) mentioned", needle.prompt))
    assert re.findall(rf"magic {name}s for {key} is: (\S+)\.", body(needle)) == list(needle.answers)
    assert len(needle.facts) == {"single_1": 1, "single_2": 1, "multi_key": 4, "multi_value": 4}[needle.kind]
    assert len(needle.answers) == (4 if needle.kind == "multi_value" else 1)


@pytest.mark.parametrize("kind", KINDS)
def test_haystacks(kind: Kind) -> None:
    """Kinds that RULER hides in noise are hidden in noise, the others between whole lines of the text."""
    needle = make(kind, 1000, seed=3)
    lines = [line for line in body(needle).split("\n") if line not in needle.facts]
    source = NOISE if kind in NOISE_KINDS else CODE
    assert set(lines[:-1]) <= set(source.split("\n"))
    assert make(kind, 1000, seed=3, haystack=PROSE if kind in NOISE_KINDS else CODE) == needle
    if kind not in NOISE_KINDS:
        assert body(make(kind, 1000, seed=3)) != body(make(kind, 1000, seed=4))
        assert body(make(kind, 1000, seed=3, haystack=NOISE)).startswith(NOISE)


def test_a_sample_is_the_same_at_every_depth_but_for_where_it_lies() -> None:
    first, *others = (make("multi_value", depth=depth) for depth in (0, 0.3, 1))
    for other in others:
        assert other.facts == first.facts and other.answers == first.answers
        assert body(other)[:20] != body(first)[:20]


def test_every_length_is_reached_where_characters_are_several_tokens() -> None:
    """Each character is three tokens of one byte, so that some lengths can only be reached with a filler."""
    text = "数学是研究数量结构变化空间以及信息等概念的一门学科\n" * 100
    maker = NeedleMaker(ENCODERS["bytes"], text)
    for length in range(1000, 1030):
        needle = maker.make("single_2", length, 0.5, 0)
        assert len(needle.prompt_ids) + needle.max_tokens == length


def test_special_tokens_spelled_out_in_a_haystack_are_text() -> None:
    needle = make(haystack="print('<|endoftext|>')\n" * 9)
    assert needle.prompt_ids.count(BPE.eot_id) == 1
    assert "<|endoftext|>" in needle.prompt


@pytest.mark.parametrize("kind", KINDS)
def test_too_short_says_how_long_is_enough(kind: Kind) -> None:
    with pytest.raises(UserError, match=f"50 tokens are too few for a needle of kind {kind}") as caught:
        make(kind, 50)
    least = int(re.findall(r"take (\d+)", str(caught.value))[0])
    assert len(make(kind, least).prompt_ids) + make(kind, least).max_tokens == least
    with pytest.raises(UserError, match="too few"):
        make(kind, least - 1)


def test_what_is_not_possible() -> None:
    with pytest.raises(UserError, match=r"unknown kind of needle 'single_3'; expected one of single_1, "):
        make("single_3")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="single_2 are hidden in a text"):
        make(haystack=None)
    with pytest.raises(UserError, match="single_2 are hidden in a text"):
        make(haystack=" \n ")
    with pytest.raises(UserError, match=r"the depth is 1.5"):
        make(depth=1.5)
    with pytest.raises(UserError, match="1 digits are too few"):
        NeedleMaker(BPE, digits=1)
    with pytest.raises(UserError, match="unknown values 'names'; expected numbers or words"):
        NeedleMaker(BPE, values="names")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="fewer than 900 tokens"):
        NeedleMaker(ENCODERS["words"], HAYSTACKS["unbroken"]).make("single_2", 900, 0.5, 0)
    with pytest.raises(UserError, match="holds nearly every value"):
        NeedleMaker(BPE, " ".join(map(str, range(10, 100))) + "\n", digits=2).make("single_2", 900, 0.5, 0)


def test_load_haystack(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first, no line end")
    (tmp_path / "b.txt").write_text("second\n")
    assert load_haystack([str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]) == "first, no line end\nsecond\n"
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(UserError, match="no text to hide needles in"):
        load_haystack([str(tmp_path / "blank.txt")])
