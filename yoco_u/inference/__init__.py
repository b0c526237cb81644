"""The inference engine: many requests at once, over paged caches and window rings, each with its own loop count.

A model and prompts go in, tokens and text come out. `LLM` (`llm.py`) is the door for Python; the server uses `Engine` itself.
Start at `engine.py`: a step is schedule, run, sample. What blocks hand their keys and values to is `paged_backend.py`.
"""

from yoco_u.inference.engine import Engine
from yoco_u.inference.llm import LLM
from yoco_u.inference.logprobs import Logprob
from yoco_u.inference.outputs import Completion, RequestOutput, TokenLogprobs, Update
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
