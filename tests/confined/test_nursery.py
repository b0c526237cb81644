"""Whatever happens in a confined process, its starter only sees that it ended, and the next one is as good as the first."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from in_fork import check_in_fork

from yoco_u.confined.nursery import Confined, Ended, Nursery, Refused, wait

LIMITS = {"seconds": 0.2, "memory": 2**26}


@pytest.fixture(scope="module")
def nursery() -> Nursery:
    return Nursery("services", {"greeting": "hi"}, **LIMITS)


def say(process: Confined, message: str) -> str:
    process.ask(message.encode())
    return process.answer().decode()


def test_messages_are_answered_in_their_order_by_processes_that_share_nothing(nursery: Nursery) -> None:
    first, second = nursery.new(), nursery.new()
    for name in ("a", "b", "c"):
        first.ask(f"greet {name}".encode())
    assert say(second, "greet d") == "hi d"
    assert [first.answer() for _ in range(3)] == [b"hi a", b"hi b", b"hi c"]
    assert say(first, "all ") == "a b c " and say(second, "all ") == "d "
    long = "x" * 10**6
    assert say(first, f"greet {long}") == f"hi {long}"


@pytest.mark.parametrize(
    "message",
    [
        "compute x",
        "allocate 1000000000000000",
        *(f"crash {int(one)}" for one in (signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL)),
    ],
)
def test_what_ends_a_process_ends_no_other(nursery: Nursery, message: str) -> None:
    innocent, guilty = nursery.new(), nursery.new()
    guilty.ask(message.encode())
    with pytest.raises((Ended, Refused)) as caught:
        guilty.answer()
    assert (
        "MemoryError" in str(caught.value) or str(caught.value) == "it takes more than 0.2 s of computing or 64 MiB, or crashes"
    )
    guilty.close()
    assert say(innocent, "greet you") == say(nursery.new(), "greet you") == "hi you"


def test_memory_is_limited_to_what_was_said(nursery: Nursery) -> None:
    process = nursery.new()
    assert say(process, f"allocate {2**25}") == str(2**25)
    with pytest.raises(Refused, match="MemoryError"):
        say(process, f"allocate {2**26 + 2**20}")  # what Python itself gave back since the fork may be used
    assert say(process, "greet you") == "hi you"


def test_only_computing_counts_and_each_message_for_itself(nursery: Nursery) -> None:
    process = nursery.new()
    assert say(process, "sleep 0.5") == say(process, "sleep 0") == "rested"


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("fail fault", "first"),
        ("fail exit", "first"),
        ("fail interrupt", "first"),
        ("recurse x", "maximum recursion depth"),
        ("no x", "no attribute"),
    ],
)
def test_what_a_service_raises_is_a_refusal(nursery: Nursery, message: str, reason: str) -> None:
    process = nursery.new()
    with pytest.raises(Refused, match=reason) as caught:
        say(process, message)
    assert "\n" not in str(caught.value)
    assert say(process, "greet you") == "hi you"


def test_nothing_is_written(nursery: Nursery, tmp_path: Path) -> None:
    with pytest.raises((Refused, Ended)):
        say(nursery.new(), f"write {tmp_path / 'file'}")
    assert not (tmp_path / "file").exists() or (tmp_path / "file").stat().st_size == 0


@pytest.mark.parametrize(
    ("service", "setup", "reason"), [("services", {"greeting": ""}, "an empty greeting"), ("no_such", {}, "No module")]
)
def test_a_service_that_cannot_be_set_up_says_so_to_everyone(service: str, setup: dict[str, str], reason: str) -> None:
    nursery = Nursery(service, setup, **LIMITS)
    for _ in range(2):
        with pytest.raises(Refused, match=reason):
            say(nursery.new(), "greet you")


def test_the_process_that_is_forked_may_be_ended_from_outside(nursery: Nursery) -> None:
    running = nursery.new()
    os.kill(int(say(running, "parent x")), signal.SIGKILL)
    assert say(running, "greet you") == "hi you"
    for _ in range(20):  # one that was handed over just before is lost with it
        try:
            assert say(nursery.new(), "greet you") == "hi you"
            break
        except Ended:
            continue
    else:
        pytest.fail("the nursery did not recover")


def test_several_threads_use_one_nursery() -> None:
    nursery, found = Nursery("services", {}, **LIMITS), []
    threads = [threading.Thread(target=lambda n=n: found.append(say(nursery.new(), f"greet {n}"))) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [f"hello {n}" for n in range(8)]


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def wait_until_gone(*pids: int) -> None:
    for _ in range(600):
        if all(gone(pid) for pid in pids):
            return
        time.sleep(0.05)
    pytest.fail(f"still there: {[pid for pid in pids if not gone(pid)]}")


def test_no_process_outlives_its_starter() -> None:
    """Not even one that computes when the starter is killed: it comes to its limit."""
    code = (
        "import os, signal, sys; from yoco_u.confined.nursery import Nursery\n"
        "nursery = Nursery('services', {}, seconds=0.2, memory=2**26); idle, busy = nursery.new(), nursery.new()\n"
        "for one in (idle, busy): one.ask(b'pid x')\n"
        "idle.ask(b'parent x'); print(int(idle.answer()), int(busy.answer()), int(idle.answer()), flush=True)\n"
        "busy.ask(b'compute x'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.returncode == -signal.SIGKILL, run.stderr
    wait_until_gone(*map(int, run.stdout.split()))


@pytest.mark.parametrize("closed", [True, False])
def test_closed_and_forgotten_processes_and_nurseries_end(closed: bool) -> None:
    nursery = Nursery("services", {}, **LIMITS)
    process = nursery.new()
    pids = int(say(process, "pid x")), int(say(process, "parent x"))
    if closed:
        process.close()
    del process
    wait_until_gone(pids[0])
    del nursery
    wait_until_gone(pids[1])


@pytest.mark.parametrize("message", ["greet " + "x" * 2**22, "sleep 0"])
def test_a_stopped_process_holds_up_nobody_and_ends_when_it_goes_on(message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither who sends it more than its connection takes, nor who looks for its answer."""
    nursery = Nursery("services", {}, **LIMITS)
    stopped, other = nursery.new(), nursery.new()
    pid = int(say(stopped, "pid x"))
    os.kill(pid, signal.SIGSTOP)
    for _ in range(3):
        stopped.ask(message.encode())
        assert stopped.take() is None
    assert say(other, "greet you") == "hello you"
    with monkeypatch.context() as patch:
        patch.setattr("yoco_u.confined.nursery._PATIENCE", 0.0)
        with pytest.raises(Ended, match="did not end within 0 s"):
            stopped.answer()
    stopped.close()
    wait_until_gone(pid)
    assert say(nursery.new(), "greet you") == "hello you"


