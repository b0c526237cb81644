"""How a server is set up, besides its engine."""

from pathlib import Path

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, SecretStr

from yoco_u.config import Config


class ServerSettings(Config):
    """Settings of a server.

    Attributes:
        model_name: what clients call the model.
        api_keys: any of them opens everything but the page and /health; none: everybody may.
        cors_origins: sites whose pages may call the API; "*" for all.
        max_waiting: outputs that may wait for a seat; more are answered with 429.
        max_body_bytes: of one HTTP request.
        max_n: outputs of one prompt.
        max_output_tokens: of one output. A chat that asks for no number gets so many, or what the context has left.
        max_num_loops: T of one request.
        time_limit: seconds from a request's arrival until its last token.
        drain_seconds: after SIGTERM, running requests have so long to end.
    """

    model_name: str = Field(min_length=1)
    api_keys: tuple[SecretStr, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_waiting: NonNegativeInt = 256
    max_body_bytes: PositiveInt = 8 * 2**20
    max_n: PositiveInt = 16
    max_output_tokens: PositiveInt = 4096
    max_num_loops: PositiveInt = 8
    time_limit: PositiveFloat = 600.0
    drain_seconds: PositiveFloat = 30.0


class Listen(Config):
    """Where a server listens.

    Attributes:
        port: 0 for any free one.
        certificate, key: PEM files for TLS.
    """

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, lt=2**16)
    certificate: Path | None = None
    key: Path | None = None
