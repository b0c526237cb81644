"""What one client can do to the others: hostile requests beside streams of innocent clients.

Each kind of hostile request is sent several times at once, as large as the server takes it, while innocent clients stream
greedy answers. Printed for each kind: the longest time that an innocent client waited between two tokens, beside that without
hostile requests; the longest that the server let it wait, without the times in which the clients themselves did not run (they
share the cores with the server); how the server answered; and the memory that it holds afterwards. Every innocent answer must
be that of the request alone.

    python benchmarks/hostile.py runs/quickstart/yoco-u
    python benchmarks/hostile.py runs/quickstart/yoco-u --minutes 10      # all kinds mixed, for a soak
"""

import asyncio
import gc
import json
import random
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import torch
from common import count, parser, show, standard_library_prompts, write
from gaps import Gap, Gaps
from serving import Server, answers_alone, serving

from yoco_u.errors import in_one_line
from yoco_u.loading import load_model
from yoco_u.serving.settings import ServerSettings

_LOOK = 0.005  # seconds between two looks whether the clients run
_STAY = 0.15  # seconds after which a client leaves that has sent its request
_LONGEST = 120.0  # seconds that are waited for the innocent clients behind a hostile request
_LEAVE_AT_ONCE = 10  # times as many clients that leave as those that wait for their answers

SIZE = ServerSettings(model_name="x").max_body_bytes - 100


def filled(before: str, part: str, after: str, separator: str = ",") -> str:
    """As many parts as a body may have."""
    count = (SIZE - len(before) - len(after)) // (len(part) + len(separator))
    return before + separator.join([part] * count) + after


def schema(of: dict[str, Any]) -> str:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": of}}
    return json.dumps({"prompt": "x", "response_format": form, "max_tokens": 20})


def keys(number: int, of: Callable[[int], Any] = lambda _: 1) -> dict[str, Any]:
    return {str(one): of(one) for one in range(number)}


