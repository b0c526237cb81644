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
