"""Where tokens leave the loop, against the slow reference; accepted drafts, against greedy decoding without the engine."""

from statistics import fmean

import numpy as np
import pytest
import torch
from exit_reference import ExitReference
from loop_models import packed
from models import architecture, build, tokens
from prompt_lookup import searched

from yoco_u import YocoUForCausalLM
from yoco_u.analysis import TokenClasses
from yoco_u.analysis.acceptance import LENGTH, draft_acceptance
from yoco_u.analysis.exits import documents
from yoco_u.analysis.token_loops import LoopShares, exit_loops
from yoco_u.data import Batch, as_batch
from yoco_u.inference.exits import Exits


def by_angle(threshold: float) -> Exits:
    return Exits(num_loops=3, score="angular", threshold=threshold)


@pytest.mark.parametrize(("threshold", "counts"), [(0.22, {2, 3}), (0.34, {1, 2})])
def test_loops_are_those_of_the_reference(threshold: float, counts: set[int]) -> None:
    model = build(architecture("yoco_u"))
    weights = {name: tensor.detach().double() for name, tensor in model.state_dict().items()}
    rows = [packed([[5, 6, 7], [8, 9, 11, 3, 4, 20, 21, 22, 2, 60]]), packed([[40, 41, 42, 43, 44]])]
    loops, losses, targets, places = list[int](), list[float](), list[int](), list[int]()
    for text in (text for one in rows for text in documents(one)):
        reference = ExitReference(weights, model.config.architecture.model_dump(), threshold)
        log_p = reference.logits(text[:-1]).log_softmax(-1)
        assert reference.nearest > 1e-5
        loops += reference.loops
        losses += [-float(log_p[place, token]) for place, token in enumerate(text[1:])]
        targets += text[1:]
        places += range(1, len(text))
    classes = TokenClasses(("low", "high", "none"), torch.tensor([0] * 20 + [1] * 76))
    found = exit_loops(model, rows, by_angle(threshold), classes)

    def check(group: LoopShares, own: list[int]) -> None:
        assert group.tokens == len(own)
        assert group.shares == pytest.approx([sum(loops[at] == count for at in own) / len(own) for count in (1, 2, 3)])
        assert group.mean == pytest.approx(fmean(loops[at] for at in own))
        assert group.loss == pytest.approx(fmean(losses[at] for at in own), abs=2e-5)

    every = list(range(len(loops)))
    assert set(loops) == counts
    check(found.all, every)
    assert [group.name for group in found.classes] == ["low", "high"]
    for group, high in zip(found.classes, (False, True), strict=True):
        check(group, [at for at in every if (targets[at] >= 20) == high])
    by_loss = sorted(every, key=losses.__getitem__)
    for number, group in enumerate(found.quarters):
        check(group, [at for rank, at in enumerate(by_loss) if rank * 4 // len(every) == number])
    assert [group.name for group in found.places] == ["1", "2-3", "4-7", "8-15"]
    for group, (low, high) in zip(found.places, ((1, 1), (2, 3), (4, 7), (8, 15)), strict=True):
        check(group, [at for at in every if low <= places[at] <= high])
    inputs = [token for one in rows for token in one["input_ids"].flatten().tolist()]
    assert found.first == list(zip(inputs, loops, strict=True))


def texts(rows: int) -> Batch:
    return as_batch(tokens(rows, 15, seed=7).numpy(), eot_id=-1)


def likeliest(model: YocoUForCausalLM, ids: list[int], num_loops: int) -> int:
    with torch.no_grad():
        return int(model(torch.tensor([ids]), num_loops=num_loops).logits[0, -1].argmax())


def continued(model: YocoUForCausalLM, ids: list[int], num_loops: int, count: int) -> list[int]:
    found = list(ids)
    for _ in range(count):
        found.append(likeliest(model, found, num_loops))
    return found[len(ids) :]


def agreement(drafts: list[int], truth: list[int]) -> int:
    return next((place for place, pair in enumerate(zip(drafts, truth, strict=True)) if pair[0] != pair[1]), len(drafts))


def test_drafts_against_greedy_decoding() -> None:
    """Of a Universal Transformer, where one loop of all tokens is what drafts by loops come from."""
    model = build(architecture("universal_transformer", vocab_size=7, loop_gate=0.3))
    rows = as_batch(np.array([[5, *continued(model, [5], 3, 14)]]), eot_id=-1)  # so that it comes back to what it wrote
    right: dict[str, list[int]] = {"loops": [], "prompt": []}
    for text in documents(rows):
        for end in range(2, len(text) + 1):
            known = [*text[:end], likeliest(model, text[:end], 3)]
            truth = continued(model, known, 3, LENGTH)
            right["loops"].append(agreement(continued(model, known, 1, LENGTH), truth))
            if drafts := searched(known, LENGTH):
                right["prompt"].append(agreement(drafts, truth))
    found = draft_acceptance(model, [rows], num_loops=3)  # its own T is 2
    assert found.places == len(right["loops"]) == 14
    assert [kind.by for kind in found.kinds] == ["loops", "prompt"]
    for kind in found.kinds:
        own = right[kind.by]
        assert kind.drafts == len(own) and 0 < sum(own) < LENGTH * len(own)
        assert kind.accepted == [sum(one >= place for one in own) for place in range(1, LENGTH + 1)]
        assert kind.tokens_per_step == pytest.approx(1 + sum(own) / found.places)


def test_drafts_of_a_loop_that_changes_nothing_are_all_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("yoco_u.analysis.acceptance._PLACES", 20)
    model = build(architecture("yoco_u", loop_gate=0.3))
    with torch.no_grad():
        model.model.stages[0].loop_gates.zero_()
    loops, _ = draft_acceptance(model, [texts(3)]).kinds
    longest = model.config.window - 1  # tokens of one step have rows of their own in the ring
    assert loops.drafts == 20 and loops.accepted == [20] * longest and loops.tokens_per_step == 1 + longest


def test_a_model_that_cannot_draft_looks_up_alone() -> None:
    assert [kind.by for kind in draft_acceptance(build(architecture("upper_loop")), [texts(1)]).kinds] == ["prompt"]
