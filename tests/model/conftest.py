import pytest

from yoco_u.model import backend


@pytest.fixture(params=["blocks", "fused"])
def attention_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test twice: with the block-by-block attention of CPUs, and with torch's fused attention of every other device."""
    monkeypatch.setattr(backend, "runs_blockwise", lambda tokens, device: request.param == "blocks" and tokens > 1)
