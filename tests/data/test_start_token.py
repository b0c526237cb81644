"""The saved tokenizer gives the ids of training to whoever loads it, and pads with a token of its own."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_samples import texts
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    GPT2Tokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

from yoco_u.data import (
    END_OF_TEXT,
    PADDING,
    DataConfig,
    DocumentEncoder,
    begin_with_end_of_text,
    load_tokenizer,
    prepare,
    train_tokenizer,
    vocabulary_size,
)
from yoco_u.errors import UserError
from yoco_u.training.run_folder import RunFolder

SAMPLE = texts(60)
START, END, BOTH = "<s>", "</s>", "<|both: of $A|>"  # the last has what templates of post-processors treat as syntax


def backend(*special: str) -> Tokenizer:
    """A byte-level BPE, made without the package."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=350, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SAMPLE, trainer)
    return tokenizer


def with_post_processor(processor: object, *special: str, **tokens: str) -> PreTrainedTokenizerFast:
    found = backend(*special)
    if processor is not None:
        found.post_processor = processor
    return PreTrainedTokenizerFast(tokenizer_object=found, **tokens)


def template(single: str, *tokens: str) -> processors.TemplateProcessing:
    ids = backend(START, END)
    return processors.TemplateProcessing(
        single=single, pair=f"{single} $B:1", special_tokens=[(token, ids.token_to_id(token)) for token in tokens]
    )


def of_class(kind: type, **tokens: str) -> PreTrainedTokenizerFast:
    state = json.loads(backend(START, END, END_OF_TEXT).to_str())["model"]
    return kind(vocab=state["vocab"], merges=[tuple(pair) for pair in state["merges"]], **tokens)


BYTES = processors.ByteLevel(trim_offsets=True)
FOREIGN: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "no start token": lambda: with_post_processor(None, END, eos_token=END),
    "like GPT-2": lambda: with_post_processor(BYTES, END_OF_TEXT, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT),
    "like Llama 2": lambda: with_post_processor(template(f"{START} $A", START), START, END, bos_token=START, eos_token=END),
    "like Llama 3": lambda: with_post_processor(
        processors.Sequence([BYTES, template(f"{START} $A", START)]), START, END, bos_token=START, eos_token=END
    ),
    "like BERT": lambda: with_post_processor(
        template(f"{START} $A {END}", START, END), START, END, bos_token=START, eos_token=END
    ),
    "an end after texts": lambda: with_post_processor(template(f"$A {END}", END), START, END, bos_token=START, eos_token=END),
    "a start token alone": lambda: with_post_processor(template(f"{START} $A", START), START, END, bos_token=START),
    "a name with syntax": lambda: with_post_processor(None, BOTH, eos_token=BOTH),
    "GPT2Tokenizer": lambda: of_class(GPT2Tokenizer),
    "LlamaTokenizer": lambda: of_class(LlamaTokenizer, bos_token=START, eos_token=END),
    "Qwen2Tokenizer": lambda: of_class(Qwen2Tokenizer, eos_token=END_OF_TEXT),
}


@pytest.fixture(scope="module", params=["trained here", *FOREIGN])
def dataset(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedTokenizerFast]:
    """A prepared dataset, and the tokenizer that it was given."""
    folder = tmp_path_factory.mktemp("dataset")
    (folder / "corpus.json").write_text(json.dumps([{"text": text} for text in SAMPLE]))
    given = None
    if request.param != "trained here":
        FOREIGN[request.param]().save_pretrained(folder / "given")
        given = str(folder / "given")
    config = DataConfig(corpus=str(folder / "corpus.json"), tokenizer=given, validation_fraction=0)
    index = prepare(config, folder / "out", progress=False)
    return index.tokenizer, AutoTokenizer.from_pretrained(given or index.tokenizer)


