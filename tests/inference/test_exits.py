"""Tokens that leave the loop, in the engine: against the direct twin, and the same whatever else runs and however it is cut."""

import math
from functools import cache
from typing import Any

import pytest
import torch
from engine_runs import (
    VARIANTS,
    assert_greedy,
    chosen_logprobs,
    drafting_engine,
    drain,
    engine,
    full_logprobs,
    greedy,
    model,
    output,
    prompt,
    run,
)
from exit_reference import ExitReference
from models import architecture, build
from torch import Tensor

from yoco_u.errors import UserError
from yoco_u.inference import Engine, EngineSettings, RequestOutput, SamplingParams
from yoco_u.inference.exits import Exits
from yoco_u.inference.prepacking import can_prepack

NEW = 6
EVERYONE = 2.0  # above every angular distance
LEAVING = [
    "yoco_u", "window 3", "gated", "two global KVs", "universal_transformer", "rins", "upper_loop",
    "upper_loop_without_shared_kv",
]  # fmt: skip


def auto(threshold: float, **settings: Any) -> SamplingParams:
    given = {"num_loops": "auto", "exit_threshold": threshold, "max_tokens": NEW, "logprobs": 0}
    return greedy(**given | settings)


@cache
def _twin(variant: str, ids: tuple[int, ...], threshold: float) -> tuple[Tensor, list[int]]:
    weights = {name: tensor.detach().double() for name, tensor in model(variant).state_dict().items()}
    twin = ExitReference(weights, model(variant).config.architecture.model_dump(), threshold)
    logprobs = twin.logits(list(ids)).log_softmax(-1)
    assert twin.nearest > 1e-5, "a score lies so near the threshold that rounding may decide; take another one"
    return logprobs, twin.loops


def check(variant: str, request: RequestOutput, threshold: float) -> list[int]:
    """Compare a greedy request with the twin: tokens, log-probabilities and loops run. Returns the loops of all its tokens."""
    ids, [completion] = request.prompt_token_ids, request.outputs
    truth, loops = _twin(variant, (*ids, *completion.token_ids[:-1]), threshold)
    new = truth[len(ids) - 1 :]
    assert completion.token_ids == new.argmax(-1).tolist()
    torch.testing.assert_close(chosen_logprobs(completion).double(), new.max(-1).values, rtol=0, atol=2e-5)
    assert completion.loops == loops[len(ids) - 1 :]
    for token, one in enumerate(request.prompt_logprobs or []):
        assert one is None or abs(one.chosen.logprob - float(truth[token - 1, ids[token]])) < 2e-5
    return loops


def facts(request: RequestOutput) -> tuple[list[int], list[int]]:
    [completion] = request.outputs
    return completion.token_ids, completion.loops


def test_the_twin_without_exits_is_the_plain_model() -> None:
    for variant in ("upper_loop", "gated"):
        truth, loops = _twin(variant, tuple(prompt(11)), 0.0)
        assert set(loops) == {3}
        torch.testing.assert_close(truth.float(), full_logprobs(variant, prompt(11)), rtol=0, atol=2e-5)


@pytest.mark.parametrize("variant", LEAVING)
def test_every_architecture_against_the_twin(variant: str) -> None:
    """Prompts in chunks, decodes behind them, two thresholds in a batch, and prompt scores."""
    thresholds = (0.19, 0.31) if "gated" not in variant else (0.1, 0.16)
    params = [auto(thresholds[0], prompt_logprobs=0), auto(thresholds[1])]
    subject = engine(variant, max_batched_tokens=12, max_num_seqs=2)
    found = run(subject, [prompt(14), prompt(9, seed=4)], params)
    loops = [check(variant, request, threshold) for request, threshold in zip(found, thresholds, strict=True)]
    assert len(set(loops[0] + loops[1])) > 1
    if variant != "upper_loop":  # whose cross-decoder runs on the tokens alone whose logits are asked for
        assert (subject.runner.loops_run, subject.runner.tokens_run) == (sum(loops[0] + loops[1]), len(loops[0] + loops[1]))


