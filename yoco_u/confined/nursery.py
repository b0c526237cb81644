"""Confined processes as their starter sees them."""

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Collection, Mapping
from typing import Any, BinaryIO

from yoco_u.confined import ANSWERED, FIRST, LENGTH
from yoco_u.errors import UserError

_LONGEST_ANSWER, _PART = 2**26, 2**18  # bytes: of an answer, and of what is taken of it at once
_PATIENCE = 60.0  # seconds: no answer for so long means that the process does not even get to use up its limit
_STARTED: "weakref.WeakSet[Nursery | Confined]" = weakref.WeakSet()  # by this process
_RUN = "import json, sys; sys.path[:] = json.loads(sys.argv.pop()); from yoco_u.confined.process import main; main()"


class Refused(Exception):  # noqa: N818
    """The service has refused a message; the text says why, in one line."""


class Ended(Exception):  # noqa: N818
    """The process has ended before it answered: it needed more than its limits, or crashed."""


class Nursery:
    """Starts confined processes for one service, each within milliseconds: by forking one that has the service set up.

    Nothing is started before `new` or `start`. Several threads may use one nursery.

    Args:
        service: name of the module whose `Service` answers the messages.
        setup: keyword arguments of `Service`; they must fit into JSON.
        seconds: CPU time that one answer may take.
        memory: bytes that a process may take beyond those that it is forked with.
    """

    def __init__(self, service: str, setup: Mapping[str, Any], *, seconds: float, memory: int) -> None:
        self.seconds, self.memory = seconds, memory
        self._service, self._setup = service, setup
        self._lock = threading.Lock()
        self._control: socket.socket | None = None
        self._end: Callable[[], object] = lambda: None
        self._wake: Callable[[], object] = lambda: None
        _STARTED.add(self)

    def start(self) -> None:
        """Begin to set the service up, so that the first process need not wait for it.

        Raises:
            UserError: if the system cannot fork processes.
        """
        if not hasattr(os, "fork"):
            raise UserError("grammars and chat templates run in forked processes, which this system lacks; use Linux or macOS")
        with self._lock:
            if self._control is None:
                self._control = self._started()

    def new(self, first: float | None = None) -> "Confined":
        """A fresh process.

        Args:
            first: seconds of CPU time that its first answer may take, in place of the nursery's.

        Raises:
            UserError: if the system cannot fork processes.
        """
        ours, theirs = socket.socketpair()
        confined = Confined(ours, self)
        with theirs:
            try:
                self._hand_over(theirs, first or self.seconds)
            except OSError:  # the process to fork has been ended or stopped from outside
                self._end()
                self._hand_over(theirs, first or self.seconds)
        return confined

    def wake(self) -> None:
        """Let processes go on that were stopped from outside."""
        self._wake()

    def leave(self) -> None:
        """In a process that was forked: the nursery starts anew when it is needed, and the parent's stays as it is."""
        if isinstance(self._end, weakref.finalize):
            self._end.detach()
        if self._control is not None:
            self._control.close()
        self._lock, self._control = threading.Lock(), None
        self._end = self._wake = lambda: None

    def _hand_over(self, connection: socket.socket, first: float) -> None:
        self.start()
        with self._lock:
            assert self._control is not None
            try:
                socket.send_fds(self._control, [FIRST.pack(first)], [connection.fileno()])
            except OSError:
                self._control = None
                raise

    def _started(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        limits, path = json.dumps({"seconds": self.seconds, "bytes": self.memory}), json.dumps(sys.path)
        try:
            with theirs, _file(json.dumps(self._setup).encode()) as setup:
                passed = theirs.fileno(), setup.fileno()
                process = subprocess.Popen(
                    [sys.executable, "-I", "-c", _RUN, *map(str, passed), self._service, limits, path],
                    pass_fds=passed,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,  # where Rust reports its panics and stack overflows
                    start_new_session=True,
                )
        except OSError:
            ours.close()
            raise
        self._end = weakref.finalize(self, _end, ours, process)
        self._wake = lambda: _wake(process)
        return ours


class Confined:
    """One confined process. Messages are answered in their order. Only `answer` waits, whatever the process does.

    Args:
        connection: to the process.
        nursery: where the process comes from.
    """

    def __init__(self, connection: socket.socket, nursery: Nursery) -> None:
        connection.setblocking(False)
        weakref.finalize(self, connection.close)  # whoever drops it without `close` lets the process end, too
        self._connection, self._nursery = connection, weakref.ref(nursery)
        self._limits = f"more than {nursery.seconds:g} s of computing or {nursery.memory >> 20} MiB, or crashes"
        self._unsent, self._received = bytearray(), bytearray()
        self._unanswered = 0
        self._since = 0.0  # time of the last answer, or of the first question behind it
        _STARTED.add(self)

    @property
    def closed(self) -> bool:
        """Whether the process is of no use here any more: after `close`, or in a process that was forked."""
        return self.fileno() < 0

    @property
    def events(self) -> int:
        """What is to be waited for: that it answers, and that it takes more of the messages."""
        return selectors.EVENT_READ | (selectors.EVENT_WRITE if self._unsent else 0)

    def fileno(self) -> int:
        return self._connection.fileno()

    def ask(self, message: bytes) -> None:
        """Send a message, as much of it as the process takes now. If the process has ended, `take` will say so."""
        if not self._unanswered:
            self._since = time.monotonic()
        self._unanswered += 1
        self._unsent += LENGTH.pack(len(message)) + message
        self._send()

    def take(self) -> bytes | None:
        """The next answer, None while it is not there. What is left of the messages is sent on.

        Raises:
            Refused: if the service refuses the message.
            Ended: if the process has ended or does not answer; it is of no use any more.
        """
        self._send()
        try:
            answer = self._receive()
        except (EOFError, OSError):
            raise Ended(f"it takes {self._limits}") from None
        if answer is None:
            if self._unanswered and time.monotonic() - self._since > _PATIENCE:
                if (nursery := self._nursery()) is not None:
                    nursery.wake()
                raise Ended(f"it did not end within {_PATIENCE:g} s")
            return None
        self._unanswered -= 1
        self._since = time.monotonic()
        if answer[:1] != ANSWERED:
            raise Refused(answer[1:].decode(errors="replace"))
        return answer[1:]

    def answer(self) -> bytes:
        """Wait for the next answer.

        Raises:
            Refused, Ended: as of `take`.
        """
        while (answer := self.take()) is None:
            wait([self], _PATIENCE)
        return answer

    def close(self) -> None:
        """Let the process end. One that computes ends when it has used up its seconds, at the latest."""
        self._connection.close()

    def _send(self) -> None:
        try:
            while self._unsent:
                del self._unsent[: self._connection.send(self._unsent)]
        except BlockingIOError:
            return
        except OSError:
            self._unsent.clear()

    def _receive(self) -> bytes | None:
        """The next answer, if all of it is there; what stands behind it stays on the connection."""
        while missing := self._missing():
            try:
                part = self._connection.recv(min(missing, _PART))
            except BlockingIOError:
                return None
            if not part:
                raise EOFError
            self._received += part
        answer = bytes(self._received[LENGTH.size :])
        self._received.clear()
        return answer

    def _missing(self) -> int:
        """Bytes of the next answer's length that are still to come; behind it, of the answer."""
        if len(self._received) < LENGTH.size:
            return LENGTH.size - len(self._received)
        length = LENGTH.unpack_from(self._received)[0]
        if length > _LONGEST_ANSWER:
            raise EOFError
        return int(LENGTH.size + length - len(self._received))

    leave = close


def wait(processes: Collection[Confined], seconds: float) -> None:
    """Wait until `take` of one of the processes may get further, or for so many seconds."""
    with selectors.PollSelector() as selector:
        for process in processes:
            selector.register(process, process.events)
        selector.select(seconds)


def _leave_to_parent() -> None:
    """In a process that was forked: answers to it and to its parent would get mixed up on the connections that both have."""
    for one in list(_STARTED):
        one.leave()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)


def _file(content: bytes) -> BinaryIO:
    """A file without a name. Unlike a connection, it takes everything at once, before its reader has begun."""
    file = open(os.memfd_create("setup"), "w+b") if hasattr(os, "memfd_create") else tempfile.TemporaryFile()  # noqa: SIM115
    file.write(content)
    file.seek(0)
    return file


def _wake(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGCONT)  # its children, too


def _end(control: socket.socket, process: "subprocess.Popen[bytes]") -> None:
    control.close()
    _wake(process)
    process.kill()  # its children have their own connections and limits
    process.wait()
