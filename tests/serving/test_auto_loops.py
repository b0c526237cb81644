"""Requests whose tokens leave the loop by themselves: what the server says of them."""

import pytest
from asgi_server import ENGINE, Server, engine_of, running
from test_app import samples
from transformers import PreTrainedTokenizerFast

from yoco_u import YocoUForCausalLM
from yoco_u.errors import UserError
from yoco_u.inference import Engine, EngineSettings
from yoco_u.inference.exits import Exits

pytestmark = pytest.mark.anyio

BODY = {"prompt": "def first(x): ", "temperature": 0, "max_tokens": 8, "ignore_eos": True}


async def test_auto_loops(model: YocoUForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    engine = engine_of(model, tokenizer)
    async with running(Server(engine)) as server:
        assert (await server.client.get("/model")).json()["auto_loops"] is False
        status, error = await server.error("completions", **BODY, num_loops="auto")
        assert status == 400 and error["param"] == "exit_threshold" and "no exits.json" in error["message"]
        engine.exits = Exits(num_loops=3, score="angular", threshold=2.0)
        assert (await server.client.get("/model")).json()["auto_loops"] is True
        before = await samples(server)
        one_loop = await server.json("completions", **BODY, num_loops=1)
        for settings, mean in (({}, 1.0), ({"exit_threshold": 0}, 3.0)):
            found = await server.json("completions", **BODY, num_loops="auto", **settings)
            assert found["usage"]["completion_tokens_details"]["mean_loops"] == mean
            if mean == 1:
                assert found["choices"][0]["text"] == one_loop["choices"][0]["text"]
            chunks = await server.stream(
                "completions", **BODY, num_loops="auto", **settings, stream_options={"include_usage": True}
            )
            assert chunks[-1]["usage"]["completion_tokens_details"] == found["usage"]["completion_tokens_details"]
        after = await samples(server)
        tokens, loops = (after[name] - before[name] for name in ("yoco_u_looped_tokens_total", "yoco_u_loops_total"))
        assert tokens < loops < 3 * tokens
        nothing = await server.json("completions", prompt="x y", max_tokens=0, echo=True)
        assert nothing["usage"]["completion_tokens_details"]["mean_loops"] is None


async def test_auto_by_default(model: YocoUForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    exits = Exits(num_loops=3, score="angular", threshold=2.0)
    async with running(Server(Engine(model, tokenizer, EngineSettings(**ENGINE, num_loops="auto"), exits))) as server:
        facts = (await server.client.get("/model")).json()
        assert (facts["num_loops"], facts["auto_loops"], facts["auto_by_default"]) == (3, True, True)
        for settings, mean in (({}, 1.0), ({"num_loops": 2}, 2.0)):
            usage = (await server.json("completions", **BODY, **settings))["usage"]
            assert usage["completion_tokens_details"]["mean_loops"] == mean


async def test_damaged_exits(
    model: YocoUForCausalLM, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    engine = engine_of(model, tokenizer)
    engine.exits = UserError("exits.json: damaged")
    async with running(Server(engine)) as server:
        assert caplog.messages == ["exits.json: damaged"]
        assert (await server.json("completions", **BODY))["usage"]["completion_tokens"] == 8
        status, error = await server.error("completions", **BODY, num_loops="auto")
        assert status == 400 and error["param"] == "num_loops" and "exits.json: damaged" in error["message"]


@pytest.mark.parametrize(
    ("settings", "param", "part"),
    [
        ({"num_loops": "most"}, "num_loops", "expected a whole number of at least 1, or auto, got 'most'"),
        ({"num_loops": "2"}, "num_loops", "or auto, got '2'"),
        ({"exit_threshold": 0.1}, "exit_threshold", "set it to auto"),
        ({"num_loops": "auto", "exit_threshold": -1}, "exit_threshold", "greater than or equal to 0"),
        ({"num_loops": "auto", "exit_threshold": 0.1, "drafts": "loops"}, "drafts", "exclude each other"),
    ],
)
async def test_mistakes(server: Server, settings: dict[str, object], param: str, part: str) -> None:
    status, error = await server.error("completions", prompt="x", **settings)
    assert (status, error["param"]) == (400, param) and part in error["message"]
