"""Tokenizers: a byte-level BPE trained here, or any existing fast tokenizer with a token that can begin documents.

A tokenizer itself puts the token before a text that begins documents, by its post-processor. So training, the engine and
whatever reads the saved tokenizer (transformers, vLLM) give the same ids.
"""

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from yoco_u.data.formats import Document
from yoco_u.data.synthetic.tasks import BEGIN, END
from yoco_u.errors import UserError, first_line
from yoco_u.regular_files import check_regular_files

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"

# GPT-2's pattern with three changes: English contractions are no words of their own, digits come in groups of three at most,
# and one leading symbol belongs to its word (`.join`, `_name`), as in later tokenizers. A line end and the indentation after it
# are one word. On source code this pattern does better than GPT-2's and than those of later tokenizers.
WORDS = r"[^\s\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+| ?[\p{L}\p{M}]+| ?\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}]+|\s+(?!\S)|\s+"

_UNUSED_BYTE = "ÿ"  # how a byte-level vocabulary writes the byte 0xFF, which no text in UTF-8 has
_PIECE = 1 << 20
_START = "document_start"  # in tokenizer_config.json, a token
_LINE_END = re.compile(r"(?<=\S)\n")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE of at most `vocab_size` tokens, with `<|endoftext|>` as bos and eos, and `<|pad|>` as padding.

    The same texts give the same tokenizer, and every string comes back exactly from its tokens. `<|pad|>` takes the place of a
    byte that no text has, so that it costs no token of the vocabulary.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    trained = PreTrainedTokenizerFast(
        tokenizer_object=_with_padding(tokenizer),
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        clean_up_tokenization_spaces=False,
    )
    _begin_documents(trained)
    return trained


def load_tokenizer(name: str | Path, keep_start: bool = False, **kwargs: Any) -> PreTrainedTokenizerFast:
    """An existing tokenizer, from a folder or by its Hugging Face name.

    It puts the token that begins documents before a text, in place of what it added itself, such as another start token.

    Args:
        keep_start: if it adds a start token itself, let that token begin documents from now on, also when it has been saved and
            loaded again: for a tokenizer whose model was trained so.
        kwargs: further arguments of `AutoTokenizer.from_pretrained`.

    Raises:
        UserError: if there is none, if it has no fast implementation, or no token that can begin a document.
    """
    check_regular_files(Path(name))
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name), trust_remote_code=False, **kwargs)
    except Exception as error:  # the library, the hub and the parsers raise nearly anything
        raise UserError(
            f"{name}: cannot load a tokenizer ({first_line(error)}); "
            "expected a folder with tokenizer.json or a Hugging Face name"
        ) from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"{name}: {type(tokenizer).__name__} is no fast tokenizer; choose one with tokenizer.json")
    tokenizer.backend_tokenizer.no_truncation()  # which a tokenizer keeps that was once saved with it
    tokenizer.backend_tokenizer.no_padding()
    if keep_start and len(start := _before_a_text(tokenizer)) == 1:
        tokenizer.init_kwargs[_START] = tokenizer.convert_ids_to_tokens(start[0])
    _begin_documents(tokenizer, str(name))
    return tokenizer


