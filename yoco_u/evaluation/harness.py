"""The engine as a model of lm-evaluation-harness, registered there as `yoco_u`.

Requests run with continuous batching, a beginning that contexts share is computed once, and for log-likelihoods the
cross-decoder and the LM head run for the scored positions alone. Scores are those of the harness's own path through
transformers.
"""

import math
import os
from collections.abc import Callable
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from yoco_u.config import parse
from yoco_u.data import end_of_text_id
from yoco_u.errors import UserError
from yoco_u.inference import LLM, RequestOutput, SamplingParams
from yoco_u.inference.chat_template import chat_text
from yoco_u.inference.outputs import check_outputs
from yoco_u.inference.shared_prefixes import run_shared

MAX_LENGTH = 2048
"""Longest context by default: the harness's own default for models that name no limit."""

_MAX_NEW_TOKENS = 256  # where a task names no limit; the default of the harness's own models
_SAMPLING = {"temperature", "top_k", "top_p", "min_p", "repetition_penalty"}
_UNASKED_DEVICE = "cuda:0"  # what the harness's command line passes if the user names no device
# Blocks are small because contexts share whole blocks alone, and may differ from any token on.
_DEFAULTS = {"dtype": "float32", "block_size": 16, "snapshot_bytes": 2**30}

_Scored = tuple[tuple[str, str] | None, list[int], list[int]]
"""A request to score: its texts (context, continuation), which are the key in the harness's cache, and the tokens of both."""


