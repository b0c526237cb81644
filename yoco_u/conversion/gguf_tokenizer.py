"""Tokenizers in GGUF files, where llama.cpp knows how texts are cut into words by a name alone, `tokenizer.ggml.pre`."""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from yoco_u.conversion.gguf_reader import Unread
from yoco_u.data import end_of_text_id
from yoco_u.errors import UserError

if TYPE_CHECKING:
    import gguf


@dataclass(frozen=True)
class _Words:
    """How a byte-level BPE tokenizer cuts a text into words, before merges.

    Attributes:
        pattern: of the words; None for that of GPT-2.
        digits: whether each digit is a word of its own first.
        whole: whether a word that is a token is taken whole, whatever the merges say (`ignore_merges`).
        nfc: whether texts are brought into the normal form NFC first, which llama.cpp does not do.
    """

    pattern: str | None = None
    digits: bool = False
    whole: bool = False
    nfc: bool = False


_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LLAMA3 = rf"{_ENDINGS}{_LETTERS}|\p{{N}}{{1,3}}{_REST}"
_QWEN2 = rf"{_ENDINGS}{_LETTERS}|\p{{N}}{_REST}"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_WORDS = {
    **dict.fromkeys(("gpt-2", "phi-2", "gigachat", "a.x-4.0", "mellum", "mpt", "olmo"), _Words()),
    **dict.fromkeys(("smollm", "starcoder", "refact"), _Words(digits=True)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "midm-2.0"), _Words(_LLAMA3, whole=True)),
    **dict.fromkeys(("dbrx", "smaug-bpe"), _Words(_LLAMA3)),
    "qwen2": _Words(_QWEN2, nfc=True),
    **dict.fromkeys(("deepseek-r1-qwen", "megrez"), _Words(_QWEN2)),
    "tekken": _Words(_TEKKEN, whole=True),
}
"""By llama.cpp's names; of several that mean the same, the first is written."""


def write_tokenizer(writer: "gguf.GGUFWriter", tokenizer: PreTrainedTokenizerFast, vocab_size: int, name: str) -> None:
    """Add a tokenizer and its chat template to a GGUF file.

    Args:
        vocab_size: rows of the embedding; ids without a token get names of their own.
        name: what errors call the model.

    Raises:
        UserError: if llama.cpp could not give the same tokens; it says why.
    """
    from gguf import Keys, TokenType

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for problem in _problems(state):
        raise UserError(f"{name}: the tokenizer {problem}, which GGUF files cannot say")
    words = _words(state)
    pre = next((known for known, one in _WORDS.items() if one == words), None)
    if pre is None:
        raise UserError(
            f"{name}: the tokenizer cuts texts into words as no name of llama.cpp says, like those that yoco-u trains; known "
            f"are {', '.join(_WORDS)}: train with the tokenizer of a Llama 3, Qwen or SmolLM for GGUF files"
        )
    tokens, kinds = [f"[PAD{number}]" for number in range(vocab_size)], [TokenType.UNUSED] * vocab_size
    for token, number in tokenizer.get_vocab().items():
        tokens[number], kinds[number] = token, TokenType.NORMAL
    for added in state["added_tokens"]:
        kinds[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    merges = [one if isinstance(one, str) else " ".join(one) for one in state["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    for kind, add in (
        ("bos", writer.add_bos_token_id), ("eos", writer.add_eos_token_id), ("unk", writer.add_unk_token_id),
        ("pad", writer.add_pad_token_id),
    ):  # fmt: skip
        if isinstance(number := getattr(tokenizer, f"{kind}_token_id"), int):
            add(number)
    writer.add_add_bos_token(end_of_text_id(tokenizer) == tokenizer.bos_token_id)
    templates = tokenizer.chat_template or {}
    templates = {"default": templates} if isinstance(templates, str) else templates
    if "default" in templates:
        writer.add_chat_template(templates["default"])
    if named := [one for one in templates if one != "default"]:
        writer.add_array(Keys.Tokenizer.CHAT_TEMPLATES, named)
        for one in named:
            writer.add_string(Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=one), templates[one])


def begins_texts(unread: Unread) -> bool:
    """Whether texts begin with the bos token: as the file says, and as llama.cpp has it where the file does not."""
    if unread.begins is not None:
        return unread.begins
    words = _WORDS.get(unread.pre or "")
    return unread.tokenizer == "llama" or (words is not None and words.whole)  # the patterns of Llama 3 and Tekken


def restored(tokenizer: PreTrainedTokenizerFast, unread: Unread, name: str) -> PreTrainedTokenizerFast:
    """A tokenizer that transformers has read from a GGUF file, with what it has not read.

    transformers cuts texts by GPT-2's words where it does not know a name, and gives each byte-level tokenizer GPT-2's
    `<|endoftext|>`, for which the model need not have a row.

    Args:
        unread: what the file says.
        name: what the error calls the file.

    Raises:
        UserError: if how texts are cut into words has no known name.
    """
    words = _WORDS.get(unread.pre or "")
    if words is None and unread.tokenizer == "gpt2":
        raise UserError(
            f"{name}: tokenizer.ggml.pre is {unread.pre!r}, by which it is not known how texts are cut into words; known are "
            f"{', '.join(_WORDS)}; convert the folder with safetensors instead"
        )
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < unread.tokens]
    backend = Tokenizer.from_str(json.dumps(state))
    if words is not None:
        steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if words.digits else []
        if words.pattern is not None:
            steps.append(pre_tokenizers.Split(Regex(words.pattern), "isolated"))
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words.pattern is None))
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
        backend.model.ignore_merges = words.whole
        backend.normalizer = normalizers.NFC() if words.nfc else None
    kept = {name: value for name, value in tokenizer.init_kwargs.items() if name not in _OF_READING and value is not None}
    made = PreTrainedTokenizerFast(tokenizer_object=backend, **kept)
    if unread.templates:
        made.chat_template = ({"default": made.chat_template} if made.chat_template else {}) | unread.templates
    return made


