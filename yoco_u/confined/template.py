"""The service that renders chat templates, in the sandbox of transformers."""

import json
from datetime import datetime
from types import SimpleNamespace

from jinja2 import TemplateSyntaxError
from transformers.utils import chat_template_utils
from transformers.utils.chat_template_utils import render_jinja_template

_LONGEST = 2**24  # characters of a chat


class Service:
    """Renders chats: a message is the arguments of `render_jinja_template`, and `now` for another date; its answer the text.

    Without any conversation, the template is compiled and not run.
    """

    def __call__(self, message: bytes) -> bytes:
        arguments = json.loads(message)
        now = arguments.pop("now", None)
        # Where `strftime_now` of a template reads the clock: transformers takes no other time from whoever renders.
        chat_template_utils.datetime = SimpleNamespace(now=lambda: datetime.fromisoformat(now)) if now else datetime
        try:
            texts, _ = render_jinja_template(**arguments)
        except TemplateSyntaxError as error:
            raise ValueError(f"line {error.lineno}: {error.message}") from None
        text = "".join(texts)
        if len(text) > _LONGEST:
            raise ValueError(f"it makes {len(text)} characters of them, more than {_LONGEST}")
        return text.encode(errors="replace")
