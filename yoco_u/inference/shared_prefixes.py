"""Run many prompts of which some begin alike: each common beginning is computed once, ahead of the prompts that go on from it.

Requests that arrive together cannot find each other's beginnings in the prefix cache, which knows what has been computed. So
the prompts are ordered as a tree of common beginnings, whole blocks of the cache long; each inner node is a request without an
output, and what lies below it runs when it is done, depth first, while it is in the cache for sure.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from yoco_u.inference.engine import Engine
from yoco_u.inference.outputs import RequestOutput
from yoco_u.inference.sampling_params import SamplingParams

_WORTH_TOKENS = 64  # a beginning is computed ahead if that saves so many tokens


@dataclass
class _Run:
    """A prompt to run, and what can run when it is done.

    Attributes:
        index: among the prompts; None for a beginning.
    """

    prompt: list[int]
    params: SamplingParams
    index: int | None
    then: list["_Run"] = field(default_factory=list)


_Member = tuple[list[int], _Run]
"""A run behind the tokens that it can share: whole blocks before the first position whose logits it needs."""


def run_shared(
    engine: Engine,
    prompts: Sequence[list[int]],
    params: Sequence[SamplingParams],
    finished: Callable[[int, RequestOutput], None] = lambda index, request: None,
) -> list[RequestOutput]:
    """Run prompts, computing what they have in common once.

    Args:
        prompts: token ids.
        params: one a prompt.
        finished: called with the index of each prompt that is done, in any order.

    Returns:
        One a prompt, in their order.

    Raises:
        UserError: if one of them is not possible.
    """
    found: list[RequestOutput | None] = [None] * len(prompts)
    ready = _plan(engine, prompts, params)[::-1]  # a stack
    running: dict[int, tuple[RequestOutput, _Run]] = {}
    try:
        while ready or running:
            while ready and len(running) < engine.settings.max_num_seqs:
                run = ready.pop()
                request = engine.add(run.prompt, run.params)
                running[id(request)] = request, run
            for update in engine.step():
                if not update.request.finished or id(update.request) not in running:
                    continue
                request, run = running.pop(id(update.request))
                ready += reversed(run.then)
                if run.index is not None:
                    found[run.index] = request
                    finished(run.index, request)
    finally:
        for request, _ in running.values():
            engine.abort(request)
    return [request for request in found if request is not None]


def _plan(engine: Engine, prompts: Sequence[list[int]], params: Sequence[SamplingParams]) -> list[_Run]:
    """What can run at once; all else hangs below it."""
    runs = [_Run(prompt, own, index) for index, (prompt, own) in enumerate(zip(prompts, params, strict=True))]
    if not engine.settings.prefix_caching:
        return runs
    block = engine.settings.block_size
    members: dict[int, list[_Member]] = {}  # by loop count: caches of different ones are never shared
    for run in runs:
        last = max(1, run.params.prompt_logprobs_start) if run.params.prompt_logprobs is not None else len(run.prompt)
        shareable = run.prompt[: max(0, last - 1) // block * block]
        members.setdefault(run.params.num_loops or engine.num_loops, []).append((shareable, run))
    return [run for group in members.values() for run in _split(sorted(group, key=lambda one: one[0]), 0, 0, block)]


def _split(members: list[_Member], known: int, at: int, block: int) -> Iterator[_Run]:
    """Runs of members that agree in their first `at` tokens, of which `known` are computed; in the order of their tokens."""
    for head, group in groupby(members, key=lambda one: one[0][at : at + block]):
        alike = list(group)
        if not head:
            yield from (run for _, run in alike)
            continue
        shared = _agreement(alike[0][0], alike[-1][0]) // block * block
        if (shared - known) * (len(alike) - 1) < _WORTH_TOKENS:
            yield from _split(alike, known, shared, block)
            continue
        _, first = alike[0]
        params = SamplingParams(max_tokens=0, num_loops=first.params.num_loops)
        yield _Run(first.prompt[: shared + 1], params, None, list(_split(alike, shared, shared, block)))


def _agreement(a: list[int], b: list[int]) -> int:
    """How many leading tokens are the same."""
    return next((index for index, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
