"""Run many prompts of which some begin alike: each common beginning is computed once, ahead of the prompts that go on from it.

The prefix cache only knows what has been computed, so requests that arrive together do not find their common beginnings in it.
Here the prompts are ordered as a tree of common beginnings, each a whole number of cache blocks long. An inner node of the tree
becomes a request without an output. When it is done, the nodes below it run, depth first, while it is certainly still cached.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from yoco_u.inference.engine import Engine
from yoco_u.inference.outputs import RequestOutput
from yoco_u.inference.sampling_params import SamplingParams

_WORTH_TOKENS = 64  # a common beginning is computed ahead if that saves at least so many tokens


@dataclass
class _Node:
    """A prompt, or a common beginning of several, and the nodes that can run when it is done.

    Attributes:
        index: which of the prompts it is; None for a common beginning.
    """

    prompt: list[int]
    params: SamplingParams
    index: int | None
    then: list["_Node"] = field(default_factory=list)


_Member = tuple[list[int], _Node]
"""A prompt's node, behind the tokens that others can share: the whole blocks before the first position that needs logits."""


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
    running: dict[int, tuple[RequestOutput, _Node]] = {}
    try:
        while ready or running:
            while ready and len(running) < engine.settings.max_num_seqs:
                node = ready.pop()
                request = engine.add(node.prompt, node.params)
                running[id(request)] = request, node
            for update in engine.step():
                if not update.request.finished or id(update.request) not in running:
                    continue
                request, node = running.pop(id(update.request))
                ready += reversed(node.then)
                if node.index is not None:
                    found[node.index] = request
                    finished(node.index, request)
    finally:
        for request, _ in running.values():
            engine.abort(request)
    return [request for request in found if request is not None]


def _plan(engine: Engine, prompts: Sequence[list[int]], params: Sequence[SamplingParams]) -> list[_Node]:
    """The nodes at the top of the tree, which can run at once."""
    nodes = [_Node(prompt, own, index) for index, (prompt, own) in enumerate(zip(prompts, params, strict=True))]
    if not engine.settings.prefix_caching:
        return nodes
    block = engine.settings.block_size
    members: dict[tuple[int, float | None], list[_Member]] = {}  # by loops: caches of different ones are never shared
    for node in nodes:
        last = max(1, node.params.prompt_logprobs_start) if node.params.prompt_logprobs is not None else len(node.prompt)
        shareable = node.prompt[: max(0, last - 1) // block * block]
        members.setdefault(engine.loops_of(node.params), []).append((shareable, node))
    return [node for group in members.values() for node in _split(sorted(group, key=lambda one: one[0]), 0, 0, block)]


def _split(members: list[_Member], known: int, at: int, block: int) -> Iterator[_Node]:
    """The nodes of members that agree in their first `at` tokens, in the order of their tokens.

    Args:
        known: how many of these tokens the node above computes.
    """
    for head, group in groupby(members, key=lambda one: one[0][at : at + block]):
        alike = list(group)
        if not head:
            yield from (node for _, node in alike)
            continue
        shared = _agreement(alike[0][0], alike[-1][0]) // block * block
        if (shared - known) * (len(alike) - 1) < _WORTH_TOKENS:
            yield from _split(alike, known, shared, block)
            continue
        _, first = alike[0]
        loops = {"num_loops": first.params.num_loops, "exit_threshold": first.params.exit_threshold}
        params = SamplingParams(max_tokens=0, **loops)
        yield _Node(first.prompt[: shared + 1], params, None, list(_split(alike, shared, shared, block)))


def _agreement(a: list[int], b: list[int]) -> int:
    """The length of the common beginning of two lists."""
    return next((index for index, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
