"""Answers of a model that is being trained, sampled by our engine: `GRPOTrainer(..., rollout_func=engine_rollouts)`."""

import copy
import itertools
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from yoco_u.config import shown
from yoco_u.data import DocumentEncoder
from yoco_u.errors import UserError
from yoco_u.inference import Engine, EngineSettings, RequestOutput, SamplingParams
from yoco_u.inference.chat_template import chat_tokens
from yoco_u.inference.outputs import check_outputs
from yoco_u.tuning.problems import Prompt

_SEATS = 64  # how many answers are sampled at once
_PLAIN = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0}


def prompt_tokens(
    tokenizer: PreTrainedTokenizerFast, prompts: Iterable[Prompt], now: datetime | None = None
) -> Iterator[list[int]]:
    """The tokens of each prompt: of a text as documents begin, of a chat by the template, at the time `now`.

    Raises:
        UserError: if there is no template, or it refuses a chat.
    """
    encoder = DocumentEncoder(tokenizer)
    for prompt in prompts:
        yield encoder.encode([prompt])[0].tolist() if isinstance(prompt, str) else chat_tokens(tokenizer, prompt, now=now)


def complete(
    model: Any, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[list[int]], params: Sequence[SamplingParams]
) -> list[RequestOutput]:
    """Answer prompts with a model as it is now.

    The engine gets a copy of the weights and is gone afterwards. So the model that is trained stays as it is, whatever an
    engine does to its own for speed; adapters are merged in the copy alone; and nothing that was cached of earlier weights can
    be served.

    Args:
        model: ours, or PEFT's around it.
        prompts: tokens of each.
        params: for each prompt.

    Raises:
        UserError: if a request is not possible, or an output ended with an error.
    """
    own = copy.deepcopy(model).eval()
    own = own.merge_and_unload() if hasattr(own, "merge_and_unload") else own
    seats = min(_SEATS, sum(one.n for one in params))
    longest = max(len(ids) + one.max_tokens for ids, one in zip(prompts, params, strict=True))
    settings = EngineSettings(
        dtype="float32" if own.dtype == torch.float32 else "bfloat16", max_num_seqs=seats, max_model_len=longest
    )
    blocks = -(-longest // settings.block_size)
    engine = Engine(own, tokenizer, settings.model_copy(update={"cache_tokens": seats * blocks * settings.block_size}))
    requests = [engine.add(ids, one) for ids, one in zip(prompts, params, strict=True)]
    while engine.unfinished:
        engine.step()
    check_outputs(requests)
    return requests


def engine_rollouts(prompts: list[Prompt], trainer: Any) -> dict[str, list[Any]]:
    """The `rollout_func` of TRL's `GRPOTrainer`: what the trainer's model answers, with its current weights, by our engine.

    Args:
        prompts: each as often as it is to be answered, one after another, as TRL repeats them. Such a prompt is computed once.

    Returns:
        For each prompt `prompt_ids`, `completion_ids` (the end token included, if it came) and `logprobs` of these.

    Raises:
        UserError: if the trainer samples in another way than by the model's own probabilities: those that the engine reports
            are without temperature and filters. If it has tools, or arguments for generation or for the chat template.
    """
    return token_rollouts(list(prompt_tokens(trainer.processing_class, prompts)), trainer)


def token_rollouts(prompts: list[list[int]], trainer: Any) -> dict[str, list[Any]]:
    """`engine_rollouts` of prompts that are tokens already."""
    for name, plain in _PLAIN.items():
        if (value := getattr(trainer.args, name)) != plain:
            raise UserError(f"engine_rollouts samples by the model's probabilities, but {name} is {value}; set it to {plain}")
    for what, name in ((trainer.args, "generation_kwargs"), (trainer.args, "chat_template_kwargs"), (trainer, "tools")):
        if value := getattr(what, name, None):
            raise UserError(f"engine_rollouts does not follow {name}, which is {shown(value)}; leave it out")
    groups = [(prompt, len(list(same))) for prompt, same in itertools.groupby(prompts)]
    params = [
        SamplingParams(
            n=count,
            max_tokens=trainer.args.max_completion_length,
            seed=int(torch.randint(2**62, ())),
            stop_token_ids=trainer.eos_token_ids,
            logprobs=0,
        )
        for _, count in groups
    ]
    model = trainer.accelerator.unwrap_model(trainer.model)
    found: dict[str, list[Any]] = {"prompt_ids": [], "completion_ids": [], "logprobs": []}
    for request in complete(model, trainer.processing_class, [prompt for prompt, _ in groups], params):
        for output in request.outputs:
            found["prompt_ids"].append(request.prompt_token_ids)
            found["completion_ids"].append(output.token_ids)
            found["logprobs"].append([one.chosen.logprob for one in output.logprobs or []])
    return found
