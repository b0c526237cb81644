"""Connections to clients: how many there may be, and how long each may keep the server waiting.

uvicorn serves a connection; what it lacks is here. Clients that send half a request or do not read their answer are given up
after a while, and running out of connections or file descriptors only makes new clients wait.
"""

import asyncio
import logging
import socket
import ssl
import sys
import time
from collections.abc import Callable
from typing import Any

import h11
import psutil
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from yoco_u.serving.errors import error_response

log = logging.getLogger("yoco_u.serving")

_SPARE_FILES = 64  # file descriptors that are left for everything but connections
_PAUSE = 0.1  # seconds between two tries to find room
_LINGER = 1.0  # seconds for which what a refused client still sends is read, so that it gets to read its answer
_SILENCE = 10.0  # seconds between two lines of the log about the same trouble


class _Transport:
    """A transport whose `close` lets a client that still sends its request read the answer.

    A socket that is closed with bytes that nobody has read is reset by the operating system, and what was written to it may be
    lost on the way.
    """

    def __init__(self, transport: asyncio.Transport, connection: "Connection") -> None:
        self._transport, self._connection, self._closing = transport, connection, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self._closing or self._transport.is_closing()

    def close(self) -> None:
        cycle = self._connection.cycle
        if self.is_closing():
            return
        self._closing = True
        if (self._connection.refused or (cycle is not None and cycle.more_body)) and self._transport.can_write_eof():
            self._connection.refused = True
            self._transport.write_eof()
            self._transport.resume_reading()
            asyncio.get_running_loop().call_later(_LINGER, self._transport.abort)
        else:
            self._transport.close()


