"""Speculative decoding: tokens are drafted before a step, and the step computes behind all of them whether they are right.

Drafts by loops are made for this architecture. A token that is drafted runs the first loop of the self-decoder and the
cross-decoder. Keys and values of the first loop depend on the tokens before alone, so those of a right draft are what they
would be without drafting, and so is the state after the first loop: the step that verifies it runs the other loops only. What
the draft wrote to the global KV is provisional, and written again by that step.

A draft is right if it is the token that the sampler chooses at its place, with the random number, penalties and grammar of that
place. So an output has the same tokens with and without drafts.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from yoco_u.architecture import Architecture
from yoco_u.device import upload
from yoco_u.errors import UserError
from yoco_u.inference.drafts import LONGEST, Acceptance, Candidate, Drafter, Drafting, DraftLengths, StepTime
from yoco_u.inference.request import Request, Status
from yoco_u.inference.runner import Runner
from yoco_u.inference.running_output import RunningOutput
from yoco_u.inference.sampler import guess
from yoco_u.inference.scheduler import Scheduler
from yoco_u.inference.step import Chunk, Step


@dataclass(eq=False)
class _Draft:
    """The drafted tokens of one output in one step.

    Attributes:
        length: how many there is room for.
        first_row: the index of its first row among the rows of the rings that are kept.
        logits: behind the last known token and behind each draft, (1 + drafts, vocab).
        accepted: how many drafts are computed for good.
    """

    output: RunningOutput
    drafter: Drafter
    chunk: Chunk
    length: int
    first_row: int = 0
    logits: Tensor | None = None
    accepted: int = 0


class Speculation:
    """Drafts for the outputs of an engine.

    Args:
        default: how requests draft that do not say.

    Attributes:
        lengths: chooses how many tokens to draft.
        accepted, rejected: drafted tokens that became part of an output, and those that did not.

    Raises:
        UserError: if the model cannot take tokens back.
    """

    def __init__(self, scheduler: Scheduler, runner: Runner, default: Drafting) -> None:
        self._scheduler, self._runner, self._default = scheduler, runner, default
        self.lengths = DraftLengths()
        self.accepted = self.rejected = 0
        self._usual: dict[Drafting, Acceptance] = {"loops": Acceptance(), "prompt": Acceptance()}
        window = runner.cache.shape.window
        self._most = LONGEST if window is None else min(LONGEST, window - 1)  # no two tokens of a chunk share a row of a ring
        self._drafts: dict[RunningOutput, _Draft] = {}
        self._decodes = 0  # of a step that has nothing else, and so is timed
        self.check(default)

    def check(self, drafting: Drafting | None) -> None:
        """Refuse drafts that would have to be taken back from a model that cannot forget.

        Raises:
            UserError: as it says.
        """
        if drafting in ("loops", "prompt") and self._runner.architecture.num_slots("retention"):
            problem = f"drafts is {drafting}, but the model's retention states cannot take a wrong draft back; set drafts none"
            raise UserError(problem, "drafts")

    def drafter(self, request: Request) -> Drafter | None:
        """How the output of a request drafts; None if it does not."""
        by = request.params.drafts or self._default
        if (
            request.exit_threshold is not None
            or by == "none"
            or self._most < 1
            or (by == "loops" and not loops_draft(self._runner.architecture, request.num_loops))
        ):
            return None
        return Drafter(by, self._usual[by].own())

    def draft(self, step: Step, outputs: Mapping[str, RunningOutput]) -> None:
        """Draft tokens behind the chunks of a step."""
        self._drafts, self._began, self._drafting = {}, time.perf_counter(), 0.0
        # Where tokens leave the loop, a step runs all its loops in one pass, so the model does not draft.
        leaving = any(chunk.request.exit_threshold is not None for chunk in step.chunks)
        drafting = [
            (output, output.drafter, chunk)
            for chunk in step.chunks
            if chunk.count == 1 and chunk.samples and not chunk.request.scores
            for output in [outputs[chunk.request.id]]
            if output.drafter is not None and not (leaving and output.drafter.lookup is None)
        ]
        self._decodes = len(step.chunks) if all(chunk.count == 1 for chunk in step.chunks) else 0
        if not drafting:
            return
        found = [drafter.looked_up(chunk.request, self._most) if drafter.lookup else [] for _, drafter, chunk in drafting]
        candidates = [
            Candidate(drafter.lookup is None, drafter.acceptance.rate, len(tokens) if drafter.lookup else self._most)
            for (_, drafter, _), tokens in zip(drafting, found, strict=True)
        ]
        lengths = self.lengths.choose(len(step.chunks), candidates)
        for (output, drafter, chunk), tokens, length in zip(drafting, found, lengths, strict=True):
            if length and (room := self._scheduler.add_drafts(step, chunk, length)):
                chunk.drafts.extend(tokens[:room])
                self._drafts[output] = _Draft(output, drafter, chunk, room)
        if not self._drafts:
            return
        self._keep_rings()
        step.states = self._run_first_loops([one for one in self._drafts.values() if one.drafter.lookup is None])

    def verify(self, output: RunningOutput, logits: Tensor) -> None:
        """Take in the logits behind the last known token and the drafts of an output, (1 + drafts, vocab)."""
        if output in self._drafts:
            self._drafts[output].logits = logits

    def accept(self) -> dict[RunningOutput, Tensor]:
        """Accept the next draft of each output whose newest token it is.

        Returns:
            Of these outputs, (vocab,) logits of the next token.
        """
        rows = {}
        for one in self._drafts.values():
            chunk, request = one.chunk, one.chunk.request
            goes_on = one.logits is not None and request.status is Status.RUNNING and one.accepted < len(chunk.drafts)
            if not goes_on or request.num_tokens != chunk.end + one.accepted + 1:  # it waits for its grammar, or was rejected
                continue
            if request.output[-1] == chunk.drafts[one.accepted]:
                one.accepted += 1
                for owner, key in self._scheduler.accept(request):
                    self._scheduler.keep_snapshot(key, *self._runner.window_state(owner))
                assert one.logits is not None
                rows[one.output] = one.logits[one.accepted]
        return rows

    def settle(self) -> None:
        """Take back what wrong drafts have written, and learn from the step."""
        wrong: list[int] = []
        for one in self._drafts.values():
            if one.logits is None:  # the step has failed
                continue
            drafts, request = one.chunk.drafts, one.chunk.request
            if request.status is Status.RUNNING:
                wrong += range(one.first_row + one.accepted, one.first_row + len(drafts))
            pairs = list(zip(drafts, request.output[one.chunk.end - len(request.prompt) :], strict=False))
            accepted = next((index for index, (draft, token) in enumerate(pairs) if draft != token), len(pairs))
            for acceptance in (one.drafter.acceptance, self._usual[one.drafter.by]):
                acceptance.take(accepted, rejected=accepted < len(pairs))
            completion = one.output.completion
            completion.accepted_drafts += accepted
            completion.rejected_drafts += len(drafts) - accepted
            self.accepted += accepted
            self.rejected += len(drafts) - accepted
        if wrong and self._kept:
            self._runner.cache.take_back(self._rows, self._kept, upload(wrong, self._rows.device))
        if self._decodes:
            tokens = sum(one.length for one in self._drafts.values())
            passes = max((one.length for one in self._drafts.values() if one.drafter.lookup is None), default=0)
            seconds = time.perf_counter() - self._began
            self.lengths.take(StepTime(self._decodes, passes, tokens, self._drafting, seconds))
        self._drafts, self._decodes = {}, 0

    def _keep_rings(self) -> None:
        """Keep what the tokens that are drafted will overwrite."""
        rows: list[int] = []
        for one in self._drafts.values():
            one.first_row = len(rows)
            assert one.chunk.request.seat is not None
            rows += self._runner.cache.ring_rows(one.chunk.request.seat, one.chunk.end, one.chunk.end + one.length)
        self._kept: list[Tensor] = []
        if rows:
            self._rows = upload(rows, self._runner.device)
            self._kept = self._runner.cache.keep_rings(self._rows)

    def _run_first_loops(self, drafts: list[_Draft]) -> dict[Request, Tensor]:
        """Let the model draft. Returns the states of all tokens but the last one of each chunk, after the first loop."""
        began = time.perf_counter()
        states: dict[Request, list[Tensor]] = {one.chunk.request: [] for one in drafts}
        for ahead in range(max((one.length for one in drafts), default=0)):
            running = [one for one in drafts if one.length > ahead]
            chunks = [Chunk(one.chunk.request, one.chunk.start + ahead, 1) for one in running]
            logits, after = self._runner.draft(chunks, [one.chunk.tokens[-1] for one in running])
            for one, state in zip(running, after.unbind(1), strict=True):
                states[one.chunk.request].append(state)
            tokens = guess(logits, [one.output.sampler for one in running], ahead)
            for one, token in zip(running, tokens, strict=True):
                one.chunk.drafts.append(token)
        self._drafting = time.perf_counter() - began
        return {request: torch.stack(own, dim=1) for request, own in states.items()}


def loops_draft(a: Architecture, num_loops: int) -> bool:
    """Whether the first loop of a model can draft: others follow it, it is of the self-decoder, and no window follows it.

    (What a draft writes to the rings of a later stage would be needed again by the step that verifies it.)
    """
    stages = [stage.attention for stage in a.stages[a.loopable_stages[0] :]]
    return num_loops > 1 and stages[0] != "cross" and "sliding" not in stages[1:]
