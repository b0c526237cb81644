"""A chat as tokens, by the template that comes with the tokenizer."""

from collections.abc import Mapping, Sequence

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from yoco_u.errors import UserError


def chat_tokens(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """The tokens of a chat up to where the answer begins.

    Args:
        messages: mappings of `role` and `content`.

    Raises:
        UserError: if the tokenizer has no template, or the template refuses the messages.
    """
    if not tokenizer.chat_template:
        raise UserError("this model has no chat template: it continues texts; use plain completions")
    try:
        text = tokenizer.apply_chat_template([dict(one) for one in messages], tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise UserError(f"the model's chat template refuses these messages: {error}") from None
    # Not through the tokenizer itself, which sets up truncation anew at each call while other threads decode.
    return [int(token) for token in tokenizer.backend_tokenizer.encode(str(text), add_special_tokens=False).ids]
