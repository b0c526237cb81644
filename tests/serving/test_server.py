"""`yoco-u serve` as a process: real sockets, clients that leave, signals, keys, TLS, OpenAI's own client."""

import asyncio
import re
import signal
import socket
import ssl
import subprocess
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from server_process import Process, serving

from yoco_u.cli import main
from yoco_u.errors import UserError
from yoco_u.serving.server import check_listen
from yoco_u.serving.settings import Listen

LONG = {"prompt": "x", "max_tokens": 3000, "ignore_eos": True}
RUNNING, HELD = 'yoco_u_requests{state="running"}', 'yoco_u_kv_blocks{state="held"}'


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_blocks(process: Process, stream: bool) -> None:
    async def leave() -> None:
        async with httpx2.AsyncClient(timeout=60) as client:
            request = asyncio.create_task(client.post(f"{process.url}/v1/completions", json={**LONG, "stream": stream}))
            await asyncio.to_thread(process.wait_for, RUNNING, 1)
            request.cancel()
            await asyncio.wait([request])
            assert request.cancelled()

    asyncio.run(leave())
    process.wait_for(RUNNING, 0)
    process.wait_for(HELD, 0)
    assert process.metric('yoco_u_outputs_total{reason="unfinished"}') >= 1


def test_a_full_queue_and_retries(process: Process) -> None:
    """Four outputs run and four wait; whoever comes then is refused, until they have gone."""
    url, short = f"{process.url}/v1/completions", {"prompt": "x", "max_tokens": 1}

    with httpx2.Client(timeout=60) as client:
        with client.stream("POST", url, json={**LONG, "stream": True, "n": 8}):
            responses = [client.post(url, json=short) for _ in range(3)]
        assert [response.status_code for response in responses] == [429] * 3
        assert all(response.headers["retry-after"].isdecimal() for response in responses)
        process.wait_for(RUNNING, 0)
        assert client.post(url, json=short).status_code == 200


def test_openais_client(process: Process) -> None:
    with openai.OpenAI(base_url=f"{process.url}/v1", api_key="none") as client:
        assert [one.id for one in client.models.list()] == ["tiny"]
        whole = client.completions.create(model="tiny", prompt="def ", temperature=0, max_tokens=9, logprobs=2, echo=True)
        choice = whole.choices[0]
        assert choice.text.startswith("def ") and choice.finish_reason == "length" and whole.usage.completion_tokens == 9
        assert len(choice.logprobs.tokens) == whole.usage.total_tokens
        stream = client.completions.create(model="tiny", prompt="def ", temperature=0, max_tokens=9, stream=True)
        assert "def " + "".join(chunk.choices[0].text for chunk in stream) == choice.text

        messages: Any = [{"role": "user", "content": "def "}]
        schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
        chat = client.chat.completions.create(
            model="tiny", messages=messages, seed=1, max_tokens=50, extra_body={"num_loops": 2},
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
        )  # fmt: skip
        assert chat.choices[0].message.content.lstrip().startswith("{")
        assert chat.usage.prompt_tokens_details.cached_tokens == 0
        chunks = client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=5, stream=True, logprobs=True, stream_options={"include_usage": True}
        )
        *parts, last = list(chunks)
        assert parts[0].choices[0].delta.role == "assistant" and last.usage.completion_tokens <= 5
        for wrong, error in (
            ({"model": "gpt"}, openai.NotFoundError),
            ({"temperature": 9}, openai.BadRequestError),
            ({"logit_bias": {"1": 1000}}, openai.BadRequestError),
        ):
            with pytest.raises(error) as raised:
                client.completions.create(**({"model": "tiny", "prompt": "x"} | wrong))
            assert raised.value.body["type"] == "invalid_request_error"


