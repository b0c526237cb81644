"""The service that renders chat templates, in the sandbox of transformers."""

import json

from transformers.utils.chat_template_utils import render_jinja_template

_LONGEST = 2**24  # characters of a chat


class Service:
    """Renders a chat: a message is the arguments of `render_jinja_template` for one conversation, its answer the text."""

    def __call__(self, message: bytes) -> bytes:
        [text], _ = render_jinja_template(**json.loads(message))
        if len(text) > _LONGEST:
            raise ValueError(f"it makes {len(text)} characters of them, more than {_LONGEST}")
        return text.encode(errors="replace")
