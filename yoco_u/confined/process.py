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
from typing import Any, BinaryIO

import psutil

from yoco_u.confined import ANSWERED, FIRST, LENGTH, REFUSED
from yoco_u.errors import first_line

_NICENESS = 19  # what computes for one request leaves the cores to the model, which computes for all

Service = Callable[[bytes], bytes]
"""Answers a message. What it raises is the answer as well: its first line."""


def main() -> None:
    """Set the service up, then fork a process for every connection that comes, until the starter is gone."""
    fd, setup, name, limits = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the starter decides what Ctrl-C ends
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel forgets children that have ended
    with open(setup, "rb") as file:
        service = _set_up(name, json.load(file))
    with socket.socket(fileno=fd) as control:
        gc.freeze()  # a collection would copy memory that is shared with the children
        while (order := socket.recv_fds(control, FIRST.size, 1))[1]:
            _fork(service, control, order[1][0], FIRST.unpack(order[0])[0], limits["seconds"], limits["bytes"])


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
        _serve(service, socket.socket(fileno=fd), first, seconds)
    finally:
        os._exit(0)


def _confine(memory: int) -> None:
    """Let this process take `memory` more bytes, and write neither files nor core dumps."""
    most = psutil.Process().memory_info().vms + memory
    for kind, limit in ((resource.RLIMIT_AS, most), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(kind, (limit, limit))


def _serve(service: Service, connection: socket.socket, first: float, seconds: float) -> None:
    """Answer messages one after another until the starter closes the connection."""
    messages, answers = connection.makefile("rb"), connection.makefile("wb")
    for limit in itertools.chain([first], itertools.repeat(seconds)):
        message = _received(messages)
        if message is None:
            return
        # Seconds of CPU, so that a busy machine ends nobody. The signal ends the process, whatever it is doing.
        signal.setitimer(signal.ITIMER_PROF, limit)
        try:
            status, answer = ANSWERED, service(message)
        except BaseException as error:  # panics of Rust are no `Exception`
            status, answer = REFUSED, first_line(error).encode(errors="replace")
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(LENGTH.pack(len(status) + len(answer)) + status)
        answers.write(answer)
        answers.flush()


def _received(messages: BinaryIO) -> bytes | None:
    """The next message, None if no whole one comes any more."""
    length = messages.read(LENGTH.size)
    if len(length) < LENGTH.size:
        return None
    [count] = LENGTH.unpack(length)
    message = messages.read(count)
    return message if len(message) == count else None
