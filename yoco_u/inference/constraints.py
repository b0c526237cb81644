"""Grammars: which tokens may come next so that the output fits a JSON schema or a regular expression, through llguidance.

A grammar is compiled, and outputs are followed through it, in a confined process of its own (`followers.py`). A mask of allowed
tokens is asked for as soon as the token before is known, and computed while the model runs.
"""

import hashlib
import importlib.util
import json
import math
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from copy import copy
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from yoco_u.confined.nursery import Confined, Ended, Nursery, Refused, wait
from yoco_u.data import vocabulary_size
from yoco_u.errors import UserError, said_of
from yoco_u.inference.followers import Followed, Follower
from yoco_u.inference.json_schemas import with_plain_names
from yoco_u.inference.sampling_params import SamplingParams
from yoco_u.inference.tool_calls import CLOSE, OPEN
from yoco_u.inference.turns import Crowded, Turns

_SECONDS, _MEMORY = 2.0, 2**28  # that compiling a grammar may take, and each mask
_LONGEST = 2**18  # characters of a schema or an expression
_PER_GRAMMAR, _PER_CHARACTER = 0.1, 1e-5  # seconds of CPU in which a grammar compiles, unless it is unusual
_QUICK = 0.2  # seconds of CPU: grammars that may take longer do not hold up the others
_TRIED, _COMPILED = 16, 4  # at once: quick grammars, and those that take longer
_IDLE = 16  # followers that are kept for outputs to come
_REMEMBERED = 4096  # grammars that are known to compile, or not to
_FORGIVEN = 60.0  # seconds after which a grammar that failed is tried again: its process may have been ended from outside
_LONGEST_PROBLEM = 1000  # characters
_LOOK = 1.0  # seconds between two looks at whether a process still answers
_LINE = re.compile(r"line (\d+): ")


class Matcher(Followed):
    """The state of one output in its grammar. One thread may use the matchers of a `Grammars`.

    Attributes:
        error: why no token is allowed, in one line; empty while all is well.
    """

    def __init__(self, grammars: "Grammars", grammar: bytes) -> None:
        super().__init__()
        self.follower: Follower | None = None
        self._grammars, self._grammar = grammars, grammar

    def sibling(self) -> "Matcher":
        """One at the beginning of another output in the same grammar."""
        return Matcher(self._grammars, self._grammar)

    def ask(self) -> None:
        """Ask for the mask, ahead of its use."""
        if self.decided or (self.follower is not None and not self.follower.ended):
            return
        try:
            self.follower = self._grammars.follow(self, self._grammar)
        except BaseException as error:
            self.error = said_of(error)

    def append(self, token: int) -> None:
        """Take in the next token, which must be an allowed one, and ask for the mask behind it."""
        self.tokens.append(token)
        self.mask = None
        if self.follower is not None and not self.follower.ended:
            self.follower.ask(self)

    @property
    def decided(self) -> bool:
        """Whether it is known which tokens may come next, or that there is an error."""
        return self.mask is not None or self.error != ""

    def allowed(self) -> Tensor:
        """(vocab,) bool: the tokens that may come next, an end token only where the grammar accepts the output.

        All false after an error. Waits until it is known.
        """
        while not self.decided:
            self._grammars.wait([self])
        if self.error:
            return torch.zeros(self._grammars.vocab_size, dtype=torch.bool)
        bits = np.frombuffer(self.mask or b"", dtype=np.uint8)
        return torch.from_numpy(np.unpackbits(bits, count=self._grammars.vocab_size, bitorder="little").view(np.bool_))

    def close(self) -> None:
        """The output has ended."""
        self._grammars.forget(self)


class _Long(Exception):  # noqa: N818
    """A grammar takes longer than a first try may."""