_OF_READING = frozenset({
    "vocab_file", "name_or_path", "gguf_file", "is_local", "local_files_only", "added_tokens_decoder", "add_bos_token",
    "add_eos_token", "backend",
})  # fmt: skip
"""What transformers notes about the file that it has read a tokenizer from, and what the post-processor says already."""


def _problems(state: dict[str, Any]) -> list[str]:
    model, found = state["model"], []
    if model["type"] != "BPE" or model.get("byte_fallback") or (state["decoder"] or {}).get("type") != "ByteLevel":
        found.append("is no byte-level BPE")
    found += [f"has a {key}" for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout") if model.get(key)]
    if (normalizer := state["normalizer"]) is not None and normalizer["type"] != "NFC":
        found.append(f"changes texts first ({normalizer['type']})")
    for token in state["added_tokens"]:
        found += [f"has a token {token['content']!r} with {key}" for key in ("lstrip", "rstrip", "single_word") if token[key]]
    return found


def _words(state: dict[str, Any]) -> _Words | None:
    """How a tokenizer cuts texts into words; None if not by these means."""
    before = state["pre_tokenizer"] or {"type": None}
    steps: list[dict[str, Any]] = before.get("pretokenizers", [before])
    kinds = tuple(step["type"] for step in steps)
    last = steps[-1]
    if last["type"] != "ByteLevel" or last["add_prefix_space"] or last["use_regex"] == ("Split" in kinds):
        return None
    whole, nfc = bool(state["model"].get("ignore_merges")), state["normalizer"] is not None
    if kinds == ("ByteLevel",):
        return _Words(whole=whole, nfc=nfc)
    if kinds == ("Digits", "ByteLevel") and steps[0]["individual_digits"]:
        return _Words(digits=True, whole=whole, nfc=nfc)
    if kinds == ("Split", "ByteLevel") and (steps[0]["behavior"], steps[0]["invert"]) == ("Isolated", False):
        return _Words(steps[0]["pattern"].get("Regex"), whole=whole, nfc=nfc)
    return None
