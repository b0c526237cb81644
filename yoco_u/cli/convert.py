"""`yoco-u convert`."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from yoco_u.cli.arguments import check_at_most, check_unused
from yoco_u.cli.output import note, print_json, progress_bar
from yoco_u.config import apply_overrides
from yoco_u.errors import UserError
from yoco_u.files import check_result

DTYPES = ("float32", "bfloat16", "float16")


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A folder with safetensors, a GGUF file, a run or model of this project, or a name on the hub.",
        ),
    ],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="What the model becomes: preset, loops, window, global_kvs, stages, rope_cross."
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder of the converted model.")] = Path("converted"),
    kv: Annotated[
        str | None, typer.Option("--kv", help="How global keys and values come about: fit, best or mean. \\[default: fit]")
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text", help="Texts to fit them to, as --corpus of yoco-u prepare. \\[default: documentation, packages]"
        ),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens", min=1, help="Tokens of these texts that are read. \\[default: 32768]")
    ] = None,
    back: Annotated[
        bool, typer.Option("--back", help="Write a Transformer of ours as the Llama, Mistral or Qwen that it is.")
    ] = False,
    gguf: Annotated[
        bool, typer.Option("--gguf", help="Write a Transformer of ours as a GGUF file, --out, for llama.cpp.")
    ] = False,
    remote_code: Annotated[
        bool,
        typer.Option("--remote-code", help="Write the modelling files too, for programs with transformers but without yoco-u."),
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="Of the weights: float32, bfloat16 or float16. \\[default: as in the source]"),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Turn a Llama, Mistral, Qwen or SmolLM into a YOCO-U.

    The lower half of the layers becomes the sliding self-decoder, the upper half
    the cross-decoder, whose layers read one global KV, or several with global_kvs.
    The tokenizer, its chat template and the generation settings come along, and
    exits.json where weights and loops stay as they are. What the model has lost
    thereby, training brings back: see docs/conversion.md.

    [bold]Examples[/bold]

      yoco-u convert SmolLM2-135M/ --out models/yoco-u

      yoco-u convert model.gguf window=512 global_kvs=5 loops=2 --out models/yoco-u

      yoco-u convert model.gguf preset=transformer --out models/teacher

      yoco-u convert models/yoco-u-15 global_kvs=5 --kv mean --out models/yoco-u-5

      yoco-u convert runs/transformer --back --out models/llama

      yoco-u convert models/teacher --gguf --dtype float16 --out teacher.gguf

      yoco-u convert runs/mine --remote-code --out models/for-the-hub
    """
    import torch

    from yoco_u.conversion import (
        METHODS,
        Calibration,
        Converted,
        check_gguf,
        check_target,
        read_source,
        target_architecture,
        write,
        write_back,
        write_gguf,
    )
    from yoco_u.conversion import convert as convert_model
    from yoco_u.loading import check_loops

    method = next((one for one in METHODS if one == (kv or "fit")), None)
    if method is None:
        raise UserError(f"--kv is {kv!r}; expected {', '.join(METHODS)}")
    if dtype not in (None, *DTYPES):
        raise UserError(f"--dtype is {dtype!r}; expected {', '.join(DTYPES)}")
    chosen = [name for name, on in (("--back", back), ("--gguf", gguf), ("--remote-code", remote_code)) if on]
    if len(chosen) > 1:
        raise UserError(f"{chosen[0]} and {chosen[1]} cannot both be; give one of them")
    if any(os.path.realpath(out) == os.path.realpath(place) for place in (source, Path(source) / "model")):
        raise UserError(f"--out {out}: is what is converted; name another")
    if gguf:
        check_result(out)
        check_gguf(out)
    else:
        check_target(out)
    if back or gguf:
        check_unused(f"{chosen[0]} changes nothing about the model", kv=kv, text=text, tokens=tokens)
    if method == "mean":
        check_unused("--kv mean reads no texts", text=text, tokens=tokens)
    check_at_most(2**24, "a fit has far fewer unknowns", tokens=tokens)
    given = apply_overrides({}, settings or [])
    if settings and (back or gguf):
        raise UserError(f"{chosen[0]} changes nothing about the model; leave the settings out")
    read = read_source(source)
    if dtype is not None:
        read = replace(read, dtype=getattr(torch, dtype))
    if back or gguf:
        kind = write_back(read, out) if back else write_gguf(read, out)
        if json:
            print_json({"source": source, "model": str(out), "model_type": kind})
        else:
            print(f"a {kind}, in {out}")
        return
    if remote_code and read.ours and not settings:
        check_unused("--remote-code alone changes nothing about the model", kv=kv, text=text, tokens=tokens)
        target, converted = read.model.model.architecture, Converted(read.model, None)
    else:
        if not {"loops", "stages"} & given.keys():
            check_loops(source, read.model.model.architecture, read.model.config.num_loops)
        target = target_architecture(read.model.model.architecture, given)
        if not target.has_global_kv:
            check_unused(f"it is for global KVs, and {target.in_words} has none", kv=kv, text=text, tokens=tokens)
        calibration = Calibration(tuple(text), special_tokens=True) if text else Calibration()
        calibration = replace(calibration, tokens=tokens or calibration.tokens)
        converted = convert_model(read, target, method, calibration, lambda total: progress_bar("reading texts", total))
        if 0 < converted.tokens < calibration.tokens:
            note(f"the texts have {converted.tokens:,} tokens in whole rows, fewer than the {calibration.tokens:,} of --tokens")
    left_out = write(converted, read, out, remote_code)
    result = {
        "source": source, "model": str(out), "architecture": target.in_words, "kv": method if target.has_global_kv else None,
        "explained": converted.explained, "tokens": converted.tokens,
    }  # fmt: skip
    for line in left_out:
        note(line)
    if json:
        print_json(result)
        return
    print(f"{target.in_words}, in {out}")
    if converted.explained:
        mean = sum(converted.explained) / len(converted.explained)
        worst = min(converted.explained)
        layers = sum(stage.layers for stage in read.model.model.architecture.stages)
        layer = layers - len(converted.explained) + converted.explained.index(worst)
        print(f"the global KVs explain {mean:.0%} of the replaced keys and values; in layer {layer}, the least, {worst:.0%}")
