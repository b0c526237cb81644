"""Calibration of exits: heads against least squares from logits, losses against the model's own, means as they were wanted."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loop_models import batch, make, packed
from models import architecture, build, tokens

from yoco_u import YocoUForCausalLM
from yoco_u.analysis.exits import (
    _mean_at,
    _threshold_at,
    answer_spans,
    calibrate,
    documents,
    fit_heads,
    halves,
    steps,
    wanted_means,
)
from yoco_u.analysis.trace import watch_loops
from yoco_u.data import Batch, as_batch
from yoco_u.errors import UserError
from yoco_u.inference import Engine, EngineSettings, SamplingParams


def test_halves_and_documents() -> None:
    batches = [batch(3, seed=1), batch(2, seed=2), batch(1, length=5, seed=3)]
    first, second = halves(batches)
    assert [len(one["input_ids"]) for one in first] == [3]
    assert [one["input_ids"].tolist() for one in second] == [one["input_ids"].tolist() for one in batches[1:]]
    first, second = halves(batches[:1])
    assert first[0]["input_ids"].tolist() + second[0]["input_ids"].tolist() == batches[0]["input_ids"].tolist()
    assert documents(packed([[5, 6, 7], [8], [9, 9]])) == [[0, 5, 6, 7, 0], [0, 8, 0], [0, 9, 9, 0]]
    with pytest.raises(UserError, match="one row"):
        halves([batch(1)])


def test_tokens_without_a_target_are_refused() -> None:
    rows = batch(4)
    rows["shift_labels"][2, 3] = -100
    with pytest.raises(UserError, match="some tokens of the batches have no target"):
        calibrate(make("yoco_u"), [rows], 1.5)


def test_heads_are_least_squares() -> None:
    """Of log KL and of losses from the logits of whole passes, with the penalty as further rows."""
    model, rows = make("yoco_u"), batch(6)
    heads = {score: torch.tensor(found, dtype=torch.float64) for score, found in fit_heads(model, [rows], 3).items()}
    ids = rows["input_ids"]
    with torch.no_grad():
        logits = [model(ids, num_loops=loops).logits.flatten(0, 1).float().log_softmax(-1) for loops in (1, 2, 3)]
        with watch_loops(model, 0) as states:
            model(ids, num_loops=3)
    for loop in (0, 1):
        kl = F.kl_div(logits[loop], logits[2], reduction="none", log_target=True).sum(-1)
        x = states[loop + 1].flatten(0, 1).double()
        x = x / (x**2).mean(-1, keepdim=True).sqrt()
        x = np.concatenate([x.numpy(), np.ones((len(x), 1))], axis=1)
        penalty = np.sqrt(1e-3 * len(x)) * np.eye(x.shape[1])
        penalty[-1] *= np.sqrt(1e-3)
        labels = rows["shift_labels"].flatten()
        gain = F.nll_loss(logits[loop], labels, reduction="none") - F.nll_loss(logits[2], labels, reduction="none")
        for score, wanted in (("divergence", kl.log()), ("gain", gain)):
            y = np.concatenate([wanted.double().numpy(), np.zeros(len(penalty))])
            found, *_ = np.linalg.lstsq(np.concatenate([x, penalty]), y, rcond=None)
            torch.testing.assert_close(heads[score][loop], torch.from_numpy(found), rtol=0, atol=2e-3)


def test_thresholds_of_means() -> None:
    scores = torch.rand(2, 500, generator=torch.Generator().manual_seed(1))
    assert _mean_at(scores, 0.0) == 3 and _mean_at(scores, 2.0) == 1
    for mean in (1.2, 2.0, 2.7):
        threshold = _threshold_at(scores, mean)
        lower = float(scores[scores < threshold].max())
        assert _mean_at(scores, threshold) <= mean < _mean_at(scores, lower)
    loops = [next((i + 1 for i, score in enumerate(own) if score < 0.4), 3) for own in scores.T.tolist()]
    assert _mean_at(scores, 0.4) == pytest.approx(sum(loops) / len(loops))


def texts(rows: int, length: int = 40) -> Batch:
    return as_batch(tokens(rows, length + 1, seed=7).numpy(), eot_id=0)


@pytest.fixture(scope="module")
def model() -> YocoUForCausalLM:
    return build(architecture("yoco_u", loop_gate=0.3))


def test_calibration(model: YocoUForCausalLM) -> None:
    rows, done = texts(24), 0

    def advance() -> None:
        nonlocal done
        done += 1

    found = calibrate(model, [rows], 1.75, advance=advance)
    assert 0 < done <= steps(3, 1.75) and found.tokens == 12 * 40
    assert wanted_means(3, 1.75) == [1.5, 1.75, 2.0, 2.5]
    plain, others = found.results[:3], found.results[3:]
    for loops, one in enumerate(plain, start=1):
        ids, numbers = rows["input_ids"][12:], rows["document_ids"][12:]
        with torch.no_grad():
            logits = model(ids, document_ids=numbers, num_loops=loops).logits
        loss = F.cross_entropy(logits.flatten(0, 1), rows["shift_labels"][12:].flatten())
        assert (one.score, one.threshold, one.mean_loops) == (None, None, loops)
        assert one.loss == pytest.approx(float(loss), abs=2e-5)
    assert [one.score for one in others] == ["angular"] * 4 + ["divergence"] * 4 + ["gain"] * 4
    for one, wanted in zip(others, [1.5, 1.75, 2.0, 2.5] * 3, strict=True):
        assert one.mean_loops - wanted < 0.15
        assert one.score == "gain" or wanted - one.mean_loops < 0.15  # of this model, half the gains are none
        assert one.change == pytest.approx(one.loss - plain[2].loss)
    chosen = [one for one in others if one.score == found.exits.score and one.threshold == found.exits.threshold]
    assert len(chosen) == 1 and chosen[0].loss == min(others[at].loss for at in (1, 5, 9))
    settings = EngineSettings(dtype="float32", cache_tokens=512, max_num_seqs=2)
    engine = Engine(model, None, settings, found.exits)
    request = engine.add(documents(rows)[-1], SamplingParams(num_loops="auto", max_tokens=4, ignore_eos=True))
    while engine.unfinished:
        engine.step()
    assert len(request.outputs[0].loops) == 4 and max(request.outputs[0].loops) <= 3


def test_what_cannot_be_calibrated(model: YocoUForCausalLM) -> None:
    for mean in (1.0, 3.0, 4.5):
        with pytest.raises(UserError, match=f"the mean is to be {mean:g} loops, but tokens run 1 to 3"):
            calibrate(model, [texts(4)], mean)
    with pytest.raises(UserError, match="the model runs one loop"):
        calibrate(build(architecture("yoco")), [texts(4)])


def with_answers(model: YocoUForCausalLM, rows: int) -> tuple[Batch, list[list[list[int]]]]:
    """Rows of questions whose answers, between the tokens 1 and 2, are one or two tokens, and the places of these by row.

    Every other answer is what the model would write, the others are random.
    """
    draw = torch.Generator().manual_seed(3)
    found, places = [], []
    for row in range(rows):
        ids, own = [0], []
        for question in range(4):
            ids += [*torch.randint(3, 96, (3,), generator=draw).tolist(), 1]
            own.append(list(range(len(ids), len(ids) + 1 + question % 2)))
            for _ in own[-1]:
                with torch.no_grad():
                    likeliest = int(model(torch.tensor([ids]), num_loops=3).logits[0, -1, 3:].argmax()) + 3
                ids.append(likeliest if (row + question) % 2 else int(torch.randint(3, 96, (1,), generator=draw)))
            ids.append(2)
        found.append([*ids, 0])
        places.append(own)
    return as_batch(np.array(found), eot_id=0), places


def test_of_a_task_the_answers_count(model: YocoUForCausalLM) -> None:
    rows, places = with_answers(model, 8)
    found = calibrate(model, [rows], 1.75, answers=(1, 2))
    assert answer_spans(documents(rows)[5], 1, 2) == [(own[0], own[-1] + 1) for own in places[5]]
    for loops, one in enumerate(found.results[:3], start=1):
        with torch.no_grad():
            logits = model(rows["input_ids"], num_loops=loops).logits.float()
        nats, right = [], []
        for row in range(4, 8):
            ids = rows["input_ids"][row].tolist()
            for own in places[row]:
                nats += [float(F.cross_entropy(logits[row, place - 1], torch.tensor(ids[place]))) for place in own]
                right.append(all(int(logits[row, place - 1].argmax()) == ids[place] for place in own))
        assert one.loss == pytest.approx(sum(nats) / len(nats), abs=2e-5)
        assert one.accuracy == sum(right) / len(right)
    assert 0.3 < (found.results[2].accuracy or 0) < 0.8
    with pytest.raises(UserError, match="no answers"):
        calibrate(model, [rows], 1.75, answers=(94, 94))
