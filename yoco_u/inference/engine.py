"""The engine: requests in, tokens out. `Engine.step` is schedule (`scheduler.py`), run (`runner.py`), sample (`sampler.py`)."""

import itertools
import logging
from concurrent.futures import Future
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from yoco_u.data import DocumentEncoder
from yoco_u.errors import UserError, class_and_line, said_of
from yoco_u.inference.constraints import Grammars
from yoco_u.inference.detokenizer import Detokenizer
from yoco_u.inference.exits import FILE, Exits, check_exits
from yoco_u.inference.kernels.gpu import start_triton
from yoco_u.inference.model_limits import check_memory, check_one_loop_count, end_tokens, make_room
from yoco_u.inference.model_preparation import prepare_model
from yoco_u.inference.outputs import BROKEN_LOGITS, Completion, RequestOutput, Update, joined
from yoco_u.inference.prompts import prompt_tokens
from yoco_u.inference.request import Request
from yoco_u.inference.runner import Runner
from yoco_u.inference.running_output import RunningOutput
from yoco_u.inference.sampler import Sampled, sample
from yoco_u.inference.sampler_state import SamplerState
from yoco_u.inference.sampling_params import SamplingParams
from yoco_u.inference.scheduler import Scheduler
from yoco_u.inference.settings import EngineSettings
from yoco_u.inference.speculation import Speculation
from yoco_u.inference.step import Chunk, Step
from yoco_u.model import YocoUForCausalLM

log = logging.getLogger("yoco_u.inference")

_GRACE = 0.01  # seconds that a step waits for a grammar's mask of allowed tokens; after that, its output waits for a later step
_PAUSE = 0.05  # seconds that a step waits for masks that are late already, if it has nothing else to do


