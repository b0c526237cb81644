"""Dry runs of every preset on the meta device: no pass waits for it but where it says so, and no tensor lies elsewhere."""

from typing import Any

import pytest
import torch
from dry_run import META, HiddenCopyError, OnDevice, on_meta
from examples import covering
from models import EVERYTHING, EXPERTS, PRESETS, architecture
from torch import Tensor

from yoco_u import YocoUConfig, YocoUForCausalLM
from yoco_u.model import YocoUCache

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in PRESETS},
    "everything": ("yoco_u", EVERYTHING),
    "experts": ("yoco_u", {"experts": EXPERTS | {"auxiliary_loss_weight": 0.01}}),
}
CASES = [
    *((variant, "autocast") for variant in VARIANTS),
    *((variant, precision) for variant in ("yoco_u", "yoco_retention", "parscale") for precision in ("bfloat16", "float32")),
    ("experts", "bfloat16"),  # in float32, meta has no grouped products
]
PASSES: list[tuple[str, dict[str, Any]]] = [
    ("plain", {}),
    ("packed", {"return_logits": False}),
    ("packed and padded", {"num_loops": 2, "return_logits": False}),
]
BATCH, TOKENS = 2, 40


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> OnDevice:
    return on_meta(monkeypatch)


def make(variant: str, precision: str, run: OnDevice) -> YocoUForCausalLM:
    name, settings = VARIANTS[variant]
    with META:
        model = YocoUForCausalLM(YocoUConfig.from_architecture(architecture(name, layers=2, **settings)))
    run.autocast = precision == "autocast"
    return model.bfloat16() if precision == "bfloat16" else model


def whole(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=META)


def inputs(kind: str) -> dict[str, Tensor]:
    return {
        "plain": {},
        "packed": {"document_ids": whole(BATCH, TOKENS), "cu_seqlens": whole(6, dtype=torch.int32)},
        "packed and padded": {"document_ids": whole(BATCH, TOKENS), "attention_mask": whole(BATCH, TOKENS)},
    }[kind]


@pytest.mark.parametrize(("case", "a_pass"), [*covering(CASES, PASSES), *((("yoco_u", "autocast"), one) for one in PASSES)])
def test_training_passes(case: tuple[str, str], a_pass: tuple[str, dict[str, Any]], run: OnDevice) -> None:
    model, ids, (kind, settings) = make(*case, run).train(), whole(BATCH, TOKENS), a_pass
    with run:
        out = model(ids, shift_labels=ids, use_cache=False, **inputs(kind), **settings)
        out.loss.backward()
    assert out.loss.device == META
    assert (out.logits is None) == bool(settings)
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(("case", "loops"), covering(CASES, [None, 2]))
def test_prefill_and_decode(case: tuple[str, str], loops: int | None, run: OnDevice) -> None:
    """With a loop count of the call's own, also behind a mask."""
    model, mask = make(*case, run).eval(), None if loops is None else whole(BATCH, TOKENS + 1)
    cache = YocoUCache(model.model.architecture.with_loops(loops or model.model.architecture.num_loops))
    with run, torch.no_grad():
        for start, end in ((0, TOKENS), (TOKENS, TOKENS + 1)):
            call = {} if mask is None else {"attention_mask": mask[:, :end]}
            out = model(whole(BATCH, end - start), past_key_values=cache, logits_to_keep=1, num_loops=loops, **call)
            assert out.logits.shape == (BATCH, 1, 96)
        kept = model(whole(BATCH, TOKENS), use_cache=False, logits_to_keep=whole(5)).logits
        assert kept.shape == (BATCH, 5, 96)


def test_a_chunk_behind_a_filled_cache(run: OnDevice) -> None:
    model = make("yoco_u", "bfloat16", run).eval()
    cache = YocoUCache(model.model.architecture)
    with run, torch.no_grad():
        model(whole(BATCH, TOKENS), past_key_values=cache)
        out = model(whole(BATCH, 7), past_key_values=cache)
    assert out.logits.shape == (BATCH, 7, 96)


def test_the_dry_run_sees_what_it_must_see(run: OnDevice) -> None:
    x = torch.zeros(3, 4, device=META)
    hidden = [
        lambda: torch.tensor([1.0], device=META),
        lambda: x.new_tensor([1.0]),
        lambda: torch.as_tensor([1], device="meta"),
        lambda: torch.zeros(2),
        lambda: x[[0, 2]],
        lambda: x + torch.ones(()),
        lambda: x.to("cpu"),
    ]
    on_host = torch.zeros(3, 4)
    hidden += [lambda: on_host.to(META), lambda: x.to(on_host), lambda: x[on_host[:, 0].long()]]
    for copy in hidden:
        with run, pytest.raises(HiddenCopyError):
            copy()
    for read in (lambda: x.sum().item(), x.tolist, lambda: bool(x.any()), x.nonzero, lambda: x[x > 0]):
        with run, pytest.raises((RuntimeError, NotImplementedError)):
            read()
