"""What is around the answers: models, keys, limits, other sites, health, metrics, the page's figures."""

import asyncio
import re
import threading
from typing import Any

import pytest
from asgi_server import Server, engine_of, error_of, running
from prometheus_client.parser import text_string_to_metric_families
from transformers import PreTrainedTokenizerFast

from yoco_u import YocoUForCausalLM
from yoco_u.architecture import preset
from yoco_u.budget import kv_bytes
from yoco_u.serving.engine_loop import Stuck

pytestmark = pytest.mark.anyio


async def test_models(server: Server) -> None:
    found = (await server.client.get("/v1/models")).json()
    assert found["object"] == "list" and [one["id"] for one in found["data"]] == ["tiny"]
    assert found["data"][0]["max_model_len"] == 512
    assert (await server.client.get("/v1/models/tiny")).json() == found["data"][0]
    status, error = error_of(await server.client.get("/v1/models/a/b"))
    assert status == 404 and error["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (b"", "application/json", "must be a JSON object"),
        (b"{", "application/json", "not JSON"),
        (b"\xff\xfe", "application/json", "not JSON"),
        (b"[" * 200_000, "application/json", "nested too deeply"),
        (b'{"n": 1' + b"0" * 5000 + b"}", "application/json", "value has 5001 digits"),
        (b"[]", "application/json", "must be a JSON object"),
        (b'"text"', "application/json", "must be a JSON object"),
        (b'{"prompt": "x"}', "text/plain", "must be a JSON object"),
        (b'{"temperature": NaN}', "application/json", "finite"),
        (b'{"temperature": 1e999}', "application/json", "finite"),
        (b'{"temperature": 1' + b"0" * 400 + b"}", "application/json", ""),
        (b'{"max_tokens": NaN}', "application/json", "max_tokens"),
    ],
)  # fmt: skip
async def test_bodies_that_are_no_requests(server: Server, content: bytes, kind: str, message: str) -> None:
    response = await server.client.post("/v1/completions", content=content, headers={"Content-Type": kind})
    status, error = error_of(response)
    assert status == 400 and message in error["message"], error


@pytest.mark.parametrize("encoding", ["gzip", "br", "identity, gzip", "x" * 500])
async def test_bodies_that_are_encoded(server: Server, encoding: str) -> None:
    for headers, expected in (({"Content-Encoding": encoding}, 415), ({"Content-Encoding": "Identity"}, 200), ({}, 200)):
        response = await server.client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}, headers=headers)
        assert response.status_code == expected
        if expected == 415:
            message = error_of(response)[1]["message"]
            assert f"Content-Encoding: '{encoding[:2]}" in message and len(message) < 300


@pytest.mark.parametrize("path", ["/", "/health", "/v1/models", "/v1/models/tiny", "/metrics", "/page/index.html", "/nothing"])
async def test_head_is_answered_as_get(server: Server, path: str) -> None:
    head, get = await server.client.head(path), await server.client.get(path)
    assert (head.status_code, head.headers["content-type"]) == (get.status_code, get.headers["content-type"])


async def test_paths_that_are_none(server: Server) -> None:
    for path in ("/v1/nothing", "/page/nothing", "/page/../app.py", "/docs"):
        assert error_of(await server.client.get(path))[0] == 404
    assert error_of(await server.client.get("/v1/completions"))[0] == 405


