import pytest

from yoco_u.model import backend as sequences


@pytest.fixture(params=["blocks", "fused"])
def attention_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to run attention: that of CPUs, and through torch's fused kernels, that of every other device."""
    monkeypatch.setattr(sequences, "runs_blockwise", lambda tokens, device: request.param == "blocks" and tokens > 1)