class Engine:
    """Runs many requests at once, each to its own length, with its own sampling and its own loop count.

    Args:
        model: in evaluation mode on its device. It is the engine's from then on: its weights may be quantized or prepacked.
        tokenizer: None for requests in tokens only, without text, stop strings or grammars.
        exits: how tokens leave the loop, of requests that let them; what the model's folder says, as of `find_exits`.

    Raises:
        UserError: if the caches do not fit into memory, or the settings do not fit together.

    Attributes:
        scheduler: who runs and who waits.
        cache: the memory of all sequences.
        speculation: drafts tokens and says which of them are right.
        failed: the updates of the last step if it raised, those of the outputs that it ended included; else empty.
    """

    def __init__(
        self,
        model: YocoUForCausalLM,
        tokenizer: PreTrainedTokenizerFast | None,
        settings: EngineSettings,
        exits: Exits | UserError | None = None,
    ) -> None:
        self.architecture = model.config.architecture
        if model.device.type == "cuda":
            start_triton()
        settings = settings.on_device(model.device)
        self.settings, self.tokenizer, self.exits = settings, tokenizer, exits
        usable = exits if isinstance(exits, Exits) else None
        asked = settings.num_loops
        if asked == "auto":
            asked = None if usable is None else usable.num_loops
        self.num_loops = asked or model.model.at_loops().num_loops
        if asked is None:
            check_one_loop_count(model.model.at_loops())
        shape = settings.cache_shape(self.architecture.with_loops(self.num_loops), model.device)
        check_memory(self.architecture, shape, self.num_loops, 0, model.device)
        prepare_model(model, settings)
        self.runner = Runner(model, shape, exits=usable)
        self.cache = self.runner.cache
        self.loops_of(SamplingParams())
        make_room(self.runner, self.num_loops)
        self.max_model_len = min(settings.max_model_len or 2**62, shape.num_blocks * shape.block_size)
        self.scheduler = Scheduler(
            num_blocks=shape.num_blocks,
            block_size=shape.block_size,
            max_num_seqs=shape.max_num_seqs,
            max_batched_tokens=settings.max_batched_tokens,
            max_model_len=self.max_model_len,
            prefix_caching=settings.prefix_caching,
            snapshot_bytes=settings.snapshot_bytes,
            has_window_state=self.cache.has_window_state,
        )
        self.speculation = Speculation(self.scheduler, self.runner, settings.drafts)
        self._encoder = DocumentEncoder(tokenizer) if tokenizer is not None else None
        self.eos_token_ids = end_tokens(model, self._encoder)
        self._grammars = (
            Grammars(tokenizer, self.architecture.vocab_size, self.eos_token_ids) if tokenizer is not None else None
        )
        self.failed: list[Update] = []
        self._outputs: dict[str, RunningOutput] = {}
        self._siblings: dict[str, list[RunningOutput]] = {}  # outputs that wait until the first one has computed their prompt
        self._undecided: dict[RunningOutput, torch.Tensor] = {}  # outputs that wait for their grammar, with (vocab,) logits
        self._numbers = itertools.count(1)

    @property
    def unfinished(self) -> int:
        """Requests that wait or run, each of `n` outputs counted."""
        return len(self._outputs)

    def prepare(self, params: SamplingParams) -> "Future[Any]":
        """Compile the grammar of a request, so that `add` need not wait for it. Any thread may call this.

        Returns:
            Done when the grammar is compiled, or when it is refused: with the `UserError` that `add` would raise, or with
            `Crowded` if too many others are to be compiled before it.
        """
        if self._grammars is not None and params.constrained:
            return self._grammars.prepare(params)
        nothing: Future[None] = Future()
        nothing.set_result(None)
        return nothing

    def add(self, prompt: str | list[int], params: SamplingParams, request_id: str | None = None) -> RequestOutput:
        """Queue a request.

        Args:
            prompt: a text, which begins a document, or token ids as they are.
            request_id: must not be one that still runs; by default a number.

        Returns:
            The request, whose outputs grow with every step.

        Raises:
            UserError: if the request is not possible, with the numbers; nothing is queued then.
        """
        self._check_params(params)
        tokens = prompt_tokens(prompt, self._encoder, self.architecture.vocab_size)
        self.speculation.check(params.drafts)
        loops, threshold = self.loops_of(params)
        name = next(str(n) for n in self._numbers if str(n) not in self._outputs) if request_id is None else request_id
        names = [name, *(f"{name}.{index}" for index in range(1, params.n))]
        for taken in (own for own in names if own in self._outputs):
            raise UserError(f"request {taken}: a request of this id is not finished yet; choose another id")
        parent = RequestOutput(name, prompt if isinstance(prompt, str) else None, tokens, [], loops)
        outputs = []
        distinct = list(dict.fromkeys(tokens)) if params.repetition_penalty != 1 else []  # all that penalties need of a prompt
        matcher = self._grammars.matcher(params) if self._grammars is not None else None
        for index, own_name in enumerate(names):
            completion = Completion(index, logprobs=[] if params.logprobs is not None else None)
            parent.outputs.append(completion)
            own = params if index == 0 else params.model_copy(update={"prompt_logprobs": None})
            request = Request(own_name, tokens, own, loops, threshold)
            outputs.append(
                RunningOutput(
                    request,
                    SamplerState(params, distinct, index, self.eos_token_ids, matcher and matcher.sibling()),
                    Detokenizer(self.tokenizer, params, tokens) if self.tokenizer is not None else None,
                    completion,
                    parent,
                    self.speculation.drafter(request),
                )
            )
        first, *others = outputs
        self.scheduler.add(first.request)
        if params.prompt_logprobs is not None:
            parent.prompt_logprobs = [None] * first.request.unscored
        try:
            make_room(self.runner, loops)
        except BaseException:
            self.scheduler.abort(first.request.id)
            raise
        for output in outputs:
            self._outputs[output.request.id] = output
        if self.settings.prefix_caching and others:
            self._siblings[first.request.id] = others
        else:
            for output in others:
                self.scheduler.add(output.request)
        return parent

    def abort(self, request: RequestOutput) -> None:
        """End a request, wherever it is; its memory is free at once. A finished one is left as it is."""
        for output in [output for output in self._outputs.values() if output.parent is request]:
            self._end(output, "abort")

    def fill_cache(self, tokens: int) -> None:
        """Let all waiting requests begin behind `tokens` tokens that are not computed: their keys and values are random.

        For measurements, in which the context in front of what is timed need not be computed. Retention states begin empty.

        Raises:
            UserError: if prefixes are cached, which would then be random too; if a prompt is not longer than `tokens`; or if
                not all requests can run at once.
        """
        if self.settings.prefix_caching:
            raise UserError("fill_cache writes random keys and values, which requests would share; set prefix_caching off")
        shortest = min((len(request.prompt) for request in self.scheduler.waiting), default=tokens + 1)
        if not 0 <= tokens < shortest:
            raise UserError(f"fill_cache cannot stand for {tokens} tokens of a prompt of {shortest}; leave one to compute")
        for request in self.scheduler.admit_behind(tokens):
            assert request.seat is not None
            self.cache.clear(request.seat)
            self.cache.fill(request.seat, request.blocks, self.runner.model.dtype)
        if self.scheduler.waiting:
            raise UserError(f"{len(self.scheduler.waiting)} requests cannot run beside the others; enlarge the caches")

    def step(self) -> list[Update]:
        """Run one step: some tokens of every request that runs.

        Returns:
            What was added to which output, outputs that ended included; empty when there is nothing to do. An output has ended
            with an error if an exception came up in its own sampling, grammar, text or scores, and the others go on.

        Raises:
            Exception: whatever the model raised. The requests of this step have then ended with an error, which `failed` tells,
                and the others go on.
        """
        self.failed = []
        step = self.scheduler.schedule()
        updates: list[Update] = []
        try:
            self._advance(step, updates)
        except BaseException as error:
            broken = {chunk.request.id for chunk in step.chunks}  # what their caches hold is not known any more
            for output in list(self._outputs.values()):
                if output.request.id in broken or self._is_lost(output):
                    output.completion.error = class_and_line(error)
                    updates.append(self._end(output, "error", wrong=True))
            self.failed = joined(updates)
            raise
        return joined(updates)

    def _advance(self, step: Step, updates: list[Update]) -> None:
        """Compute a step, and add what comes of it to the updates."""
        for request in step.preempted:  # what it waited with is computed again
            self._undecided.pop(self._outputs[request.id], None)
        for chunk in step.chunks:
            self._outputs[chunk.request.id].start(chunk.start)
        computed = self._run(step) if step.chunks else []
        rows = dict(self._undecided)  # logits of the outputs whose next token is to be chosen
        for chunk, logits in computed:
            output = self._outputs[chunk.request.id]
            known = logits[: len(logits) - len(chunk.drafts)]  # behind tokens that were not drafted
            failed = self._score(output, chunk, known) if chunk.request.params.prompt_logprobs is not None else None
            if failed is not None:
                updates.append(failed)
            elif chunk.samples:
                rows[output] = known[-1]
                output.loops = self.runner.last_loops.get(chunk.request, [chunk.request.num_loops])[-1]
                self.speculation.verify(output, logits)
        updates += self._sample(rows, idle=not step.chunks)
        while accepted := self.speculation.accept():
            updates += self._sample(self._undecided | accepted, idle=False)
        self.speculation.settle()
        ending = (self._outputs.get(chunk.request.id) for chunk in step.chunks if chunk.completes)
        updates += [self._end(output, "length") for output in ending if output is not None]
        self._release_siblings()

    def _is_lost(self, output: RunningOutput) -> bool:
        """Whether an output has nothing to compute and no logits to choose from: a step failed that was to choose its token."""
        return output.request.computed == output.request.num_tokens and output not in self._undecided

    def _run(self, step: Step) -> list[tuple[Chunk, torch.Tensor]]:
        """Compute a step; its chunks that logits are asked of, with them."""
        self.runner.begin(step)
        self.speculation.draft(step, self._outputs)
        computed = self.runner.run(step)
        for request, key in step.snapshots:
            self.scheduler.keep_snapshot(key, *self.runner.window_state(request))
        self.scheduler.advance(step)
        return computed

    def _sample(self, rows: dict[RunningOutput, torch.Tensor], idle: bool) -> list[Update]:
        """Choose the next tokens of outputs; those whose grammar has not said yet which may come wait for a later step.

        Args:
            rows: (vocab,) logits of each output.
            idle: whether nothing else is to be done meanwhile.
        """
        if self._grammars is not None:
            new = [output.sampler.matcher for output in rows if output not in self._undecided]
            old = [output.sampler.matcher for output in self._undecided]
            self._grammars.wait([matcher for matcher in new if matcher is not None], _GRACE)
            self._grammars.wait([matcher for matcher in old if matcher is not None], _PAUSE if idle else 0)
        decided = {output: None for output in rows if output.sampler.decided}
        self._undecided = {
            output: self._undecided[output] if output in self._undecided else logits.clone()  # the next step overwrites them
            for output, logits in rows.items()
            if output not in decided
        }
        if not decided:
            return []
        found = sample(torch.stack([rows[output] for output in decided]), [output.sampler for output in decided])
        return [self._append(output, one) for output, one in zip(decided, found, strict=True)]

    def _append(self, output: RunningOutput, sampled: Sampled | None) -> Update:
        if sampled is None:
            return self._fail(output, output.sampler.failure or "")
        self.scheduler.append(output.request, sampled.token)
        try:
            text, reason = output.take(sampled)
        except BaseException as error:
            return self._fail(output, error)
        if reason is not None:
            return self._end(output, reason, [sampled.token], text)
        return Update(output.parent, output.completion, text, [sampled.token])

    def _score(self, output: RunningOutput, chunk: Chunk, logits: torch.Tensor) -> Update | None:
        """Score the prompt tokens of a chunk; the output's last update if that failed."""
        try:
            return None if output.score(chunk.end, logits) else self._fail(output, BROKEN_LOGITS)
        except BaseException as error:
            return self._fail(output, error)

    def _fail(self, output: RunningOutput, reason: str | BaseException) -> Update:
        """End an output with an error that concerns it alone."""
        if isinstance(reason, BaseException):
            output.completion.error = said_of(reason)
            log.warning("request %s failed", output.request.id, exc_info=reason)
        else:
            output.completion.error = reason
        return self._end(output, "error", wrong=reason == BROKEN_LOGITS)

    def _end(
        self, output: RunningOutput, reason: str, tokens: list[int] | None = None, text: str = "", *, wrong: bool = False
    ) -> Update:
        """End an output; what was computed for it may be shared unless it is `wrong`."""
        try:
            text += output.flush()
            if reason == "length" and output.completion.stop_reason is not None:
                reason = "stop"
        except BaseException as error:
            output.completion.error, reason = output.completion.error or said_of(error), "error"
        if not any(output in others for others in self._siblings.values()):
            self.scheduler.finish(output.request, "error" if wrong else "abort" if reason == "error" else reason)
        del self._outputs[output.request.id]
        self._undecided.pop(output, None)
        self._release_siblings()
        return output.ended(reason, tokens or [], text)

    def _release_siblings(self) -> None:
        """Queue the other outputs of a prompt once the first output has computed it, so that they find the prompt cached."""
        for first in list(self._siblings):
            output = self._outputs.get(first)
            if output is None or output.request.computed >= len(output.request.prompt):
                for sibling in self._siblings.pop(first):
                    if sibling.completion.finish_reason is None:
                        self.scheduler.add(sibling.request)

    def _check_params(self, params: SamplingParams) -> None:
        if (token := max(params.logit_bias, default=0)) >= self.architecture.vocab_size:
            problem = f"token {token} of logit_bias is not in the vocabulary of {self.architecture.vocab_size}"
            raise UserError(problem, "logit_bias")
        if self.tokenizer is None and (params.stop or params.constrained):
            raise UserError("stop strings, json_schema, regex and tools need a tokenizer; use stop_token_ids or give one")

    @property
    def auto_loops(self) -> bool:
        """Whether a request may say `num_loops="auto"` without an `exit_threshold`."""
        try:
            return self.loops_of(SamplingParams(num_loops="auto"))[1] is not None
        except UserError:
            return False

    def loops_of(self, params: SamplingParams) -> tuple[int, float | None]:
        """T of a request, and the score below which its tokens leave the loop, None if they do not.

        Raises:
            UserError: if they are to leave it and cannot.
        """
        asked = params.num_loops or self.settings.num_loops
        if asked != "auto":
            return asked or self.num_loops, None
        exits = check_exits(self.architecture.with_loops(self.num_loops), self.exits)
        if params.drafts in ("loops", "prompt"):  # the engine's num_loops is auto
            problem = f"drafts is {params.drafts}, but num_loops is auto here, with which nothing is drafted"
            raise UserError(f"{problem}; give a number of loops, or set drafts none", "drafts")
        if params.exit_threshold is not None:
            return self.num_loops, params.exit_threshold
        if exits is None:
            problem = f"num_loops is auto, but the model has no {FILE}; run yoco-u exits, or set exit_threshold in requests"
            raise UserError(problem, "exit_threshold")
        return self.num_loops, exits.threshold
