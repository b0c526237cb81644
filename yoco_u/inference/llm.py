"""`LLM("path").generate(prompts, SamplingParams(...))`."""

import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from yoco_u.config import parse
from yoco_u.device import find_device
from yoco_u.errors import UserError
from yoco_u.inference.engine import Engine
from yoco_u.inference.exits import find_exits
from yoco_u.inference.interrupts import interrupts_later
from yoco_u.inference.outputs import RequestOutput, Update
from yoco_u.inference.sampling_params import SamplingParams
from yoco_u.inference.settings import EngineSettings
from yoco_u.loading import load_model, model_folder

Prompt = str | list[int]
Prompts = Prompt | Iterable[Prompt]
Params = SamplingParams | Iterable[SamplingParams] | None


class LLM:
    """A model that is ready to answer. Several threads may use one; they take turns, step by step.

    Args:
        path: a run folder or a saved model.
        device: auto, cpu or cuda.
        settings: fields of `EngineSettings`.

    Raises:
        UserError: for a folder that holds no model, no such device, or settings that do not fit.
    """

    def __init__(self, path: str | os.PathLike[str], *, device: str = "auto", **settings: Any) -> None:
        chosen = parse(EngineSettings, settings, "settings of LLM")
        place = find_device(device)
        model, tokenizer = load_model(path, place, lambda a: chosen.torch_dtype(a, place))
        self.engine = Engine(model, tokenizer, chosen, find_exits(model_folder(path), model.config.architecture))
        self._lock = threading.Lock()  # held by whoever uses the engine
        self._unread: dict[int, deque[Update]] = {}  # by the requests of open streams
        self._abandoned: deque[RequestOutput] = deque()  # to be aborted when nobody uses the engine

    def generate(self, prompts: Prompts, params: Params = None) -> list[RequestOutput]:
        """Answer prompts, all at once as far as memory allows.

        Args:
            prompts: texts or lists of token ids, or one of them.
            params: for all prompts, or one for each.

        Returns:
            One a prompt, in their order.

        Raises:
            UserError: if one of the requests is not possible; none is run then.
        """
        requests = self._add(prompts, params)
        try:
            while self._step(requests):
                pass
        finally:
            self._forget(requests)
        return requests

    def stream(self, prompts: Prompts, params: Params = None) -> Iterator[Update]:
        """The same, token by token as they come; abandoning the iterator aborts what is unfinished.

        Several streams may be read in turns, and `generate` called meanwhile.
        """
        unread: deque[Update] = deque()
        updates = self._updates(self._add(prompts, params, unread), unread)
        next(updates)  # it has begun, so that it ends its requests even if nothing is ever read
        return updates

    def _updates(self, requests: list[RequestOutput], unread: deque[Update]) -> Iterator[Update]:
        try:
            yield  # type: ignore[misc]
            goes_on = True
            while goes_on or unread:
                if unread:
                    yield unread.popleft()
                else:
                    goes_on = self._step(requests)
        finally:
            self._forget(requests)

    def _step(self, requests: list[RequestOutput]) -> bool:
        """Run a step of the engine, unless these requests have all ended; whether it was run."""
        with self._turn():
            if all(request.finished for request in requests):
                return False
            try:
                updates = self.engine.step()
            except BaseException:
                updates = self.engine.failed  # others' requests, too, have ended by it
                raise
            finally:
                for update in updates:
                    if (unread := self._unread.get(id(update.request))) is not None:
                        unread.append(update)
            return True

    def _add(self, prompts: Prompts, params: Params, unread: deque[Update] | None = None) -> list[RequestOutput]:
        """Queue requests, whose updates are kept in `unread`."""
        several = _several(prompts)
        chosen = _chosen(params, len(several))
        requests: list[RequestOutput] = []
        try:
            with self._turn():
                for prompt, own in zip(several, chosen, strict=True):
                    requests.append(self.engine.add(prompt, own))
                if unread is not None:
                    self._unread |= {id(request): unread for request in requests}
        except BaseException:
            self._forget(requests)
            raise
        return requests

    def _forget(self, requests: list[RequestOutput]) -> None:
        """End what is unfinished, now or when the engine is not in use.

        Python may collect an abandoned stream at any moment, also within a step.
        """
        for request in requests:
            self._unread.pop(id(request), None)
        self._abandoned.extend(request for request in requests if not request.finished)
        if self._lock.acquire(blocking=False):
            try:
                with interrupts_later():
                    self._end_abandoned()
            finally:
                self._lock.release()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """The engine is used by one thread at a time, and not interrupted meanwhile."""
        with self._lock, interrupts_later():
            self._end_abandoned()
            try:
                yield
            finally:
                self._end_abandoned()

    def _end_abandoned(self) -> None:
        while self._abandoned:
            self.engine.abort(self._abandoned.popleft())


def _several(prompts: Prompts) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Iterable) or isinstance(prompts, (bytes, Mapping)):
        raise UserError(f"prompts is of type {type(prompts).__name__}; give texts or lists of token ids, or one of them")
    found: list[Any] = list(prompts)
    return [found] if found and all(isinstance(token, int) for token in found) else found


def _chosen(params: Params, count: int) -> list[SamplingParams]:
    """The parameters of so many prompts."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    found = list(params) if isinstance(params, Iterable) else [params]
    for wrong in (one for one in found if not isinstance(one, SamplingParams)):
        raise UserError(f"{wrong!r:.80} is no SamplingParams; give one for all prompts or one for each")
    if len(found) != count:
        raise UserError(f"{count} prompts came with {len(found)} SamplingParams; give one for all or one for each")
    return found
