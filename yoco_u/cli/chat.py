"""`yoco-u chat`."""

import sys
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from yoco_u.cli import options
from yoco_u.cli.arguments import check_unused, is_unicode, loops_or_auto, parse_options
from yoco_u.cli.output import note
from yoco_u.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from yoco_u.inference import LLM, SamplingParams

_SETTINGS = {
    "loops": "num_loops", "temperature": "temperature", "tokens": "max_tokens", "top-p": "top_p", "seed": "seed",
    "drafts": "drafts",
}  # fmt: skip
_HELP = f"{', '.join(f'/{name} VALUE' for name in _SETTINGS)}\nfor the answers to come; /reset forgets what was said"


def chat(
    model: options.Model,
    num_loops: Annotated[
        str | None, typer.Option("--num-loops", help="Loop count T, or auto. \\[default: the model's own]")
    ] = None,
    temperature: Annotated[float, typer.Option("--temperature", help="0 takes the likeliest token.")] = 0.8,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Tokens of one answer.")] = 200,
    seed: Annotated[int | None, typer.Option("--seed", help="The same seed gives the same answers.")] = None,
    drafts: Annotated[
        Literal["none", "loops", "prompt"], typer.Option("--drafts", help="Draft tokens to verify several in a step.")
    ] = "none",
    device: options.Device = "auto",
    dtype: options.DType = "auto",
) -> None:
    """Talk to a model in the terminal.

    A model with a chat template answers; any other continues the text, which
    grows with what both write. Ctrl-C stops an answer, /exit or Ctrl-D ends.
    Other lines that begin with a slash change settings: /help names them.

    [bold]Examples[/bold]

      yoco-u chat runs/quickstart/yoco-u

      yoco-u chat runs/quickstart/yoco-u --num-loops 5 --temperature 0
    """
    if temperature == 0:
        check_unused("--temperature 0 takes the likeliest token every time", seed=seed)
    with suppress(ImportError):
        import readline  # noqa: F401  (gives input() its line editing)

    from yoco_u.inference import LLM, SamplingParams
    from yoco_u.inference.chat_template import template_file, why_no_chats

    chosen: dict[str, Any] = {
        "num_loops": loops_or_auto(num_loops), "temperature": temperature, "max_tokens": max_tokens, "seed": seed,
        "drafts": drafts,
    }  # fmt: skip
    params = parse_options(SamplingParams, chosen)
    llm = LLM(model, device=device, dtype=dtype, num_loops=params.num_loops)
    tokenizer = llm.engine.tokenizer
    assert tokenizer is not None
    if tokenizer.chat_template and (problem := why_no_chats(tokenizer)):
        raise UserError(f"{template_file(tokenizer)}: {problem}")
    said = Conversation(tokenizer)
    kind = "chat" if said.has_template else "no chat template: what you write is continued"
    note(f"{kind}; /help names the settings; /exit or Ctrl-D ends")
    while (line := _read()) not in (None, "/exit"):
        try:
            if line.startswith("/"):
                params = _command(line, params, said)
            elif line:
                said.add(line, _answer(llm, said.ask(line), params))
        except UserError as error:
            note(str(error))


class Conversation:
    """What was said so far, and how the model reads it: by the chat template, or as one text where there is none."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        self._tokenizer = tokenizer
        self.has_template = bool(tokenizer.chat_template)
        self.forget()

    def forget(self) -> None:
        self._messages: list[dict[str, str]] = []

    def ask(self, text: str) -> str | list[int]:
        """The prompt for an answer to what a person says next."""
        from yoco_u.inference.chat_template import chat_tokens

        messages = [*self._messages, {"role": "user", "content": text}]
        if self.has_template:
            return chat_tokens(self._tokenizer, messages)
        return "".join(message["content"] for message in messages)

    def add(self, text: str, answer: str) -> None:
        """Go on from what a person said and the model answered, also if it was stopped midway."""
        self._messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]


def _read() -> str | None:
    """The next line; an empty one for what is not UTF-8 text, and None at the end."""
    if sys.stdin is None:
        return None
    try:
        line = input("> " if sys.stdin.isatty() else "")
    except EOFError:
        print()
        return None
    except UnicodeDecodeError:
        line = "\udcff"
    if not is_unicode(line):
        note("this is not UTF-8 text; write it again")
        return ""
    return line


def _command(line: str, params: "SamplingParams", said: Conversation) -> "SamplingParams":
    from yoco_u.config import apply_overrides, parse
    from yoco_u.inference import SamplingParams

    name, _, value = line[1:].partition(" ")
    if name == "reset":
        said.forget()
        note("forgotten")
    elif name in _SETTINGS and value:
        setting = _SETTINGS[name]
        params = parse(SamplingParams, apply_overrides(params.model_dump(), [f"{setting}={value}"]), line)
        note(f"{name}: {getattr(params, setting)}")
    elif name == "help":
        note(_HELP)
    else:
        problem = f"/{name} needs a value" if name in _SETTINGS else f"unknown: /{name}"
        note(f"{problem}\n{_HELP}")
    return params


def _answer(llm: "LLM", prompt: str | list[int], params: "SamplingParams") -> str:
    """Print an answer as it comes, until it ends or Ctrl-C stops it, and return its text."""
    from yoco_u.inference.outputs import failed_output

    text, error = "", None
    with closing(llm.stream([prompt], params)) as updates, suppress(KeyboardInterrupt):  # type: ignore[type-var]
        for update in updates:
            print(update.text, end="", flush=True)
            text += update.text
            error = update.output.error
    print()
    if error is not None:
        raise failed_output(error)
    return text