BODIES: dict[str, str] = {
    "300,000 texts": json.dumps({"prompt": ["a"] * 300_000}),
    "empty lists": filled('{"prompt":[', "[]", "]}"),
    "lists of a token": filled('{"prompt":[', "[1]", "]}"),
    "tokens": filled('{"prompt":[', "1", "]}"),
    "long whole numbers": filled('{"prompt":[', "1" * 4000, "]}"),
    "floats": filled('{"prompt":[', "1e5", "]}"),
    "a word": filled('{"prompt":"', "a", '"}', ""),
    "words": filled('{"prompt":"', "word ", '"}', ""),
    "line ends": filled('{"prompt":"', "\\n", '"}', ""),
    "256 texts": json.dumps({"prompt": ["def f(x): " * 8] * 256, "max_tokens": 2}),
    "stop texts": filled('{"stop":[', '"a"', "]}"),
    "biases": json.dumps({"logit_bias": keys(SIZE // 15)}),
    "unknown keys": json.dumps(keys(SIZE // 15)),
    "unknown options": json.dumps({"stream": True, "stream_options": keys(SIZE // 15)}),
    "a long key": filled('{"', "a", '":1}', ""),
    "nested": '{"prompt":' + "[" * (SIZE // 2),
    "metadata": json.dumps({"prompt": "x", "metadata": keys(SIZE // 15), "max_tokens": 1}),
    "no messages": filled('{"messages":[', "{}", "]}"),
    "messages": filled('{"messages":[', '{"role":"user","content":"x"}', "]}"),
    "parts": filled('{"messages":[{"role":"user","content":[', '{"type":"text","text":"x"}', "]}]}"),
    "a long message": filled('{"messages":[{"role":"user","content":"', "word ", '"}]}', ""),
    "no JSON": "x" * SIZE,
    "outputs with log probabilities": json.dumps({"n": 16, "logprobs": 20, "max_tokens": 100, "ignore_eos": True}),
    "64 stop texts": json.dumps({"prompt": "x", "stop": ["x" * 999 + str(one) for one in range(64)], "max_tokens": 100}),
    "a schema of options": schema({"type": "object", "properties": keys(499, lambda _: {"type": "string"})}),
    "a schema of patterns": schema({"type": "object", "patternProperties": {f"a{one}.*": {} for one in range(400)}}),
    "a schema of references": schema(
        {"$ref": "#/$defs/0", "$defs": keys(1000, lambda one: {"$ref": f"#/$defs/{one + 1}"} if one < 999 else {})}
    ),
    "a schema of many patterns": schema({"allOf": [{"type": "string", "pattern": f".*X.{{{one}}}"} for one in range(24)]}),
    "echoed tokens with log probabilities": json.dumps(
        {"prompt": [[5] * 2000] * 100, "max_tokens": 0, "echo": True, "logprobs": 20}
    ),
    "long outputs with log probabilities": json.dumps({"n": 16, "logprobs": 20, "max_tokens": 4096, "ignore_eos": True}),
    "lines": json.dumps({"prompt": "".join(f"line {one:x}\n" for one in range(SIZE // 14)), "max_tokens": 1}),
    "an expression": json.dumps({"prompt": "x", "regex": "(a{1000}){1000}"}),
    "a long expression": json.dumps({"prompt": "x", "regex": "a" * 2**20}),
}
"""Bodies by name; those of chats have messages."""
LEAVING = [
    "words", "lines", "tokens", "a long message", "echoed tokens with log probabilities", "a schema of many patterns"
]  # fmt: skip
KINDS = {name: (body, False) for name, body in BODIES.items()} | {
    f"{name}, then gone": (BODIES[name], True) for name in LEAVING
}
"""Bodies by name, and whether clients leave soon after they have sent it."""


@dataclass
class Innocents:
    """What the innocent clients saw.

    Attributes:
        gaps: the times between two tokens, and those in which the program of the clients itself did not run.
        hostile: names of the hostile requests that the server has at the moment.
        heard: when each client heard from the server last, by its number.
    """

    gaps: Gaps = field(default_factory=Gaps)
    hostile: list[str] = field(default_factory=list)
    answers: list[tuple[int, str]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    heard: dict[int, float] = field(default_factory=dict)

    async def settled(self) -> None:
        """Wait until every client has heard from the server again, so that the gaps of what has been sent have ended."""
        now = time.monotonic()
        while min(self.heard.values()) < now and time.monotonic() < now + _LONGEST:
            await asyncio.sleep(0.05)


async def watch(seen: Innocents) -> None:
    """Note for how long other programs, or this one's own work, kept the clients from running."""
    while True:
        due = time.monotonic() + _LOOK
        await asyncio.sleep(_LOOK)
        if (now := time.monotonic()) > due:
            seen.gaps.pauses.append((due, now))


async def innocent(server: Server, prompts: list[list[int]], own: int, chosen: Namespace, seen: Innocents) -> None:
    """Stream one answer after another, for ever; `own` is the number of the client."""
    draw = random.Random(own)
    seen.heard[own] = 0.0
    async with server.client() as client:
        while True:
            number, text = draw.randrange(len(prompts)), ""
            last: float | None = None
            try:
                stream = await client.completions.create(
                    model="model", prompt=prompts[number], max_tokens=chosen.new, temperature=0, stream=True
                )
                async for event in stream:
                    now = time.monotonic()
                    if last is not None:
                        seen.gaps.found.append(Gap(last, now, tuple(seen.hostile)))
                    last = seen.heard[own] = now
                    text += event.choices[0].text
                seen.answers.append((number, text))
            except openai.OpenAIError as error:
                seen.heard[own] = time.monotonic()
                if not isinstance(error, openai.RateLimitError):
                    seen.errors.append(repr(error))
                await asyncio.sleep(0.2)


async def hostile(server: Server, body: str, leaves: bool) -> str:
    """Send one body, and return the status of the answer, unless the client leaves before it comes."""
    address = urlsplit(server.url)
    path = "/v1/chat/completions" if '"messages"' in body[:20] else "/v1/completions"
    content = body.encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n"
    try:
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        writer.write(f"{head}Connection: close\r\n\r\n".encode() + content)
        if leaves:
            await writer.drain()
            await asyncio.sleep(_STAY)
            writer.transport.abort()
            return "left"
        answer = await asyncio.wait_for(reader.read(), 120)
        writer.close()
    except (TimeoutError, OSError) as error:
        return type(error).__name__
    return answer.split(b" ", 2)[1].decode() if answer else "closed"


async def attack(server: Server, chosen: Namespace, prompts: list[list[int]], seen: Innocents) -> list[dict[str, Any]]:
    """One kind after another, or all mixed for some minutes."""
    clients = [asyncio.create_task(innocent(server, prompts, own, chosen, seen)) for own in range(chosen.innocents)]
    clients.append(asyncio.create_task(watch(seen)))
    await asyncio.sleep(3)
    begun = time.monotonic()
    await asyncio.sleep(10)
    rows = [row("nothing", seen, server, Counter(), begun)]
    print(rows[-1], flush=True)
    if chosen.minutes:
        rows.append(await mixed(server, chosen, seen))
    else:
        for name, (body, leaves) in KINDS.items():
            begun, clients_at_once = time.monotonic(), chosen.at_once * (_LEAVE_AT_ONCE if leaves else 1)
            statuses = Counter(await asyncio.gather(*(hostile(server, body, leaves) for _ in range(clients_at_once))))
            await asyncio.sleep(0.5)
            await seen.settled()
            rows.append(row(name, seen, server, statuses, begun))
            print(rows[-1], flush=True)
    for client in clients:
        client.cancel()
    await asyncio.wait(clients)
    return rows


async def mixed(server: Server, chosen: Namespace, seen: Innocents) -> dict[str, Any]:
    """All kinds, drawn at random, by several clients at once."""
    begun, statuses = time.monotonic(), Counter[str]()
    draw, names = random.Random(0), list(KINDS)

    async def one() -> None:
        while time.monotonic() < begun + 60 * chosen.minutes:
            name = draw.choice(names)
            seen.hostile.append(name)
            statuses[await hostile(server, *KINDS[name])] += 1
            seen.hostile.remove(name)
            await asyncio.sleep(draw.uniform(0, 1))

    await asyncio.gather(*(one() for _ in range(chosen.at_once)))
    await seen.settled()
    return row("all mixed", seen, server, statuses, begun)


def row(name: str, seen: Innocents, server: Server, statuses: Counter[str], begun: float) -> dict[str, Any]:
    gap, of_server, pause = seen.gaps.longest(begun)
    return {
        "hostile": name,
        "longest gap, ms": 1e3 * gap,
        "longest of the server, ms": 1e3 * of_server,
        "own pause, ms": 1e3 * pause,
        "statuses": ", ".join(f"{status} x {count}" for status, count in sorted(statuses.items())),
        "s": time.monotonic() - begun,
        "MiB": server.resident_mib,
    }


def main() -> None:
    arguments = parser(__doc__, "hostile")
    arguments.add_argument("model", type=Path, help="a trained run or saved model")
    arguments.add_argument("--innocents", type=count, default=4, help="clients that stream all the time")
    arguments.add_argument("--at-once", type=count, default=3, help="hostile requests at the same time")
    arguments.add_argument("--minutes", type=float, default=0.0, help="mix all kinds for so long, instead of one after another")
    arguments.add_argument("--context", type=count, default=8192, help="tokens of the longest request that the server takes")
    arguments.add_argument("--prompts", type=count, default=40, help="different ones")
    arguments.add_argument("--longest", type=count, default=256, help="tokens of the longest prompt")
    arguments.add_argument("--new", type=count, default=64, help="tokens of an answer")
    chosen = arguments.parse_args()

    _, tokenizer = load_model(chosen.model, torch.device("cpu"))
    draw, seen = random.Random(0), Innocents()
    prompts = standard_library_prompts(tokenizer, [round(chosen.longest ** draw.random()) for _ in range(chosen.prompts)])
    gc.collect()
    gc.freeze()  # else a collection looks at all of torch and transformers, for 0.1 to 0.5 s, in which no client runs
    with serving(chosen.model, "--dtype", "float32", "--max-model-len", str(chosen.context)) as server:
        rows = asyncio.run(attack(server, chosen, prompts, seen))
    alone = answers_alone(chosen, prompts)
    wrong = sum(alone[number][-1] != text for number, text in seen.answers)
    clients = {"innocent answers": len(seen.answers), "unlike alone": wrong, "innocent errors": len(seen.errors)}
    figures = clients | seen.gaps.percentiles()
    write(chosen.out, {"hostile": rows, **figures, "errors": seen.errors[:20]})
    show("Hostile requests beside innocent streams", rows)
    show("Innocent clients", [figures])
    if chosen.minutes:
        gaps = seen.gaps
        longest = sorted(gaps.found, key=gaps.of_server, reverse=True)[:10]
        show(
            "The longest gaps of the server",
            [
                {"ms": 1e3 * gap.seconds, "of the server": 1e3 * gaps.of_server(gap), "hostile": ", ".join(gap.hostile)}
                for gap in longest
            ],
        )


if __name__ == "__main__":
    in_one_line(main)
