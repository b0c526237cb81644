"""How an engine is set up."""

from typing import Annotated, Literal

import torch
from pydantic import NonNegativeInt, PositiveInt, model_validator

from yoco_u.architecture import Architecture
from yoco_u.budget import KVType, bytes_per_kv_element, cache_bytes
from yoco_u.config import Config, Count, LoopsOrAuto, Needs, at_most
from yoco_u.device import check_bfloat16, fast_dtype, free_memory_bytes
from yoco_u.errors import UserError
from yoco_u.inference.drafts import Drafting
from yoco_u.inference.kv_cache import CacheShape
from yoco_u.inference.prepacking import runs_in_kernels

DEFAULT_CACHE_BYTES = 2**30

_GPU_DEFAULTS = {"max_num_seqs": 64, "max_batched_tokens": 8192}
_GPU_CACHE_SHARE = 0.8  # of the memory that the weights leave, by default
_GPU_RESERVE_BYTES = 2**31  # beside the caches, for what a step computes


class EngineSettings(Config):
    """Settings of an engine.

    Attributes:
        dtype: data type of weights and activations; auto is bfloat16 where the device multiplies it in hardware or the CPU
            kernels do, else float32.
        weights: int8 keeps the weights of linear layers as 8-bit whole numbers, with one scale for each output; see `quantize`.
        kv_dtype: data type of the caches; as `dtype` by default.
        num_loops: T of requests that name none; the model's own by default. With `auto` their tokens leave the loop, as
            the model's `exits.json` says, whose T is the engine's then.
        cache_tokens: tokens that the paged caches hold, all requests together; by default as many as 1 GiB holds, or on a GPU
            four fifths of the memory that the weights leave, and at least `max_model_len`.
        max_model_len: most tokens of one request, prompt and output together; by default as many as the cache holds.
        max_num_seqs: how many requests run at once; on a GPU 64 by default.
        max_batched_tokens: most tokens of one step, over all requests. Fewer let running requests have their next token sooner
            while a prompt is computed; more make a long prompt a little faster. On a GPU 8192 by default.
        block_size: tokens in a block of the paged caches.
        prefix_caching: compute common beginnings of prompts once, and share their blocks.
        snapshot_bytes: memory for the window states that cached prefixes need.
        drafts: how requests draft that do not say; see `SamplingParams`.
    """

    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    weights: Literal["int8"] | None = None
    kv_dtype: KVType | None = None
    num_loops: LoopsOrAuto | None = None
    cache_tokens: PositiveInt | None = None
    max_model_len: Count | None = None
    max_num_seqs: Annotated[Count, at_most(2**20, "each of which has a seat in memory")] = 16
    max_batched_tokens: Count = 512
    block_size: Count = 64
    prefix_caching: bool = True
    snapshot_bytes: Annotated[NonNegativeInt, Needs("prefix_caching", True)] = 2**28
    drafts: Drafting = "none"

    @model_validator(mode="after")
    def _longest_fits(self) -> "EngineSettings":
        longest, tokens = self.max_model_len or 0, self.cache_tokens or self.max_model_len or 0
        if longest > -(-tokens // self.block_size) * self.block_size:
            problem = f"max_model_len is {longest}, but cache_tokens holds {tokens}; raise cache_tokens or lower max_model_len"
            raise UserError(problem, "max_model_len")
        return self

    def on_device(self, device: torch.device) -> "EngineSettings":
        """These settings, with the defaults of a device for what was not set."""
        defaults = {} if device.type == "cpu" else _GPU_DEFAULTS
        return self.model_copy(update={name: value for name, value in defaults.items() if name not in self.model_fields_set})

    def torch_dtype(self, a: Architecture, device: torch.device) -> torch.dtype:
        """The dtype that a model's weights and activations have on a device.

        Raises:
            UserError: if bfloat16 is asked for of a GPU that has none.
        """
        if self.dtype == "bfloat16":
            check_bfloat16(device)
        dtype = self.dtype
        if dtype == "auto":
            dtype = "bfloat16" if runs_in_kernels(a, device) else fast_dtype(device)
        return torch.bfloat16 if dtype == "bfloat16" else torch.float32

    def cache_shape(self, a: Architecture, device: torch.device) -> CacheShape:
        """The caches' shape for a model.

        Raises:
            UserError: if not even one block fits.
        """
        kind: KVType = self.kv_dtype or ("bfloat16" if self.torch_dtype(a, device) == torch.bfloat16 else "float32")
        element = bytes_per_kv_element(a, kind)
        if self.cache_tokens is not None:
            blocks = -(-self.cache_tokens // self.block_size)
        else:
            seats = cache_bytes(a, 0, self.max_num_seqs, a.window or 0, element)
            block = cache_bytes(a, self.block_size, 0, 0, element)
            bytes_ = _default_cache_bytes(device)
            blocks = (bytes_ - seats) // block if block else 2**20 // self.block_size
            blocks = max(blocks, -(-(self.max_model_len or 0) // self.block_size))
        if blocks < 1:
            raise UserError(
                f"the caches of {self.max_num_seqs} sequences leave no room for a block in {bytes_ >> 20} MiB; "
                "set cache_tokens, or lower max_num_seqs"
            )
        longest = min(self.max_model_len or blocks * self.block_size, blocks * self.block_size)
        window = min(a.window, longest) if a.window else None
        return CacheShape(blocks, self.block_size, self.max_num_seqs, window, kind)


def _default_cache_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return DEFAULT_CACHE_BYTES
    free = free_memory_bytes(device)
    return max(int(_GPU_CACHE_SHARE * free) - _GPU_RESERVE_BYTES, min(DEFAULT_CACHE_BYTES, free // 2))
