"""The server process: a socket, uvicorn around the application, and a shutdown that lets running requests end."""

import socket
import sys
from types import FrameType

import uvicorn

from yoco_u.errors import UserError
from yoco_u.inference import Engine
from yoco_u.serving.app import create_app
from yoco_u.serving.engine_loop import EngineLoop
from yoco_u.serving.settings import Listen, ServerSettings

_LAST_WORDS = 5.0  # seconds after the drain in which the last answers can be sent
_FAILED = 1


def serve(engine: Engine, settings: ServerSettings, listen: Listen) -> int:
    """Serve until SIGTERM or SIGINT. Running requests are finished first; a second signal ends the server at once.

    Returns:
        The exit status: 0, or 1 if the engine has failed.

    Raises:
        UserError: if the address cannot be listened on, or the certificate cannot be used.
    """
    server: _Server | None = None

    def died() -> None:
        assert server is not None
        server.should_exit = True

    app = create_app(engine, settings, died)
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="on",
        server_header=False,
        ssl_certfile=listen.certificate,
        ssl_keyfile=listen.key,
        timeout_graceful_shutdown=round(settings.drain_seconds + _LAST_WORDS),
    )
    try:
        config.load()
    except OSError as error:  # ssl.SSLError is one
        raise UserError(f"{listen.certificate}: cannot use this certificate and key ({error}); expected PEM files") from None
    server = _Server(config, app.state.loop, settings.drain_seconds)
    with _socket(listen) as listening:
        scheme, port = "https" if listen.certificate else "http", listening.getsockname()[1]
        host = f"[{listen.host}]" if ":" in listen.host else listen.host
        print(
            f"{settings.model_name} at {scheme}://{host}:{port} (the page; the API is under /v1)", file=sys.stderr, flush=True
        )
        server.run(sockets=[listening])
    return _FAILED if app.state.loop.failure is not None else 0


class _Server(uvicorn.Server):
    """A uvicorn server that drains the engine loop at the first signal.

    It does not raise the signal again after the shutdown, as uvicorn's own does, so that `serve` returns.
    """

    def __init__(self, config: uvicorn.Config, loop: EngineLoop, drain_seconds: float) -> None:
        super().__init__(config)
        self._loop, self._drain_seconds = loop, drain_seconds

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self.force_exit = True
        elif self.started:
            self._loop.drain(self._drain_seconds)
        self.should_exit = True


def _socket(listen: Listen) -> socket.socket:
    family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
    try:
        return socket.create_server((listen.host, listen.port), family=family)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"cannot listen on {listen.host} port {listen.port} ({reason}); choose another --host or --port"
        ) from None
