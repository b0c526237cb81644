"""Text token by token against the text of all tokens."""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import architecture, build
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from yoco_u.data import END_OF_TEXT, train_tokenizer
from yoco_u.inference import Engine, EngineSettings
from yoco_u.inference.detokenizer import Detokenizer
from yoco_u.inference.sampling_params import SamplingParams

TOKENIZER = train_tokenizer(["hello world, stop here. délta 数 🦉 🦉🦉 aab abab </end>\n"] * 20, 350)
EOS = TOKENIZER.convert_tokens_to_ids(END_OF_TEXT)
BYTES = {byte: TOKENIZER.convert_tokens_to_ids(piece) for byte, piece in bytes_to_unicode().items()}
PIECES = [*"ab ", "é", "数", "🦉", "stop", "hello", "</end>", "\ufffd", "👩‍🚀"]
texts = st.lists(st.sampled_from(PIECES), max_size=15).map("".join)


@st.composite
def tokenized(draw, texts=texts) -> list[int]:
    """The tokens of a text, some of them cut into their bytes, so that characters and stop strings cross tokens anyhow."""
    tokens = TOKENIZER.convert_ids_to_tokens(TOKENIZER(draw(texts), add_special_tokens=False)["input_ids"])
    parts = [list(token) if draw(st.booleans()) else [token] for token in tokens]  # a character of a token stands for a byte
    return TOKENIZER.convert_tokens_to_ids([part for token in parts for part in token])


def run(
    tokens: list[int], tokenizer: PreTrainedTokenizerFast = TOKENIZER, prompt: Sequence[int] = (), **settings: Any
) -> tuple[str, str | None, int]:
    """The text, the stop string, and the tokens taken; checks that the pieces add up."""
    detokenizer = Detokenizer(tokenizer, SamplingParams(max_tokens=1000, **settings), prompt)
    shown, taken = "", 0
    for token in tokens:
        new = detokenizer.append(token)
        taken += 1
        shown += new
        assert detokenizer.text == shown
        if detokenizer.stopped is not None:
            assert detokenizer.append(tokens[0]) == ""
            break
    shown += detokenizer.flush()
    assert detokenizer.text == shown
    return shown, detokenizer.stopped, taken


def expected(text: str, stops: list[str], start: int = 0) -> tuple[str, str | None]:
    """Character by character: the stop string that is complete first after `start` ends the text, of several the longest."""
    for end in range(start + 1, len(text) + 1):
        if ending := [stop for stop in stops if text[:end].endswith(stop)]:
            stop = max(ending, key=len)
            return text[: end - len(stop)], stop
    return text, None


@given(st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=30), st.booleans())
def test_any_tokens_give_the_text_of_the_whole(tokens, skip):
    """Most of these are no UTF-8, and special tokens are among them."""
    text, _, _ = run(tokens, skip_special_tokens=skip)
    assert text == TOKENIZER.decode(tokens, skip_special_tokens=skip)


@given(tokenized())
def test_texts_come_back_and_never_in_broken_characters(tokens):
    detokenizer = Detokenizer(TOKENIZER, SamplingParams())
    for count, token in enumerate(tokens, 1):
        new = detokenizer.append(token)
        assert not new.endswith("\ufffd")
        assert TOKENIZER.decode(tokens[:count]).rstrip("\ufffd") == detokenizer.text.rstrip("\ufffd")
    detokenizer.flush()
    assert detokenizer.text == TOKENIZER.decode(tokens)


stop_strings = st.lists(
    st.one_of(st.text("ab ", min_size=1, max_size=4), st.sampled_from(["é", "数🦉", "top", "</end>", "lo🦉", "🚀"])), max_size=4
)


@given(st.one_of(tokenized(), tokenized(st.text("ab ", max_size=20))), stop_strings)
def test_stop_strings_end_the_text_wherever_the_tokens_lie(tokens, stops):
    whole = TOKENIZER.decode(tokens)
    text, stopped, taken = run(tokens, stop=stops)
    assert (text, stopped) == expected(whole, stops)
    if stopped is not None:  # with the token that completed it, not later
        assert stopped in TOKENIZER.decode(tokens[:taken])
        assert not any(stop in TOKENIZER.decode(tokens[: taken - 1]) for stop in stops)


@given(st.text("ab", max_size=60), st.lists(st.text("ab", min_size=1, max_size=9), max_size=3), st.integers(0, 40))
def test_stop_strings_that_begin_within_one_another(text, stops, least):
    tokens = TOKENIZER.convert_tokens_to_ids(list(text))
    assert run(tokens, stop=stops, min_tokens=least)[:2] == expected(text, stops, start=least)


@given(st.text("ab", max_size=12), stop_strings, st.integers(0, 8))
def test_stop_strings_do_not_count_before_min_tokens(text, stops, least):
    tokens = TOKENIZER.convert_tokens_to_ids(list(text))
    assert run(tokens, stop=stops, min_tokens=least)[:2] == expected(text, stops, start=least)


