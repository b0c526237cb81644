"""The flash attention of GPUs, with a stand-in for torch's operator, against attention by definition and the way of CPUs."""

import math
from inspect import signature
from itertools import groupby
from typing import Any

import flash
import pytest
import torch
from flash import use_flash
from hypothesis import given
from hypothesis import strategies as st
from models import EVERYTHING, EXPERTS, PRESETS, architecture, assert_same_gradients, build, gradients, tokens
from torch import Tensor

from yoco_u import YocoUConfig, YocoUForCausalLM
from yoco_u.errors import UserError
from yoco_u.model import backend, gpu_attention, segments
from yoco_u.model.gpu_attention import find_sequences, runs_flash
from yoco_u.model.segments import cumulative_lengths

N = 29
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in PRESETS},
    "everything": ("yoco_u", EVERYTHING),
    "window 1": ("yoco_u", {"window": 1}),
    "experts": ("yoco_u", {"experts": EXPERTS}),
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)


@st.composite
def rows_of_segments(draw: st.DrawFn) -> Tensor:
    """Segments of some rows, (rows, tokens): documents of any lengths, and padding on either side."""
    length = draw(st.integers(1, 40))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        begins = draw(st.lists(st.booleans(), min_size=length, max_size=length))
        row = torch.tensor(begins).long().cumsum(0) + 1
        padding = draw(st.integers(0, length))
        side = draw(st.sampled_from(["left", "right", "none"]))
        if side == "left":
            row[:padding] = 0
        elif side == "right":
            row[length - padding :] = 0
        rows.append(row)
    return torch.stack(rows)


@given(rows_of_segments())
def test_cumulative_lengths(found: Tensor) -> None:
    lengths = [len(list(run)) for row in found.tolist() for _, run in groupby(row)]
    expected = torch.tensor([0, *lengths]).cumsum(0).int()
    assert torch.equal(cumulative_lengths(found), expected)


@given(
    rows_of_segments(), st.integers(0, 2**32), st.integers(1, 2), st.integers(1, 3), st.integers(1, 12), st.integers(0, 40),
    st.integers(0, 4),
)  # fmt: skip
def test_attention_within_sequences(
    found: Tensor, seed: int, kv_heads: int, groups: int, window: int, kept: int, prefix: int
) -> None:
    """Windows, kept tokens and learned prefixes, each against masked scores of all pairs, values and gradients."""
    (rows, length), kept = found.shape, min(kept, found.shape[1])
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, 4, generator=generator, dtype=torch.float64).requires_grad_()

    q, k, v = draw(rows, length, kv_heads * groups), draw(rows, length, kv_heads), draw(rows, length, kv_heads)
    learned = draw(prefix, kv_heads), draw(prefix, kv_heads)
    i = torch.arange(length)
    causal = (i[None, :] <= i[:, None]) & (found[:, :, None] == found[:, None, :])  # (rows, queries, keys)
    sequences = find_sequences(cumulative_lengths(found), rows, length, kept, prefix)
    with pytest.MonkeyPatch.context() as patch:
        use_flash(patch)
        outputs = {
            "window": (sequences.attend(q, k, v, window), masked(q, k, v, causal & (i[:, None] - i < window))),
            "causal": (sequences.attend(q, k, v), masked(q, k, v, causal)),
            "kept": (
                sequences.attend_kept(q[:, length - kept :], k, v),
                masked(q[:, length - kept :], k, v, causal[:, length - kept :]),
            ),
        }
        if prefix:
            keys, values = (torch.cat([p.expand(rows, -1, -1, -1), x], 1) for p, x in zip(learned, (k, v), strict=True))
            seen = torch.cat([torch.ones(rows, length, prefix, dtype=torch.bool), causal], 2)
            outputs["prefixed"] = (sequences.attend_prefixed(q, k, v, learned), masked(q, keys, values, seen))
    for name, (actual, expected) in outputs.items():
        torch.testing.assert_close(actual, expected, msg=name)
        inputs = (q, k, v, *learned)
        weights = torch.randn(actual.shape, generator=generator, dtype=torch.float64)
        both = (torch.autograd.grad((x * weights).sum(), inputs, allow_unused=True) for x in (actual, expected))
        for a, b in zip(*both, strict=True):
            torch.testing.assert_close(torch.zeros(()) if a is None else a, torch.zeros(()) if b is None else b, msg=name)