async def test_bodies_that_are_too_large(model: YocoUForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    async def in_parts(parts: int) -> Any:
        for _ in range(parts):
            yield b" " * 500

    async with running(Server(engine_of(model, tokenizer), max_body_bytes=1000)) as server:
        headers = {"Content-Type": "application/json"}
        for content in (b" " * 1001, in_parts(3)):
            status, error = error_of(await server.client.post("/v1/completions", content=content, headers=headers))
            assert status == 413 and "larger than 1000 bytes" in error["message"]
        assert error_of(await server.client.post("/v1/completions", content=in_parts(2), headers=headers))[0] == 400


async def test_keys(model: YocoUForCausalLM, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture) -> None:
    async with running(Server(engine_of(model, tokenizer), api_keys=("first", "second"))) as server:
        client = server.client
        for header in (
            None,
            "Bearer",
            "Bearer ",
            "Bearer third",
            "first",
            "Basic first",
            "Bearer first second",
            "Bearer fïrst",
        ):
            headers = {} if header is None else {"Authorization": header.encode("latin-1")}
            for path in ("/v1/models", "/metrics", "/openapi.json", "/model", "/nothing"):
                response = await client.get(path, headers=headers)
                assert error_of(response)[0] == 401 and response.headers["www-authenticate"] == "Bearer"
        for key in ("first", "second"):
            for scheme in ("Bearer", "bearer"):
                assert (await client.get("/v1/models", headers={"Authorization": f"{scheme} {key}"})).status_code == 200
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/")).status_code == 200
    assert "second" not in caplog.text


async def test_other_sites(model: YocoUForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    settings = {"cors_origins": ("https://a.example",), "api_keys": ("key",)}
    async with running(Server(engine_of(model, tokenizer), **settings)) as server:
        asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        for origin, status in (("https://a.example", 200), ("https://b.example", 400)):
            response = await server.client.options("/v1/completions", headers={"Origin": origin, **asked})
            assert response.status_code == status
        response = await server.client.get("/v1/models", headers={"Origin": "https://a.example"})
        assert response.status_code == 401 and response.headers["access-control-allow-origin"] == "https://a.example"


async def test_no_other_sites_by_default(server: Server) -> None:
    response = await server.client.get("/v1/models", headers={"Origin": "https://a.example"})
    assert "access-control-allow-origin" not in response.headers


async def test_a_request_may_name_the_loops_that_it_has_anyway(
    model: YocoUForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    async with running(Server(engine_of(model, tokenizer, num_loops=4), max_num_loops=2)) as server:
        facts = (await server.client.get("/model")).json()
        assert facts["num_loops"] == facts["max_num_loops"] == 4
        named, none = [await server.json("completions", prompt="x", seed=1, **own) for own in ({"num_loops": 4}, {})]
        assert named["choices"] == none["choices"]
        status, error = await server.error("completions", prompt="x", num_loops=5)
        assert status == 400 and "at most 4" in error["message"]


async def test_a_full_queue(model: YocoUForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    async with running(Server(engine_of(model, tokenizer), max_waiting=0)) as server:
        body = {"prompt": "x", "max_tokens": 300, "ignore_eos": True}
        first = asyncio.create_task(server.post("completions", n=4, **body))
        while not server.engine.unfinished:
            await asyncio.sleep(0.002)
        response = await server.post("completions", prompt="x")
        assert error_of(response)[0] == 429 and 1 <= int(response.headers["retry-after"]) <= 60
        assert (await first).status_code == 200


async def test_time_runs_out(model: YocoUForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    async with running(Server(engine_of(model, tokenizer), time_limit=0.1)) as server:
        body = {"prompt": "x", "max_tokens": 500, "ignore_eos": True, "n": 4}
        status, error = await server.error("completions", **body)
        assert status == 503 and "longer than 0.1 seconds" in error["message"]
        response = await server.post("completions", stream=True, **body)
        assert response.status_code in (200, 503)  # the latter where time ran out before the first event
        assert "longer than 0.1 seconds" in response.text and "[DONE]" not in response.text
        assert error["code"] == "time_exceeded" and '"code": "time_exceeded"' in response.text


async def test_health(model: YocoUForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    async with running(Server(engine_of(model, tokenizer))) as server:
        assert (await server.client.get("/health")).json() == {"status": "ok"}
        server.loop.draining = True
        response = await server.client.get("/health")
        assert error_of(response)[0] == 503 and response.headers["retry-after"]
        assert (await server.error("completions", prompt="x"))[0] == 503


async def test_health_says_what_requests_are_told(model: YocoUForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Whatever ends the engine: the probe, the metrics and requests for text agree, and name the reason."""
    for state, reason in (
        ({}, None),
        ({"draining": True}, "the server is shutting down"),
        ({"failure": RuntimeError("secret detail")}, "the engine has failed"),
        ({"failure": Stuck("one step has taken longer than 120 seconds")}, "one step has taken longer than 120 seconds"),
        ({"_thread": threading.Thread()}, "the engine does not run"),
    ):
        async with running(Server(engine_of(model, tokenizer))) as server:
            with pytest.MonkeyPatch.context() as patch:
                for name, value in state.items():
                    patch.setattr(server.loop, name, value)
                assert (await samples(server))["yoco_u_serving"] == (reason is None)
                health = await server.client.get("/health")
                for response in (health, await server.post("completions", prompt="x", max_tokens=1)):
                    assert response.status_code == (200 if reason is None else 503)
                    assert "secret" not in response.text
                    if reason is not None:
                        assert reason in error_of(response)[1]["message"]


async def test_faults_are_answered(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(_: Any) -> Any:
        raise RuntimeError("secret detail")

    with monkeypatch.context() as patch:
        patch.setattr(server.engine.runner, "run", breaks)
        assert (await server.error("completions", prompt="x"))[0] == 500
        response = await server.post("completions", prompt="x", stream=True)
        assert '"type": "server_error"' in response.text and "secret" not in response.text
    with monkeypatch.context() as patch:
        patch.setattr(server.loop, "submit", breaks)
        status, error = await server.error("completions", prompt="x")
        assert status == 500 and "secret" not in error["message"]
    await server.json("completions", prompt="x")


async def samples(server: Server) -> dict[str, float]:
    text = (await server.client.get("/metrics")).text
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(value for key, value in sample.labels.items() if key != "le")
            found[sample.name + (f"[{labels}]" if labels else "")] = sample.value
    return found


async def test_metrics(model: YocoUForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    async with running(Server(engine_of(model, tokenizer))) as server:
        prompt = "def first(x): return x * 3  # a text of some blocks"
        usages = [
            (await server.json("completions", prompt=prompt, max_tokens=7, ignore_eos=True, num_loops=loops))["usage"]
            for loops in (2, 2)
        ]
        await server.stream("completions", prompt="x", n=2, max_tokens=3, ignore_eos=True)
        await server.json("completions", prompt="x", max_tokens=0)
        found = await samples(server)
        assert found["yoco_u_outputs_total[length]"] == 5
        assert found["yoco_u_generated_tokens_total"] == 7 + 7 + 3 + 3
        assert found["yoco_u_prompt_tokens_total"] == 2 * usages[0]["prompt_tokens"] + 2 + 2
        cached = usages[1]["prompt_tokens_details"]["cached_tokens"]
        assert found["yoco_u_cached_prompt_tokens_total"] == cached > 0
        assert found["yoco_u_prefix_hit_tokens_total"] >= cached
        computed = 2 * usages[0]["prompt_tokens"] - cached + 6 + 6
        several = 2 * (2 + 2) + 1  # of the two outputs, whose prompt is too short to be shared, and of one without an output
        assert found["yoco_u_loops_total"] == 2 * computed + 3 * several
        assert found["yoco_u_looped_tokens_total"] == computed + several
        assert found["yoco_u_time_to_first_token_seconds_count"] == 4
        assert found["yoco_u_inter_token_seconds_count"] == 6 + 6 + 2 + 2
        assert found["yoco_u_job_seconds_count"] == 4
        assert found["yoco_u_step_seconds_count"] > 6
        assert found["yoco_u_requests[running]"] == found["yoco_u_requests[waiting]"] == 0
        blocks = {state: found[f"yoco_u_kv_blocks[{state}]"] for state in ("free", "cached", "held")}
        assert sum(blocks.values()) == 2048 / 16 and blocks["held"] == 0 and blocks["cached"] > 0
        assert found["yoco_u_window_seats[free]"] == 4
        assert found["yoco_u_snapshot_bytes"] > 0
        assert found["yoco_u_serving"] == 1 and "yoco_u_step_age_seconds" in found


async def test_what_the_page_asks_for(server: Server) -> None:
    facts = (await server.client.get("/model")).json()
    assert facts["name"] == "tiny" and facts["chat"] is False and facts["num_loops"] == 3
    assert facts["stages"] == ["sliding x 2, 3 loops", "cross x 2"] and facts["window"] == 8
    a = server.engine.architecture
    transformer = preset("transformer", "test", vocab_size=a.vocab_size)
    for loops in (1, 3, 5):
        found = (await server.client.get("/kv", params={"tokens": 100, "num_loops": loops})).json()
        assert found == {"bytes": kv_bytes(a.with_loops(loops), 100, 4), "transformer_bytes": kv_bytes(transformer, 100, 4)}
    for params in ({}, {"tokens": "x"}, {"tokens": -1}, {"tokens": 1, "num_loops": 0}):
        assert error_of(await server.client.get("/kv", params=params))[0] == 400


async def test_the_page_is_whole(server: Server) -> None:
    """Everything that it refers to is there, and nothing of it comes from elsewhere."""
    page = await server.client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    parts = re.findall(r'(?:src|href)="([^"#]+)"', page.text)
    assert len(parts) >= 2
    texts = [page.text]
    for part in parts:
        assert part.startswith("/page/")
        response = await server.client.get(part)
        assert response.status_code == 200 and response.headers["x-content-type-options"] == "nosniff"
        texts.append(response.text)
    for text in texts:
        assert not re.search(r"https?://(?!www\.w3\.org/)", text)
        assert "innerHTML" not in text and "eval(" not in text and "document.write" not in text
