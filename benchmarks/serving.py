"""`yoco-u serve` under load, and the waiting time of a short request beside a long one.

- Load: `--clients` clients of the openai package stream greedy completions of random prompts and lengths for `--minutes`, from
  a model in float32; some clients close the connection in the middle. Every answer is compared with the answer of an engine
  that runs the request alone. Errors other than 429, memory over time, and blocks and seats that are still held in the end are
  reported.
- Waiting: time to the first token of a short request, on an idle server and while the server prefills a prompt of `--long`
  tokens, with a model of `--size` and random weights in bfloat16.

    python benchmarks/serving.py runs/quickstart/yoco-u

prints tables and writes JSON.
"""

import asyncio
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import psutil
import torch
from common import count, parser, show, standard_library_prompts, write
from rich.progress import Progress

from yoco_u import LLM, SamplingParams, YocoUConfig, YocoUForCausalLM
from yoco_u.architecture import preset
from yoco_u.errors import UserError, in_one_line
from yoco_u.loading import load_model

Answer = tuple[int, int | None, str]
"""Number of the prompt, how many tokens were asked for (None if the client went away before the end), and the text."""


@dataclass
class Server:
    """A running server, and its process."""

    url: str
    process: psutil.Process

    def client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=900)

    def metrics(self) -> dict[str, float]:
        """The values that /metrics shows, by name and labels as they stand there."""
        text = urllib.request.urlopen(f"{self.url}/metrics").read().decode()
        return {name: float(value) for name, value in re.findall(r"^([^#\s]+) (\S+)$", text, flags=re.MULTILINE)}

    @property
    def resident_mib(self) -> float:
        return self.process.memory_info().rss / 2**20


@contextmanager
def serving(model: Path, *options: str) -> Iterator[Server]:
    """Run the installed command's server on a free port; in the end it gets SIGTERM, and must exit with status 0."""
    command = [str(Path(sys.executable).with_name("yoco-u")), "serve", str(model), "--name", "model", "--port", "0", *options]
    with tempfile.TemporaryFile("w+") as log, subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT) as process:

        def said() -> str:
            log.seek(0)
            return log.read()

        while (found := re.search(r"http://[\d.]+:\d+", said())) is None:
            if process.poll() is not None:
                raise UserError(f"the server did not start: {said()}")
            time.sleep(0.2)
        try:
            yield Server(found[0], psutil.Process(process.pid))
        finally:
            process.terminate()
            status = process.wait(60)
        if status:
            raise UserError(f"the server ended with {status}: {said()}")


@dataclass
class Tally:
    """What all clients saw together.

    Attributes:
        first_token: seconds until the first token, of each request.
        tokens: how many tokens came.
        busy: how many requests were refused with status 429.
        errors: all other errors.
        resident_mib: the server's resident memory, every two seconds.
    """

    answers: list[Answer] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)
    tokens: int = 0
    busy: int = 0
    errors: list[str] = field(default_factory=list)
    resident_mib: list[float] = field(default_factory=list)


async def one_client(
    server: Server, prompts: list[list[int]], draw: random.Random, until: float, chosen: Namespace, tally: Tally
) -> None:
    """Send one request after another until a time, by `time.monotonic`."""
    async with server.client() as client:
        while time.monotonic() < until:
            number, most = draw.randrange(len(prompts)), draw.randint(1, chosen.new)
            leaves_after = draw.randrange(most) if draw.random() < chosen.leaving else None
            text, begun, events, left = "", time.monotonic(), 0, False
            try:
                stream = await client.completions.create(
                    model="model", prompt=prompts[number], max_tokens=most, temperature=0, stream=True
                )
                async for event in stream:
                    if not event.choices:
                        continue
                    if events == 0:
                        tally.first_token.append(time.monotonic() - begun)
                    text += event.choices[0].text
                    events += 1
                    if leaves_after is not None and events > leaves_after:
                        await stream.close()
                        left = True
                        break
                tally.answers.append((number, None if left else most, text))
                tally.tokens += events
            except openai.RateLimitError:
                tally.busy += 1
                await asyncio.sleep(draw.uniform(0.5, 1.5))
            except openai.OpenAIError as error:
                tally.errors.append(repr(error))


async def put_under_load(server: Server, prompts: list[list[int]], chosen: Namespace) -> Tally:
    """Run all clients at once, and watch the server's memory meanwhile."""
    tally, seconds = Tally(), 60 * chosen.minutes
    until = time.monotonic() + seconds
    with Progress(transient=True) as progress:
        bar = progress.add_task(f"{chosen.clients} clients", total=seconds)
        draws = [random.Random(i) for i in range(chosen.clients)]
        clients = [asyncio.create_task(one_client(server, prompts, draw, until, chosen, tally)) for draw in draws]
        while time.monotonic() < until:
            await asyncio.sleep(2)
            tally.resident_mib.append(server.resident_mib)
            progress.update(bar, completed=seconds - (until - time.monotonic()))
        await asyncio.gather(*clients)
    return tally