@register_model("yoco_u")
class EngineLM(TemplateLM):
    """A model behind our engine, for `lm_eval.simple_evaluate`.

    Args:
        pretrained: a run folder or a saved model; or an `LLM`, whose settings are kept.
        device: auto, cpu or cuda.
        num_loops: loop count T; the model's own by default. The attribute may be set anew between evaluations.
        max_length: tokens of a context and its continuation; longer contexts lose their beginning.
        add_bos_token: whether contexts begin with `<|endoftext|>`, as documents do in training.
        seed: seed of the first request that is sampled; each further request takes the next number.
        batch_size, max_batch_size: not used. The harness passes them to every model, but the engine batches continuously.
        settings: fields of `EngineSettings`; float32 by default.

    Raises:
        UserError: for a folder that holds no model, settings that do not fit, or caches too small for `max_length`.
    """

    def __init__(
        self,
        pretrained: str | os.PathLike[str] | LLM,
        device: str | None = None,
        num_loops: int | None = None,
        max_length: int = MAX_LENGTH,
        add_bos_token: bool = True,
        seed: int = 0,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        if device is None or (device == _UNASKED_DEVICE and not torch.cuda.is_available()):
            device = "auto"
        self.llm = pretrained if isinstance(pretrained, LLM) else LLM(pretrained, device=device, **_DEFAULTS | settings)
        self.engine, self.num_loops, self.seed = self.llm.engine, num_loops, seed
        if self.engine.tokenizer is None:
            raise UserError("the engine has no tokenizer; give one that has")
        if self.engine.max_model_len <= max_length:
            raise UserError(
                f"max_length is {max_length}, but the caches hold {self.engine.max_model_len} tokens, and one more is needed; "
                "lower it or set cache_tokens"
            )
        self.tokenizer, self.max_length, self.add_bos_token = self.engine.tokenizer, max_length, add_bos_token
        self.max_gen_toks = _MAX_NEW_TOKENS

    @property
    def eot_token_id(self) -> int:
        """The token that begins and ends documents."""
        return end_of_text_id(self.tokenizer)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return chat_text(self.tokenizer, chat_history, continue_final_message=not add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens of a text. `<|endoftext|>` is put before them, unless the text has it already or it is not wanted."""
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=False)
        begins = self.add_bos_token if add_special_tokens is None else add_special_tokens
        return ids if not begins or ids[:1] == [self.prefix_token_id] else [self.prefix_token_id, *ids]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each request the log probability of its continuation, and whether each of its tokens is the likeliest one."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log probability of each text. Texts are cut into windows of `max_length` targets, so that each token counts once."""
        windows: list[_Scored] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue each context up to a stop string, the end of the document or the largest number of tokens."""
        eos = self.tokenizer.decode([self.eot_token_id])
        prompts, params, stops = [], [], []
        for index, request in enumerate(requests):
            how, stop = self._how_to_generate(request, self.seed + index, eos)
            prompts.append(self.tok_encode(request.args[0])[how.max_tokens - self.max_length :])
            params.append(how)
            stops.append(stop)
        texts = [""] * len(requests)

        def finish(index: int, request: RequestOutput) -> None:
            text = self.tokenizer.decode(request.outputs[0].token_ids, skip_special_tokens=True)
            texts[index] = postprocess_generated_text(text, stops[index], None)
            self.cache_hook.add_partial("generate_until", requests[index].args, texts[index])

        self._run("generating", prompts, params, finish)
        return texts

    def check(self, requests: list[Instance]) -> None:
        """Check that requests can be answered, without answering them.

        Raises:
            UserError: what answering them would raise.
        """
        eos = self.tokenizer.decode([self.eot_token_id])
        for request in requests:
            if request.request_type == "generate_until":
                self._how_to_generate(request, self.seed, eos)
            elif request.request_type == "loglikelihood":
                self._check_continuation(self._encode_pair(*request.args)[1])

    def _how_to_generate(self, request: Instance, seed: int, eos: str) -> tuple[SamplingParams, list[str]]:
        """The sampling parameters of a request that generates, and its stop strings, `eos` among them."""
        name, kwargs = (
            request.task_name or "a request",
            dict[str, Any](normalize_gen_kwargs(request.args[1], self.max_gen_toks)),
        )
        stop = handle_stop_sequences(kwargs.pop("until"), eos)
        new = kwargs.pop("max_gen_toks")
        if not 0 < new < self.max_length:
            raise UserError(
                f"{name} asks for {new} new tokens, but context and output have to fit into "
                f"{self.max_length}; raise max_length or let it ask for fewer"
            )
        settings = {"max_tokens": new, "stop": tuple(filter(None, stop)), "num_loops": self.num_loops}
        return parse(SamplingParams, settings | _sampling(kwargs, seed), f"{name}, generation_kwargs"), stop

    def _check_continuation(self, tokens: list[int]) -> None:
        if len(tokens) > self.max_length:
            raise UserError(f"a continuation has {len(tokens)} tokens, but max_length is {self.max_length}; raise it")

    def _loglikelihood_tokens(self, requests: list[_Scored], **kwargs: Any) -> list[tuple[float, bool]]:
        prompts, params = [], []
        for _, context, continuation in requests:
            self._check_continuation(continuation)
            tokens = (context + continuation)[-(self.max_length + 1) :]
            start = len(tokens) - len(continuation)
            prompts.append(tokens)
            params.append(
                SamplingParams(max_tokens=0, prompt_logprobs=1, prompt_logprobs_start=start, num_loops=self.num_loops)
            )
        answers = [(0.0, False)] * len(requests)

        def finish(index: int, request: RequestOutput) -> None:
            scored = request.scored
            total = math.fsum(one.chosen.logprob for one in scored)
            answers[index] = total, all(one.top[0].token_id == one.chosen.token_id for one in scored)
            if requests[index][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[index][0], answers[index])

        self._run("scoring", prompts, params, finish)
        return answers

    def _run(
        self,
        work: str,
        prompts: list[list[int]],
        params: list[SamplingParams],
        finish: Callable[[int, RequestOutput], None],
    ) -> None:
        with tqdm(total=len(prompts), desc=work, disable=None) as bar:

            def finished(index: int, request: RequestOutput) -> None:
                check_outputs([request])
                finish(index, request)
                bar.update()

            run_shared(self.engine, prompts, params, finished)


def _sampling(kwargs: dict[str, Any], seed: int) -> dict[str, Any]:
    """Fields of `SamplingParams` from a task's generation settings, after `normalize_gen_kwargs`.

    Raises:
        UserError: for a setting that the engine does not know.
    """
    sampled = kwargs.pop("do_sample")
    unknown = sorted(kwargs.keys() - _SAMPLING)
    if unknown:
        raise UserError(f"generation_kwargs has {unknown[0]}, which the engine does not know; leave it out")
    if not sampled:
        return {"temperature": 0.0}
    return {key: value for key, value in kwargs.items() if value is not None} | {"seed": seed}