@pytest.mark.parametrize("variant", ["yoco_u", "rins", "upper_loop"])
def test_at_threshold_0_all_is_as_without_bit_for_bit(variant: str) -> None:
    """And where everybody leaves, as with one loop."""
    prompts = [prompt(length, seed=length) for length in (1, 7, 21)]
    plain, subject = (
        run(engine(variant), prompts, greedy(**how, logprobs=0, prompt_logprobs=0))
        for how in ({}, {"num_loops": "auto", "exit_threshold": 0})
    )
    for one, other in zip(plain, subject, strict=True):
        assert one.outputs == other.outputs and one.prompt_logprobs == other.prompt_logprobs
    for request in run(engine(variant), prompts, auto(EVERYONE)):
        assert request.outputs[0].loops == [1] * NEW
        assert_greedy(variant, request, 1, NEW)


@pytest.mark.parametrize("variant", ["yoco_u", "window 3", "rins", "four kinds"])
def test_however_the_prompt_is_cut(variant: str) -> None:
    ids, thresholds = prompt(19), (0.19, 0.31)
    expected = [facts(run(engine(variant, max_batched_tokens=64), [ids], auto(threshold))[0]) for threshold in thresholds]
    assert len({loops for _, several in expected for loops in several}) > 1
    for size in (1, 2, 5, 11):
        for threshold, its in zip(thresholds, expected, strict=True):
            [request] = run(engine(variant, max_num_seqs=1, max_batched_tokens=size), [ids], auto(threshold, prompt_logprobs=0))
            assert facts(request) == its
    if variant != "four kinds":  # with retention before the loop
        check(variant, request, thresholds[1])


@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
def test_requests_of_all_kinds_share_a_batch(kv_dtype: str) -> None:
    kinds: list[SamplingParams] = [
        auto(0.19), greedy(num_loops=1), auto(0.31), greedy(num_loops=4, drafts="loops"), auto(EVERYONE),
        greedy(drafts="prompt"), auto(0.0), SamplingParams(num_loops="auto", exit_threshold=0.25, seed=3, n=2, max_tokens=9),
    ]  # fmt: skip
    prompts = [prompt(4 + 3 * i, seed=i) for i in range(7)] + [prompt(9, seed=2) * 2]
    alone = [run(engine(kv_dtype=kv_dtype, max_num_seqs=1), [ids], own)[0] for ids, own in zip(prompts, kinds, strict=True)]
    subject = drafting_engine("yoco_u", 5, max_num_seqs=8, kv_dtype=kv_dtype)
    for request, other in zip(run(subject, prompts, kinds), alone, strict=True):
        assert [one.token_ids for one in request.outputs] == [one.token_ids for one in other.outputs]
        assert [one.loops for one in request.outputs] == [one.loops for one in other.outputs]
    assert subject.speculation.accepted + subject.speculation.rejected > 0


@pytest.mark.parametrize("variant", ["yoco_u", "upper_loop_without_shared_kv"])
def test_giving_way_and_coming_back(variant: str) -> None:
    prompts = [prompt(4 + 2 * i, seed=i) for i in range(6)]
    params = [auto((0.19, 0.31)[i % 2], max_tokens=14) for i in range(6)]
    alone = [facts(run(engine(variant, max_num_seqs=1), [ids], own)[0]) for ids, own in zip(prompts, params, strict=True)]
    for caching in (True, False):
        small = engine(variant, cache_tokens=40, max_num_seqs=6, prefix_caching=caching)
        assert [facts(request) for request in run(small, prompts, params)] == alone
        assert small.scheduler.statistics.preemptions > 0


