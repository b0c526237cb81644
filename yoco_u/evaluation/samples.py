"""Continuing a prompt by `generate()`, with the document format of training."""

from typing import Any

import torch
from pydantic import Field, PositiveInt
from transformers import PreTrainedTokenizerFast, TextStreamer

from yoco_u.data import DocumentEncoder
from yoco_u.errors import UserError
from yoco_u.model import YocoUForCausalLM
from yoco_u.typed import Config


class Sampling(Config):
    """How the next token is chosen.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token every time, whatever else is set.
        top_k: choose among so many likeliest tokens.
        top_p: choose among the likeliest tokens that together have this probability.
        num_loops: T; the model's own by default.
    """

    max_new_tokens: PositiveInt = 200
    temperature: float = Field(default=0.8, ge=0)
    top_k: PositiveInt | None = None
    top_p: float | None = Field(default=None, gt=0, le=1)
    num_loops: PositiveInt | None = None
    seed: int = 0


def continue_text(
    model: YocoUForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompt: str,
    sampling: Sampling,
    streamer: TextStreamer | None = None,
) -> tuple[str, int]:
    """What the model writes after a prompt that begins a document.

    Args:
        streamer: is given the tokens as they come.

    Returns:
        The new text, without the prompt, and the number of its tokens.

    Raises:
        UserError: if the prompt is empty.
    """
    if not prompt:
        raise UserError("the prompt is empty; give at least one character")
    encoder = DocumentEncoder(tokenizer)
    tokens = torch.from_numpy(encoder.encode([prompt])[0].astype("int64"))[None].to(model.device)
    chosen: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        chosen = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k or 0,
            "top_p": sampling.top_p or 1.0,
        }
    torch.manual_seed(sampling.seed)
    out = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=encoder.eot_id,
        pad_token_id=encoder.eot_id,
        num_loops=sampling.num_loops,
        streamer=streamer,
        **chosen,
    )
    new = out[0, tokens.shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True), len(new)
