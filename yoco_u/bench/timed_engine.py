"""Our engine as the benchmark runs it: timed prefills and decodes, behind contexts that are made up instead of computed."""

import time
from typing import Any

import torch

from yoco_u.architecture import Architecture
from yoco_u.device import synchronize
from yoco_u.inference import Engine, EngineSettings, RequestOutput, SamplingParams
from yoco_u.model import YocoUConfig, YocoUForCausalLM

WARM_STEPS = 4
"""Decode steps that run before those that are timed."""


class TimedEngine:
    """One model in our engine, with the default settings, but caches as large as the cases need and no prefix cache.

    Args:
        architecture: shape of the model, whose weights are random unless `model` is given.
        model: folder of a checkpoint that has this architecture.
        dtype: data type of weights, activations and caches, bfloat16 or float32.
        weights: int8 to quantize the weights; with bfloat16 they have the data type `dtype`.
        cache_tokens: the most tokens that a case keeps in the caches at once, all its sequences together.
        sequences: the most sequences that a case has.
        num_loops: T of all cases; the model's own if None.
        device: where the engine runs, as torch names it.
        block_size: tokens in a block of the pages.
    """

    def __init__(
        self,
        architecture: Architecture,
        *,
        model: str | None,
        dtype: str,
        weights: str,
        cache_tokens: int,
        sequences: int,
        num_loops: int | None,
        device: str = "cpu",
        block_size: int = 64,
    ) -> None:
        torch.manual_seed(0)
        self.device = torch.device(device)
        as_dtype = getattr(torch, dtype)
        loaded: Any
        if model is None:
            with torch.device(device):
                loaded = YocoUForCausalLM._from_config(YocoUConfig.from_architecture(architecture), dtype=as_dtype)
        else:
            loaded = YocoUForCausalLM.from_pretrained(model, dtype=as_dtype, trust_remote_code=False)
        settings = EngineSettings.model_validate(
            {
                "dtype": dtype,
                "weights": "int8" if weights == "int8" else None,
                "num_loops": num_loops,
                "cache_tokens": cache_tokens + 2 * block_size * sequences,  # each has a block begun and one to spare
                "block_size": block_size,
                "max_num_seqs": sequences,
                "prefix_caching": False,
            }
        )
        self.engine = Engine(loaded.eval().to(self.device), None, settings)
        self.vocab_size = architecture.vocab_size
        self.bytes_per_weight = 1 if weights == "int8" else as_dtype.itemsize
        self.engine.cache.release()

    def prefill(self, tokens: int, depth: int = 0) -> float:
        """Seconds from handing over a prompt of `tokens` tokens until its first new token is known.

        Args:
            depth: tokens before the prompt that are not computed; their keys and values are random.
        """
        prompt = self.tokens(depth + tokens)
        begin = time.perf_counter()
        request = self.engine.add(prompt, self.params(1))
        elapsed = time.perf_counter() - begin
        if depth:
            self.engine.fill_cache(depth)
            synchronize(self.device)
        begin = time.perf_counter()
        while not request.finished:
            self.engine.step()
        elapsed += time.perf_counter() - begin
        self.engine.cache.release()
        return elapsed

    def decode(self, batch: int, context: int, steps: int) -> float:
        """Seconds of `steps` decode steps of `batch` sequences, each behind `context` tokens of random keys and values."""
        params = self.params(1 + WARM_STEPS + steps)
        requests = [self.engine.add(self.tokens(context), params) for _ in range(batch)]
        self.engine.fill_cache(context - 1)
        self._step(requests, 1 + WARM_STEPS)
        begin = time.perf_counter()
        self._step(requests, steps)
        elapsed = time.perf_counter() - begin
        self.engine.cache.release()
        return elapsed

    def _step(self, requests: list[RequestOutput], steps: int) -> None:
        """Run decode steps, in each of which every request must get one token."""
        for _ in range(steps):
            updates = self.engine.step()
            if len(updates) != len(requests):
                raise RuntimeError(f"{len(updates)} of {len(requests)} sequences got a token in one step")

    def params(self, tokens: int) -> SamplingParams:
        """Of a request that gets exactly so many tokens."""
        return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)

    def tokens(self, count: int) -> list[int]:
        """Random tokens."""
        return torch.randint(self.vocab_size, (count,)).tolist()