def masked(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """Attention by its definition; `allowed` is (rows, queries, keys)."""
    groups = q.shape[2] // k.shape[2]
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(groups, 2)) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~allowed[:, None], -math.inf).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v.repeat_interleave(groups, 2))


def make(variant: str) -> YocoUForCausalLM:
    """In float64 where the model can."""
    name, settings = VARIANTS[variant]
    model = build(architecture(name, layers=2, **settings))
    return model if model.config.experts else model.double()


def batches() -> dict[str, dict[str, Tensor]]:
    padding = torch.ones(2, N, dtype=torch.long)
    padding[0, :5] = 0
    padding[1, 20:] = 0
    documents = torch.tensor([0] * 11 + [1] + [2] * 10 + [3] * 7).expand(2, -1)
    return {
        "plain": {},
        "padded": {"attention_mask": padding},
        "packed": {"document_ids": documents},
        "packed and padded": {"document_ids": documents, "attention_mask": (torch.arange(N) < 25).long().expand(2, -1)},
    }


@every_variant
def test_a_model_computes_what_it_computes_on_a_cpu(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits and gradients of rows with padding and documents; the CPU's are held to the reference by other tests."""
    model, ids = make(variant), tokens(2, N)
    exact = model.dtype == torch.float64 and "retention" not in variant
    tolerance = 1e-8 if exact else 2e-4

    def run(call: dict[str, Any], real: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logits = model(ids, use_cache=False, **call).logits[real]
        return logits, gradients(model, logits.double().square().mean())

    for name, call in batches().items():
        real = call.get("attention_mask", torch.ones_like(ids)).bool()
        expected, expected_gradients = run(call, real)
        found = call.get("document_ids", torch.ones_like(ids)) * call.get("attention_mask", 1)
        with monkeypatch.context() as patch:
            use_flash(patch)
            given_lengths = {"cu_seqlens": cumulative_lengths(found)} if call else {}
            for lengths in ({}, given_lengths):
                actual, actual_gradients = run(call | lengths, real)
                torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, msg=name)
                assert_same_gradients(actual_gradients, expected_gradients, 10 * tolerance)


@every_variant
def test_prefill_and_decode(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A padded prompt, of which the last token alone or some tokens are asked for, then single tokens and a chunk."""
    model, ids = make(variant), tokens(2, N)
    mask = batches()["padded"]["attention_mask"].flip(0).clone()
    mask[:, 16:] = 1
    tolerance = 1e-8 if model.dtype == torch.float64 and "retention" not in variant else 2e-4

    def run(keep: Any) -> list[Tensor]:
        cache, outputs = None, []
        for start, end in ((0, 20), (20, 21), (21, 22), (22, N)):
            call: dict[str, Any] = {"attention_mask": mask[:, :end], "past_key_values": cache, "use_cache": True}
            out = model(ids[:, start:end], logits_to_keep=keep if start == 0 else 0, **call)
            cache = out.past_key_values
            outputs.append(out.logits)
        return outputs

    for keep in (0, 1, 3, torch.tensor([2, 19]), torch.tensor([19])):
        with torch.no_grad(), monkeypatch.context() as patch:
            expected = run(keep)
            use_flash(patch)
            for a, b in zip(run(keep), expected, strict=True):
                torch.testing.assert_close(a[:, -1], b[:, -1], rtol=tolerance, atol=tolerance)


def test_generate_takes_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = make("yoco_u"), tokens(2, 12)
    mask = (torch.arange(12) >= torch.tensor([[0], [4]])).long()
    call: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    expected = model.generate(ids, **call)
    use_flash(monkeypatch)
    assert torch.equal(model.generate(ids, **call), expected)


@pytest.mark.parametrize("given_names", [False, True], ids=["torch 2.11", "later"])
def test_grouped_heads_are_announced_where_torch_asks_for_it(given_names: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def record(*args: Any, window_size: tuple[int, int], **settings: Any) -> Tensor:
        calls.append((window_size, settings))
        return flash.varlen_attn(*args, window_size=window_size)

    monkeypatch.setattr(gpu_attention, "varlen_attn", record)
    monkeypatch.setattr(gpu_attention, "_NAMES_GROUPED_HEADS", given_names)
    q, k = torch.randn(1, 5, 4, 8), torch.randn(1, 5, 2, 8)
    sequences = find_sequences(torch.tensor([0, 5], dtype=torch.int32), 1, 5, 5, 0)
    sequences.attend(q, k, k, 3)
    sequences.attend(q, k, k)
    assert calls == [((2, 0), calls[0][1]), ((-1, 0), calls[0][1])]
    assert calls[0][1] == ({"enable_gqa": True} if given_names else {})
    names = signature(torch.nn.attention.varlen.varlen_attn).parameters
    assert set(signature(flash.varlen_attn).parameters) <= set(names)


def test_what_flash_attention_runs_on(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    capability = (9, 0)
    assert runs_flash(gpu, torch.bfloat16, 128) and runs_flash(gpu, torch.float16, 64)
    assert not runs_flash(gpu, torch.float32, 128)
    assert not runs_flash(gpu, torch.bfloat16, 20) and not runs_flash(gpu, torch.bfloat16, 512)
    assert not runs_flash(cpu, torch.bfloat16, 128)
    capability = (7, 5)
    assert not runs_flash(gpu, torch.float16, 128)


def test_segments_are_read_once_and_only_if_nobody_says(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = make("yoco_u"), tokens(2, N)
    reads = []
    use_flash(monkeypatch)
    monkeypatch.setattr(segments, "read_back", lambda tensor: reads.append(tensor) or tensor.tolist())
    document_ids = batches()["packed"]["document_ids"]
    lengths = cumulative_lengths(document_ids)
    reads.clear()
    for call, expected in (({}, 0), ({"document_ids": document_ids}, 1), ({"attention_mask": torch.ones_like(ids)}, 1)):
        model(ids, use_cache=False, **call)
        assert len(reads) == expected
        reads.clear()
    model(ids, use_cache=False, document_ids=document_ids, cu_seqlens=lengths)
    assert not reads


def test_one_graph_of_a_block_serves_any_number_of_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own operator, traced without values."""
    torch.compiler.reset()  # tests before may have compiled a block so often that torch does not compile it again
    monkeypatch.setattr(backend, "runs_flash", lambda device, dtype, head_dim: True)
    graphs = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    with torch.device("meta"):
        model = YocoUForCausalLM(YocoUConfig.from_architecture(architecture(), use_cache=False)).bfloat16()
        for block in model.modules():
            if type(block).__name__ == "Block":
                block.compile(dynamic=False, fullgraph=True, backend=count)
        for sequences in (1, 4, 7):
            lengths = torch.zeros(sequences + 1, dtype=torch.int32)
            model(torch.zeros(2, N, dtype=torch.long), document_ids=torch.zeros(2, N, dtype=torch.long), cu_seqlens=lengths)
    assert len(graphs) == 2  # of the self-decoder and of the cross-decoder


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        (torch.tensor([0, 2 * N]), "cu_seqlens has dtype torch.int64 and shape"),
        (torch.tensor([[0, 2 * N]], dtype=torch.int32), "expected int32 of shape"),
        (torch.tensor([0], dtype=torch.int32), "expected int32 of shape"),
    ],
)
def test_impossible_lengths(lengths: Tensor, message: str) -> None:
    model, ids = make("yoco_u"), tokens(2, N)
    with pytest.raises(UserError, match=message):
        model(ids, document_ids=torch.ones_like(ids), cu_seqlens=lengths)
    with pytest.raises(UserError, match="cu_seqlens came without document_ids or attention_mask"):
        model(ids, cu_seqlens=torch.tensor([0, 2 * N], dtype=torch.int32))
