"""`yoco-u generate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from yoco_u.cli import options
from yoco_u.cli.arguments import check_unused, loops_or_auto, standard_input
from yoco_u.cli.output import print_json
from yoco_u.errors import UserError

if TYPE_CHECKING:
    from yoco_u.inference import LLM, RequestOutput, SamplingParams


def generate(
    model: options.Model,
    prompt: Annotated[
        list[str], typer.Option("--prompt", help="Text to continue; - reads standard input. Can be given again.")
    ],
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Stop after this many tokens.")] = 200,
    n: Annotated[int, typer.Option("-n", help="Outputs of each prompt.")] = 1,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="Divides the logits: lower is safer. \\[default: 0.8]")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option("--top-k", help="Choose among this many likeliest tokens; 0: all. \\[default: 0]")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option("--top-p", help="Choose among the likeliest tokens that together have this probability. \\[default: 1]"),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option("--min-p", help="Leave out tokens less likely than this share of the likeliest one. \\[default: 0]"),
    ] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Take the likeliest token every time.")] = False,
    repetition_penalty: Annotated[float, typer.Option("--repetition-penalty", help="Over 1 makes repetition rarer.")] = 1.0,
    seed: Annotated[int | None, typer.Option("--seed", help="The same seed gives the same text. \\[default: 0]")] = None,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="Text that ends the output. Can be given again.")] = None,
    num_loops: Annotated[
        str | None, typer.Option("--num-loops", help="Loop count T, instead of the model's own; auto: see --exit-threshold.")
    ] = None,
    exit_threshold: Annotated[
        float | None,
        typer.Option("--exit-threshold", help="With --num-loops auto: tokens of a score below leave the loop."),
    ] = None,
    drafts: Annotated[
        Literal["none", "loops", "prompt"], typer.Option("--drafts", help="Draft tokens to verify several in a step.")
    ] = "none",
    json_schema: Annotated[
        Path | None, typer.Option("--json-schema", help="File with a schema that the text must fit.")
    ] = None,
    regex: Annotated[str | None, typer.Option("--regex", help="Expression that the text must match.")] = None,
    dtype: options.DType = "auto",
    weights: Annotated[Literal["int8"] | None, typer.Option("--weights", help="Keep weights in 8 bits.")] = None,
    device: options.Device = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print prompts, texts and settings as JSON when done.")] = False,
) -> None:
    """Continue prompts; one text appears as it is written, several when done.

    A prompt begins a document. A text ends where the model ends it, or after
    --max-tokens tokens. Several prompts run at once.

    [bold]Examples[/bold]

      yoco-u generate runs/quickstart/yoco-u --prompt 'def ' --temperature 0.5

      yoco-u generate runs/quickstart/yoco-u --prompt - --greedy < start.txt

      yoco-u generate runs/8m --prompt 'import ' --prompt 'class ' -n 3 --json
    """
    loops = loops_or_auto(num_loops)
    prompts = [standard_input() if text == "-" else text for text in prompt]
    if not all(prompts):
        raise UserError("the prompt is empty; give at least one character")

    if greedy:
        check_unused("--greedy takes the likeliest token every time", temperature=temperature)
    if greedy or temperature == 0:
        why = f"--{'greedy' if greedy else 'temperature 0'} takes the likeliest token every time"
        check_unused(why, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)

    from yoco_u.inference import LLM, SamplingParams
    from yoco_u.inference.exits import FILE
    from yoco_u.inference.outputs import check_outputs
    from yoco_u.loading import model_folder

    chosen = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed}
    sampling = {"temperature": 0 if greedy else 0.8, "seed": 0} | {k: v for k, v in chosen.items() if v is not None}
    params = SamplingParams(
        max_tokens=max_tokens, n=n, repetition_penalty=repetition_penalty, **sampling,
        stop=tuple(stop or ()), num_loops=loops, regex=regex,
        json_schema=_read(json_schema), drafts=drafts, exit_threshold=exit_threshold,
    )  # fmt: skip
    # auto takes T from exits.json, which a model need not have where the threshold is given
    own = loops if exit_threshold is None or (model_folder(model) / FILE).is_file() else None
    llm = LLM(model, device=device, dtype=dtype, weights=weights, num_loops=own)
    if not json and len(prompts) == n == 1:
        _stream(llm, prompts[0], params)
        return
    requests = llm.generate(prompts, params)
    any_whole = any(output.error is None for request in requests for output in request.outputs)
    if json and any_whole:
        print_json({"settings": params.model_dump(mode="json"), "requests": [_as_json(request) for request in requests]})
    elif any_whole:
        for request in requests:
            for output in request.outputs:
                print(f"{request.prompt}{output.text}\n{'-' * 40}")
    check_outputs(requests)


def _stream(llm: "LLM", prompt: str, params: "SamplingParams") -> None:
    """Print the prompt and the text as it comes; nothing if the first step fails, as it does for a grammar that is none."""
    from yoco_u.inference.outputs import failed_output

    begins, error = True, None
    for update in llm.stream(prompt, params):
        error = update.output.error
        if error is None:
            print(f"{prompt if begins else ''}{update.text}", end="", flush=True)
            begins = False
    if not begins:
        print()
    if error is not None:
        raise failed_output(error)


def _read(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read it ({error})") from None


def _as_json(request: "RequestOutput") -> dict[str, Any]:
    outputs = [
        {
            "text": output.text,
            "tokens": len(output.token_ids),
            "mean_loops": sum(output.loops) / len(output.loops) if output.loops else None,
            "finish_reason": output.finish_reason,
            "error": output.error,
        }
        for output in request.outputs
    ]
    return {"prompt": request.prompt, "num_loops": request.num_loops, "outputs": outputs}