def _before_a_text(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The special tokens that a tokenizer puts before a text; it may put others behind it."""
    whole, text = (tokenizer("a", add_special_tokens=special).input_ids for special in (True, False))
    return next((whole[:i] for i in range(len(whole)) if whole[i : i + len(text)] == text), [])


def begin_with_end_of_text(tokenizer: PreTrainedTokenizerFast) -> None:
    """Let `<|endoftext|>` begin documents, if the tokenizer has it and no start token: the end token of a model that chats ends
    its turns."""
    if _START not in tokenizer.init_kwargs and END_OF_TEXT in tokenizer.get_added_vocab():
        begin_with(tokenizer, END_OF_TEXT)


def begin_with(tokenizer: PreTrainedTokenizerFast, token: str) -> None:
    """Let a token begin documents from now on, also when the tokenizer has been saved and loaded again."""
    tokenizer.init_kwargs[_START] = token
    _begin_documents(tokenizer)


def end_of_text_id(tokenizer: PreTrainedTokenizerFast, name: str = "tokenizer") -> int:
    """The id of the token that begins every document: the tokenizer's eos token, or its bos token if it has no eos.

    A tokenizer that came with a converted model may name another, see `load_tokenizer`.

    Raises:
        UserError: if the tokenizer has neither, or not the one that is named.
    """
    if (start := tokenizer.init_kwargs.get(_START)) is not None and isinstance(start, str):
        if (found := tokenizer.get_vocab().get(start)) is None:
            raise UserError(
                f"{name}: {_START} {start!r} of tokenizer_config.json is no token of the tokenizer; name one that is"
            )
        return found
    for token in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        if isinstance(token, int):
            return token
    raise UserError(f"{name}: the tokenizer has neither an eos nor a bos token to separate documents; give it one")


def name_end_of_text(tokenizer: PreTrainedTokenizerFast) -> None:
    """Make the token that begins every document the tokenizer's bos and eos, which chat templates and `generate()` ask for.

    The tokenizer of a converted model is left as it is.
    """
    if _START in tokenizer.init_kwargs:
        return
    token = tokenizer.convert_ids_to_tokens(end_of_text_id(tokenizer))
    tokenizer.bos_token = tokenizer.eos_token = token


def answer_marks(tokenizer: PreTrainedTokenizerFast) -> tuple[int, int]:
    """The tokens before and behind an answer of a generated task."""
    return tokenizer.convert_tokens_to_ids(BEGIN), tokenizer.convert_tokens_to_ids(END)


def vocabulary_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """The rows that a model needs: the largest token id + 1, added tokens included. There are fewer tokens if ids have gaps."""
    return int(max(tokenizer.get_vocab().values())) + 1


def _with_padding(tokenizer: Tokenizer) -> Tokenizer:
    """Give the id of a byte that no text has to the padding token."""
    state = json.loads(tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary[PADDING] = vocabulary.pop(_UNUSED_BYTE)
    renamed = Tokenizer.from_str(json.dumps(state))
    renamed.add_special_tokens([PADDING])
    return renamed


def _begin_documents(tokenizer: PreTrainedTokenizerFast, name: str = "tokenizer") -> None:
    """Set the post-processor: it puts the token that begins documents before each text, and adds no other token.

    Of a post-processor that was there, only what trims the offsets of tokens is kept.
    """
    eot = end_of_text_id(tokenizer, name)
    token = tokenizer.convert_ids_to_tokens(eot)

    def document(text: str, kind: int) -> list[dict[str, dict[str, object]]]:
        return [{"SpecialToken": {"id": token, "type_id": kind}}, {"Sequence": {"id": text, "type_id": kind}}]

    template = {
        "type": "TemplateProcessing",
        "single": document("A", 0),
        "pair": document("A", 0) + document("B", 1),
        "special_tokens": {token: {"id": token, "ids": [eot], "tokens": [token]}},
    }
    backend = tokenizer.backend_tokenizer
    before = json.loads(backend.post_processor.__getstate__()) if backend.post_processor is not None else {"type": None}
    steps = [step for step in before.get("processors", [before]) if step["type"] == "ByteLevel"]
    processor = processors.Sequence([])
    processor.__setstate__(json.dumps({"type": "Sequence", "processors": [*steps, template]}).encode())
    backend.post_processor = processor


class DocumentEncoder:
    """Turns texts into documents: the token `<|endoftext|>`, then the tokens of the text.

    A special token that is spelled out in a text is encoded as ordinary characters, so `<|endoftext|>` occurs only at the
    beginning. Several threads may use one encoder.

    Args:
        special_tokens: encode what spells a special token as that token instead.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, special_tokens: bool = False) -> None:
        self.eot_id = end_of_text_id(tokenizer)
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.encode_special_tokens = not special_tokens
        self._backend.no_truncation()
        self._backend.no_padding()

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """An array of token ids (tokens,) for each text, beginning with `eot_id`."""
        pieces = [list(_pieces(text)) for text in texts]
        flat = list(itertools.chain.from_iterable(pieces))
        encodings = iter(self._backend.encode_batch_fast(flat, add_special_tokens=False))
        return [
            np.array([self.eot_id, *itertools.chain.from_iterable(next(encodings).ids for _ in parts)], dtype=np.uint32)
            for parts in pieces
        ]

    def encode_documents(self, documents: Sequence[Document]) -> list[NDArray[np.uint32]]:
        """As `encode`, of documents that may not hold `eot_id` anywhere else, where it would divide them.

        Raises:
            UserError: if a text spells it, and that is not encoded as ordinary characters.
        """
        encoded = self.encode([document.text for document in documents])
        for document, tokens in zip(documents, encoded, strict=True):
            if (tokens[1:] == self.eot_id).any():
                why = "special_tokens encodes as such; mend the text"
                if self._backend.encode_special_tokens:
                    why = "this tokenizer does not treat as special; mend the text, or choose another tokenizer"
                raise UserError(f"{document.source}: the text spells the token that separates documents, which {why}")
        return encoded

    def token_ends(self, text: str) -> list[int]:
        """The position in the text, in characters, at which each of its tokens ends (exclusive). `eot_id` has no entry."""
        ends: list[int] = []
        start, pieces = 0, list(_pieces(text))
        for piece, encoding in zip(pieces, self._backend.encode_batch(pieces, add_special_tokens=False), strict=True):
            ends += [start + end for _, end in encoding.offsets]
            start += len(piece)
        return ends


def _pieces(text: str) -> Iterator[str]:
    """Cut a long text into pieces, because the library needs over 100 bytes of memory a character while it encodes.

    A cut lies before a line end that follows a visible character. No word of WORDS can lie across such a place, so tokenizers
    that were trained here give the tokens of the uncut text. Only a line longer than a piece is cut anywhere.
    """
    start = 0
    while len(text) - start > 2 * _PIECE:
        found = _LINE_END.search(text, start + _PIECE, start + 2 * _PIECE)
        end = found.start() if found else start + 2 * _PIECE
        yield text[start:end]
        start = end
    yield text[start:]
