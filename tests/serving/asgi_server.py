"""A server over a tiny model, in this process: requests go to the ASGI application itself."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2
from transformers import PreTrainedTokenizerFast

from yoco_u import YocoUForCausalLM
from yoco_u.inference import Engine, EngineSettings
from yoco_u.serving.app import create_app
from yoco_u.serving.settings import ServerSettings

TEXTS = [
    '{"name": "alpha délta 数 🦉", "age": 17, "tags": ["red", "blue"]}\n',
    "def first(x):\n    return x * 3  # täglich\n",
] * 9
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    "{% if messages[0]['role'] == 'assistant' %}{{ raise_exception('a chat begins with a user') }}{% endif %}"
)
ENGINE: dict[str, Any] = {
    "dtype": "float32", "cache_tokens": 2048, "block_size": 16, "max_num_seqs": 4, "max_batched_tokens": 32,
    "max_model_len": 512,
}  # fmt: skip


class Server:
    """An application that runs, and a client for it."""

    def __init__(self, engine: Engine, **settings: Any) -> None:
        self.engine = engine
        self.app = create_app(engine, ServerSettings(**{"model_name": "tiny"} | settings))
        self.loop = self.app.state.loop
        # Exceptions become answers with status 500, as they do in a real server.
        transport = httpx2.ASGITransport(app=self.app, raise_app_exceptions=False)
        self.client = httpx2.AsyncClient(transport=transport, base_url="http://test", timeout=60)

    async def post(self, path: str, **body: Any) -> httpx2.Response:
        # In ASCII, so that strings which are no Unicode text can be sent.
        headers = {"Content-Type": "application/json"}
        return await self.client.post(f"/v1/{path}", content=json.dumps(body), headers=headers)

    async def json(self, path: str, **body: Any) -> Any:
        response = await self.post(path, **body)
        assert response.status_code == 200, response.text
        return response.json()

    async def error(self, path: str, **body: Any) -> tuple[int, dict[str, Any]]:
        return error_of(await self.post(path, **body))

    async def stream(self, path: str, **body: Any) -> list[Any]:
        response = await self.post(path, stream=True, **body)
        assert response.status_code == 200, response.text
        return events_of(response)


def events_of(response: httpx2.Response) -> list[Any]:
    """What the events of a whole stream hold, [DONE] left out."""
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def error_of(response: httpx2.Response) -> tuple[int, dict[str, Any]]:
    assert response.status_code >= 400
    found = response.json()
    assert set(found) == {"error"} and set(found["error"]) == {"message", "type", "param", "code"}
    assert isinstance(found["error"]["message"], str) and found["error"]["message"]
    return response.status_code, found["error"]


def engine_of(model: YocoUForCausalLM, tokenizer: PreTrainedTokenizerFast, **settings: Any) -> Engine:
    return Engine(model, tokenizer, EngineSettings(**ENGINE | settings))


@asynccontextmanager
async def running(server: Server) -> AsyncIterator[Server]:
    """The server while its application runs; it leaves an empty engine behind."""
    async with server.app.router.lifespan_context(server.app), server.client:
        yield server
    assert not server.engine.unfinished
    assert server.engine.scheduler.pool.num_available == server.engine.scheduler.pool.num_blocks