def test_sigterm_lets_what_runs_end(process: Process) -> None:
    """The last test of this process."""
    with httpx2.stream(
        "POST", f"{process.url}/v1/completions", json={**LONG, "max_tokens": 200, "stream": True}, timeout=60
    ) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        process.process.send_signal(signal.SIGTERM)
        rest = list(lines)
    assert rest[-2:] == ["data: [DONE]", ""] and '"finish_reason":"length"' in rest[-4]
    assert process.process.wait(120) == 0, process.log.read_text()
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(process.url)
    assert "Traceback" not in process.log.read_text()


def _certify(folder: Path) -> None:
    """Write a certificate and its key."""
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    try:
        subprocess.run(
            [*command, "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"],
            cwd=folder, check=True, capture_output=True,
        )  # fmt: skip
    except FileNotFoundError:
        pytest.skip("openssl is not installed")


def test_tls_keys_that_stay_secret_and_a_drain_with_an_end(folder: Path, tmp_path: Path) -> None:
    _certify(tmp_path)
    certificate, key, keys = tmp_path / "cert.pem", tmp_path / "key.pem", tmp_path / "keys"
    keys.write_text("from-the-file\n\n")
    trusted = ssl.create_default_context(cafile=str(certificate))
    with serving(
        folder, "--certificate", str(certificate), "--key", str(key), "--drain-seconds", "0.2", "--api-key-file", str(keys),
        "--api-key", "from-an-option", log=tmp_path / "log", environment={"YOCO_U_API_KEY": "from-the-environment"},
    ) as process, httpx2.Client(base_url=process.url, verify=trusted, timeout=60) as client:  # fmt: skip
        assert process.url.startswith("https://127.0.0.1:")
        for name, status in (
            ("from-the-file", 200),
            ("from-the-environment", 200),
            ("from-an-option", 200),
            ("guessed-one", 401),
        ):
            assert client.get("/v1/models", headers={"Authorization": f"Bearer {name}"}).status_code == status
        headers = {"Authorization": "Bearer from-the-file"}
        with client.stream("POST", "/v1/completions", json={**LONG, "stream": True}, headers=headers) as response:
            lines = response.iter_lines()
            next(lines)
            process.process.send_signal(signal.SIGTERM)
            rest = list(lines)
        assert "shutting down" in rest[-2] and process.process.wait(120) == 0
        log = process.log.read_text()
        assert not re.search("from-the-|from-an-|guessed-one", log) and "/v1/models" in log


@pytest.mark.parametrize("kind", ["absent", "no PEM", "another's key", "with a password"])
def test_a_certificate_that_cannot_be_used_is_told_before_a_model_is_loaded(kind: str, tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    if kind == "no PEM":
        certificate.write_text("certificate")
        key.write_text("key")
    elif kind != "absent":
        _certify(tmp_path)
        password = ["-aes256", "-passout", "pass:secret"] if kind == "with a password" else []
        source = ["rsa", "-in", key] if password else ["genrsa"]
        subprocess.run(["openssl", *source, *password, "-out", key], check=True, capture_output=True)
    with pytest.raises(UserError, match=r"cert\.pem: cannot use this certificate and key"):
        check_listen(Listen(port=0, certificate=certificate, key=key))


def test_mistakes(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YOCO_U_KERNELS", "off")

    def error(*arguments: object) -> str:
        assert main(["serve", str(folder), "--dtype", "float32", "--cache-tokens", "512", *map(str, arguments)]) == 2
        captured = capsys.readouterr()
        assert captured.err.splitlines()[-1].startswith("error: ")
        return captured.err

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1 port {port}" in error("--port", port)
    assert "belong together" in error("--certificate", "a.pem")
    assert "cannot read it" in error("--api-key-file", tmp_path / "none")
    (tmp_path / "empty").write_text("\n")
    assert "no key in it" in error("--api-key-file", tmp_path / "empty")
    shown = error("--api-key", "secret with spaces")
    assert "has spaces" in shown and "secret" not in shown
    assert "--api-key is empty; give at least one character" in error("--api-key", "")
    assert "--port: " in error("--port", 99999)
    assert "--time-limit: " in error("--time-limit", 0)
