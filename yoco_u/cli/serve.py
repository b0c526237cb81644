"""`yoco-u serve`."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from yoco_u.cli import options
from yoco_u.cli.arguments import loops_or_auto, parse_options
from yoco_u.errors import UserError

if TYPE_CHECKING:
    from yoco_u.inference import Engine

KEY_VARIABLE = "YOCO_U_API_KEY"


def serve(
    model: options.Model,
    host: Annotated[str, typer.Option("--host", help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Port; 0 for any free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option("--name", help="What clients call the model. \\[default: the folder's name]")
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option("--api-key", help=f"Key that clients must send. Can be given again; ${KEY_VARIABLE} is another."),
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option("--api-key-file", help="File of keys, one a line.")] = None,
    num_loops: Annotated[
        str | None, typer.Option("--num-loops", help="Loop count T of requests that name none, or auto.")
    ] = None,
    max_num_loops: Annotated[
        int | None, typer.Option("--max-num-loops", help="Largest loop count of one request. \\[default: 8]")
    ] = None,
    drafts: Annotated[
        Literal["none", "loops", "prompt"] | None,
        typer.Option("--drafts", help="How requests draft tokens that do not say. \\[default: none]"),
    ] = None,
    dtype: options.DType = "auto",
    weights: Annotated[Literal["int8"] | None, typer.Option("--weights", help="Keep weights in 8 bits.")] = None,
    kv_dtype: Annotated[
        Literal["bfloat16", "float32", "int8"] | None,
        typer.Option("--kv-dtype", metavar="DTYPE", help="Of the caches: bfloat16, float32 or int8. \\[default: as --dtype]"),
    ] = None,
    device: options.Device = "auto",
    cache_tokens: Annotated[
        int | None,
        typer.Option("--cache-tokens", help="Tokens of all requests together. \\[default: what 1 GiB holds, or most of a GPU]"),
    ] = None,
    max_model_len: Annotated[int | None, typer.Option("--max-model-len", help="Tokens of one request.")] = None,
    max_num_seqs: Annotated[
        int | None, typer.Option("--max-num-seqs", help="Outputs that run at once. \\[default: 16, on a GPU 64]")
    ] = None,
    max_batched_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-batched-tokens",
            help="Tokens of one step. Fewer let a short request begin sooner while a long prompt is read. "
            "\\[default: 64, on a GPU 8192]",
        ),
    ] = None,
    max_waiting: Annotated[int | None, typer.Option("--max-waiting", help="Outputs that may wait. \\[default: 256]")] = None,
    max_body_bytes: Annotated[
        int | None, typer.Option("--max-body-bytes", help="Bytes of one HTTP request. \\[default: 1 MiB]")
    ] = None,
    max_n: Annotated[int | None, typer.Option("--max-n", help="Most outputs of one prompt. \\[default: 16]")] = None,
    max_output_tokens: Annotated[
        int | None, typer.Option("--max-output-tokens", help="Tokens of one output. \\[default: 4096]")
    ] = None,
    max_connections: Annotated[
        int | None,
        typer.Option("--max-connections", help="Connections at once, fewer if there are not so many files. \\[default: 512]"),
    ] = None,
    client_seconds: Annotated[
        float | None,
        typer.Option("--client-seconds", help="Seconds to wait for a client that sends or reads too slowly. \\[default: 60]"),
    ] = None,
    time_limit: Annotated[float | None, typer.Option("--time-limit", help="Seconds of one request. \\[default: 600]")] = None,
    step_seconds: Annotated[
        float | None,
        typer.Option("--step-seconds", help="Seconds of one step, after which the server ends as stuck. \\[default: 120]"),
    ] = None,
    drain_seconds: Annotated[
        float | None,
        typer.Option("--drain-seconds", help="Seconds that running requests have to end after SIGTERM. \\[default: 30]"),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option("--cors-origin", help="Site whose pages may call the API; * for all. Can be given again."),
    ] = None,
    certificate: Annotated[Path | None, typer.Option("--certificate", help="PEM file with a certificate: serve TLS.")] = None,
    key: Annotated[Path | None, typer.Option("--key", help="PEM file with its private key.")] = None,
) -> None:
    """Serve a model: OpenAI's API under /v1, and a page to try it at /.

    Clients need the address (`http://127.0.0.1:8000/v1`) and the model's name.
    Ends in good order on SIGTERM and Ctrl-C: what runs is finished first.

    [bold]Examples[/bold]

      yoco-u serve runs/quickstart/yoco-u

      yoco-u serve runs/8m --host 0.0.0.0 --api-key-file keys.txt

      yoco-u serve runs/8m --certificate cert.pem --key key.pem --port 8443
    """
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        if find_spec(package) is None:
            raise UserError(f"serving needs {package}: pip install 'yoco-u[serve]'")
    from yoco_u.loading import model_name
    from yoco_u.serving.server import check_listen, serve_process
    from yoco_u.serving.settings import Listen, ServerSettings

    loops = loops_or_auto(num_loops)
    if (certificate is None) != (key is None):
        raise UserError("--certificate and --key belong together; give both or neither")
    keys = _keys(api_key or [], api_key_file)
    given: dict[str, Any] = {
        "model_name": name or model_name(model), "api_keys": keys, "cors_origins": cors_origin,
        "max_num_loops": max_num_loops, "max_waiting": max_waiting, "max_body_bytes": max_body_bytes, "max_n": max_n,
        "max_output_tokens": max_output_tokens, "max_connections": max_connections, "client_seconds": client_seconds,
        "time_limit": time_limit, "step_seconds": step_seconds, "drain_seconds": drain_seconds,
    }  # fmt: skip
    settings = parse_options(ServerSettings, given, model_name="name", api_keys="api-key", cors_origins="cors-origin")
    listen = parse_options(Listen, {"host": host, "port": port, "certificate": certificate, "key": key})
    check_listen(listen)  # before the model is loaded
    engine = _engine(
        model, device, dtype=dtype, weights=weights, kv_dtype=kv_dtype, num_loops=loops, cache_tokens=cache_tokens,
        max_model_len=max_model_len, max_num_seqs=max_num_seqs, max_batched_tokens=max_batched_tokens,
        drafts=drafts,
    )  # fmt: skip
    if host not in ("127.0.0.1", "::1", "localhost") and not keys:
        typer.echo("anybody who reaches this address can use the model; --api-key-file asks for keys", err=True)
    status = serve_process(engine, settings, listen)
    if status:
        raise typer.Exit(status)


def _engine(model: Path, device: str, **settings: Any) -> "Engine":
    from yoco_u.device import find_device
    from yoco_u.inference import LLM

    given, place = {name: value for name, value in settings.items() if value is not None}, find_device(device)
    if place.type == "cpu":
        given.setdefault("max_batched_tokens", max(64, given.get("max_num_seqs", 16)))
    return LLM(model, device=str(place), **given).engine


def _keys(given: list[str], file: Path | None) -> list[str]:
    """API keys from the options, the environment and the file. No error message shows one."""
    keys = [*given, *os.environ.get(KEY_VARIABLE, "").split()]
    if file is not None:
        try:
            keys += [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--api-key-file {file}: cannot read it ({error})") from None
        if not keys:
            raise UserError(f"--api-key-file {file}: no key in it; give one a line")
    if not all(key and key.isascii() and key.isprintable() and " " not in key for key in keys):
        raise UserError(
            "an API key is empty, or has spaces or characters beyond ASCII, which HTTP cannot carry; choose another"
        )
    return keys
