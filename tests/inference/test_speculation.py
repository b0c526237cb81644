"""Speculative decoding against the plain engine, token for token: whatever is drafted, and whatever else a request asks for."""

from collections.abc import Callable, Sequence

import pytest
import torch
from engine_runs import VARIANTS, assert_greedy, drafting_engine, drain, engine, greedy, output, prompt, run
from torch import Tensor

from yoco_u.inference import Engine, speculation
from yoco_u.inference.sampler_state import SamplerState

LOOPING = ["yoco_u", "universal_transformer", "rins", "upper_loop_without_shared_kv", "gated", "window 3", "two global KVs"]


def guesses(monkeypatch: pytest.MonkeyPatch, tokens: Callable[[SamplerState, int], int]) -> None:
    """Let the model's drafts be these tokens, by the state of their output and how far ahead they are."""

    def made_up(logits: Tensor, states: Sequence[SamplerState], ahead: int) -> list[int]:
        return [tokens(state, ahead) for state in states]

    monkeypatch.setattr(speculation, "guess", made_up)


def counts(subject: Engine) -> tuple[int, int]:
    return subject.speculation.accepted, subject.speculation.rejected


@pytest.mark.parametrize("by", ["loops", "prompt"])
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in ("yoco_retention", "four kinds")])
def test_every_architecture(variant: str, by: str) -> None:
    subject = drafting_engine(variant, drafts=by)
    for request in run(subject, [prompt(length, seed=length) for length in (1, 7, 21)], greedy()):
        assert_greedy(variant, request)
    if variant in LOOPING and by == "loops":
        assert sum(counts(subject)) > 0


@pytest.mark.parametrize("length", [1, 2, 7])
@pytest.mark.parametrize("right", ["always", "never", "at random"])
@pytest.mark.parametrize("variant", LOOPING)
def test_drafts_that_are_right_wrong_and_mixed(variant: str, right: str, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The drafts are made up from what the plain engine gave; if all are right, all but one token of each step were drafted."""
    prompts, new = [prompt(3 + 4 * i, seed=i) for i in range(3)], 16
    expected = [output(request) for request in run(engine(variant), prompts, greedy(max_tokens=new))]
    generator = torch.Generator().manual_seed(length)
    subject = drafting_engine(variant, length, drafts="loops", block_size=64 if right == "always" else 4)
    truth: dict[SamplerState, list[int]] = {}

    def made_up(state: SamplerState, ahead: int) -> int:
        token, place = truth[state], state.num_tokens + ahead
        is_right = right == "always" or (right == "at random" and bool(torch.rand((), generator=generator) < 0.7))
        return token[place] if is_right else (token[place] + 1) % 96

    guesses(monkeypatch, made_up)
    requests = [subject.add(ids, greedy(max_tokens=new)) for ids in prompts]
    truth.update({own.sampler: tokens for own, tokens in zip(subject._outputs.values(), expected, strict=True)})
    drain(subject)
    assert [output(request) for request in requests] == expected
    accepted, rejected = counts(subject)
    assert (rejected == 0) == (right == "always") and (accepted == 0) == (right == "never")
    if right == "always":
        steps = -(-(new - 1) // (1 + min(length, subject.speculation._most)))
        assert [request.outputs[0].accepted_drafts for request in requests] == [new - 1 - steps] * 3
