"""bfloat16 engines: prepacked weights and compiled kernels against the plain model, and both against float32."""

import itertools
from typing import Any

import pytest
import torch
from engine_runs import (
    GREEDY,
    VARIANTS,
    FixedLengths,
    assert_all_free,
    drain,
    full_logprobs,
    greedy,
    model,
    new_model,
    output,
    prompt,
    run,
)
from models import EXPERTS, architecture, build
from torch import Tensor

from yoco_u.inference import Engine, EngineSettings, SamplingParams, kernels, model_preparation, prepacking
from yoco_u.inference.prepacking import FusedDecodeBlock, PrepackedEmbedding, PrepackedLinear, can_prepack, prepack
from yoco_u.model.layers import RMSNorm

COARSE = {"experts", "one key-value head, tied"}  # choices of experts flip; logits of a tied head are large
OTHER_BLOCKS = {"as converted", "experts", "parscale", "streams with qk norm"}  # that are several calls
LENGTH = 40

needs_prepacking = pytest.mark.skipif(not can_prepack(build(architecture()).bfloat16()), reason="needs a C++ compiler")


def bfloat16_engine(variant: str, **settings: Any) -> Engine:
    chosen = {"dtype": "bfloat16", "cache_tokens": 512, "block_size": 4, "max_num_seqs": 4, "max_batched_tokens": 16} | settings
    return Engine(new_model(variant), None, EngineSettings(**chosen))


@needs_prepacking
@pytest.mark.parametrize(("vocabulary", "width"), [(70, 24), (64, 7), (129, 33)])
def test_a_tied_head_is_the_embedding_itself(vocabulary: int, width: int) -> None:
    weight = torch.randn(vocabulary, width).bfloat16()
    head = PrepackedLinear([weight])
    embedding = PrepackedEmbedding(head, width)
    assert embedding.prepacked is head.prepacked
    ids = torch.randint(vocabulary, (2, 9))
    assert torch.equal(embedding(ids), weight[ids])
    subject = bfloat16_engine("one key-value head, tied").runner.model
    assert subject.model.embed_tokens.prepacked is subject.lm_head.prepacked


def scores(subject: Engine) -> Tensor:
    """Log-probabilities of a prompt's tokens."""
    [request] = run(subject, [prompt(LENGTH)], greedy(prompt_logprobs=0, max_tokens=1))
    assert request.prompt_logprobs is not None
    return torch.tensor([one.chosen.logprob for one in request.prompt_logprobs if one is not None])


def float32_scores(variant: str) -> Tensor:
    ids = prompt(LENGTH)
    return full_logprobs(variant, ids)[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]


def is_prepacked(subject: Engine) -> bool:
    return any(isinstance(module, PrepackedLinear) for module in subject.runner.model.modules())