@pytest.mark.parametrize(
    ("pieces", "stop", "text", "stopped"),
    [
        (["a", "b", "ab", "x"], "ba", "a", "ba"),
        (["stop", " here"], "stop", "", "stop"),
        (["a", "<", "/", "en", "d", ">"], ["</end>"], "a", "</end>"),
        (["a", "<", "/", "en", "d"], ["</end>"], "a</end", None),
        (["aa", "aa"], ["aaa"], "", "aaa"),
        (["a", "b", "c", "d"], ["bc", "abcd"], "a", "bc"),
        (["ab", "c"], ["bc", "abc"], "", "abc"),
        (["x", "ab", "y"], ["abc", "b"], "xa", "b"),
    ],
)
def test_examples(pieces, stop, text, stopped):
    tokens = [token for piece in pieces for token in TOKENIZER(piece, add_special_tokens=False)["input_ids"]]
    assert run(tokens, stop=stop)[:2] == (text, stopped)


def test_only_what_may_become_a_stop_string_is_held_back():
    detokenizer = Detokenizer(TOKENIZER, SamplingParams(stop=["bab"]))
    shown = [detokenizer.append(TOKENIZER.convert_tokens_to_ids(letter)) for letter in "abbaab"]
    assert shown == ["a", "", "b", "", "baa", ""]
    assert detokenizer.flush() == "b" and detokenizer.stopped is None


def test_special_tokens_and_ids_without_a_token():
    a, b = TOKENIZER.convert_tokens_to_ids(["a", "b"])
    tokens = [a, EOS, len(TOKENIZER) + 5, b]
    assert run(tokens)[0] == "ab"
    assert run(tokens, skip_special_tokens=False)[0] == f"a{END_OF_TEXT}b"
    assert run(tokens, skip_special_tokens=False, stop=END_OF_TEXT)[:2] == ("a", END_OF_TEXT)


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Words that begin with a blank, and bytes as `<0xNN>`, of which one that fits nothing spoils those before it."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁b": 256, "b": 257, "<unk>": 258}
    backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", clean_up_tokenization_spaces=False)


@given(st.lists(st.sampled_from(["▁b", "b", "é", "数", "🦉"]), max_size=12))
def test_bytes_of_sentencepiece(pieces):
    tokenizer = sentencepiece_like()
    parts = [[piece] if "b" in piece else [f"<0x{byte:02X}>" for byte in piece.encode()] for piece in pieces]
    tokens = tokenizer.convert_tokens_to_ids([part for piece in parts for part in piece])
    assert run(tokens, tokenizer)[0] == tokenizer.decode(tokens) == "".join(pieces).replace("▁", " ").removeprefix(" ")


def test_a_byte_that_fits_nothing_does_not_stop_the_text():
    tokenizer = sentencepiece_like()
    tokens = [256, *"€".encode(), 0xE2, 257, 256, 256]
    assert run(tokens, tokenizer)[0] == "b€\ufffdb b b"


def added_tokens() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with tokens beside its alphabet: special ones, others, one with blanks, one that is U+FFFD."""
    tokenizer = train_tokenizer(["hello é 数 🦉"] * 3, 280)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>", "<| blank |>"]})
    tokenizer.add_tokens(["<plain>", "two words", "é数", "\ufffd"])
    return tokenizer


def word_pieces() -> PreTrainedTokenizerFast:
    vocab = {"[UNK]": 0, "a": 1, "##b": 2, ",": 3, "'": 4, "s": 5, "\ufffd": 6, "##\ufffd": 7, "do": 8, "n": 9, "not": 10}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", clean_up_tokenization_spaces=False)


def metaspace() -> PreTrainedTokenizerFast:
    vocab = {"<unk>": 0, "▁": 1, "▁a": 2, "a": 3, "\ufffd": 4, "🦉": 5}
    backend = Tokenizer(models.WordLevel(vocab, "<unk>"))
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", clean_up_tokenization_spaces=False)


@given(st.sampled_from([TOKENIZER, added_tokens(), word_pieces(), metaspace()]), st.data())
def test_long_runs_of_any_tokens_give_the_text_of_the_whole(tokenizer, data):
    """Among them runs of bytes that never make a character, and of tokens without any text."""
    runs = st.tuples(st.lists(st.integers(0, len(tokenizer) + 3), min_size=1, max_size=4), st.integers(1, 60))
    parts = data.draw(st.lists(runs, max_size=5))
    tokens = [token for part, times in parts for token in part * times]
    skip = data.draw(st.booleans())
    assert run(tokens, tokenizer, skip_special_tokens=skip)[0] == tokenizer.decode(tokens, skip_special_tokens=skip)


def common_beginning(one: str, other: str) -> str:
    return "".join(char for char, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


@given(st.sampled_from([TOKENIZER, added_tokens(), word_pieces(), metaspace()]), st.booleans(), st.data())
def test_the_text_goes_on_behind_the_prompt(tokenizer, skip, data):
    """Behind any tokens; a character that these begin, and have as U+FFFD, is the output's if that completes it."""
    tokens = st.lists(st.integers(0, len(tokenizer) + 3), max_size=15)
    prompt = data.draw(tokens) * data.draw(st.sampled_from([1, 5]))
    output = data.draw(tokens)
    given, whole = (tokenizer.decode(some, skip_special_tokens=skip) for some in (prompt, prompt + output))
    common = common_beginning(given, whole)
    assert not given[len(common) :].strip("\ufffd")
    assert common + run(output, tokenizer, prompt, skip_special_tokens=skip)[0] == whole


