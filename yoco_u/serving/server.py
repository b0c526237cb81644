"""The server process: a socket, uvicorn around the application, and an end that comes in time."""

import asyncio
import faulthandler
import gc
import socket
import ssl
import sys
from types import FrameType
from typing import Any

import uvicorn

from yoco_u.errors import UserError
from yoco_u.inference import Engine
from yoco_u.serving.app import create_app
from yoco_u.serving.connections import Acceptor, Connection
from yoco_u.serving.engine_loop import EngineLoop
from yoco_u.serving.settings import Listen, ServerSettings

_LAST_WORDS = 5.0  # seconds after the drain in which the last answers can be sent
_CLEANING = 3.0  # seconds after the last words in which the process may clean up before it is ended
_LOOK = 0.05  # seconds between two looks whether all requests are answered
_FAILED = 1


def serve(engine: Engine, settings: ServerSettings, listen: Listen) -> int:
    """Serve until SIGTERM or SIGINT. Running requests are finished first; a second signal ends them at once.

    From the first signal on, or from the engine's failure, this function has `drain_seconds` and a few more to return. Then the
    process is ended with status 1, whatever its threads are doing.

    Returns and raises what `serve_process` does.
    """
    try:
        return serve_process(engine, settings, listen)
    finally:
        faulthandler.cancel_dump_traceback_later()


def serve_process(engine: Engine, settings: ServerSettings, listen: Listen) -> int:
    """The same in a process that only serves, and has to end in the same time.

    Returns:
        The exit status: 0, or 1 if the engine has failed.

    Raises:
        UserError: if the address cannot be listened on, or the certificate cannot be used.
    """
    _check_certificate(listen)
    server: _Server | None = None

    def died() -> None:
        assert server is not None
        server.end(0.0)

    app = create_app(engine, settings, died)
    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        lifespan="on",
        server_header=False,
        ssl_certfile=listen.certificate,
        ssl_keyfile=listen.key,
        timeout_graceful_shutdown=round(settings.drain_seconds + _LAST_WORDS) + 1,
    )
    server = _Server(config, app.state.loop, settings)
    with _socket(listen) as listening:
        scheme, port = "https" if listen.certificate else "http", listening.getsockname()[1]
        host = f"[{listen.host}]" if ":" in listen.host else listen.host
        print(
            f"{settings.model_name} at {scheme}://{host}:{port} (the page; the API is under /v1)", file=sys.stderr, flush=True
        )
        gc.collect()
        gc.freeze()  # else each large request makes the collector look at all of torch and transformers, for 0.1 to 0.5 s
        try:
            server.run(sockets=[listening])
        finally:
            gc.unfreeze()  # else nothing of the engine would ever be freed
    return _FAILED if app.state.loop.failure is not None else 0


class _Server(uvicorn.Server):
    """A uvicorn server that drains the engine loop at the first signal, and whose connections are limited.

    It does not raise the signal again after the shutdown, as uvicorn's own does, so that `serve` returns.
    """

    def __init__(self, config: uvicorn.Config, loop: EngineLoop, settings: ServerSettings) -> None:
        super().__init__(config)
        self._loop, self._settings = loop, settings
        self._acceptor: Acceptor | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        assert sockets is not None
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            sys.exit(_FAILED)

        def protocol() -> Connection:
            return Connection(self.config, self.server_state, self.lifespan.state)

        connections: set[Any] = self.server_state.connections  # of `Connection` alone
        settings, tls = self._settings, self.config.ssl
        self._acceptor = Acceptor(sockets[0], connections, protocol, tls, settings.max_connections, settings.client_seconds)
        self.servers = [self._acceptor]  # type: ignore[list-item]
        self._event_loop = asyncio.get_running_loop()
        self.started = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer what has come, while new clients are told that the server ends; then close the socket too."""
        before = set(self.server_state.connections)
        for connection in before:
            connection.shutdown()
        while before & self.server_state.connections:
            await asyncio.sleep(_LOOK)
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.started:
            self.end(0.0 if self.should_exit else self._settings.drain_seconds)
        self.should_exit = True

    def end(self, drain_seconds: float) -> None:
        """Let what runs end within some seconds, and then the process. Safe in a signal handler; a later call may cut it short.

        The deadline is kept by a thread without Python code, so that nothing can hold it up.
        """
        assert self._acceptor is not None
        self.should_exit = True
        faulthandler.dump_traceback_later(drain_seconds + _LAST_WORDS + _CLEANING, exit=True)
        self._loop.drain(drain_seconds)
        abort = self._acceptor.abort
        self._event_loop.call_soon_threadsafe(lambda: self._event_loop.call_later(drain_seconds + _LAST_WORDS, abort))


def check_listen(listen: Listen) -> None:
    """Check the address and the certificate, without taking connections yet; errors as of `serve_process`."""
    _socket(listen).close()
    _check_certificate(listen)


def _check_certificate(listen: Listen) -> None:
    if listen.certificate is None:
        return
    try:
        # The password is a wrong one, where a key has one: else OpenSSL asks for it, and waits.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(listen.certificate, listen.key, password="")
    except OSError as error:  # ssl.SSLError is one
        raise UserError(
            f"{listen.certificate}: cannot use this certificate and key ({error}); expected PEM files, "
            "the key without a password"
        ) from None


def _socket(listen: Listen) -> socket.socket:
    family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
    try:
        return socket.create_server((listen.host, listen.port), family=family)
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (while ")[0]
        raise UserError(
            f"cannot listen on {listen.host} port {listen.port} ({reason}); choose another --host or --port"
        ) from None
