"""Dry runs of the engine on the meta device: no step waits for the device but where tokens are read, nothing lies elsewhere."""

from typing import Any

import numpy as np
import pytest
import torch
from dry_run import META, on_meta
from engine_runs import VARIANTS
from models import architecture

from yoco_u import YocoUConfig, YocoUForCausalLM
from yoco_u.inference import Engine, EngineSettings, SamplingParams

UPLOADERS = ("block_tables", "gpu_plan", "packed_upload", "runner", "running_output", "token_exits")
SAME = {"window 1", "window 3", "window beyond the context", "nearly closed gates"}  # as others, where nothing has a value
READERS = ("logprobs", "sampler", "token_exits")


@pytest.mark.parametrize(
    ("variant", "kind"),
    [*((variant, None) for variant in VARIANTS if variant not in SAME), ("yoco_u", "int8"), ("parscale", "int8")],
)
def test_steps_of_every_architecture(variant: str, kind: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts in chunks beside decodes, decodes alone, three loop counts, scored prompts, a prompt that is cached."""
    name, settings = VARIANTS[variant]
    with META:
        model = YocoUForCausalLM(YocoUConfig.from_architecture(architecture(name, **settings)))
    chosen: dict[str, Any] = {
        "dtype": "bfloat16",
        "kv_dtype": kind,
        "cache_tokens": 512,
        "block_size": 4,
        "max_num_seqs": 8,
        "max_batched_tokens": 24,
    }
    engine = Engine(model.eval(), None, EngineSettings(**chosen))
    prompt = list(range(1, 30))
    requests = [
        engine.add(prompt[:length], SamplingParams(temperature=0, max_tokens=3, num_loops=loops, prompt_logprobs=scored))
        for length, loops, scored in ((1, 1, None), (29, 2, None), (20, 3, 0), (29, 1, None))
    ]
    run, copies = watched(monkeypatch)
    with run:
        for _ in range(100):
            if not engine.unfinished:
                break
            copies.clear()
            engine.step()
            scored = any(request.prompt_logprobs is not None and not request.finished for request in requests)
            assert copies.count("back") <= 1 + scored
    assert all(request.finished for request in requests)
    again = engine.add(prompt, SamplingParams(temperature=0, max_tokens=3, num_loops=2))
    with run:
        while engine.unfinished:
            copies.clear()
            engine.step()
        # A step of one decode: its plan and its new blocks go there, its token comes back.
        assert copies.count("there") <= 2 and copies.count("back") == 1
    assert again.cached_tokens == 28


@pytest.mark.parametrize("variant", ["yoco_u", "rins", "upper_loop"])
def test_steps_whose_tokens_leave_the_loop(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scores of each loop but the last come back too, as long as tokens are in it; here they are zero, and all leave."""
    with META:
        model = YocoUForCausalLM(YocoUConfig.from_architecture(architecture(variant)))
    settings = {"dtype": "bfloat16", "cache_tokens": 512, "block_size": 4, "max_num_seqs": 8, "max_batched_tokens": 24}
    engine = Engine(model.eval(), None, EngineSettings.model_validate(settings))
    how = [("auto", 0.5), ("auto", 0.0), (2, None), ("auto", 0.5)]
    requests = [
        engine.add(list(range(1, length)), SamplingParams(temperature=0, max_tokens=6, num_loops=loops, exit_threshold=below))
        for length, (loops, below) in zip((2, 30, 21, 30), how, strict=True)
    ]
    run, copies = watched(monkeypatch)
    with run:
        while engine.unfinished:
            copies.clear()
            engine.step()
            assert copies.count("back") <= 3
    assert [set(request.outputs[0].loops) for request in requests] == [{1}, {3}, {2}, {1}]


def watched(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[str]]:
    """A dry run, and the list that it notes copies in: `there` or `back`. What comes back is zeros."""
    run = on_meta(monkeypatch, host=True)
    copies: list[str] = []

    def upload(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
        copies.append("there")
        with run.relaxed():
            return torch.as_tensor(values, dtype=dtype).to(device)

    def read_back(tensor: torch.Tensor) -> Any:
        assert tensor.device == META
        copies.append("back")
        return np.zeros(tensor.shape).tolist()

    for module in UPLOADERS:
        monkeypatch.setattr(f"yoco_u.inference.{module}.upload", upload)
    for module in READERS:
        monkeypatch.setattr(f"yoco_u.inference.{module}.read_back", read_back)
    return run, copies