def plain_scores(variant: str) -> Tensor:
    """Of a bfloat16 engine whose model is as it was given."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_preparation, "can_prepack", lambda model: False)
        for module in (kernels, prepacking):
            patch.setattr(module, "compiled", lambda: False)
        subject = bfloat16_engine(variant)
        assert not is_prepacked(subject)
        return scores(subject)


def mean_distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().mean())


@needs_prepacking
@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_weights_and_kernels_are_as_near_to_float32_as_plain_bfloat16(variant: str) -> None:
    """On average within 0.03 of a nat of both (0.15 where experts are chosen or logits are large), at chunks of all sizes."""
    near = 0.15 if variant in COARSE else 0.03
    plain, truth = plain_scores(variant), float32_scores(variant)
    assert mean_distance(plain, truth) < near
    for chunk in (1, 9, 200):
        subject = bfloat16_engine(variant, max_batched_tokens=chunk, max_num_seqs=1)
        assert is_prepacked(subject)
        found = scores(subject)
        assert mean_distance(found, plain) < near
        assert mean_distance(found, truth) < near


@needs_prepacking
@pytest.mark.parametrize("variant", ["yoco_u", "two global KVs"])
def test_norms_are_those_that_they_replace(variant: str) -> None:
    """With weights far from one, which the scores of a whole model hardly show."""
    name, settings = VARIANTS[variant]
    model = build(architecture(name, **settings)).bfloat16()
    places = [
        (parent, name) for parent in model.modules() for name, child in parent.named_children() if isinstance(child, RMSNorm)
    ]
    given, expected = [], []
    for parent, name in places:
        norm = getattr(parent, name)
        torch.nn.init.uniform_(norm.weight, 0.1, 4.0)
        groups = len(norm.weight) // norm.normalized_shape[0]
        given.append(torch.randn(1, 3, groups, 2, *norm.normalized_shape).bfloat16())
        scaled = torch.nn.functional.rms_norm(given[-1].float(), norm.normalized_shape, eps=norm.eps)
        expected.append(scaled * norm.weight.float().view(groups, 1, -1))
    prepack(model)
    for (parent, name), x, right in zip(places, given, expected, strict=True):
        torch.testing.assert_close(getattr(parent, name)(x).float(), right, rtol=0.02, atol=0.01)


LOADS = [(variant, "bfloat16") for variant in VARIANTS]
LOADS += itertools.product(["yoco_u", "rins", "yoco_retention", "parscale"], ["float32", "int8"])


@needs_prepacking
@pytest.mark.parametrize(("variant", "kv_dtype"), LOADS)
def test_all_kinds_of_cache_under_load(variant: str, kv_dtype: str) -> None:
    """Batches of mixed loops, preemption, sharing, drafts: every reported log-probability is near that of float32."""
    subject = bfloat16_engine(variant, kv_dtype=kv_dtype, cache_tokens=56, max_num_seqs=6, max_batched_tokens=12)
    subject.speculation.lengths = FixedLengths(2)
    drafts = ["none"] if subject.cache.states else ["loops", "none", "prompt", "loops"]
    prompts = [[*prompt(9), *prompt(1 + 2 * i, seed=i)] for i in range(6)]
    settings = GREEDY | {"max_tokens": 9, "logprobs": 0}
    params = [SamplingParams(**settings, num_loops=1 + i % 3, drafts=drafts[i % len(drafts)]) for i in range(6)]
    found = run(subject, prompts, params)
    assert subject.scheduler.statistics.preemptions > 0
    distances = []
    for ids, own, request in zip(prompts, params, found, strict=True):
        text = ids + output(request)
        truth = full_logprobs(variant, text, own.num_loops)[len(ids) - 1 : -1]
        assert request.outputs[0].logprobs is not None
        for row, token, one in zip(truth, output(request), request.outputs[0].logprobs, strict=True):
            distances.append(abs(float(row[token]) - one.chosen.logprob))
    assert sum(distances) / len(distances) < (0.2 if variant in COARSE else 0.04)


@needs_prepacking
@pytest.mark.parametrize(
    ("variant", "weights"),
    [*((one, None) for one in VARIANTS), *((one, "int8") for one in ("yoco_u", "rins", "two global KVs", "gated"))],
)
def test_blocks_as_one_call_change_no_bit(variant: str, weights: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Among prompts in chunks, shared blocks, mixed loops and preemption."""
    if weights == "int8":
        pytest.importorskip("torchao")
    prompts = [[*prompt(9), *prompt(1 + 2 * i, seed=i)] for i in range(6)]
    params = [SamplingParams(**GREEDY | {"max_tokens": 8, "logprobs": 0, "num_loops": 1 + i % 3}) for i in range(6)]

    def scores_of(subject: Engine) -> list[tuple[int, float]]:
        found = [request.outputs[0].logprobs or [] for request in run(subject, prompts, params)]
        return [(one.chosen.token_id, one.chosen.logprob) for own in found for one in own]

    settings = {"weights": weights, "cache_tokens": 56, "max_num_seqs": 6, "max_batched_tokens": 12}
    subject = bfloat16_engine(variant, **settings)
    is_one_call = any(isinstance(module, FusedDecodeBlock) for module in subject.runner.model.modules())
    assert is_one_call == (variant not in OTHER_BLOCKS)
    if not is_one_call:
        return
    together = scores_of(subject)
    assert subject.scheduler.statistics.preemptions > 0
    monkeypatch.setattr(FusedDecodeBlock, "can_run", lambda block: False)
    assert scores_of(bfloat16_engine(variant, **settings)) == together


@needs_prepacking
def test_a_packed_model_runs_forward() -> None:
    plain = build(architecture()).bfloat16()
    prepacked = build(architecture()).bfloat16()
    prepack(prepacked)
    ids = torch.tensor([prompt(20), prompt(20, seed=2)])
    with torch.inference_mode():
        distance = (prepacked(ids).logits.float() - plain(ids).logits.float()).abs()
    assert float(distance.mean()) < 0.03
    assert not any(isinstance(module, torch.nn.Linear) for module in prepacked.modules())


def test_only_bfloat16_on_a_cpu_is_prepacked() -> None:
    assert not can_prepack(model("yoco_u"))
    assert not can_prepack(build(architecture()).bfloat16().to("meta"))


def test_choice_biases_of_experts_stay_float32() -> None:
    subject = Engine(
        build(architecture(experts=EXPERTS)), None, EngineSettings(dtype="bfloat16", cache_tokens=64, block_size=4)
    )
    weights = subject.runner.model.state_dict()
    assert {tensor.dtype for name, tensor in weights.items() if "choice_bias" in name} == {torch.float32}
    subject.add(prompt(9), greedy())
    drain(subject)
    assert_all_free(subject)
