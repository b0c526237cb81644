"""Requests made from our own OpenAPI schema, valid and not: none is answered with a failure of the server."""

import subprocess
import sys
from pathlib import Path

import httpx2
from examples import examples
from server_process import serving


def test_no_request_makes_the_server_fail(folder: Path, tmp_path: Path) -> None:
    """As docs/serving.md says it can be done for longer."""
    with serving(folder, "--max-output-tokens", "2", "--max-n", "2", "--max-num-loops", "3", log=tmp_path / "log") as process:
        command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{process.url}/openapi.json"]
        options = [
            "--checks",
            "not_a_server_error",
            "--max-examples",
            str(examples(8)),
            "--seed",
            "1",
            "--no-color",
            "--request-timeout",
            "600",
        ]
        done = subprocess.run([*command, *options], capture_output=True, text=True, cwd=tmp_path, timeout=3000, check=False)
        assert done.returncode == 0, done.stdout[-5000:]
        assert httpx2.get(f"{process.url}/health", timeout=60).status_code == 200
        process.wait_for('yoco_u_kv_blocks{state="held"}', 0)
        assert "Traceback" not in process.log.read_text()