def test_a_process_may_be_stopped_within_its_answer(nursery: Nursery) -> None:
    process = nursery.new()
    pid, name = int(say(process, "pid x")), "x" * 2**22
    process.ask(f"greet {name}".encode())
    while process._unsent:
        wait([process], 60)
        process._send()
    wait([process], 60)  # until the answer has begun, of which a connection holds only a part
    os.kill(pid, signal.SIGSTOP)
    while psutil.Process(pid).status() != psutil.STATUS_STOPPED:
        time.sleep(0.001)
    assert process.take() is None
    before = len(process._received)
    assert 0 < before < len(name) and process.take() is None and len(process._received) == before
    os.kill(pid, signal.SIGCONT)
    assert process.answer() == f"hi {name}".encode()


def test_the_process_that_is_forked_may_be_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for a new one then does not wait, and it goes on when somebody has waited for too long."""
    nursery = Nursery("services", {"greeting": "x" * 2**22}, **LIMITS)  # more than a connection takes
    parent = int(say(nursery.new(), "parent x"))
    os.kill(parent, signal.SIGSTOP)
    several = [nursery.new() for _ in range(50)]
    with monkeypatch.context() as patch:
        patch.setattr("yoco_u.confined.nursery._PATIENCE", 0.0)
        with pytest.raises(Ended, match="did not end within 0 s"):
            say(several[0], "greet you")
    assert say(several[1], "parent x") == str(parent)
    os.kill(parent, signal.SIGSTOP)
    many = [nursery.new() for _ in range(300)]  # more orders than its connection takes: another one is started
    assert say(many[-1], "parent x") != str(parent)


def test_a_forked_process_has_processes_of_its_own(nursery: Nursery) -> None:
    """On connections that both have, each would get the other's answers."""
    process = nursery.new()
    assert say(process, "greet a") == "hi a"
    parent = say(process, "parent x")

    def child() -> None:
        assert process.closed
        own = nursery.new()
        assert say(own, "greet b") == "hi b" and say(own, "parent x") != parent

    check_in_fork(child)
    assert not process.closed and say(process, "all ") == "a x "
    assert say(nursery.new(), "parent x") == parent


def test_where_no_process_can_be_started_nothing_stays_open(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError("Resource temporarily unavailable")

    nursery, before = Nursery("services", {"greeting": "hi"}, **LIMITS), psutil.Process().num_fds()
    with monkeypatch.context() as patch, pytest.raises(BlockingIOError):
        patch.setattr(subprocess, "Popen", refuse)
        nursery.new()
    assert psutil.Process().num_fds() == before
    assert say(nursery.new(), "greet you") == "hi you"
