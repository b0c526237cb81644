"""What speculation accepts: drafts of the engine behind many places of a text, and how far each of them is right."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from yoco_u.analysis.exits import documents
from yoco_u.data import Batch
from yoco_u.inference import Engine, EngineSettings, SamplingParams
from yoco_u.inference.drafts import Drafting, FixedLengths
from yoco_u.inference.outputs import check_outputs
from yoco_u.inference.speculation import loops_draft
from yoco_u.model import YocoUForCausalLM

LENGTH = 8
"""Tokens of a draft, where the window is longer."""

_PLACES = 256
_SEATS, _TOKENS_PER_STEP = 16, 4096


@dataclass(frozen=True)
class Accepted:
    """What becomes of the drafts of one kind.

    Attributes:
        by: who drafts: `loops` or `prompt`.
        drafts: how many there were.
        accepted: for each token of a draft, the first one first, how many drafts were accepted up to it.
        tokens_per_step: tokens that a step with this kind of drafts gives on average, where nothing was drafted too: those that
            were accepted, and the one behind them.
    """

    by: Drafting
    drafts: int
    accepted: list[int]
    tokens_per_step: float


@dataclass(frozen=True)
class DraftAcceptance:
    """What speculation accepts.

    Attributes:
        places: places of the text behind which tokens were to be drafted.
        kinds: the kinds of drafts that the model can make.
    """

    places: int
    kinds: list[Accepted]


def draft_acceptance(model: YocoUForCausalLM, batches: Iterable[Batch], num_loops: int | None = None) -> DraftAcceptance:
    """Let the engine draft and verify once behind each of 256 places, evenly spaced over all tokens of the text.

    The document up to the place is a prompt, whose greedy continuation by all loops is what drafts must hit: the engine samples
    its first token, and then drafts up to eight tokens behind that, whatever their chances, and verifies them in the same step.

    Args:
        model: in float32 on a CPU.
        num_loops: T; the model's own by default.

    Raises:
        UserError: if the model cannot take drafts back, or its logits are not finite.
    """
    architecture = model.model.at_loops(num_loops)
    prompts = _prompts([text for batch in batches for text in documents(batch)])
    room = max(map(len, prompts)) + LENGTH + 2
    seats = max(1, min(_SEATS, _TOKENS_PER_STEP // room))
    settings = EngineSettings(
        dtype="float32", num_loops=architecture.num_loops, prefix_caching=False, max_num_seqs=seats,
        max_batched_tokens=seats * room, cache_tokens=seats * (room + 128),
    )  # fmt: skip
    engine = Engine(model, None, settings)
    engine.speculation.lengths = FixedLengths(LENGTH)
    kinds: list[Drafting] = ["prompt"]
    if loops_draft(model.model.architecture, architecture.num_loops):
        kinds.insert(0, "loops")
    groups = [prompts[start : start + seats] for start in range(0, len(prompts), seats)]
    found = []
    for by in kinds:
        drafts = [one for group in groups for one in _verified(engine, group, by)]
        longest = max(drafted for drafted, _ in drafts)
        accepted = [sum(right >= token for _, right in drafts) for token in range(1, longest + 1)]
        rate = 1 + sum(right for _, right in drafts) / len(drafts)
        found.append(Accepted(by, sum(drafted > 0 for drafted, _ in drafts), accepted, rate))
    return DraftAcceptance(len(prompts), found)


def _prompts(texts: Sequence[list[int]]) -> list[list[int]]:
    """The beginnings of texts up to evenly spaced places. Behind a single token drafts would come at once, so none is one."""
    places = [(text, end) for text in texts for end in range(2, len(text) + 1)]
    chosen = torch.linspace(0, len(places) - 1, min(_PLACES, len(places))).round().long().tolist()
    return [text[:end] for text, end in (places[place] for place in chosen)]


def _verified(engine: Engine, prompts: Sequence[list[int]], by: Drafting) -> list[tuple[int, int]]:
    """How many tokens are drafted behind each prompt in one step, and how many of them are accepted."""
    params = SamplingParams(max_tokens=LENGTH + 2, temperature=0, ignore_eos=True, drafts=by)
    requests = [engine.add(prompt, params) for prompt in prompts]
    engine.step()  # computes all prompts, and samples a token behind each
    engine.step()  # drafts behind these tokens, and verifies that
    for request in requests:
        engine.abort(request)
    check_outputs(requests)
    outputs = [request.outputs[0] for request in requests]
    return [(one.accepted_drafts + one.rejected_drafts, one.accepted_drafts) for one in outputs]
