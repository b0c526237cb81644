"""The process that confined processes are forked from, and what each of them does."""

import gc
import importlib
import itertools
import json
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import psutil

from yoco_u.confined import ANSWERED, FIRST, REFUSED
from yoco_u.errors import first_line

_NICENESS = 19  # what computes for one request leaves the cores to the model, which computes for all

Service = Callable[[bytes], bytes]
"""Answers a message. What it raises is the answer as well: its first line."""


def main() -> None:
    """Set the service up, then fork a process for every connection that comes, until the starter is gone."""
    fd, name, limits = int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the starter decides what Ctrl-C ends
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel forgets children that have ended
    with socket.socket(fileno=fd) as control:
        service = _set_up(name, _received(control))
        gc.freeze()  # a collection would copy memory that is shared with the children
        while (order := socket.recv_fds(control, FIRST.size, 1))[1]:
            _fork(service, control, order[1][0], FIRST.unpack(order[0])[0], limits["seconds"], limits["bytes"])


def _received(control: socket.socket) -> dict[str, Any]:
    """The service's setup, JSON behind its length."""
    length = int.from_bytes(control.recv(8, socket.MSG_WAITALL), "big")
    return json.loads(control.recv(length, socket.MSG_WAITALL) or "{}")


def _set_up(name: str, setup: dict[str, Any]) -> Service:
    """The service of a module; if it cannot be set up, one that says so whatever it is asked."""
    try:
        return importlib.import_module(name).Service(**setup)
    except Exception as error:
        reason = first_line(error)

        def refuse(_: bytes) -> bytes:
            raise RuntimeError(reason)

        return refuse


def _fork(service: Service, control: socket.socket, fd: int, first: float, seconds: float, memory: int) -> None:
    try:
        child = os.fork() == 0
    except OSError:  # too many processes: the starter finds its connection closed
        child = False
    if not child:
        os.close(fd)
        return
    try:
        control.close()
        os.nice(_NICENESS)
        _confine(memory)
        _serve(service, Connection(fd), first, seconds)
    finally:
        os._exit(0)


def _confine(memory: int) -> None:
    """Let this process take `memory` more bytes, and write neither files nor core dumps."""
    most = psutil.Process().memory_info().vms + memory
    for kind, limit in ((resource.RLIMIT_AS, most), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(kind, (limit, limit))


def _serve(service: Service, connection: Connection, first: float, seconds: float) -> None:
    """Answer messages one after another until the starter closes the connection."""
    for limit in itertools.chain([first], itertools.repeat(seconds)):
        try:
            message = connection.recv_bytes()
        except EOFError:
            return
        # Seconds of CPU, so that a busy machine ends nobody. The signal ends the process, whatever it is doing.
        signal.setitimer(signal.ITIMER_PROF, limit)
        try:
            answer = ANSWERED + service(message)
        except BaseException as error:  # panics of Rust are no `Exception`
            answer = REFUSED + first_line(error).encode(errors="replace")
        signal.setitimer(signal.ITIMER_PROF, 0)
        connection.send_bytes(answer)
