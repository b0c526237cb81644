"""Servers over a tiny model, with and without a chat template."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx2
import openai
import pytest
from asgi_server import TEMPLATE, TEXTS, Server, engine_of, running
from models import architecture, build
from server_process import Process, serving
from transformers import PreTrainedTokenizerFast

from yoco_u import YocoUForCausalLM
from yoco_u.data import train_tokenizer


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 300)


@pytest.fixture(scope="session")
def model(tokenizer: PreTrainedTokenizerFast) -> YocoUForCausalLM:
    return build(architecture("yoco_u", vocab_size=len(tokenizer) + 3))


@pytest.fixture(scope="session")
def chatty() -> PreTrainedTokenizerFast:
    """The same tokenizer with a chat template."""
    tokenizer = train_tokenizer(TEXTS, 300)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
async def server(model: YocoUForCausalLM, tokenizer: PreTrainedTokenizerFast, anyio_backend: str) -> AsyncIterator[Server]:
    async with running(Server(engine_of(model, tokenizer))) as one:
        yield one


@pytest.fixture(scope="module")
async def chat_server(model: YocoUForCausalLM, chatty: PreTrainedTokenizerFast, anyio_backend: str) -> AsyncIterator[Server]:
    async with running(Server(engine_of(model, chatty))) as one:
        yield one


@pytest.fixture(scope="module")
async def client(chat_server: Server) -> AsyncIterator[openai.AsyncOpenAI]:
    """OpenAI's own client before our application."""
    transport = httpx2.ASGITransport(app=chat_server.app, raise_app_exceptions=False)
    http = httpx2.AsyncClient(transport=transport, base_url="http://test", timeout=60)
    async with openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=http, max_retries=0) as one:
        yield one


@pytest.fixture(scope="session")
def folder(model: YocoUForCausalLM, chatty: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served")
    model.save_pretrained(path)
    chatty.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def process(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    with serving(folder, "--drain-seconds", "600", log=tmp_path_factory.mktemp("log") / "log") as found:
        yield found
