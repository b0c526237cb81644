"""Settings of a server, besides those of its engine."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt, SecretStr

from yoco_u.config import Config, Count, Loops, Seconds, at_most
from yoco_u.inference.sampling_params import MOST_OUTPUTS


class ServerSettings(Config):
    """Settings of a server.

    Attributes:
        model_name: what clients call the model.
        api_keys: keys of which requests must carry one, except for the page and /health; without any, no key is needed.
        cors_origins: sites whose pages may call the API; "*" for all.
        max_waiting: outputs that may wait for a seat; requests beyond that are answered with 429.
        max_body_bytes: largest body of an HTTP request.
        max_n: most outputs of one prompt.
        max_output_tokens: most tokens of one output. A chat that names no number gets this many, or as many as the context has
            left.
        max_num_loops: largest T of a request, besides that of requests that name none.
        max_connections: most connections to clients, fewer where the process may not open so many files.
        client_seconds: longest time that the server waits for a client: for a request to come, and for the client to take more
            of its answer.
        time_limit: longest time from a request's arrival until its last token, in seconds.
        step_seconds: longest time of one step of the engine. After it the engine counts as stuck, and the server ends.
        drain_seconds: time that running requests have to end after SIGTERM.
    """

    model_name: str = Field(min_length=1)
    api_keys: tuple[SecretStr, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_waiting: Annotated[NonNegativeInt, at_most(2**20, "each of which keeps its prompt in memory")] = 256
    max_body_bytes: Annotated[PositiveInt, at_most(2**30, "which are all in memory at once")] = 2**20
    max_n: Annotated[Count, at_most(MOST_OUTPUTS, "all of which take memory at once")] = 16
    max_output_tokens: Count = 4096
    max_num_loops: Loops = 8
    max_connections: Count = 512
    client_seconds: Seconds = 60.0
    time_limit: Seconds = 600.0
    step_seconds: Seconds = 120.0
    drain_seconds: Seconds = 30.0


class Listen(Config):
    """Where a server listens.

    Attributes:
        port: TCP port; 0 for any free one.
        certificate, key: PEM files; with them the server speaks TLS.
    """

    host: str = Field(default="127.0.0.1", min_length=1)
    port: int = Field(default=8000, ge=0, lt=2**16)
    certificate: Path | None = None
    key: Path | None = None
