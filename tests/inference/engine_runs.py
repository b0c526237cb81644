"""Engines over tiny models, and what they are held against: the same request through `generate()`, or its text in one pass."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from models import EXPERTS, PRESETS, architecture, build
from reference import reference_logits
from torch import Tensor

from yoco_u import Stage, YocoUForCausalLM
from yoco_u.inference import Completion, Engine, EngineSettings, RequestOutput, SamplingParams, TokenLogprobs
from yoco_u.inference.drafts import FixedLengths as AnyFixedLengths
from yoco_u.inference.drafts import StepTime

NEW = 8
WINDOW = 8  # of the `test` size
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": NEW, "ignore_eos": True}

SCALING = {"type": "yarn", "factor": 2.0, "original_length": 64, "attention_factor": 1.2, "truncate": False}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in PRESETS},
    "experts": ("yoco_u", {"experts": EXPERTS}),
    "qk norm, rotated": ("yoco_u", {"qk_norm": True, "rope_cross": True}),
    "two global KVs": ("yoco_u", {"global_kvs": 2, "qk_norm": True, "rope_cross": True}),
    "as converted": (
        "upper_loop",
        {"layers": 6, "global_kvs": 2, "attention_bias": True, "rope_cross": True, "rotary_scaling": SCALING},
    ),
    "gated": ("yoco_u", {"loop_gate": 0.3}),
    "gated upper loop": ("upper_loop", {"loop_gate": 0.3, "rope_cross": True}),
    "nearly closed gates": ("yoco_u", {"loop_gate": 0.3}),
    "window 1": ("yoco_u", {"window": 1}),
    "window 3": ("yoco_u", {"window": 3}),
    "window beyond the context": ("yoco_u", {"window": 500}),
    "one key-value head, tied": ("yoco_u", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "streams with qk norm": ("parscale", {"qk_norm": True, "parallel": {"streams": 3, "prefix_tokens": 2}}),
    "sliding only": ("yoco", {"stages": (Stage(attention="sliding", layers=4),)}),
    "four kinds": (
        "yoco",
        {
            "stages": (
                Stage(attention="retention", layers=1),
                Stage(attention="full", layers=1),
                Stage(attention="sliding", layers=1, loops=3),
                Stage(attention="cross", layers=1),
            )
        },
    ),
}


@cache
def model(variant: str) -> YocoUForCausalLM:
    """In float32, which the engine leaves as it is, so that engines can share it."""
    return new_model(variant)


def new_model(variant: str) -> YocoUForCausalLM:
    """For one engine alone, which may change it."""
    name, settings = VARIANTS[variant]
    built = build(architecture(name, **settings), pad_token_id=0)
    if variant == "nearly closed gates":  # most tokens are those of one loop
        with torch.no_grad():
            built.model.stages[0].loop_gates.fill_(0.05)
    return built


def engine(variant: str = "yoco_u", **settings: Any) -> Engine:
    chosen = {"dtype": "float32", "cache_tokens": 512, "block_size": 4, "max_num_seqs": 4, "max_batched_tokens": 16} | settings
    return Engine(model(variant), None, EngineSettings(**chosen))


class FixedLengths(AnyFixedLengths):
    """Drafts of one length in every step, whose times make sense."""

    def take(self, time: StepTime) -> None:
        assert time.decodes > 0 and time.seconds >= time.drafting >= 0


def drafting_engine(variant: str = "yoco_u", length: int = 4, **settings: Any) -> Engine:
    """An engine that drafts so many tokens in every step."""
    subject = engine(variant, **{"max_batched_tokens": 40} | settings)
    subject.speculation.lengths = FixedLengths(length)
    return subject


def prompt(length: int, seed: int = 1) -> list[int]:
    """Without token 0, from which generate() would infer padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 96, (length,), generator=generator).tolist()


def greedy(**settings: Any) -> SamplingParams:
    return SamplingParams(**GREEDY | settings)


def run(engine: Engine, prompts: Sequence[list[int]], params: SamplingParams | Sequence[SamplingParams]) -> list[RequestOutput]:
    """Requests that all arrive at once, run to their ends."""
    several = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    requests = [engine.add(ids, own) for ids, own in zip(prompts, several, strict=True)]
    drain(engine)
    assert all(request.finished for request in requests)
    return requests


