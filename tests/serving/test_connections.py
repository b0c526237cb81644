"""Clients that send half a request, do not read, or are too many: over real sockets, before an application of three paths."""

import asyncio
import errno
import json
import logging
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from yoco_u.serving import connections
from yoco_u.serving.answers import _JobResponse, _parts
from yoco_u.serving.connections import Acceptor, Connection, most_connections

pytestmark = pytest.mark.anyio

LARGE = 64 * 2**20
PATIENCE = 60.0
Client = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Servant:
    """An acceptor on a free port, before an application that answers at once, with very much, or when it is told to."""

    def __init__(self, most: int, longest: float, tls: ssl.SSLContext | None) -> None:
        self.release, self.gone = asyncio.Event(), 0
        self._config = uvicorn.Config(self._app, http=Connection, lifespan="off", interface="asgi3", log_config=None)
        self._config.load()
        self.state = ServerState()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.connections: set[Any] = self.state.connections
        self.acceptor = Acceptor(self._socket, self.connections, self._protocol, tls, most, longest)

    def _protocol(self) -> Connection:
        return Connection(self._config, self.state, {})

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        message: Any = {"type": ""}
        while scope["path"] != "/early" and (message := await receive()).get("more_body"):
            pass
        if message["type"] == "http.disconnect":
            self.gone += 1
            return
        if scope["path"] == "/later":
            await self.release.wait()
        body = BODIES[scope["path"]]
        if scope["path"] == "/answer":
            job: Any = SimpleNamespace(close=lambda: None)
            response = _JobResponse(job, _parts(body), media_type="x/y", headers={"Content-Length": str(len(body))})
            await response(scope, receive, send)
            return
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def connect(self) -> Client:
        return await asyncio.wait_for(asyncio.open_connection("127.0.0.1", self.port), PATIENCE)

    async def close(self) -> None:
        self.acceptor.close()
        self.acceptor.abort()
        await self.until(lambda: not self.connections)
        await self.acceptor.wait_closed()
        self._socket.close()

    async def until(self, condition: Any) -> None:
        async def wait() -> None:
            while not condition():
                await asyncio.sleep(0.005)

        await asyncio.wait_for(wait(), PATIENCE)


BODIES = {"/": b"here", "/later": b"here", "/early": b"here", "/large": bytes(LARGE), "/answer": bytes(2**22)}
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


@asynccontextmanager
async def serving(most: int = 100, longest: float = 60.0, tls: ssl.SSLContext | None = None) -> AsyncIterator[Servant]:
    servant = Servant(most, longest, tls)
    yield servant
    await servant.close()


async def rest(client: Client) -> bytes:
    """Everything until the server closes the connection."""
    try:
        return await asyncio.wait_for(client[0].read(), PATIENCE)
    except ConnectionError:
        return b""


async def answer(client: Client) -> bytes:
    return await asyncio.wait_for(client[0].readuntil(b"here"), PATIENCE)


def error_of(answered: bytes) -> tuple[int, str]:
    """Status and message of an error, which has OpenAI's shape."""
    head, body = answered.split(b"\r\n\r\n", 1)
    assert b"content-type: application/json" in head.lower() and b"connection: close" in head.lower()
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return int(head.split()[1]), error["message"]


