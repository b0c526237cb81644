"""Confined processes as their starter sees them."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

from yoco_u.confined import ANSWERED, FIRST
from yoco_u.errors import UserError

_LONGEST_ANSWER = 2**26
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
        with theirs:
            try:
                self._hand_over(theirs, first or self.seconds)
            except OSError:  # the process to fork has been ended from outside
                self._end()
                self._hand_over(theirs, first or self.seconds)
        return Confined(Connection(ours.detach()), self.seconds, self.memory)

    def leave(self) -> None:
        """In a process that was forked: the nursery starts anew when it is needed, and the parent's stays as it is."""
        if isinstance(self._end, weakref.finalize):
            self._end.detach()
        if self._control is not None:
            self._control.close()
        self._lock, self._control, self._end = threading.Lock(), None, lambda: None

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
        limits = json.dumps({"seconds": self.seconds, "bytes": self.memory})
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-I", "-c", _RUN, str(theirs.fileno()), self._service, limits, json.dumps(sys.path)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # where Rust reports its panics and stack overflows
                start_new_session=True,
            )
        self._end = weakref.finalize(self, _end, ours, process)
        setup = json.dumps(self._setup).encode()
        with contextlib.suppress(OSError):  # it has ended already, which `_hand_over` will find
            ours.sendall(len(setup).to_bytes(8, "big") + setup)
        return ours


class Confined:
    """One confined process. Messages are answered in their order.

    Args:
        connection: to the process.
        seconds, memory: its limits, for the text of errors.
    """

    def __init__(self, connection: Connection, seconds: float, memory: int) -> None:
        self.connection = connection
        self._limits = f"more than {seconds:g} s of computing or {memory >> 20} MiB, or crashes"
        _STARTED.add(self)

    @property
    def closed(self) -> bool:
        """Whether the process is of no use here any more: after `close`, or in a process that was forked."""
        return self.connection.closed

    def ask(self, message: bytes) -> None:
        """Send a message. If the process has ended, `answer` will say so."""
        with contextlib.suppress(OSError):
            self.connection.send_bytes(message)

    def answer(self) -> bytes:
        """Wait for the next answer.

        Raises:
            Refused: if the service refuses the message.
            Ended: if the process has ended or does not answer; it is of no use any more.
        """
        try:
            if not self.connection.poll(_PATIENCE):
                raise Ended(f"it did not end within {_PATIENCE:g} s")
            answer = self.connection.recv_bytes(_LONGEST_ANSWER)
        except (EOFError, OSError):
            raise Ended(f"it takes {self._limits}") from None
        if answer[:1] != ANSWERED:
            raise Refused(answer[1:].decode(errors="replace"))
        return answer[1:]

    def close(self) -> None:
        """Let the process end. One that computes ends when it has used up its seconds, at the latest."""
        self.connection.close()

    leave = close


def _leave_to_parent() -> None:
    """In a process that was forked: answers to it and to its parent would get mixed up on the connections that both have."""
    for one in list(_STARTED):
        one.leave()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)


def _end(control: socket.socket, process: "subprocess.Popen[bytes]") -> None:
    control.close()
    process.kill()  # its children have their own connections and limits
    process.wait()