class Connection(H11Protocol):
    """One connection to a client. Whatever it refuses, it refuses in the shape of OpenAI's API.

    Attributes:
        since: time at which the connection was made, or its last answer was complete.
        stalled_since: time since which the client has not taken what was sent to it, None while it takes it.
        refused: whether what the client still sends is of no interest.
    """

    since = 0.0
    stalled_since: float | None = None
    refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.since = time.monotonic()
        super().connection_made(_Transport(transport, self))  # type: ignore[arg-type]

    def data_received(self, data: bytes) -> None:
        if not self.refused:
            super().data_received(data)

    def handle_events(self) -> None:
        """uvicorn stops reading when something comes behind a request, and with it would not notice that the client leaves.

        Here reading goes on. Of what comes behind a request little is kept; a client that sends more gets the answer, and with
        it the end of the connection, as HTTP allows.
        """
        super().handle_events()
        if self.waits or self.refused:
            return
        if len(self.conn.trailing_data[0]) > HIGH_WATER_LIMIT:
            self.refused, self.cycle.keep_alive = True, False
        self.flow.resume_reading()

    def on_response_complete(self) -> None:
        self.since = time.monotonic()
        super().on_response_complete()

    def pause_writing(self) -> None:
        self.stalled_since = time.monotonic()
        super().pause_writing()

    def resume_writing(self) -> None:
        self.stalled_since = None
        super().resume_writing()

    @property
    def waits(self) -> bool:
        """Whether no whole request is there, so that the server has nothing to do for this client."""
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    def check(self, longest: float) -> None:
        """End the connection if the server has waited for this client for more than `longest` seconds."""
        now = time.monotonic()
        if self.stalled_since is not None:
            if now - self.stalled_since > longest:
                self.transport.abort()
        elif self.waits and now - self.since > longest:
            if self.transport.is_closing():
                self.transport.abort()
            else:
                self.refuse(408, f"the request did not come within {longest:g} seconds")

    def refuse(self, status: int, message: str) -> None:
        """Close the connection, with an error if there is the beginning of a request and no answer has begun."""
        begun = self.cycle is not None and not self.cycle.response_complete
        if begun or self.conn.trailing_data[0]:
            self.send_error(status, message)
        else:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """uvicorn calls this where it cannot parse a request; h11 knows the status that fits."""
        error = sys.exc_info()[1]
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        self.send_error(status, f"not HTTP as it should be: {error or msg}")

    def send_error(self, status: int, message: str) -> None:
        """Answer with an error, if no answer has begun, and close the connection."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE) or self.transport.is_closing():
            self.transport.close()
            return
        response = error_response(status, message, headers={"Connection": "close"})
        for event in (
            h11.Response(status_code=status, headers=response.raw_headers, reason=STATUS_PHRASES[status]),
            h11.Data(data=bytes(response.body)),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.refused = True
        self.transport.close()

    def shutdown(self) -> None:
        """uvicorn calls this at the beginning of a shutdown."""
        if self.waits:
            self.refuse(503, "the server is shutting down")
        else:
            self.cycle.keep_alive = False


class Acceptor:
    """Takes new connections while there is room. It stands in for the `asyncio.Server` of `uvicorn.Server.servers`.

    Where no connection is left, that which has been without a request for longest is closed for the next client; where all
    have one, new clients wait in the queue of the operating system.

    Args:
        listening: the socket that listens.
        connections: all connections, which each adds itself to.
        protocol: makes the protocol of a new connection.
        most: connections at once.
        longest: seconds that the server waits for a client.
    """

    def __init__(
        self,
        listening: socket.socket,
        connections: set[Connection],
        protocol: Callable[[], Connection],
        tls: ssl.SSLContext | None,
        most: int,
        longest: float,
    ) -> None:
        self._listening, self._connections, self._protocol, self._tls = listening, connections, protocol, tls
        self._most, self._longest = most_connections(most), longest
        self._greeting: set[asyncio.Task[None]] = set()  # connections that are not in `connections` yet
        self._said: dict[str, float] = {}  # when the log was last told of a trouble
        listening.setblocking(False)
        self._tasks = [asyncio.create_task(self._accept()), asyncio.create_task(self._watch())]

    def close(self) -> None:
        """Take no more connections. Those that there are go on."""
        self._tasks[0].cancel()

    async def wait_closed(self) -> None:
        """Give up watching, after all connections have been closed."""
        self._tasks[1].cancel()

    def abort(self) -> None:
        """End all connections at once, and take no more."""
        self.close()
        for connection in list(self._connections):
            connection.transport.abort()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, _ = await loop.sock_accept(self._listening)
            except ConnectionError:
                continue  # the client has gone already
            except OSError as error:
                await self._make_room(f"cannot take a connection ({error.strerror or error}); new clients wait")
                continue
            while len(self._connections) + len(self._greeting) >= self._most:
                await self._make_room(f"all {self._most} connections are taken; new clients wait")
            greeting = asyncio.create_task(self._greet(accepted))
            self._greeting.add(greeting)
            greeting.add_done_callback(self._greeting.discard)
            await asyncio.sleep(0)

    async def _greet(self, accepted: socket.socket) -> None:
        handshake = {"ssl": self._tls, "ssl_handshake_timeout": self._longest} if self._tls else {}
        try:
            # asyncio does so by itself for sockets whose protocol number says TCP, which that of create_server is not.
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await asyncio.get_running_loop().connect_accepted_socket(self._protocol, accepted, **handshake)  # type: ignore[arg-type]
        except (TimeoutError, OSError) as error:  # ssl.SSLError is an OSError
            log.debug("a connection failed before its first request: %s", error)
            accepted.close()

    async def _make_room(self, trouble: str) -> None:
        """Close the connection that has waited longest, and say what the trouble is, but not all the time."""
        now = time.monotonic()
        if now - self._said.get(trouble, -_SILENCE) >= _SILENCE:
            self._said[trouble] = now
            log.warning("%s", trouble)
        waiting = [one for one in self._connections if one.waits and not one.transport.is_closing()]
        if waiting:
            min(waiting, key=lambda one: one.since).refuse(503, "the server has no connection left; try again later")
        await asyncio.sleep(_PAUSE)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(min(1.0, self._longest))
            for connection in list(self._connections):
                connection.check(self._longest)


def most_connections(wanted: int) -> int:
    """How many connections there may be: as many as wanted, or as the file descriptors of this process allow."""
    try:
        import resource
    except ImportError:  # Windows
        return wanted
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return wanted
    return max(1, min(wanted, limit - psutil.Process().num_fds() - _SPARE_FILES))