@pytest.mark.parametrize("variant", ["yoco_u", "rins", "upper_loop_without_shared_kv"])
def test_the_prefix_cache_is_shared_within_one_rule_alone(variant: str) -> None:
    ids = prompt(17)
    rules = [auto(0.19), auto(0.31), auto(0.0), greedy(max_tokens=NEW), greedy(max_tokens=NEW, num_loops=1)]
    fresh = [facts(run(engine(variant, prefix_caching=False), [ids], own)[0]) for own in rules]
    subject = engine(variant)
    for its, own in zip(fresh, rules, strict=True):
        for cached in (0, 16):
            [request] = run(subject, [ids], own)
            assert facts(request) == its and request.cached_tokens == cached
    subject = engine(variant, snapshot_bytes=0)  # window states are computed again, over blocks that are shared
    for _ in range(2):
        assert facts(run(subject, [ids], rules[1])[0]) == fresh[1]


@pytest.mark.skipif(not can_prepack(build(architecture()).bfloat16()), reason="needs a C++ compiler")
@pytest.mark.parametrize(("variant", "kv_dtype"), [("yoco_u", "bfloat16"), ("rins", "int8")])
def test_in_bfloat16_with_compiled_kernels(variant: str, kv_dtype: str) -> None:
    settings = EngineSettings(
        dtype="bfloat16", kv_dtype=kv_dtype, cache_tokens=256, block_size=4, max_num_seqs=3, max_batched_tokens=16
    )
    subject = Engine(build(architecture(variant)), None, settings)
    prompts = [prompt(length, seed=length) for length in (5, 13, 20)]
    for threshold, loops in ((0, 3), (EVERYONE, 1)):
        plain = greedy(max_tokens=NEW, logprobs=0, num_loops=loops)
        for one, other in zip(run(subject, prompts, plain), run(subject, prompts, auto(threshold)), strict=True):
            assert one.outputs == other.outputs
    mixed = run(subject, prompts, auto(0.25))
    assert len({loops for request in mixed for loops in request.outputs[0].loops}) > 1


@pytest.mark.parametrize(("variant", "kind"), [("yoco_u", "divergence"), ("upper_loop", "gain")])
def test_heads_against_the_twin(variant: str, kind: Any) -> None:
    heads = torch.randn(2, model(variant).config.hidden_size + 1, generator=torch.Generator().manual_seed(3)).mul(0.3)
    rows = heads.double().tolist()

    def score(loop: int, before: Tensor, after: Tensor) -> float:
        *weights, constant = rows[loop]
        found = float(after / after.square().mean().sqrt() @ torch.tensor(weights, dtype=torch.float64)) + constant
        return math.exp(found) if kind == "divergence" else max(found, 0)

    exits = Exits(num_loops=3, score=kind, threshold=0.7, heads=tuple(map(tuple, heads.tolist())))
    settings = EngineSettings(dtype="float32", cache_tokens=128, block_size=4, max_num_seqs=2, max_batched_tokens=12)
    [request] = run(Engine(model(variant), None, settings, exits), [prompt(14)], greedy(num_loops="auto", max_tokens=NEW))
    assert output(request) == output(run(Engine(model(variant), None, settings, exits), [prompt(14)], auto(0.7))[0])
    weights = {name: tensor.detach().double() for name, tensor in model(variant).state_dict().items()}
    twin = ExitReference(weights, model(variant).config.architecture.model_dump(), 0.7, score)
    new = twin.logits([*prompt(14), *output(request)[:-1]])[13:]
    assert output(request) == new.argmax(-1).tolist() and request.outputs[0].loops == twin.loops[13:]
    assert len(set(twin.loops)) > 1 and twin.nearest > 1e-5


def test_loops_are_counted() -> None:
    subject = engine()
    run(subject, [prompt(9), prompt(5)], [greedy(max_tokens=3), auto(EVERYONE, max_tokens=4)])
    tokens = [9 + 3 - 1, 5 + 4 - 1]
    assert (subject.runner.tokens_run, subject.runner.loops_run) == (sum(tokens), 3 * tokens[0] + tokens[1])
    before = subject.runner.loops_run
    request = subject.add(prompt(9), greedy(max_tokens=3, num_loops=2))
    drain(subject)
    assert request.outputs[0].loops == [2, 2, 2]
    assert subject.runner.loops_run == before + 2 * (9 + 3 - 1)


