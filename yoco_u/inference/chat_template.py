"""A chat as a text or as tokens, by the template that comes with the tokenizer.

A template is a program of whoever made the tokenizer, so it runs in a confined process, under limits of time and memory.
"""

import contextlib
import json
import queue
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from yoco_u.confined.nursery import Confined, Ended, Nursery, Refused
from yoco_u.errors import UserError, first_line

_SECONDS, _MEMORY = 1.0, 2**28
_NURSERY = Nursery("yoco_u.confined.template", {}, seconds=_SECONDS, memory=_MEMORY)
_NONE = "this model has no chat template: it continues texts; use plain completions"
_IDLE: "queue.LifoQueue[Confined]" = queue.LifoQueue(4)  # processes that are kept for chats to come


def chat_tokens(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] = (),
    now: datetime | None = None,
) -> list[int]:
    """The tokens of a chat up to where the answer begins.

    Args:
        messages: mappings of `role` and `content`.
        tools: JSON schemas of the tools that the model may call.
        now: as of `chat_text`.

    Raises:
        UserError: as of `chat_text`.
    """
    return text_tokens(tokenizer, chat_text(tokenizer, messages, tools=tools or None, now=now))


def text_tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """The tokens of a chat's text, as `chat_text` gives it."""
    # Not through the tokenizer itself, which sets up truncation anew at each call while other threads decode; and as a batch,
    # which lets other threads go on meanwhile.
    [encoded] = tokenizer.backend_tokenizer.encode_batch_fast([text], add_special_tokens=False)
    return list(encoded.ids)


def chat_text(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Mapping[str, Any]],
    *,
    continue_final_message: bool = False,
    generation_prompt: bool | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    now: datetime | None = None,
) -> str:
    """The text of a chat up to where the answer begins. Any thread may call this.

    Args:
        messages: mappings of `role` and `content`.
        continue_final_message: end within the last message, which the answer goes on from.
        generation_prompt: whether the text ends with what an answer begins with; by default unless it ends within a message.
        tools: JSON schemas of the tools that the model may call.
        now: the time by which a template writes the date; None for that of the clock.

    Raises:
        UserError: if the tokenizer has no template that can be used, if the template refuses the messages or fails, or if it
            takes more time or memory than a template may.
    """
    if not tokenizer.chat_template:
        raise UserError(_NONE)
    try:
        arguments = tokenizer.special_tokens_map | {
            "conversations": [[{key: value for key, value in one.items() if value is not None} for one in messages]],
            "tools": None if tools is None else list(tools),
            "chat_template": tokenizer.get_chat_template(tools=tools),
            "now": now and now.isoformat(),
            "continue_final_message": continue_final_message,
            "add_generation_prompt": not continue_final_message if generation_prompt is None else generation_prompt,
        }
        return _rendered(json.dumps(arguments).encode()).decode()
    except (Refused, Ended, RecursionError, ValueError) as error:
        problem = why_no_chats(tokenizer, tools) or f"the model's chat template refuses these messages: {error}"
        raise UserError(problem) from None


def why_no_chats(tokenizer: PreTrainedTokenizerFast, tools: Sequence[Mapping[str, Any]] | None = None) -> str | None:
    """Why there can be no chats, whatever the messages: without a template, or with one that cannot be compiled.

    Returns:
        One line; None if there can be chats.
    """
    if not tokenizer.chat_template:
        return _NONE
    try:
        template = tokenizer.get_chat_template(tools=None if tools is None else list(tools))
        _rendered(json.dumps({"conversations": [], "chat_template": template}).encode())
    except UserError as error:
        return str(error)
    except (Refused, Ended, ValueError) as error:
        return f"this model's chat template is broken ({first_line(error)}); mend it, or use plain completions"
    return None


def template_file(tokenizer: PreTrainedTokenizerFast) -> Path:
    """The file that the tokenizer's chat template comes from."""
    folder = Path(tokenizer.name_or_path)
    own = folder / "chat_template.jinja"
    return own if own.is_file() else folder / "tokenizer_config.json"


def _rendered(message: bytes) -> bytes:
    """The answer of a confined process, which is kept for the next chat."""
    process = _idle_process() or _NURSERY.new()
    process.ask(message)
    try:
        answer = process.answer()
    except Ended:
        process.close()
        raise
    except Refused:
        _keep(process)
        raise
    _keep(process)
    return answer


def _idle_process() -> Confined | None:
    while True:
        try:
            process = _IDLE.get_nowait()
        except queue.Empty:
            return None
        with contextlib.suppress(Refused, Ended):
            if process.take() is None:
                return process
        process.close()  # it has been ended from outside, or is the parent's


def _keep(process: Confined) -> None:
    try:
        _IDLE.put_nowait(process)
    except queue.Full:
        process.close()
