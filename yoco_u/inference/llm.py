"""`LLM("path").generate(prompts, SamplingParams(...))`."""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from yoco_u.config import parse
from yoco_u.device import find_device
from yoco_u.errors import UserError
from yoco_u.inference.engine import Engine
from yoco_u.inference.exits import find_exits
from yoco_u.inference.outputs import RequestOutput, Update
from yoco_u.inference.sampling_params import SamplingParams
from yoco_u.inference.settings import EngineSettings
from yoco_u.loading import load_model, model_folder

Prompt = str | list[int]
Prompts = Prompt | Iterable[Prompt]
Params = SamplingParams | Iterable[SamplingParams] | None


class LLM:
    """A model that is ready to answer.

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
        model, tokenizer = load_model(path, place, chosen.torch_dtype(place))
        self.engine = Engine(model, tokenizer, chosen, find_exits(model_folder(path), model.config.architecture))
        self._unread: dict[int, deque[Update]] = {}  # by the requests of open streams

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
            while not all(request.finished for request in requests):
                self._step()
        finally:
            self._abort(requests)
        return requests

    def stream(self, prompts: Prompts, params: Params = None) -> Iterator[Update]:
        """The same, token by token as they come; abandoning the iterator aborts what is unfinished.

        Several streams may be read in turns, and `generate` called meanwhile.
        """
        updates = self._updates(self._add(prompts, params))
        next(updates)  # it has begun, so that it ends its requests even if nothing is ever read
        return updates

    def _updates(self, requests: list[RequestOutput]) -> Iterator[Update]:
        unread: deque[Update] = deque()
        try:
            self._unread |= {id(request): unread for request in requests}
            yield  # type: ignore[misc]
            while unread or not all(request.finished for request in requests):
                if unread:
                    yield unread.popleft()
                else:
                    self._step()
        finally:
            for request in requests:
                del self._unread[id(request)]
            self._abort(requests)

    def _step(self) -> None:
        for update in self.engine.step():
            if id(update.request) in self._unread:
                self._unread[id(update.request)].append(update)

    def _add(self, prompts: Prompts, params: Params) -> list[RequestOutput]:
        several = _several(prompts)
        chosen = _chosen(params, len(several))
        requests: list[RequestOutput] = []
        try:
            for prompt, own in zip(several, chosen, strict=True):
                requests.append(self.engine.add(prompt, own))
        except BaseException:
            self._abort(requests)
            raise
        return requests

    def _abort(self, requests: list[RequestOutput]) -> None:
        for request in requests:
            if not request.finished:
                self.engine.abort(request)


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