@pytest.mark.parametrize(
    ("variant", "problem"),
    [
        ("yoco", "the model runs one loop, which no token can leave; give a number of loops"),
        ("yoco_retention", "the model runs one loop"),
    ],
)
def test_models_whose_tokens_cannot_leave(variant: str, problem: str) -> None:
    with pytest.raises(UserError, match=f"num_loops is auto, but {problem}") as caught:
        engine(variant).add(prompt(3), auto(0.1))
    assert caught.value.setting == "num_loops"


def test_retention_in_the_loop_is_refused() -> None:
    with pytest.raises(UserError, match="num_loops is auto, but the model's loop is gated retention"):
        engine("yoco_retention", num_loops=2).add(prompt(3), auto(0.1))


def test_settings_that_do_not_fit() -> None:
    with pytest.raises(UserError, match=r"the model has no exits\.json; run yoco-u exits, or set exit_threshold"):
        engine().add(prompt(3), greedy(num_loops="auto"))
    for settings, problem in {
        "exit_threshold is for num_loops auto, but num_loops is None": {"exit_threshold": 0.1},
        "exit_threshold is for num_loops auto, but num_loops is 3": {"exit_threshold": 0.1, "num_loops": 3},
        "num_loops auto and drafts loops exclude each other; set drafts none": {"num_loops": "auto", "drafts": "loops"},
        "exit_threshold": {"num_loops": "auto", "exit_threshold": -0.1},
        "num_loops": {"num_loops": "Auto"},
    }.items():
        with pytest.raises(UserError, match=settings):
            greedy(**problem)
    assert set(LEAVING) <= set(VARIANTS)


def test_auto_drafts_nothing_where_the_engine_drafts() -> None:
    subject = drafting_engine("yoco_u", 4, drafts="prompt")
    [request] = run(subject, [prompt(5) * 3], auto(0.31))
    assert request.outputs[0].accepted_drafts == request.outputs[0].rejected_drafts == 0
    assert output(request) == output(run(engine(), [prompt(5) * 3], auto(0.31))[0])


def test_auto_of_the_engine() -> None:
    """Requests that name no loop count leave the loop as `exits.json` says, whose T is the engine's then."""
    exits = Exits(num_loops=4, score="angular", threshold=0.31)
    settings = {"dtype": "float32", "cache_tokens": 512, "block_size": 4, "max_num_seqs": 4, "max_batched_tokens": 16}
    expected = run(Engine(model("yoco_u"), None, EngineSettings(**settings, num_loops=4)), [prompt(9)], auto(0.31))
    subject = Engine(model("yoco_u"), None, EngineSettings(**settings, num_loops="auto", drafts="prompt"), exits)
    assert [facts(one) for one in run(subject, [prompt(9)], greedy(max_tokens=NEW))] == [facts(one) for one in expected]
    [plain] = run(subject, [prompt(9)], greedy(max_tokens=NEW, num_loops=2))
    assert plain.outputs[0].loops == [2] * NEW
    with pytest.raises(UserError, match="drafts is loops, but num_loops is auto here") as caught:
        subject.add(prompt(3), greedy(drafts="loops"))
    assert caught.value.setting == "drafts"
    for found, problem in ((None, r"no exits\.json"), (UserError("exits.json: damaged"), r"auto, but exits\.json: damaged")):
        with pytest.raises(UserError, match=problem):
            Engine(model("yoco_u"), None, EngineSettings(**settings, num_loops="auto"), found)


def test_exits_that_are_damaged_refuse_auto_alone() -> None:
    subject = engine()
    subject.exits = UserError("exits.json: damaged")
    assert run(subject, [prompt(3)], greedy(max_tokens=1))[0].outputs[0].loops == [3] and not subject.auto_loops
    for own in (auto(0.1), greedy(num_loops="auto")):
        with pytest.raises(UserError, match=r"num_loops is auto, but exits\.json: damaged"):
            subject.add(prompt(3), own)