HALVES = {
    "a letter": b"G",
    "half a line": b"POST /v1/compl",
    "half of the headers": b"GET / HTTP/1.1\r\nHost: x\r\nX-",
    "headers without an end": b"GET / HTTP/1.1\r\nHost: x\r\n",
    "no body": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n",
    "half a body": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{",
    "half a chunk": b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n9\r\n{",
    "chunks without an end": b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n",
}


@pytest.mark.parametrize("after_an_answer", [False, True])
async def test_half_a_request_is_given_up(after_an_answer: bool) -> None:
    async with serving(longest=2.0) as servant:
        clients = [await servant.connect() for _ in HALVES]
        for client, half in zip(clients, HALVES.values(), strict=True):
            if after_an_answer:
                client[1].write(GET)
                await answer(client)
            client[1].write(half)
        for client in clients:
            assert error_of(await rest(client)) == (408, "the request did not come within 2 seconds")
        await servant.until(lambda: not servant.connections)


async def test_a_byte_now_and_then_does_not_help() -> None:
    async with serving(longest=0.2) as servant:
        client = await servant.connect()

        async def drip() -> None:
            for byte in GET[:-1] + b"X-Header: " + b"x" * 10**6:
                client[1].write(bytes([byte]))
                await asyncio.sleep(0.05)

        dripping = asyncio.create_task(drip())
        assert error_of(await rest(client))[0] == 408
        dripping.cancel()


async def test_a_client_that_says_nothing_is_told_nothing() -> None:
    async with serving(longest=0.1) as servant:
        assert await rest(await servant.connect()) == b""


async def test_a_client_that_does_not_read_is_given_up() -> None:
    async with serving(longest=0.2) as servant:
        client = await servant.connect()
        client[1].transport.pause_reading()  # type: ignore[attr-defined]
        client[1].write(GET.replace(b"/ ", b"/large "))
        await servant.until(lambda: servant.connections)
        await servant.until(lambda: not servant.connections)
        client[1].transport.abort()


async def test_a_client_that_reads_slowly_gets_the_whole_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """In ten times as long as it may take for each part."""
    now = 0.0
    monkeypatch.setattr(connections, "time", SimpleNamespace(monotonic=lambda: now))
    async with serving() as servant:
        slow = socket.socket()
        for one, option in ((slow, socket.SO_RCVBUF), (servant._socket, socket.SO_SNDBUF)):
            one.setsockopt(socket.SOL_SOCKET, option, 2**14)
        await asyncio.get_running_loop().sock_connect(slow, ("127.0.0.1", servant.port))
        reader, writer = await asyncio.open_connection(sock=slow)
        writer.write(GET.replace(b"/ ", b"/answer "))
        await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE)
        [connection] = servant.connections
        for _ in range(16):
            assert not any(await asyncio.wait_for(reader.readexactly(2**18), PATIENCE))
            now += 0.6
            connection.check(1.0)
        writer.close()


async def test_a_handshake_that_does_not_come_is_given_up() -> None:
    async with serving(longest=0.2, tls=ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)) as servant:
        assert await rest(await servant.connect()) == b""


async def test_whoever_gets_an_answer_may_take_his_time() -> None:
    """Neither the time of the answer counts, nor that of the requests before."""
    async with serving(longest=0.3) as servant:
        client = await servant.connect()
        client[1].write(GET.replace(b"/ ", b"/later "))
        await asyncio.sleep(1.0)
        servant.release.set()
        await answer(client)


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/x\r\nHost: x\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: nine\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n", 400),
        (b"GET /" + b"x" * 200_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 200_000 + b"\r\n\r\n", 431),
    ],
)  # fmt: skip
async def test_what_is_no_http_is_answered(sent: bytes, status: int) -> None:
    async with serving() as servant:
        client = await servant.connect()
        client[1].write(sent)
        assert error_of(await rest(client))[0] == status


