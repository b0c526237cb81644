"""The inference engine: paged global KV, window rings, continuous batching, a loop count per request. Start at `engine.py`."""

from yoco_u.inference.engine import Engine
from yoco_u.inference.llm import LLM
from yoco_u.inference.outputs import Completion, RequestOutput, TokenLogprobs, Update
from yoco_u.inference.sampler import Logprob
from yoco_u.inference.sampling_params import SamplingParams
from yoco_u.inference.settings import EngineSettings

__all__ = [
    "LLM",
    "Completion",
    "Engine",
    "EngineSettings",
    "Logprob",
    "RequestOutput",
    "SamplingParams",
    "TokenLogprobs",
    "Update",
]