def test_every_reader_gives_the_ids_of_training(dataset: tuple[Path, PreTrainedTokenizerFast]) -> None:
    folder, original = dataset
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    encoder = DocumentEncoder(ours)
    eot = encoder.eot_id
    assert ours.bos_token_id == ours.eos_token_id == theirs.bos_token_id == theirs.eos_token_id == eot
    assert eot == (original.bos_token_id if original.eos_token_id is None else original.eos_token_id)

    @given(
        text=st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from([SAMPLE[0], START, END, PADDING])
    )
    def check(text: str) -> None:
        bare = original(text, add_special_tokens=False, split_special_tokens=True).input_ids
        [expected] = encoder.encode([text])
        assert expected.tolist() == [eot, *bare]
        for tokenizer in (ours, theirs):
            found = tokenizer(text, split_special_tokens=True, return_offsets_mapping=True, return_special_tokens_mask=True)
            assert found.input_ids == [eot, *bare] and set(found) == {
                "input_ids", "attention_mask", "offset_mapping", "special_tokens_mask",
            }  # fmt: skip
            assert found.special_tokens_mask == [1] + [0] * len(bare)
            assert [end for _, end in found.offset_mapping[1:]] == encoder.token_ends(text)
            assert tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids == bare

    check()
    if ours.eos_token != BOTH:  # which transformers itself cannot put into a template
        asked = AutoTokenizer.from_pretrained(folder, add_bos_token=True)
        assert asked(SAMPLE).input_ids == theirs(SAMPLE).input_ids


def test_pairs_and_windows_begin_as_documents_do(dataset: tuple[Path, PreTrainedTokenizerFast]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(dataset[0])
    eot = tokenizer.eos_token_id
    one, two = (tokenizer(text, add_special_tokens=False).input_ids for text in SAMPLE[:2])
    assert tokenizer(*SAMPLE[:2]).input_ids == [eot, *one, eot, *two]
    windows = tokenizer(SAMPLE[0], truncation=True, max_length=5, stride=1, return_overflowing_tokens=True).input_ids
    expected = [[eot, *one[start : start + 4]] for start in range(0, len(one), 3)]
    assert [list(window) for window in windows] == expected[: len(windows)] and windows[-1][-1] == one[-1]
    tokenizer.truncation_side = "left"
    assert tokenizer(SAMPLE[0], truncation=True, max_length=5).input_ids == [eot, *one[-4:]]


def test_a_chat_template_may_spell_the_start_token(dataset: tuple[Path, PreTrainedTokenizerFast]) -> None:
    tokenizer = load_tokenizer(dataset[0])
    tokenizer.chat_template = "{{ bos_token }}{{ messages[0].content }}"
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=True)["input_ids"]
    assert ids == tokenizer("x").input_ids


def test_a_tokenizer_saved_without_it_gives_the_same_ids(tmp_path: Path) -> None:
    """Datasets and runs of earlier versions: no post-processor, and the end token as padding."""
    for name, old in {
        "own": with_post_processor(None, END_OF_TEXT, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT),
        "llama": FOREIGN["like Llama 3"](),
    }.items():
        old.save_pretrained(tmp_path / name)
        loaded = load_tokenizer(tmp_path / name)
        expected = [[old.eos_token_id, *old(text, add_special_tokens=False).input_ids] for text in SAMPLE]
        assert loaded(SAMPLE).input_ids == expected == [ids.tolist() for ids in DocumentEncoder(loaded).encode(SAMPLE)]
        RunFolder(tmp_path / f"{name} run").copy_tokenizer(tmp_path / name)
        assert AutoTokenizer.from_pretrained(tmp_path / f"{name} run" / "tokenizer")(SAMPLE).input_ids == expected
        assert loaded.get_vocab() == old.get_vocab()
        assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == (old.bos_token, old.eos_token, old.pad_token)