class Grammars:
    """Compiles the grammars of requests for one tokenizer, and follows outputs through them.

    Args:
        tokenizer: a fast tokenizer whose tokens are bytes or characters of the text.
        vocab_size: columns of the logits; at least the tokenizer's vocabulary. Tokens that it lacks are never allowed.
        eos_token_ids: the tokens that end an output.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        self.vocab_size = vocab_size
        self._tokenizer = tokenizer
        self._eos_token_ids = list(eos_token_ids)
        self._shown = _shown_tokens(tokenizer).difference(eos_token_ids)
        self._nursery: Nursery | None = None
        self._lock, self._starting = threading.RLock(), threading.Lock()
        self._followers: OrderedDict[bytes, Follower] = OrderedDict()  # by the grammar's hash; least recently used first
        self._compiled: OrderedDict[bytes, None] = OrderedDict()  # hashes of grammars that compile
        self._failed: OrderedDict[bytes, tuple[float, str]] = OrderedDict()  # and of others: when they failed, and why
        self._underway: dict[bytes, list[Future[None]]] = {}  # by the grammar's hash: who waits until it is compiled
        self._newest: tuple[SamplingParams, bytes] | None = None  # of `matcher`: many prompts may come with one schema
        crowd = "new regex, response_format or tools are being compiled"
        self._quick, self._slow = Turns("grammar", _TRIED, crowd), Turns("slow-grammar", _COMPILED, crowd)

    def prepare(self, params: SamplingParams) -> "Future[None]":
        """Compile the grammar of a request, without waiting for it. Any thread may call this.

        A grammar that is known does not wait for others. A new one first gets the time that honest grammars of its length need;
        what takes longer begins anew, behind all others.

        Returns:
            Done when the grammar is known to compile. Or a UserError: if llguidance is not installed, cannot read the
            tokenizer, or refuses the schema or the expression, or if that takes more time or memory than a grammar may. Or
            Crowded: if it would have to wait for too many others.
        """
        done: Future[None] = Future()
        try:
            grammar = self._message(params)
            known = self._knows(params, grammar)
        except UserError as error:
            done.set_exception(error)
            return done
        if known:
            done.set_result(None)
            return done
        with self._lock:
            others = self._underway.setdefault(key := _hash(grammar), [])
            others.append(done)
            first = len(others) == 1
        if first:
            self._queue(params, grammar, key, min(_SECONDS, _PER_GRAMMAR + _PER_CHARACTER * len(grammar)))
        return done

    def matcher(self, params: SamplingParams) -> Matcher | None:
        """A matcher at the beginning of an output; None if the request has no grammar.

        A grammar that was not prepared is compiled here and now, whatever `prepare` still has to do.

        Raises:
            UserError: as of `prepare`.
        """
        if not params.constrained:
            return None
        if self._newest is None or self._newest[0] is not params:
            grammar = self._message(params)
            if not self._knows(params, grammar):
                self._compile(params, grammar, _SECONDS)
            self._newest = params, grammar
        return Matcher(self, self._newest[1])

    def follow(self, output: Followed, grammar: bytes) -> Follower:
        """Ask a process that may be new for the mask of an output."""
        key = _hash(grammar)
        with self._lock:
            follower = self._followers.get(key)
            if follower is None or follower.ended:
                follower = self._followers[key] = Follower(self._new_process(_SECONDS), grammar)
            self._followers.move_to_end(key)
            follower.ask(output)
            self._trim()
        return follower

    def forget(self, matcher: Matcher) -> None:
        """Follow an output no longer."""
        with self._lock:
            if matcher.follower is not None:
                matcher.follower.forget(matcher)
                self._trim()

    def wait(self, matchers: Sequence[Matcher], seconds: float = math.inf) -> None:
        """Wait until all matchers are decided, or for so many seconds."""
        end = time.monotonic() + seconds
        while undecided := [matcher for matcher in matchers if not matcher.decided]:
            for matcher in undecided:
                matcher.ask()
            followers = {matcher.follower for matcher in undecided if matcher.follower is not None}
            waiting = [follower for follower in followers if not follower.ended]
            if any(follower.take() for follower in waiting):
                continue
            if (left := end - time.monotonic()) <= 0:
                return
            wait([follower.confined for follower in waiting], min(left, _LOOK))

    def _message(self, params: SamplingParams) -> bytes:
        """The grammar of a request as its process is told it.

        Raises:
            UserError: if it is too long, or nested too deeply.
        """
        kind, text = self._text(params)
        if len(text) > _LONGEST:
            problem = f"it has {len(text)} characters, at most {_LONGEST} may be used"
            raise _refusal(params, text, problem)
        return json.dumps({"kind": kind, "text": text}).encode()

    def _knows(self, params: SamplingParams, grammar: bytes) -> bool:
        """Whether a grammar is known to compile.

        Raises:
            UserError: if it is known not to.
        """
        key = _hash(grammar)
        with self._lock:
            if key in self._compiled:
                self._compiled.move_to_end(key)
                return True
            since, problem = self._failed.get(key, (-math.inf, ""))
        if time.monotonic() - since < _FORGIVEN:
            raise _refusal(params, json.loads(grammar)["text"], problem)
        return False

    def _queue(self, params: SamplingParams, grammar: bytes, key: bytes, seconds: float, used: float = 0.0) -> None:
        """Compile a grammar for all who wait for it, when it is its turn.

        Args:
            used: seconds that were not enough, behind which it comes after those that never had any.
        """

        def wanted() -> bool:
            return not all(one.cancelled() for one in self._underway.get(key, []))

        turns = self._quick if seconds <= _QUICK else self._slow
        try:
            turns.take(used + seconds, wanted, lambda: self._try(params, grammar, key, seconds))
        except Crowded as crowded:
            self._finish(key, crowded)

    def _try(self, params: SamplingParams, grammar: bytes, key: bytes, seconds: float) -> None:
        with self._lock:
            if all(one.cancelled() for one in self._underway[key]):
                del self._underway[key]
                return
        try:
            self._compile(params, grammar, seconds)
        except _Long:
            self._queue(params, grammar, key, _SECONDS, used=seconds)
        except BaseException as error:
            self._finish(key, error)
        else:
            self._finish(key)

    def _finish(self, key: bytes, error: BaseException | None = None) -> None:
        with self._lock:
            waiting = self._underway.pop(key, [])
        for done in waiting:
            if not done.set_running_or_notify_cancel():
                continue
            if error is None:
                done.set_result(None)
            else:
                done.set_exception(error)

    def _compile(self, params: SamplingParams, grammar: bytes, seconds: float) -> None:
        """Compile a grammar.

        Args:
            seconds: of CPU that it may take.

        Raises:
            _Long: if it takes longer than `seconds`, and a grammar may.
            UserError: if it cannot be compiled.
        """
        key = _hash(grammar)
        try:
            follower = Follower(self._new_process(seconds), grammar)
        except UserError as error:
            raise UserError(str(error), params.grammar) from None
        try:
            follower.compile()
        except (Refused, Ended) as error:
            follower.end()
            if seconds < _SECONDS and isinstance(error, Ended):
                raise _Long from None
            problem = str(error)[:_LONGEST_PROBLEM]
            with self._lock:
                _remember(self._failed, key, (time.monotonic(), problem))
            raise _refusal(params, json.loads(grammar)["text"], problem) from None
        with self._lock:
            _remember(self._compiled, key, None)
            self._keep(key, follower)

    def _text(self, params: SamplingParams) -> tuple[str, str]:
        """The kind of a grammar, and its text.

        Raises:
            UserError: if it is nested too deeply.
        """
        try:
            if params.tools is not None:
                return "lark", params.tools.grammar(
                    params.json_schema, self._tokenizer.backend_tokenizer.token_to_id, self._shown
                )
            if params.regex is not None:
                return "regex", params.regex
            return "json_schema", json.dumps(with_plain_names(params.json_schema))
        except RecursionError:
            raise UserError(f"{params.grammar}: it is nested too deeply", params.grammar) from None

    def _keep(self, key: bytes, follower: Follower) -> None:
        """Keep a follower for outputs to come."""
        if key in self._followers and not self._followers[key].ended:
            follower.end()
        else:
            self._followers[key] = follower
        self._trim()

    def _trim(self) -> None:
        """End the idle followers that were not needed for longest, but for a few."""
        idle = [one for one, its in self._followers.items() if its.idle or its.ended]
        for one in idle[:-_IDLE]:
            self._followers.pop(one).end()

    def _new_process(self, seconds: float) -> Confined:
        """A process whose first answer may take so many seconds of CPU."""
        with self._starting:
            if self._nursery is None:
                self._nursery = self._new_nursery()
        return self._nursery.new(seconds)

    def _new_nursery(self) -> Nursery:
        if importlib.util.find_spec("llguidance") is None:
            raise UserError("json_schema, regex and tools need llguidance: pip install 'yoco-u[structured]'")
        if vocabulary_size(self._tokenizer) > len(self._tokenizer):  # llguidance counts tokens, not ids
            raise UserError("json_schema, regex and tools cannot be used with this tokenizer: its token ids have gaps")
        backend = copy(self._tokenizer.backend_tokenizer)
        backend.no_padding()
        backend.no_truncation()
        setup = {"tokenizer": backend.to_str(), "vocab_size": self.vocab_size, "eos_token_ids": self._eos_token_ids}
        return Nursery("yoco_u.confined.grammar", setup, seconds=_SECONDS, memory=_MEMORY)


def _refusal(params: SamplingParams, text: str, problem: str) -> UserError:
    """What is wrong with a grammar; where it has several schemas, with which of them."""
    if params.tools is None:
        return UserError(f"{params.grammar} {_shortened(text)}: {problem}", params.grammar)
    place = _LINE.match(problem)
    if place is None:
        return UserError(f"tools: {problem}", "tools")
    problem, tool = problem[place.end() :], params.tools.tool_of(text, int(place[1]))
    if tool is None:  # the schema of answers without calls
        return UserError(f"json_schema: {problem}", "json_schema")
    return UserError(f"tools: the parameters of {tool}: {problem}", "tools")


def _shown_tokens(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """Added tokens that texts show, such as `<think>`, but for the tags of calls."""
    added = tokenizer.added_tokens_decoder
    return {token for token, piece in added.items() if not piece.special and piece.content not in (OPEN, CLOSE)}


Known = TypeVar("Known")


def _remember(known: OrderedDict[bytes, Known], key: bytes, value: Known) -> None:
    known[key] = value
    known.move_to_end(key)
    if len(known) > _REMEMBERED:
        known.popitem(last=False)


def _hash(grammar: bytes) -> bytes:
    return hashlib.sha256(grammar).digest()


def _shortened(text: str, longest: int = 80) -> str:
    return repr(text if len(text) <= longest else text[: longest - 3] + "...")