def measure_load(chosen: Namespace) -> dict[str, Any]:
    """The figures of the load: rates, waiting times, errors, wrong answers, memory."""
    _, tokenizer = load_model(chosen.model, torch.device("cpu"))
    draw = random.Random(0)
    prompts = standard_library_prompts(tokenizer, [round(chosen.longest ** draw.random()) for _ in range(chosen.prompts)])
    with serving(chosen.model, "--dtype", "float32", "--max-waiting", str(chosen.waiting)) as server:
        idle = server.metrics()
        tally = asyncio.run(put_under_load(server, prompts, chosen))
        deadline = time.monotonic() + 30
        while server.metrics()['yoco_u_requests{state="running"}'] and time.monotonic() < deadline:
            time.sleep(0.5)
        after = server.metrics()
    alone = answers_alone(chosen, prompts)
    wrong = sum(
        not alone[number][-1].startswith(text) if most is None else alone[number][most] != text
        for number, most, text in tally.answers
    )
    quarter = max(1, len(tally.resident_mib) // 4)
    return {
        "clients": chosen.clients,
        "minutes": chosen.minutes,
        "answers": len(tally.answers),
        "tokens/s": tally.tokens / (60 * chosen.minutes),
        "went away": sum(most is None for _, most, _ in tally.answers),
        "429": tally.busy,
        "other errors": len(tally.errors),
        "unlike alone": wrong,
        "first token, median s": statistics.median(tally.first_token),
        "first token, 99% s": statistics.quantiles(tally.first_token, n=100)[98],
        "MiB, 2nd quarter": statistics.median(tally.resident_mib[quarter : 2 * quarter]),
        "MiB, 4th quarter": statistics.median(tally.resident_mib[-quarter:]),
        "blocks held before": int(idle['yoco_u_kv_blocks{state="held"}']),
        "blocks held after": int(after['yoco_u_kv_blocks{state="held"}']),
        "seats held after": int(after['yoco_u_window_seats{state="held"}']),
        "errors": tally.errors[:20],
    }


def answers_alone(chosen: Namespace, prompts: list[list[int]]) -> list[list[str]]:
    """The right answers: by prompt and number of new tokens, the text of an engine that runs one request at a time and has no
    prefix cache."""
    llm = LLM(chosen.model, dtype="float32", max_num_seqs=1, prefix_caching=False)
    tokenizer = llm.engine.tokenizer
    assert tokenizer is not None
    found = []
    for prompt in prompts:
        [request] = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=chosen.new))
        tokens = request.outputs[0].token_ids
        texts = [tokenizer.decode(tokens[:most], skip_special_tokens=True) for most in range(chosen.new)]
        found.append([*texts, request.outputs[0].text])
    return found


async def first_token(client: openai.AsyncOpenAI, prompt: list[int]) -> float:
    """Seconds from sending a request to its first token."""
    begun = time.monotonic()
    stream = await client.completions.create(model="model", prompt=prompt, max_tokens=4, temperature=0, stream=True)
    seconds = 0.0
    async for _ in stream:
        seconds = seconds or time.monotonic() - begun
    return seconds


async def wait_beside_long(server: Server, chosen: Namespace) -> dict[str, Any]:
    """Short requests on the idle server, then short requests while one long prompt is prefilled."""
    draw = random.Random(1)

    def prompt(length: int) -> list[int]:
        return [draw.randrange(1000) for _ in range(length)]

    async with server.client() as client:
        for _ in range(3):
            await first_token(client, prompt(chosen.short))
        idle = [await first_token(client, prompt(chosen.short)) for _ in range(20)]
        long = asyncio.create_task(first_token(client, prompt(chosen.long)))
        await asyncio.sleep(0.5)
        beside = []
        while not long.done():
            beside.append(await first_token(client, prompt(chosen.short)))
        beside = beside[:-1]  # the last request may have run on after the long prompt was done
        if not beside:
            raise UserError(f"a prompt of {chosen.long} tokens is read before a short one is answered; make --long longer")
        seconds = await long
    return {
        "short prompt": chosen.short,
        "long prompt": chosen.long,
        "idle, median ms": 1e3 * statistics.median(idle),
        "beside, median ms": 1e3 * statistics.median(beside),
        "beside, slowest ms": 1e3 * max(beside),
        "ratio of medians": statistics.median(beside) / statistics.median(idle),
        "short requests": len(beside),
        "long one, s": seconds,
    }


def measure_waiting(chosen: Namespace) -> dict[str, Any]:
    """The figures of the waiting times, of a model of random weights with the tokenizer of `chosen.model`."""
    _, tokenizer = load_model(chosen.model, torch.device("cpu"))
    architecture = preset("yoco_u", chosen.size)
    with tempfile.TemporaryDirectory() as folder:
        model = YocoUForCausalLM._from_config(YocoUConfig.from_architecture(architecture), dtype=torch.bfloat16)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        del model
        options = ("--cache-tokens", str(chosen.long + 16 * 1024), "--dtype", "bfloat16", "--max-num-seqs", "4")
        with serving(Path(folder), *options) as server:
            return asyncio.run(wait_beside_long(server, chosen))


def main() -> None:
    arguments = parser(__doc__, "serving")
    arguments.add_argument("model", type=Path, help="a trained run or saved model")
    arguments.add_argument("--clients", type=count, default=64)
    arguments.add_argument("--minutes", type=float, default=10)
    arguments.add_argument("--prompts", type=count, default=200, help="different ones")
    arguments.add_argument("--longest", type=count, default=1024, help="tokens of the longest prompt under load")
    arguments.add_argument("--new", type=count, default=96, help="tokens of the longest answer")
    arguments.add_argument("--leaving", type=float, default=0.2, help="share of requests whose client goes away")
    arguments.add_argument("--waiting", type=count, default=32, help="outputs that may wait")
    arguments.add_argument("--size", default="100m", help="of the model that reads the long prompt")
    arguments.add_argument("--short", type=count, default=32, help="tokens of the short prompt")
    arguments.add_argument("--long", type=count, default=65536, help="tokens of the long prompt")
    chosen = arguments.parse_args()

    load = measure_load(chosen)
    show("Under load", [{"": name, "value": value} for name, value in load.items() if name != "errors"])
    write(chosen.out, {"load": load})
    waiting = measure_waiting(chosen)
    show("A short request beside a long one", [{"": name, "value": value} for name, value in waiting.items()])
    write(chosen.out, {"load": load, "waiting": waiting})


if __name__ == "__main__":
    in_one_line(main)