def test_padding_costs_no_token_and_stays_apart_from_the_end() -> None:
    ours = train_tokenizer(SAMPLE, 350)
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = ours.backend_tokenizer.pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [END_OF_TEXT]
    plain.train_from_iterator(
        SAMPLE,
        trainers.BpeTrainer(vocab_size=350, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    some = "".join(chr(code) for code in [*range(0x400), *range(0x400, 0x110000, 97)] if not 0xD800 <= code < 0xE000)
    for text in [*SAMPLE, some]:
        ids = DocumentEncoder(ours).encode([text])[0].tolist()
        assert ids[1:] == plain.encode(text, add_special_tokens=False).ids
        assert ours.pad_token_id not in ids
    assert vocabulary_size(ours) == len(ours) == plain.get_vocab_size() == 350
    assert ours.pad_token_id != ours.eos_token_id and ours.get_vocab()[PADDING] == plain.token_to_id("ÿ")
    rows = [[*ours(text).input_ids, ours.eos_token_id] for text in SAMPLE[:4]]
    batch = DataCollatorForLanguageModeling(ours, mlm=False)([{"input_ids": row} for row in rows])
    assert [labels[labels != -100].tolist() for labels in batch["labels"]] == rows


TURN = "<|im_end|>"


def save_one_of_turns(folder: Path) -> None:
    """A tokenizer whose end token ends turns, as it comes and as a conversion keeps it."""
    with_post_processor(None, END_OF_TEXT, TURN, eos_token=TURN).save_pretrained(folder / "given")
    kept = load_tokenizer(folder / "given", keep_start=True)
    begin_with_end_of_text(kept)
    kept.save_pretrained(folder / "kept")


def test_the_end_of_a_turn_does_not_begin_documents(tmp_path: Path) -> None:
    """A model that chats ends its turns with its end token; documents begin with the one of its pretraining."""
    save_one_of_turns(tmp_path)
    for folder, start in (("kept", END_OF_TEXT), ("given", TURN)):
        loaded = load_tokenizer(tmp_path / folder)
        assert loaded.eos_token == TURN
        assert loaded("a").input_ids[0] == DocumentEncoder(loaded).eot_id == loaded.convert_tokens_to_ids(start)


def test_special_tokens_that_a_text_spells(tmp_path: Path) -> None:
    """Rendered chats keep their turns where that is asked for; elsewhere a text is only text."""
    save_one_of_turns(tmp_path)
    corpus = tmp_path / "corpus.json"
    corpus.write_text(json.dumps([{"text": f"a{TURN}b"}]))
    for special in (False, True):
        settings = {"corpus": str(corpus), "tokenizer": str(tmp_path / "kept"), "special_tokens": special}
        out = tmp_path / str(special)
        prepare(DataConfig(**settings, validation_fraction=0), out, progress=False)
        tokens = np.fromfile(out / "train-00000.bin", dtype="uint16").tolist()
        made = load_tokenizer(out / "tokenizer")
        assert (made.convert_tokens_to_ids(TURN) in tokens) == special
        assert made.decode(tokens) == f"{END_OF_TEXT}a{TURN}b"
    corpus.write_text(json.dumps([{"text": f"a{END_OF_TEXT}b"}]))
    with pytest.raises(UserError, match="which special_tokens encodes as such; mend the text"):
        prepare(DataConfig(**settings, validation_fraction=0), tmp_path / "refused", progress=False)


def test_a_start_that_is_no_token_is_named(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(SAMPLE, 300)
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"document_start": "<none>"}))
    with pytest.raises(UserError, match=rf"^{tmp_path}: document_start '<none>' .* is no token"):
        load_tokenizer(tmp_path)


def test_a_truncation_that_was_saved_cuts_nothing(tmp_path: Path) -> None:
    """A tokenizer that was once called with `truncation` or `padding` keeps them in its file."""
    tokenizer = train_tokenizer(SAMPLE, 300)
    tokenizer(SAMPLE[0], truncation=True, max_length=4, padding="max_length")
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=1000)
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    found = load_tokenizer(tmp_path).backend_tokenizer.encode(SAMPLE[0], add_special_tokens=False).ids
    assert found == train_tokenizer(SAMPLE, 300).backend_tokenizer.encode(SAMPLE[0], add_special_tokens=False).ids


def test_a_start_token_stays_where_an_end_token_is_added_too(tmp_path: Path) -> None:
    FOREIGN["like BERT"]().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path, keep_start=True)
    assert tokenizer.convert_ids_to_tokens(tokenizer("def").input_ids)[0] == START
    FOREIGN["an end after texts"]().save_pretrained(tmp_path)
    assert "document_start" not in load_tokenizer(tmp_path, keep_start=True).init_kwargs