@given(tokenized(), st.data())
def test_a_character_that_the_prompt_begins_is_the_outputs(tokens, data):
    cut = data.draw(st.integers(0, len(tokens)))
    given, whole = TOKENIZER.decode(tokens[:cut]), TOKENIZER.decode(tokens)
    assert common_beginning(given, whole) + run(tokens[cut:], prompt=tokens[:cut])[0] == whole


@given(st.lists(st.sampled_from(["▁b", "b", "é", "数", "🦉"]), max_size=12), st.integers(0, 12), st.integers(0, 3))
def test_the_text_of_sentencepiece_goes_on_behind_the_prompt(pieces, begin, more):
    """Prompts of many bytes are not cut within a character to look at their end; a prompt may end within one."""
    tokenizer = sentencepiece_like()
    parts = [[piece] if "b" in piece else [f"<0x{byte:02X}>" for byte in piece.encode()] for piece in pieces]
    before, rest = (
        tokenizer.convert_tokens_to_ids([part for own in some for part in own]) for some in (parts[:begin], parts[begin:])
    )
    begun = min(more, len(parts[begin]) - 1) if rest else 0
    prompt, output = before + rest[:begun], rest[begun:]
    assert tokenizer.decode(before) + run(output, tokenizer, prompt)[0] == tokenizer.decode(before + rest)


def test_an_engine_goes_on_behind_its_prompt():
    """Whether the prompt is a text or tokens; a prompt without a text begins one."""
    tokenizer = sentencepiece_like()
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    engine = Engine(build(architecture("yoco_u", vocab_size=len(tokenizer))), tokenizer, EngineSettings(cache_tokens=64))
    word = SamplingParams(temperature=0, max_tokens=2, logit_bias={256: 1e6}, logprobs=0)
    requests = [engine.add(prompt, word) for prompt in ("b", [257], [tokenizer.eos_token_id])]
    while engine.unfinished:
        engine.step()
    assert [request.outputs[0].text for request in requests] == [" b b", " b b", "b b"]


byte_runs = st.lists(
    st.tuples(st.lists(st.sampled_from([0xF0, 0x9F, 0xA6, 0x89, 0xC3, 0xA9, 0x80, 0xFE, 0x61]), max_size=5), st.integers(1, 40))
)


@given(byte_runs)
def test_bytes_in_any_order(parts):
    data = bytes(byte for part, times in parts for byte in part * times)
    tokens = [BYTES[byte] for byte in data]
    assert run(tokens)[0] == data.decode(errors="replace")


@pytest.mark.parametrize("byte", [0xFF, 0xE2, 0x80])
@pytest.mark.parametrize("before", ["", "b", "€"])
def test_bytes_of_sentencepiece_that_never_make_a_character(byte, before):
    """Each is U+FFFD, and those that begin a character after a text are none of it."""
    tokenizer = sentencepiece_like()
    known = [257] if before == "b" else list(before.encode())
    text, _, _ = run([*known, *[byte] * 200, 257], tokenizer)
    assert text == before + "\ufffd" * 200 + "b"


@given(byte_runs)
def test_bytes_of_sentencepiece_in_any_order(parts):
    """What is shown stays, so a byte that fits nothing may not spoil it; nothing is shown twice, and the rest is U+FFFD."""
    data = [byte for part, times in parts for byte in part * times]
    text, _, _ = run([*data, 257], sentencepiece_like())
    assert text.endswith("b") and len(text) <= len(data) + 1
    valid = bytes(data).decode(errors="ignore")
    shown = iter(valid)
    assert all(char in shown for char in text[:-1].replace("\ufffd", ""))


@pytest.mark.parametrize(
    "tokens", [[EOS], [TOKENIZER.convert_tokens_to_ids("ð")], [TOKENIZER.convert_tokens_to_ids(c) for c in "ðŁ"]]
)
def test_a_token_costs_as_much_after_many_without_text(tokens, monkeypatch):
    """Each decodes a few tokens a few times, however many came before."""
    detokenizer = Detokenizer(TOKENIZER, SamplingParams())
    counts: list[int] = []
    text_of = detokenizer._text_of
    monkeypatch.setattr(detokenizer, "_text_of", lambda tokens: counts.append(len(tokens)) or text_of(tokens))
    many = tokens * 5000
    for token in many:
        detokenizer.append(token)
    assert max(counts, default=0) <= 33 and len(counts) <= 2 * len(many)
    assert detokenizer.text + detokenizer.flush() == TOKENIZER.decode(many, skip_special_tokens=True)
