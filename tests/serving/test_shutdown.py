"""How the server ends, whatever it is doing: real signals and sockets, around an engine in this process."""

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest
from asgi_server import engine_of
from models import architecture, build
from transformers import PreTrainedTokenizerFast

from yoco_u import YocoUForCausalLM
from yoco_u.inference import Engine
from yoco_u.serving import server
from yoco_u.serving.settings import Listen, ServerSettings

LONG = {"prompt": "x", "max_tokens": 450, "ignore_eos": True}
HALF = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
PATIENCE = 60


@pytest.fixture
def engine(model: YocoUForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Engine:
    return engine_of(model, tokenizer)


@pytest.fixture
def deadlines(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The deadlines that were set, which do not end this process."""
    found: list[float] = []
    monkeypatch.setattr(server.faulthandler, "dump_traceback_later", lambda seconds, exit: found.append(seconds))
    return found


def serve(engine: Engine, monkeypatch: pytest.MonkeyPatch, client: Callable[[int], None], **settings: Any) -> int:
    """Serve in this thread, which gets the signals, until a client in another is done, who is given the port."""
    listen, failed = server._socket, []

    def listening(given: Listen) -> socket.socket:
        found = listen(given)
        threading.Thread(target=run, args=[found.getsockname()[1]]).start()
        return found

    def run(port: int) -> None:
        try:
            while httpx2.get(f"http://127.0.0.1:{port}/health", timeout=PATIENCE).status_code != 200:
                time.sleep(0.01)
            client(port)
        except BaseException as error:
            failed.append(error)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(server, "_socket", listening)
    status = server.serve(engine, ServerSettings(model_name="tiny", **settings), Listen(port=0))
    for error in failed:
        raise error
    return status


@contextmanager
def half_sent(port: int) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
        connection.sendall(HALF)
        yield connection


def all_of(connection: socket.socket) -> bytes:
    found = b""
    while part := connection.recv(2**16):
        found += part
    return found


def checked_503(status: int, body: str) -> None:
    assert status == 503
    error = json.loads(body)["error"]
    assert error["type"] == "service_unavailable_error" and set(error) == {"message", "type", "param", "code"}


class Asking:
    """A request that waits for its answer, in a thread."""

    def __init__(self, port: int, **body: Any) -> None:
        self.response: httpx2.Response | None = None
        self._url = f"http://127.0.0.1:{port}/v1/completions"
        self._thread = threading.Thread(target=self._run, args=[body])
        self._thread.start()

    def _run(self, body: dict[str, Any]) -> None:
        with suppress(httpx2.TransportError):
            self.response = httpx2.post(self._url, json=body, timeout=PATIENCE)

    def join(self) -> None:
        self._thread.join(PATIENCE)

    def answer(self) -> httpx2.Response:
        self.join()
        assert self.response is not None
        return self.response


def held(engine: Engine, monkeypatch: pytest.MonkeyPatch, outputs: int = 1) -> tuple[threading.Event, threading.Event]:
    """Hold the engine in its first step with so many outputs.

    Returns:
        Set when it is in this step; to be set when it may go on.
    """
    step, begun, go_on = engine.step, threading.Event(), threading.Event()

    def waits() -> Any:
        if engine.unfinished < outputs and not begun.is_set():
            time.sleep(0.001)
            return []
        begun.set()
        go_on.wait(PATIENCE)
        return step()

    monkeypatch.setattr(engine, "step", waits)
    return begun, go_on


@pytest.fixture
def half_came(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when the server has what `half_sent` sends."""
    came = threading.Event()

    class Noticing(server.Connection):
        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if data.endswith(HALF[-5:]):
                came.set()

    monkeypatch.setattr(server, "Connection", Noticing)
    return came


@pytest.mark.parametrize(("first", "second"), [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGINT)])
def test_a_second_signal_ends_what_runs_with_an_answer(
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    deadlines: list[float],
    half_came: threading.Event,
    first: int,
    second: int,
) -> None:
    begun, go_on = held(engine, monkeypatch, outputs=2)

    def client(port: int) -> None:
        asking, streaming = Asking(port, **LONG), Asking(port, stream=True, **LONG)
        assert begun.wait(PATIENCE)
        with half_sent(port) as half:
            assert half_came.wait(PATIENCE)
            os.kill(os.getpid(), first)
            head, body = all_of(half).split(b"\r\n\r\n", 1)
            checked_503(int(head.split()[1]), body.decode())
        os.kill(os.getpid(), second)
        checked_503(asking.answer().status_code, asking.answer().text)
        events = streaming.answer().text.strip().split("\n\n")
        checked_503(503, events[-1].removeprefix("data: "))
        go_on.set()

    assert serve(engine, monkeypatch, client, drain_seconds=1000.0) == 0
    assert len(deadlines) == 2 and deadlines[0] > 1000 and deadlines[1] < 20


def test_new_clients_are_told_while_requests_are_finished(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, deadlines: list[float]
) -> None:
    """For as long as a request runs, whatever else is open; after it, connections without a request hold up nothing."""
    begun, go_on = held(engine, monkeypatch)

    def client(port: int) -> None:
        url, place = f"http://127.0.0.1:{port}", ("127.0.0.1", port)
        asking = Asking(port, **LONG | {"max_tokens": 9})
        with socket.create_connection(place) as idle, httpx2.Client(timeout=PATIENCE) as kept:
            assert kept.get(f"{url}/v1/models").status_code == 200
            assert begun.wait(PATIENCE)
            os.kill(os.getpid(), signal.SIGTERM)
            while httpx2.get(f"{url}/health", timeout=PATIENCE).status_code == 200:
                time.sleep(0.01)
            assert all_of(idle) == b""
            with socket.create_connection(place), half_sent(port), httpx2.Client(timeout=PATIENCE) as late:
                assert late.get(f"{url}/v1/models").status_code == 200
                for body in (LONG, {"prompt": "x", "stream": True}):
                    answer = late.post(f"{url}/v1/completions", json=body)
                    checked_503(answer.status_code, answer.text)
                    assert int(answer.headers["retry-after"]) > 0 and answer.headers["connection"] == "close"
                health = kept.get(f"{url}/health")
                checked_503(health.status_code, health.text)
                assert asking.response is None
                go_on.set()
                assert asking.answer().json()["usage"]["completion_tokens"] == 9
                with pytest.raises(httpx2.TransportError):
                    while True:
                        httpx2.get(f"{url}/health", timeout=PATIENCE)

    assert serve(engine, monkeypatch, client, drain_seconds=1000.0) == 0


def test_a_stuck_engine_ends_the_server(engine: Engine, monkeypatch: pytest.MonkeyPatch, deadlines: list[float]) -> None:
    """Without any signal: clients are told why, and the status says that it went wrong."""
    free = threading.Event()

    def stuck() -> list[Any]:
        free.wait()
        return []

    monkeypatch.setattr(engine, "step", stuck)

    def client(port: int) -> None:
        answer = Asking(port, **LONG).answer()
        checked_503(answer.status_code, answer.text)
        assert "one step has taken longer than 0.3 seconds" in answer.text

    assert serve(engine, monkeypatch, client, step_seconds=0.3) == 1
    assert len(deadlines) == 1 and deadlines[0] < 20
    free.set()


def test_nothing_of_a_server_outlives_it(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, deadlines: list[float]
) -> None:
    """Whoever serves from Python gets the memory back, and the process goes on."""
    model = build(architecture("yoco_u", vocab_size=len(tokenizer)))
    engine = engine_of(model, tokenizer)
    gone = [weakref.ref(one) for one in (model, engine, engine.cache, engine.scheduler)]
    handlers, threads = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)], set(threading.enumerate())
    cancelled: list[bool] = []
    monkeypatch.setattr(server.faulthandler, "cancel_dump_traceback_later", lambda: cancelled.append(True))

    def client(port: int) -> None:
        Asking(port, **LONG | {"max_tokens": 2, "n": 2}).answer()
        Asking(port, **LONG | {"max_tokens": 2, "regex": "a+", "ignore_eos": False}).answer()
        os.kill(os.getpid(), signal.SIGTERM)

    assert serve(engine, monkeypatch, client) == 0
    monkeypatch.undo()
    del model, engine
    gc.collect()
    assert [one() for one in gone] == [None] * 4
    frozen = gc.get_freeze_count()  # Python 3.12 counts its immortal objects
    gc.unfreeze()
    gc.collect()
    assert gc.get_freeze_count() == frozen and len(cancelled) == len(deadlines) == 1
    assert handlers == [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    for thread in set(threading.enumerate()) - threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()


STUCK = """
import os, sys, time
from pathlib import Path
from yoco_u.data import DocumentEncoder
from yoco_u.inference import LLM
from yoco_u.serving import server
from yoco_u.serving.settings import Listen, ServerSettings

def say(what):
    os.write(2, what + b"\\n")

def stuck(where):
    say(where)
    time.sleep(10**6)

class Noticing(server.Connection):
    def data_received(self, data):
        super().data_received(data)
        if data.endswith(b"\\r\\n\\r\\n{"):
            say(b"half a request")

server.Connection = Noticing

server._LAST_WORDS = server._CLEANING = 0.5
engine = LLM(Path(sys.argv[1]), dtype="float32", cache_tokens=8192).engine
encode = DocumentEncoder.encode
DocumentEncoder.encode = lambda self, texts: stuck(b"tokenizing") if len(texts[0]) > 10_000 else encode(self, texts)
engine.step = lambda: stuck(b"computing")
sys.exit(server.serve_process(engine, ServerSettings(model_name="tiny", drain_seconds=0.5), Listen(port=int(sys.argv[2]))))
"""


def test_sigterm_ends_a_process_that_is_stuck_everywhere(folder: Path) -> None:
    """The engine's thread and one that tokenizes never come back, and a request is sent by half."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK, str(folder), str(port)],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "YOCO_U_KERNELS": "off"},
    )  # fmt: skip
    try:
        assert process.stderr is not None
        while "Started server process" not in (line := process.stderr.readline()):
            assert line, "the server did not start"
        asking, tokenizing = Asking(port, **LONG), Asking(port, prompt="def " * 3000)
        with half_sent(port) as half:
            waits_for = {"computing\n", "tokenizing\n", "half a request\n"}
            while waits_for:
                line = process.stderr.readline()
                assert line, "the server ended"
                waits_for.discard(line)
            process.send_signal(signal.SIGTERM)
            assert b"503" in all_of(half).split(b"\r\n")[0]
        for one in (asking, tokenizing):
            checked_503(one.answer().status_code, one.answer().text)
        assert process.wait(PATIENCE) == 1
        assert "Timeout (0:00:01" in process.stderr.read()
    finally:
        process.kill()
        process.wait()
