"""`yoco-u generate`."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from yoco_u.cli.output import print_json
from yoco_u.errors import UserError


def generate(
    model: Annotated[Path, typer.Argument(metavar="RUN_OR_MODEL", help="A run folder or a saved model.")],
    prompt: Annotated[str, typer.Option("--prompt", help="Text to continue; - reads it from standard input.")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Stop after so many tokens.")] = 200,
    temperature: Annotated[float, typer.Option("--temperature", help="Divides the logits: lower is safer.")] = 0.8,
    top_k: Annotated[int | None, typer.Option("--top-k", help="Choose among so many likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", help="Choose among the likeliest of this probability.")] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Take the likeliest token every time.")] = False,
    seed: Annotated[int, typer.Option("--seed", help="The same seed gives the same text.")] = 0,
    num_loops: Annotated[int | None, typer.Option("--num-loops", help="Loop count T, instead of the model's own.")] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print prompt, text and settings as JSON when done.")] = False,
) -> None:
    """Continue a prompt; the text appears as it is written.

    The prompt begins a document; the text ends where the model ends it, or after
    so many tokens.

    [bold]Examples[/bold]

      yoco-u generate runs/quickstart/yoco-u --prompt 'def ' --temperature 0.5

      yoco-u generate runs/quickstart/yoco-u --prompt - --greedy < start.txt
    """
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise UserError("the prompt is empty; give at least one character")

    from yoco_u.evaluation.samples import Sampling, continue_text
    from yoco_u.runs import load_model
    from yoco_u.training.distributed import distributed_session
    from yoco_u.typed import parse

    chosen = {"max_new_tokens": max_new_tokens, "temperature": 0 if greedy else temperature, "top_k": top_k, "top_p": top_p}
    sampling = parse(Sampling, chosen | {"seed": seed, "num_loops": num_loops}, "options")
    with distributed_session(device) as distributed:
        weights, tokenizer = load_model(model, distributed.device)
        streamer = None if json else _streamer(tokenizer)
        new, tokens = continue_text(weights, tokenizer, text, sampling, streamer)
    if json:
        print_json({"prompt": text, "text": new, "tokens": tokens, "settings": sampling.model_dump()})


def _streamer(tokenizer: Any) -> Any:
    from transformers import TextStreamer

    return TextStreamer(tokenizer, skip_prompt=False, skip_special_tokens=True)
