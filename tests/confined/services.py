"""A service that does what it is told to, for the tests of confined processes."""

import os
import time


class Service:
    """Answers `word argument`."""

    def __init__(self, greeting: str = "hello") -> None:
        if greeting == "":
            raise ValueError("an empty greeting\nis none")
        self._greeting = greeting
        self._heard: list[str] = []

    def __call__(self, message: bytes) -> bytes:
        word, _, argument = message.decode().partition(" ")
        self._heard.append(argument)
        return str(getattr(self, f"_{word}")(argument)).encode()

    def _greet(self, name: str) -> str:
        return f"{self._greeting} {name}"

    def _all(self, _: str) -> str:
        return " ".join(self._heard)

    def _compute(self, _: str) -> None:
        while True:
            pass

    def _sleep(self, seconds: str) -> str:
        time.sleep(float(seconds))
        return "rested"

    def _allocate(self, count: str) -> int:
        return len(bytearray(int(count)))

    def _crash(self, signal: str) -> None:
        os.kill(os.getpid(), int(signal))

    def _recurse(self, argument: str) -> None:
        self._recurse(argument)

    def _fail(self, what: str) -> None:
        raise {"exit": SystemExit, "interrupt": KeyboardInterrupt, "fault": ZeroDivisionError}[what]("first\nsecond")

    def _write(self, path: str) -> None:
        with open(path, "w") as file:
            file.write("x" * 10_000)

    def _pid(self, _: str) -> int:
        return os.getpid()

    def _parent(self, _: str) -> int:
        return os.getppid()
