"""The engine on the device: its greedy tokens and their log probabilities, which the model on the CPU is asked about.

If each token is the likeliest behind the tokens before it, the sequence is the one that greedy `generate()` writes. So one pass
over a sequence checks all of its tokens, and two tokens that are equally likely up to rounding are no error.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu_phases.check import BFLOAT16_FACTOR, verdict
from gpu_phases.check_models import architectures, build
from gpu_phases.record import Figure, Record
from gpu_phases.scale import Scale
from yoco_u.architecture import Architecture
from yoco_u.architecture.presets import DEPTH_FACTOR
from yoco_u.inference import Engine, EngineSettings, RequestOutput, SamplingParams
from yoco_u.inference.exits import loop_problem
from yoco_u.model import YocoUForCausalLM

NEW_TOKENS = 12
NATS = 1e-3
"""The largest error of a log probability in float32."""

GRAPH_NATS = 0.05
"""The largest difference between decoding with and without CUDA graphs, in bfloat16."""

INT8_NATS = 0.15
"""The same with keys and values kept as int8."""

NEVER_AND_ALWAYS = 0.0, 2.0
"""Thresholds of the angular distance between states before and after a loop, which is between 0 and 1."""


def check_engine(record: Record, scale: Scale, size: str) -> None:
    """At the smallest size everything, at larger ones what depends on the size."""
    for name, architecture in architectures(scale, size).items():
        if name in DEPTH_FACTOR:  # those are yoco with more layers
            continue
        subject = _Subject(architecture, scale.device)
        checks: dict[str, Callable[[], Figure]] = {
            "float32 tokens": partial(subject.against_the_model, "float32"),
            "bfloat16 tokens": partial(subject.against_the_model, "bfloat16"),
        }
        if torch.device(scale.device).type == "cuda":
            checks["bfloat16 tokens without CUDA graphs"] = subject.against_no_graphs
        if size == scale.check_sizes[0]:
            if architecture.experts is None:  # int8 moves the states by enough to choose other experts
                checks["int8 cache"] = partial(subject.against_the_model, "float32", limit=INT8_NATS, kv_dtype="int8")
            if architecture.looped_stages:
                checks["loop counts of one batch"] = partial(subject.against_the_model, "float32", (1, 2, None, 4))
            if not loop_problem(architecture):
                checks["tokens that leave the loop"] = partial(subject.against_the_model, "float32", (1, None), leave=True)
        for what, check in checks.items():
            record.measure(f"{name} {size}, engine, {what}", check)


class _Subject:
    """One architecture with random weights: on the CPU as the truth, and copied into engines on the device."""

    def __init__(self, architecture: Architecture, device: str) -> None:
        self.model, self.device = build(architecture), device
        window, draw = architecture.window or 40, torch.Generator().manual_seed(3)
        lengths = (1, 2, window - 1, window, window + 1, 3 * window + 5, 40)
        shared = torch.randint(architecture.vocab_size, (3 * window + 5,), generator=draw).tolist()
        self.prompts = [shared[:length] for length in lengths]  # one begins as the other, so that prefixes are found cached
        self.prompts.append(torch.randint(architecture.vocab_size, (25,), generator=draw).tolist())
        self._plain: dict[str, list[RequestOutput]] = {}  # what the engine answered with no settings besides the dtype

    def against_the_model(
        self, dtype: str, loops: Sequence[int | None] = (None,), limit: float = NATS, leave: bool = False, **settings: Any
    ) -> Figure:
        """The log probabilities that the engine tells, and by how much its tokens are below the likeliest ones.

        Args:
            loops: of the prompts, in turn.
            leave: tokens of one loop leave the loop after it, since all are below the threshold; the others never do.
        """
        plain = not settings and loops == (None,)
        requests = self._answers(dtype) if plain else self._run(self._engine(dtype, **settings), loops, leave)
        counts = [loops[index % len(loops)] for index in range(len(requests))]
        truths = list(map(partial(_logprobs, self.model), requests, counts))
        told, true, best = (torch.cat(parts) for parts in zip(*map(_of_tokens, requests, truths), strict=True))
        error, margin = (told - true).abs(), best - true
        agreement = float((margin == 0).double().mean())
        if dtype == "float32":
            return verdict(max(float(error.max()), float(margin.max())), limit, agreement=agreement)
        coarse = deepcopy(self.model).to(torch.bfloat16)
        rounded = torch.cat(
            [_of_tokens(one, _logprobs(coarse, one, own))[1] for one, own in zip(requests, counts, strict=True)]
        )
        ours, cpu = (float(x.square().mean().sqrt()) for x in (told - true, rounded - true))
        return verdict(ours / max(cpu, 2e-3), BFLOAT16_FACTOR, agreement=agreement, gpu_nats=ours, cpu_nats=cpu)

    def against_no_graphs(self) -> Figure:
        """Replayed graphs do what the same kernels do when they are launched one by one."""
        engine = self._engine("bfloat16")
        graphs = engine.runner.decode_graphs
        assert graphs is not None
        graphs.capture = None
        with_graphs, without = self._answers("bfloat16"), self._run(engine)
        errors = []
        for a, b in zip(with_graphs, without, strict=True):
            same = [x == y for x, y in zip(_tokens(a), _tokens(b), strict=True)]
            first = same.index(False) if False in same else len(same)
            errors += [abs(x - y) for x, y in zip(_told(a)[:first], _told(b)[:first], strict=True)]
        different = sum(_tokens(a) != _tokens(b) for a, b in zip(with_graphs, without, strict=True))
        error = max(errors, default=float("inf"))
        return verdict(error, GRAPH_NATS, sequences_that_differ=different)

    def _answers(self, dtype: str) -> list[RequestOutput]:
        if dtype not in self._plain:
            self._plain[dtype] = self._run(self._engine(dtype))
        return self._plain[dtype]

    def _engine(self, dtype: str, **settings: Any) -> Engine:
        """Few seats and small steps, so that requests wait, and prompts are cut into chunks beside decodes."""
        small = {"dtype": dtype, "block_size": 16, "cache_tokens": 4096, "max_num_seqs": 4, "max_batched_tokens": 100}
        return Engine(deepcopy(self.model).to(self.device), None, EngineSettings.model_validate(small | settings))

    def _run(self, engine: Engine, loops: Sequence[int | None] = (None,), leave: bool = False) -> list[RequestOutput]:
        requests = []
        for index, prompt in enumerate(self.prompts):
            own = loops[index % len(loops)]
            how = {"num_loops": "auto", "exit_threshold": NEVER_AND_ALWAYS[own == 1]} if leave else {"num_loops": own}
            params = {"temperature": 0, "max_tokens": NEW_TOKENS, "ignore_eos": True, "logprobs": 0, **how}
            requests.append(engine.add(prompt, SamplingParams.model_validate(params)))
        while engine.unfinished:
            engine.step()
        return requests


@torch.no_grad()
def _logprobs(model: YocoUForCausalLM, request: RequestOutput, loops: int | None) -> Tensor:
    """Of all tokens of the vocabulary, at each new token: (new tokens, vocab), from one pass without a cache."""
    ids = torch.tensor([request.prompt_token_ids + _tokens(request)])
    logits = model(ids, use_cache=False, num_loops=loops).logits[0, -NEW_TOKENS - 1 : -1]
    return logits.double().log_softmax(-1)


def _of_tokens(request: RequestOutput, truth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each new token: its log probability as the engine tells it, the true one, and that of the likeliest token."""
    chosen = truth.gather(-1, torch.tensor(_tokens(request))[:, None])[:, 0]
    return torch.tensor(_told(request), dtype=torch.float64), chosen, truth.max(-1).values


def _tokens(request: RequestOutput) -> list[int]:
    return request.outputs[0].token_ids


def _told(request: RequestOutput) -> list[float]:
    logprobs = request.outputs[0].logprobs
    assert logprobs is not None
    return [one.chosen.logprob for one in logprobs]
