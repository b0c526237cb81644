"""Chats as examples: read from JSON lines, and written by the model's chat template, with the assistant's part marked."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, Field
from transformers import PreTrainedTokenizerFast

from yoco_u.data.json_lines import read_lines
from yoco_u.errors import UserError
from yoco_u.inference.chat_template import chat_text, text_tokens


class _Message(BaseModel, extra="allow"):
    role: Literal["system", "user", "assistant", "tool"]
    content: str


class _Line(BaseModel, extra="allow"):
    messages: list[_Message] = Field(min_length=1)


class Chat(NamedTuple):
    """A chat and where it came from: its messages, mappings of `role` and `content`, as a chat template takes them."""

    place: str
    messages: list[dict[str, Any]]


class Example(NamedTuple):
    """Tokens of a chat, and whether each of them is the assistant's."""

    input_ids: list[int]
    assistant: list[bool]


def read_chats(files: Sequence[Path]) -> Iterator[Chat]:
    """Read files of JSON lines, each `{"messages": [{"role": ..., "content": ...}, ...]}`; other keys are ignored.

    Raises:
        UserError: at the first file that cannot be read, and the first line that is no chat with an answer; it names both.
    """
    for place, line in read_lines(files, _Line, "messages"):
        if all(message.role != "assistant" for message in line.messages):
            raise UserError(f"{place}: no message is the assistant's, so there is nothing to learn")
        yield Chat(place, [message.model_dump() for message in line.messages])


def examples(chats: Iterable[Chat], tokenizer: PreTrainedTokenizerFast, now: datetime | None = None) -> Iterator[Example]:
    """Write chats by the tokenizer's chat template, all at the time `now`, by default that of the clock.

    What the assistant says, up to the end of its turn, is marked: the text that follows the prompt for an answer. A template
    that writes earlier messages differently once there are later ones, as some leave out earlier thoughts, gives an example for
    each such stretch of a chat.

    Raises:
        UserError: if there is no template, or it refuses a chat; the chat is named.
    """
    now = now or datetime.now()
    for chat in chats:
        try:
            for text, spans in _texts(chat.messages, tokenizer, now):
                yield _example(text, spans, tokenizer)
        except UserError as error:
            raise UserError(f"{chat.place}: {error}") from None


def _texts(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast, now: datetime
) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    """Texts of a chat, and the assistant's characters in each: from a place, to another."""
    text, spans = "", list[tuple[int, int]]()
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = chat_text(tokenizer, messages[:number], now=now)
        after = chat_text(tokenizer, messages[: number + 1], generation_prompt=False, now=now)
        if not after.startswith(before):
            raise UserError("the chat template does not write an answer behind the prompt for it")
        if after == before and message["content"]:
            raise UserError("the chat template writes nothing of what the assistant says; mend the template")
        if not before.startswith(text):
            yield text, spans
            spans = []
        text = after
        spans.append((len(before), len(after)))
    yield text, spans


def _example(text: str, spans: list[tuple[int, int]], tokenizer: PreTrainedTokenizerFast) -> Example:
    """The tokens of a text, none of which lies across an end of a span, as none does where a model answers a prompt."""
    found, before, cuts = Example([], []), "", [0, *itertools.chain.from_iterable(spans), len(text)]
    for begin, end in itertools.pairwise(cuts):
        piece = text[begin:end]
        tokens = _continued(before, piece, tokenizer) if before else text_tokens(tokenizer, piece)
        found.input_ids.extend(tokens)
        found.assistant.extend([(begin, end) in spans] * len(tokens))
        before = piece or before
    return found


def _continued(before: str, piece: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The tokens of a piece of a text, without the blank that some tokenizers put before a text.

    They are those behind what comes before, or, where a token would lie across, behind another text where none does.
    """
    for context in (before, "\n", ".", "a"):
        head, whole = text_tokens(tokenizer, context), text_tokens(tokenizer, context + piece)
        if whole[: len(head)] == head:
            return whole[len(head) :]
    return text_tokens(tokenizer, piece)
