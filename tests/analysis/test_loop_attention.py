"""Attention spans against weights computed token by token, against the model's own attention, and by hand."""

import math

import numpy as np
import pytest
import torch
from loop_models import VARIANTS, batch, make, packed, tolerance
from recorded_reference import recorded
from torch import Tensor

from yoco_u.analysis import attention, attention_spans
from yoco_u.analysis.attention import attention_weights, visible_keys
from yoco_u.analysis.trace import Attended, last_states, unroll, watch_attention
from yoco_u.errors import UserError
from yoco_u.model import backend

every_variant = pytest.mark.parametrize("variant", VARIANTS)


def bucket(distance: int) -> int:
    return 0 if distance == 0 else int(math.log2(distance)) + 1


@every_variant
def test_spans_of_every_layer_token_by_token(variant: str) -> None:
    model, text = make(variant), batch()
    n = text["input_ids"].shape[1]
    found = attention_spans(model, [text], queries=1000)
    reference = recorded(variant)
    unrolled, streams = unroll(model.model.architecture), len(reference.ends)
    prefix = model.config.parallel["prefix_tokens"] if model.config.parallel else 0
    assert found.queries == n
    assert found.buckets == [0, 1, 2, 4, 8, 16]
    assert [span.layer for span in found.layers] == [layer.number for layer in unrolled if layer.attention != "retention"]
    for span in found.layers:
        figures, mass = [], np.zeros(len(found.buckets))
        for token in range(n):
            for stream in range(streams):
                for weights in reference.weights[stream * len(unrolled) + span.layer - 1][token].numpy():
                    own = weights[prefix:]
                    back = np.arange(len(own))[::-1]
                    for weight, distance in zip(own, back, strict=True):
                        mass[bucket(distance)] += weight
                    sees_first = token > 0 and len(own) == token + 1
                    figures.append(
                        (
                            (own * back).sum() / own.sum(), back.mean(),
                            -(weights * np.log(weights)).sum(), math.log(len(weights)),
                            own[0] if sees_first else math.nan, weights[:prefix].sum(),
                        )
                    )  # fmt: skip
        expected = np.nanmean(figures, axis=0)
        got = (span.distance, span.even_distance, span.entropy, span.even_entropy, span.first_token, span.prefix)
        np.testing.assert_allclose(got, expected, rtol=tolerance(model), atol=1e-12)
        np.testing.assert_allclose(span.mass, mass / len(figures), rtol=tolerance(model), atol=1e-12)
        assert sum(span.mass) + span.prefix == pytest.approx(1)
        if unrolled[span.layer - 1].attention == "sliding":
            assert span.mass[bucket(model.config.window - 1) + 1 :] == [0] * (
                len(span.mass) - bucket(model.config.window - 1) - 1
            )


