import itertools
import subprocess
import sys

import pytest
from data_samples import texts
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import yoco_u.data.tokenizer as module
from yoco_u.data import END_OF_TEXT, PADDING, DocumentEncoder, load_tokenizer, train_tokenizer, vocabulary_size
from yoco_u.errors import UserError

CODE = ["def f(self):\n        return self.x\n\n\nclass A:\n        pass\n"] * 20
TOKENIZER = train_tokenizer([*CODE, *texts(50)], 400)
ENCODER = DocumentEncoder(TOKENIZER)

pieces = st.one_of(
    st.text(max_size=20),
    st.text(" \n\t\r", max_size=8),
    st.sampled_from([END_OF_TEXT, "\u2028", "\x00", "def f(self)"]),
)


@settings(max_examples=examples(100), deadline=None)
@given(st.lists(pieces, max_size=6).map("".join))
def test_every_text_comes_back_exactly(text):
    [tokens] = ENCODER.encode([text])
    assert tokens[0] == ENCODER.eot_id
    assert ENCODER.eot_id not in tokens[1:]
    assert TOKENIZER.decode(tokens[1:].tolist()) == text


@settings(max_examples=examples(100), deadline=None)
@given(st.lists(st.one_of(pieces, st.sampled_from(["a\n", " b)\n", "\n  "])), max_size=20).map("".join), st.integers(1, 9))
def test_cutting_long_texts_changes_nothing(text, size):
    whole = ENCODER.encode([text])[0].tolist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PIECE", size)
        parts = list(module._pieces(text))
        tokens = ENCODER.encode([text])[0].tolist()
    assert "".join(parts) == text
    assert max(map(len, parts)) <= 2 * size
    assert TOKENIZER.decode(tokens[1:]) == text
    if all(part[0] == "\n" and not before[-1].isspace() for before, part in itertools.pairwise(parts)):
        assert tokens == whole


def test_batches_and_single_texts_agree():
    documents = texts(30, seed=3)
    together = ENCODER.encode(documents)
    assert all((one == ENCODER.encode([text])[0]).all() for one, text in zip(together, documents, strict=True))


def test_special_tokens_have_their_roles_and_indentation_is_one_token():
    assert TOKENIZER.bos_token == TOKENIZER.eos_token == END_OF_TEXT
    assert TOKENIZER.pad_token == PADDING
    assert len(TOKENIZER) == vocabulary_size(TOKENIZER) <= 400
    tokens = TOKENIZER.convert_ids_to_tokens(ENCODER.encode(["self):\n        return"])[0].tolist())
    assert "Ċ" + 7 * "Ġ" in tokens


def test_training_is_deterministic_in_another_process():
    program = (
        "from yoco_u.data import train_tokenizer\n"
        "tokenizer = train_tokenizer([f'value_{n} = {n * n}' for n in range(500)], 350)\n"
        "print(tokenizer.backend_tokenizer.to_str())"
    )
    there = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    here = train_tokenizer([f"value_{n} = {n * n}" for n in range(500)], 350)
    assert there == here.backend_tokenizer.to_str() + "\n"


def test_saved_and_loaded_it_is_the_same(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    for loaded in (load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        text = "def  f(x):\n\n    return 'é' , 1234 .\n"
        assert loaded(text)["input_ids"] == ENCODER.encode([text])[0].tolist()
        assert loaded.decode(loaded(text)["input_ids"], skip_special_tokens=True) == text
        assert loaded.eos_token == END_OF_TEXT


def bare(**tokens: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "<s>": 1}, "a")), **tokens)


def test_an_existing_tokenizer_needs_a_separator(tmp_path):
    bare().save_pretrained(tmp_path / "none")
    with pytest.raises(UserError, match="none: the tokenizer has neither an eos nor a bos token"):
        load_tokenizer(tmp_path / "none")
    bare(bos_token="<s>").save_pretrained(tmp_path / "bos")
    assert DocumentEncoder(load_tokenizer(tmp_path / "bos")).eot_id == 1


def test_no_tokenizer_at_all(tmp_path):
    with pytest.raises(UserError, match=r"cannot load a tokenizer .*; expected a folder with tokenizer.json") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@given(st.lists(pieces, max_size=6).map("".join))
def test_tokens_end_where_their_texts_do(text):
    """A token ends where the text of the tokens up to it ends, unless it ends inside a character of several tokens."""
    ends, tokens = ENCODER.token_ends(text), ENCODER.encode([text])[0].tolist()[1:]
    assert len(ends) == len(tokens)
    for count, end in enumerate(ends, start=1):
        so_far = TOKENIZER.decode(tokens[:count])
        assert text[:end] == so_far or so_far.rstrip("\N{REPLACEMENT CHARACTER}") == text[: end - 1]