def drain(engine: Engine) -> None:
    for _ in range(100_000):
        if not engine.unfinished:
            break
        engine.step()
    assert_all_free(engine)


def assert_all_free(engine: Engine) -> None:
    """Nothing runs or waits, and all blocks and seats can be taken again."""
    scheduler = engine.scheduler
    assert not engine.unfinished
    assert not scheduler.running and not scheduler.waiting
    scheduler.pool.check()
    assert scheduler.pool.num_available == scheduler.pool.num_blocks
    assert not any(scheduler.pool.refcounts)
    assert sorted(scheduler._seats) == list(range(engine.settings.max_num_seqs))


@cache
def _generated(variant: str, ids: tuple[int, ...], new: int, loops: int | None) -> list[int]:
    row = torch.tensor([ids])
    call = {} if loops is None else {"num_loops": loops}
    out = model(variant).generate(row, attention_mask=torch.ones_like(row), max_new_tokens=new, do_sample=False, **call)
    return out[0, len(ids) :].tolist()


def generated(variant: str, ids: list[int], new: int = NEW, loops: int | None = None) -> list[int]:
    """The new tokens of transformers' `generate()`, greedily."""
    return _generated(variant, tuple(ids), new, loops)


def likeliest(variant: str, ids: list[int], new: list[int], loops: int | None = None) -> list[int]:
    """The likeliest token at each place of `new` behind `ids`, from one pass over both without a cache.

    It equals `new` if and only if `new` is what greedy decoding gives, by induction over its places, in one pass instead of one
    for each token.
    """
    return full_logprobs(variant, [*ids, *new[:-1]], loops)[len(ids) - 1 :].argmax(-1).tolist() if new else []


def full_logprobs(variant: str, ids: list[int], loops: int | None = None) -> Tensor:
    """Of every position, (tokens, vocab), from one pass over the whole text without a cache."""
    return _full(variant, tuple(ids), loops)


@cache
@torch.no_grad()
def _full(variant: str, ids: tuple[int, ...], loops: int | None) -> Tensor:
    logits = model(variant)(torch.tensor([ids]), use_cache=False, num_loops=loops).logits[0]
    return logits.float().log_softmax(-1)


@cache
def _direct(variant: str, ids: tuple[int, ...]) -> Tensor:
    weights = {name: tensor.detach().double() for name, tensor in model(variant).state_dict().items()}
    return reference_logits(weights, model(variant).config.architecture.model_dump(), list(ids)).log_softmax(-1)


def direct_logprobs(variant: str, ids: list[int]) -> Tensor:
    """The same by the slow direct formulas in float64."""
    return _direct(variant, tuple(ids))


def assert_ranked(reported: TokenLogprobs, truth: Tensor) -> None:
    """One token's log-probability, rank and likeliest tokens, each within 2e-5 of those of `truth` (vocab,)."""
    chosen, near = float(truth[reported.chosen.token_id]), 2e-5
    assert abs(reported.chosen.logprob - chosen) < near
    assert int((truth > chosen + near).sum()) < reported.chosen.rank <= int((truth > chosen - near).sum())
    likeliest = truth.topk(len(reported.top)).values
    torch.testing.assert_close(torch.tensor([top.logprob for top in reported.top]), likeliest, rtol=0, atol=near)
    torch.testing.assert_close(truth[[top.token_id for top in reported.top]], likeliest, rtol=0, atol=near)


def chosen_logprobs(completion: Completion) -> Tensor:
    assert completion.logprobs is not None
    assert [one.chosen.token_id for one in completion.logprobs] == completion.token_ids
    return torch.tensor([one.chosen.logprob for one in completion.logprobs])


def output(request: RequestOutput) -> list[int]:
    assert len(request.outputs) == 1
    return request.outputs[0].token_ids


def assert_greedy(variant: str, request: RequestOutput, loops: int | None = None, new: int = NEW) -> None:
    """The one output has `new` tokens, and they are those of greedy decoding."""
    assert len(output(request)) == new
    assert output(request) == likeliest(variant, request.prompt_token_ids, output(request), loops)
