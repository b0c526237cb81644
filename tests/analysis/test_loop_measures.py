"""Angular distance, logit lens, loss against loops and convergence against slow direct formulas."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from examples import covering
from hypothesis import given
from hypothesis import strategies as st
from loop_models import LOOPED, VARIANTS, batch, make, packed, tolerance
from models import architecture
from recorded_reference import recorded
from torch import Tensor

from yoco_u import YocoUForCausalLM
from yoco_u.analysis import (
    TokenClasses,
    angular_distance,
    angular_distances,
    logit_lens,
    loops_to_convergence,
    loss_against_loops,
    trace,
)
from yoco_u.analysis.convergence import first_steady
from yoco_u.analysis.loss import counts_around
from yoco_u.errors import UserError

every_looped = pytest.mark.parametrize("variant", LOOPED)


def arccos_distance(x: Tensor, y: Tensor) -> float:
    """The mean over tokens by the formula of arXiv 2403.17887, in numpy."""
    a, b = x.double().numpy(), y.double().numpy()
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    return float((np.arccos(cosine) / np.pi).mean())


def logits(model: YocoUForCausalLM, ids: Tensor, loops: int) -> Tensor:
    """The logits of one row by an ordinary call, (tokens, vocab)."""
    with torch.no_grad():
        return model(ids, num_loops=loops).logits[0].double()


# Angular distance


@pytest.mark.parametrize(
    ("variant", "num_loops"), [*((variant, None) for variant in VARIANTS), *((variant, 4) for variant in (*LOOPED, "yoco"))]
)
def test_angular_distances_of_every_layer_and_loop(variant: str, num_loops: int | None) -> None:
    model, text = make(variant), batch()
    found = angular_distances(model, [text], num_loops)
    reference = recorded(variant, num_loops)
    streams = len(reference.ends)
    layers = np.reshape([arccos_distance(x, y) for x, y in zip(reference.reads, reference.writes, strict=True)], (streams, -1))
    np.testing.assert_allclose(found.layers, layers.mean(0), rtol=tolerance(model))
    if num_loops is None and variant not in LOOPED:
        assert found.loops == []
    elif streams == 1:
        states = reference.loop_states()
        expected = [arccos_distance(x, y) for x, y in pairwise(states)]
        np.testing.assert_allclose([loop.distance for loop in found.loops], expected, rtol=tolerance(model))
        assert [loop.loop for loop in found.loops] == list(range(1, len(expected) + 1))


def test_angular_distances_average_over_all_tokens_of_all_batches() -> None:
    model = make("yoco_u")
    one, other = batch(2, 9), batch(1, 5, seed=2)
    together = np.array(angular_distances(model, [one, other]).layers)
    alone = [np.array(angular_distances(model, [part]).layers) for part in (one, other)]
    np.testing.assert_allclose(together, (18 * alone[0] + 5 * alone[1]) / 23, rtol=1e-9)


def test_without_gates_consecutive_outputs_are_what_layers_read_and_write() -> None:
    """So the distances are those of the hidden states that transformers collects, of which the last are normed."""
    model, text = make("yoco_u"), batch()
    with torch.no_grad():
        outputs = model(text["input_ids"], output_hidden_states=True).hidden_states
    expected = [arccos_distance(x[0], y[0]) for x, y in pairwise(outputs[:-1])]
    np.testing.assert_allclose(angular_distances(model, [text]).layers[-1 - len(expected) : -1], expected, rtol=1e-6)


@given(st.floats(1e-12, math.pi), st.floats(0.1, 10))
def test_angular_distance_is_exact_at_every_angle(angle: float, length: float) -> None:
    x = torch.tensor([1.0, 0.0], dtype=torch.float64)
    y = length * torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
    assert float(angular_distance(x, y)) == pytest.approx(angle / math.pi, rel=1e-6, abs=1e-15)


# Logit lens


@every_looped
def test_logit_lens_against_the_models_of_fewer_loops(variant: str) -> None:
    model, text = make(variant), batch()
    lens, ids, targets = logit_lens(model, [text]), text["input_ids"], text["shift_labels"][0]
    reference = recorded(variant)
    last = len(lens.loops)
    assert last == 2 if variant == "universal_transformer" else last == 3
    final = logits(model, ids, last).log_softmax(-1)
    for reading, state in zip(lens.loops, reference.loop_states()[1:], strict=True):
        ways = (
            (reading.rest, logits(model, ids, reading.loop), 1e-5 if model.config.experts else 1e-10),
            (reading.direct, reference.read_out(state), tolerance(model)),
        )
        for got, expected, exact in ways:
            log_p = expected.log_softmax(-1)
            kl = (final.exp() * (final - log_p)).sum(-1).mean().item()
            assert got.kl == pytest.approx(kl, rel=exact, abs=exact)
            assert got.agreement == pytest.approx((log_p.argmax(-1) == final.argmax(-1)).double().mean().item())
            assert got.loss == pytest.approx(-log_p[range(len(targets)), targets].mean().item(), rel=exact)
    assert lens.loops[-1].rest.kl == pytest.approx(0, abs=1e-6)
    assert lens.loops[-1].rest.agreement == 1


@pytest.mark.parametrize("variant", ["universal_transformer", "upper_loop", "gated upper loop"])
def test_both_ways_to_read_agree_where_nothing_follows_the_loop(variant: str) -> None:
    for reading in logit_lens(make(variant), [batch(2)]).loops:
        assert reading.direct.kl == pytest.approx(reading.rest.kl, abs=1e-9)
        assert reading.direct.loss == pytest.approx(reading.rest.loss, rel=1e-9)


def test_samples_are_positions_whose_prediction_changes() -> None:
    model, text = make("yoco_u"), batch(3)
    lens = logit_lens(model, [text, batch(3, seed=5)], samples=4)
    rows, targets = text["input_ids"].tolist(), text["shift_labels"].tolist()
    assert len(lens.samples) == 4
    for sample in lens.samples:
        places = [(r, n) for r, row in enumerate(rows) for n in range(len(row)) if row[: n + 1][-12:] == sample.context]
        assert len(places) == 1
        row, n = places[0]
        assert sample.target == targets[row][n]
        assert sample.rest[0].token != sample.rest[-1].token
        for loops, guess in enumerate(sample.rest, start=1):
            p = logits(model, text["input_ids"][row : row + 1], loops)[n].softmax(-1)
            assert guess.token == int(p.argmax())
            assert guess.probability == pytest.approx(float(p.max()), rel=1e-9)
    assert logit_lens(model, [text], samples=0).samples == []


def test_a_lens_of_more_loops_than_the_model_was_made_with() -> None:
    model, text = make("gated"), batch()
    lens = logit_lens(model, [text], num_loops=5)
    assert len(lens.loops) == 5
    final = logits(model, text["input_ids"], 5).log_softmax(-1)
    log_p = logits(model, text["input_ids"], 3).log_softmax(-1)
    assert lens.loops[2].rest.kl == pytest.approx((final.exp() * (final - log_p)).sum(-1).mean().item(), rel=1e-9)


# Loss against loops


@every_looped
def test_loss_against_loops(variant: str) -> None:
    model = make(variant)
    texts = [batch(2), packed([[5, 6, 7, 8], [9, 10]])]
    counts = counts_around(model.model.architecture)
    assert counts == list(range(1, 2 * max(stage["loops"] for stage in model.config.stages) + 3))
    some = [1, 3, counts[-1]]
    found = loss_against_loops(model, texts, some)
    for row, loops in zip(found, some, strict=True):
        nats = []
        for text in texts:
            with torch.no_grad():
                log_p = model(text["input_ids"], document_ids=text["document_ids"], num_loops=loops).logits.log_softmax(-1)
            nats += (-log_p.gather(-1, text["shift_labels"][..., None])).flatten().tolist()
        assert row.loops == loops
        assert row.loss == pytest.approx(np.mean(nats), rel=1e-5)
        assert row.perplexity == pytest.approx(math.exp(row.loss))


@pytest.mark.parametrize("loops", [1, 3, 126, 127, 128, 256])
def test_no_more_loops_are_tried_than_a_model_runs(loops: int) -> None:
    own = architecture("yoco_u", loops=loops)
    counts = counts_around(own)
    assert counts[0] == 1 and counts[-1] == min(2 * loops + 2, 256) >= loops
    assert own.with_loops(counts[-1]).num_loops == counts[-1]


@pytest.mark.parametrize("alive", [96, 500])
def test_logits_in_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch, alive: int) -> None:
    model, texts = make("yoco_u"), [batch(2)]
    whole = (logit_lens(model, texts), loss_against_loops(model, texts, [1, 3]), loops_to_convergence(model, texts))
    monkeypatch.setattr(trace, "_LOGITS_ALIVE", alive)
    pieces = (logit_lens(model, texts), loss_against_loops(model, texts, [1, 3]), loops_to_convergence(model, texts))
    for one, other in zip(whole[0].loops, pieces[0].loops, strict=True):
        assert other.rest.kl == pytest.approx(one.rest.kl, abs=1e-12)
        assert other.direct.loss == pytest.approx(one.direct.loss, rel=1e-12)
    assert [row.loss for row in pieces[1]] == pytest.approx([row.loss for row in whole[1]], rel=1e-12)
    assert pieces[2].all == whole[2].all


# Convergence


def steady_from(values: list[object]) -> int:
    """The first loop, counted from 1, from which all values are the same."""
    return next(t for t in range(1, len(values) + 1) if len(set(values[t - 1 :])) == 1)


@given(
    st.integers(1, 5).flatmap(lambda loops: st.lists(st.lists(st.integers(0, 2), min_size=loops, max_size=loops), min_size=1))
)
def test_first_steady_loop(tokens: list[list[int]]) -> None:
    values = torch.tensor(tokens).T  # (loops, tokens)
    if len(values) > 1:
        assert first_steady(values[1:] != values[:-1]).tolist() == [steady_from(token) for token in tokens]


@pytest.mark.parametrize(("variant", "limit"), covering(list(LOOPED), [0.05, 0.6]))
def test_loops_to_convergence_token_by_token(variant: str, limit: float) -> None:
    model, text = make(variant), batch()
    loops = 4
    classes = TokenClasses(("low", "unused", "high"), torch.tensor([0] * 40 + [2] * 56))
    found = loops_to_convergence(model, [text], loops, limit, classes)
    predictions = torch.stack([logits(model, text["input_ids"], t).argmax(-1) for t in range(1, loops + 1)])
    by_prediction = [steady_from(token) for token in predictions.T.tolist()]
    states = recorded(variant, loops).loop_states()
    moved = torch.stack([(y - x).norm(dim=-1) / y.norm(dim=-1) for x, y in pairwise(states)])
    by_state = [next(t for t in range(1, loops + 1) if (move[t:] <= limit).all()) for move in moved.T]

    def shares(steady: list[int], chosen: list[int]) -> list[float]:
        return [sum(steady[i] == t for i in chosen) / len(chosen) for t in range(1, loops + 1)]

    everything = list(range(len(by_prediction)))
    assert found.all.prediction == pytest.approx(shares(by_prediction, everything))
    assert found.all.state == pytest.approx(shares(by_state, everything))
    assert found.changes == pytest.approx(moved.mean(1).tolist(), rel=tolerance(model))

    targets = text["shift_labels"][0].tolist()
    assert [group.name for group in found.classes] == ["low", "high"]
    for group, chosen in zip(
        found.classes, ([i for i in everything if targets[i] < 40], [i for i in everything if targets[i] >= 40]), strict=True
    ):
        assert group.tokens == len(chosen)
        assert group.prediction == pytest.approx(shares(by_prediction, chosen))

    losses = -logits(model, text["input_ids"], loops).log_softmax(-1)[everything, targets]
    order = losses.argsort().tolist()
    assert sum(group.tokens for group in found.quarters) == len(everything)
    begin = 0
    for group in found.quarters:
        assert abs(group.tokens - len(everything) / 4) < 1
        assert group.prediction == pytest.approx(shares(by_prediction, order[begin : begin + group.tokens]))
        begin += group.tokens


# What cannot be measured


@pytest.mark.parametrize("measure", [logit_lens, loops_to_convergence])
def test_measures_that_follow_one_looped_stage(measure) -> None:
    with pytest.raises(UserError, match="no stage loops; expected one looped stage"):
        measure(make("yoco"), [batch()])
    with pytest.raises(UserError, match="no stage loops"):
        measure(make("yoco_u"), [batch()], 1)
    stages = [{"attention": "sliding", "layers": 1, "loops": 2}, {"attention": "cross", "layers": 1, "loops": 2}]
    with pytest.raises(UserError, match="stages 0, 1 loop; expected one"):
        measure(make("yoco_u", stages=stages), [batch()])


def test_a_tolerance_has_to_be_positive() -> None:
    with pytest.raises(UserError, match="tolerance is 0; expected more than 0"):
        loops_to_convergence(make("yoco_u"), [batch()], tolerance=0)


def test_models_are_left_without_hooks() -> None:
    model, texts = make("yoco_u"), [batch()]
    angular_distances(model, texts)
    logit_lens(model, texts)
    loops_to_convergence(model, texts)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