@pytest.mark.parametrize("path", ["blocks", "fused"])
@every_variant
def test_weights_times_values_are_the_models_attention(variant: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In packed rows, for both implementations of the model's attention."""
    monkeypatch.setattr(backend, "runs_blockwise", lambda tokens, device: path == "blocks" and tokens > 1)
    model, text = make(variant), packed([list(range(1, 12)), list(range(20, 45)), [7]])
    positions = torch.arange(text["input_ids"].shape[1])
    wanted: list[Tensor] = []
    pairs: list[tuple[Tensor, Tensor]] = []
    for name in ("sliding_attention", "full_attention", "cross_attention"):
        monkeypatch.setattr(backend.PaddedBackend, name, watched(getattr(backend.PaddedBackend, name), pairs, name))
    with watch_attention(model, lambda _, attended: wanted.append(attention_weights(attended, positions))):
        last_states(model, text)
    assert len(wanted) == len(pairs) > 0
    for weights, (values, out) in zip(wanted, pairs, strict=True):
        values = values.repeat_interleave(weights.shape[1] // values.shape[2], dim=2)
        torch.testing.assert_close(
            torch.einsum("bhqk,bkhd->bqhd", weights, values.to(weights.dtype)), out, rtol=1e-5, atol=1e-5
        )


def watched(method, pairs: list, name: str):
    def call(self, *args):
        out = method(self, *args)
        if name == "cross_attention":
            values = args[2][1]
        else:
            values = args[3]
            if name == "full_attention" and args[4] is not None:
                values = torch.cat([args[4][1][None], values], dim=1)
        pairs.append((values, out))
        return out

    return call


def attended(scores: Tensor, **settings) -> Attended:
    """One head of one row whose scores are given, (tokens, tokens): q is a basis, k its coordinates."""
    n = len(scores)
    q = torch.eye(n, dtype=torch.float64)[None, :, None] * n**0.5
    return Attended(q, scores.double().T[None, :, None], **{"prefix": 0, "window": None, "segments": None} | settings)


def test_a_hand_built_attention() -> None:
    """Query 3 of 4 with scores 0, ln 2, 0, ln 4 has weights 1/8, 2/8, 1/8, 4/8."""
    scores = torch.zeros(4, 4)
    scores[3] = torch.tensor([0, math.log(2), 0, math.log(4)])
    subject, last = attended(scores), torch.tensor([3])
    torch.testing.assert_close(attention_weights(subject, last)[0, 0, 0], torch.tensor([1, 2, 1, 4], dtype=torch.float64) / 8)
    sums = attention._Sums()
    sums.add(subject, last)
    span = sums.mean(1, 4)
    assert span.distance == pytest.approx(3 / 8 + 2 * 2 / 8 + 1 / 8)
    assert span.even_distance == 1.5
    assert span.mass == pytest.approx([4 / 8, 1 / 8, 3 / 8, 0])
    assert span.entropy == pytest.approx(3 / 8 * math.log(8) + 2 / 8 * math.log(4) + 1 / 2 * math.log(2) - 1 / 8 * math.log(8))
    assert span.first_token == pytest.approx(1 / 8)

    windowed = attended(scores, window=2)
    torch.testing.assert_close(attention_weights(windowed, last)[0, 0, 0], torch.tensor([0, 0, 1, 4], dtype=torch.float64) / 5)
    sums = attention._Sums()
    sums.add(windowed, last)
    assert sums.mean(1, 4).first_token is None

    second = attended(scores, segments=torch.tensor([[1, 2, 2, 2]]))
    torch.testing.assert_close(attention_weights(second, last)[0, 0, 0], torch.tensor([0, 2, 1, 4], dtype=torch.float64) / 7)
    sums = attention._Sums()
    sums.add(second, last)
    assert sums.mean(1, 4).first_token == pytest.approx(2 / 7)


def test_visible_keys_are_causal_windowed_and_of_one_document() -> None:
    segments = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 2]])
    subject = attended(torch.zeros(8, 8), window=3, segments=segments)
    for i, row in enumerate(visible_keys(subject, torch.arange(8))[0].tolist()):
        assert row == [i - 3 < j <= i and segments[0, i] == segments[0, j] for j in range(8)]


@pytest.mark.parametrize("alive", [1, 200, 3000])
def test_scores_in_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch, alive: int) -> None:
    model, texts = make("parscale"), [batch(2), batch(1, 5)]
    whole = attention_spans(model, texts, queries=6)
    monkeypatch.setattr(attention, "_SCORES_ALIVE", alive)
    pieces = attention_spans(model, texts, queries=6)
    assert whole.queries == pieces.queries == 2 * 6 + 5
    for one, other in zip(whole.layers, pieces.layers, strict=True):
        assert other.mass == pytest.approx(one.mass, rel=1e-12)
        assert other.entropy == pytest.approx(one.entropy, rel=1e-12)
        assert other.first_token == pytest.approx(one.first_token, rel=1e-12)


def test_watching_changes_no_result() -> None:
    for variant in VARIANTS:
        model, text = make(variant), batch(2)
        plain = last_states(model, text)
        with watch_attention(model, lambda *_: None):
            assert torch.equal(last_states(model, text), plain)
        assert torch.equal(last_states(model, text), plain)


def test_a_model_of_retention_alone_has_no_attention() -> None:
    model = make("yoco_retention", stages=[{"attention": "retention", "layers": 2}])
    with pytest.raises(UserError, match="all layers are gated retention"):
        attention_spans(model, [batch()])