@pytest.mark.parametrize("size", [1, 100_000, LARGE])
async def test_an_answer_before_the_end_of_the_request_is_not_lost(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "_LINGER", 60.0)
    async with serving() as servant:
        _, writer = client = await servant.connect()
        writer.write(f"POST /early HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {size}\r\n\r\n".encode())
        for start in range(0, size, 65536):
            writer.write(bytes(min(65536, size - start)))
            await writer.drain()
        head, body = (await rest(client)).split(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200") and body == b"here"
        writer.close()
        await servant.until(lambda: not servant.connections)


@pytest.mark.parametrize("behind", [b"G", GET, GET * 3 + b"GET /", bytes(60_000), bytes(2**23)])
async def test_who_leaves_is_noticed_whatever_came_behind_the_request(behind: bytes) -> None:
    async with serving() as servant:
        client = await servant.connect()
        client[1].write(GET.replace(b"/ ", b"/later "))
        await servant.until(lambda: servant.state.tasks)
        [connection] = servant.connections
        for part in (behind[:1], behind[1:]):
            client[1].write(part)
        await servant.until(lambda: connection.refused or len(connection.conn.trailing_data[0]) == len(behind))
        client[1].close()
        await servant.until(lambda: not servant.connections)
        servant.release.set()


@pytest.mark.parametrize(("behind", "answers"), [(100, 101), (20_000, 1)])
async def test_what_comes_behind_a_request_is_answered_in_order_and_not_kept_without_end(behind: int, answers: int) -> None:
    """More than is kept ends the connection with the answer."""
    async with serving() as servant:
        reader, writer = await servant.connect()
        writer.write(GET.replace(b"/ ", b"/later "))
        await servant.until(lambda: servant.state.tasks)
        [connection] = servant.connections
        kept = [GET] * (behind - 1) + [GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")]
        writer.write(b"".join(kept))
        await servant.until(lambda: connection.refused or connection.conn.trailing_data[0] == b"".join(kept))
        assert len(connection.conn.trailing_data[0]) < 2**20
        servant.release.set()
        assert (await rest((reader, writer))).count(b"\r\n\r\nhere") == answers


async def test_idle_connections_make_room() -> None:
    async with serving(most=3) as servant:
        idle = [await servant.connect() for _ in range(3)]
        for client in idle:
            client[1].write(GET)
            await answer(client)
        for _ in range(4):
            client = await servant.connect()
            client[1].write(GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
            await answer(client)
        assert await rest(idle[0]) == b""
        idle[2][1].write(GET)
        await answer(idle[2])


async def test_busy_connections_do_not_make_room(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(most=2) as servant:
        busy = [await servant.connect() for _ in range(2)]
        for client in busy:
            client[1].write(GET.replace(b"/ ", b"/later "))
        await servant.until(lambda: len(servant.state.tasks) == 2)
        waiting = [await servant.connect() for _ in range(3)]
        for client in waiting:
            client[1].write(GET)
        await servant.until(lambda: "all 2 connections are taken" in caplog.text)
        await asyncio.sleep(0.3)
        assert len(servant.connections) == 2
        servant.release.set()
        for client in (*busy, *waiting):
            await answer(client)
        assert caplog.text.count("connections are taken") == 1


async def test_running_out_of_files(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """One line in the log, an idle connection gives up its file, and new clients come as soon as they can."""
    tries = 0
    loop = asyncio.get_running_loop()
    accept = loop.sock_accept

    async def fails(listening: socket.socket) -> Any:
        nonlocal tries
        tries += 1
        if 2 <= tries <= 8:
            raise OSError(errno.EMFILE, "Too many open files")
        if tries == 9:
            raise ConnectionAbortedError
        return await accept(listening)

    monkeypatch.setattr(loop, "sock_accept", fails)
    async with serving() as servant:
        idle = await servant.connect()
        assert await rest(idle) == b""
        client = await servant.connect()
        client[1].write(GET)
        await answer(client)
    assert caplog.text.count("Too many open files") == 1 and tries >= 10
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_small_answers_are_sent_at_once() -> None:
    """Nagle's algorithm would hold them back for 40 ms, until the client acknowledges what came before."""
    async with serving() as servant:
        client = await servant.connect()
        client[1].write(GET)
        await answer(client)
        [connection] = servant.connections
        connected = connection.transport.get_extra_info("socket")
        assert connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_a_shutdown_answers_half_requests() -> None:
    async with serving() as servant:
        clients = [await servant.connect() for _ in HALVES]
        for client, half in zip(clients, HALVES.values(), strict=True):
            client[1].write(half)
        busy, idle = await servant.connect(), await servant.connect()
        busy[1].write(GET.replace(b"/ ", b"/later "))
        await servant.until(lambda: len(servant.state.tasks) == 5 and len(servant.connections) == len(HALVES) + 2)
        await asyncio.sleep(0.1)  # until all that was sent has come
        servant.acceptor.close()
        for connection in list(servant.connections):
            connection.shutdown()
        for client in clients:
            assert error_of(await rest(client)) == (503, "the server is shutting down")
        assert await rest(idle) == b""
        servant.release.set()
        await answer(busy)
        assert await rest(busy) == b""


def test_files_limit_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    for limit, most in ((resource.RLIM_INFINITY, 500), (10**6, 500), (300, None), (10, 1)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        found = most_connections(500)
        assert found == most if most is not None else 1 < found < 300
