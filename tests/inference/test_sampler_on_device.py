"""Sampling as on a GPU: one copy to the device, one back, nothing else that the host would wait for, and the CPU's tokens."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_sampler import random_logits, random_params, state
from torch import Tensor
from torch.overrides import TorchFunctionMode

from yoco_u.inference import logprobs, packed_upload, sampler, token_filters
from yoco_u.inference.logprobs import score
from yoco_u.inference.sampler import sample
from yoco_u.inference.sampler_state import SamplerState
from yoco_u.inference.sampling_params import SamplingParams

META = torch.device("meta")


class OnlyNamedCopies(TorchFunctionMode):
    """Refuses operations that would copy to the device unseen; reading from a meta tensor raises by itself."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", str(func))
        on_device = isinstance(made, Tensor) and made.device == META
        from_host = any(isinstance(one, Tensor) and one.device.type == "cpu" for one in args)
        assert not (on_device and (name in ("tensor", "as_tensor", "new_tensor") or from_host)), f"{name} copies to the device"
        if name in ("__getitem__", "__setitem__"):
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            assert not any(isinstance(place, list) for place in places), f"{name} with a list copies it to the device"
        return made


class Copies:
    """Counts copies between host and device; what comes back is zeros."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.uploads, self.read_backs = 0, 0
        self._upload = packed_upload.upload
        monkeypatch.setattr(packed_upload, "upload", self.upload)
        for module in (sampler, logprobs):
            monkeypatch.setattr(module, "read_back", self.read_back)

    def upload(self, values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
        self.uploads += 1
        with torch._C.DisableTorchFunction():
            return self._upload(values, device, dtype)

    def read_back(self, tensor: Tensor) -> Any:
        assert tensor.device == META
        self.read_backs += 1
        return np.zeros(tensor.shape).tolist()


class Grammar:
    """Allows every other token, and follows what was chosen."""

    error = ""

    def __init__(self, vocab: int) -> None:
        self.vocab, self.tokens = vocab, list[int]()

    def allowed(self) -> Tensor:
        return torch.arange(self.vocab) % 2 == len(self.tokens) % 2

    def append(self, token: int) -> None:
        self.tokens.append(token)


def some_states(params: list[SamplingParams], grammars: list[bool], vocab: int) -> list[SamplerState]:
    states = []
    for row, (one, constrained) in enumerate(zip(params, grammars, strict=True)):
        grammar: Any = Grammar(vocab) if constrained else None
        states.append(SamplerState(one, [1, 2, row], row, [0], grammar))
    return states


grammars = st.lists(st.booleans(), min_size=5, max_size=5)


@given(st.lists(random_params, min_size=1, max_size=5), grammars, st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_step_copies_once_each_way(params, grammars, dtype):
    states = some_states(params, grammars[: len(params)], 50)
    with pytest.MonkeyPatch.context() as patch:
        copies = Copies(patch)
        for _ in range(3):
            with OnlyNamedCopies():
                found = sample(torch.empty(len(params), 50, dtype=dtype, device=META), states)
            assert [one.token for one in found] == [0] * len(params)
            assert [one.logprob is None for one in found] == [one.logprobs is None for one in params]
            assert [len(one.top) for one in found] == [one.logprobs or 0 for one in params]
    assert copies.read_backs == 3 and copies.uploads <= 3


@pytest.mark.parametrize("top", [None, 0, 20])
def test_greedy_rows_upload_nothing(top, monkeypatch):
    states = [state(SamplingParams(temperature=0, logprobs=top), index=row) for row in range(3)]
    copies = Copies(monkeypatch)
    with OnlyNamedCopies():
        sample(torch.empty(3, 50, device=META), states)
    assert (copies.uploads, copies.read_backs) == (0, 1)


@pytest.mark.parametrize("rows", [1, 700])
def test_scoring_a_prompt_reads_back_once(rows, monkeypatch):
    monkeypatch.setattr(logprobs, "_ELEMENTS", 5000)  # the rows are then looked at in several pieces
    copies = Copies(monkeypatch)
    with OnlyNamedCopies():
        found = score(torch.empty(rows, 50, device=META), torch.empty(rows, dtype=torch.int64, device=META), 4)
    assert len(found) == rows and len(found[0][1]) == 4
    assert (copies.uploads, copies.read_backs) == (0, 1)


def test_the_guard_sees_hidden_copies():
    on_device = torch.empty(3, 4, device=META)
    hidden = [
        lambda: torch.tensor([1.0], device=META),
        lambda: on_device.new_tensor([1.0]),
        lambda: torch.ones(2).to(META),
        lambda: on_device[[0, 1]],
        lambda: on_device[0, [0, 1]],
    ]
    for copy in hidden:
        with pytest.raises(AssertionError, match="to the device"), OnlyNamedCopies():
            copy()
    for read in (on_device.tolist, on_device[0, 0].item, on_device.nonzero, lambda: on_device[on_device > 0]):
        with pytest.raises((NotImplementedError, RuntimeError)), OnlyNamedCopies():
            read()


@given(
    st.lists(random_params, min_size=1, max_size=5),
    grammars,
    st.sampled_from([7, 40, 1500, 3000]),
    st.integers(0, 999),
    st.sampled_from([None, float("nan"), float("inf"), -float("inf")]),
    st.booleans(),
)
def test_the_device_gives_the_tokens_of_the_cpu(params, grammars, vocab, seed, odd, equals):
    """The ways that differ are those that do not look at values: they run here on a CPU."""
    on_cpu, as_on_device = (some_states(params, grammars[: len(params)], vocab) for _ in range(2))
    targets = torch.arange(len(params)) % vocab
    for step in range(3):
        logits = random_logits(seed + step, len(params), vocab)
        if equals:
            logits = logits.round()  # few distinct values, 0.0 and -0.0 among them
        broken = logits.clone()
        if odd is not None:
            broken[-1, seed % vocab] = odd
        expected = [score(logits, targets, 5), sample(logits, on_cpu), sample(broken, on_cpu)]
        with pytest.MonkeyPatch.context() as patch:
            for module in (token_filters, logprobs):
                patch.setattr(module, "host_waits", lambda device: True)
            found = [score(logits, targets, 5), sample(logits, as_on_device), sample(broken, as_on_device)]
        assert found == expected
        assert [one.failure for one in as_on_device] == [one.failure for one in on_cpu]
