"""Small checkpoints for programs that run our models, and the test of their answers: greedy tokens of our own forward pass."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from models import architecture, build
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from yoco_u import YocoUForCausalLM

VOCABULARY = 96
EXPERTS = {"num_experts": 8, "experts_per_token": 3, "shared_experts": 1, "intermediate_size": 32}
TIE = 1e-3
"""Two logits that differ by less are a tie: another order of summation can change which one is larger."""


class Checkpoint(NamedTuple):
    folder: Path
    model: YocoUForCausalLM


def checkpoint(folder: Path, name: str, **settings: Any) -> Checkpoint:
    """A small float32 checkpoint of random weights, of head sizes that other hosts take, with a tokenizer of numbers."""
    shape: dict[str, Any] = {"hidden_size": 64, "head_dim": 32, "vocab_size": VOCABULARY}
    if architecture(name).window is not None:
        shape["window"] = 40  # no multiple of a block
    model = build(architecture(name, **(shape | settings)))
    model.save_pretrained(folder)
    vocabulary = Tokenizer(WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0"))
    vocabulary.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=vocabulary).save_pretrained(folder)
    return Checkpoint(folder, model)


def prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def assert_greedy(
    model: YocoUForCausalLM, asked: Sequence[list[int]], answers: Sequence[Sequence[int]], num_loops: int | None = None
) -> None:
    """Check that each answered token has the highest logit behind all tokens before it, or one that ties with it."""
    for prompt, answer in zip(asked, answers, strict=True):
        row = torch.tensor([prompt + list(answer)])
        with torch.no_grad():
            logits = model(row[:, :-1], num_loops=num_loops, use_cache=False).logits[0, len(prompt) - 1 :]  # (new, vocab)
        lost = logits.max(dim=-1).values - logits.gather(-1, row[0, len(prompt) :, None])[:, 0]
        assert float(lost.max()) < TIE, f"prompt of {len(prompt)}: token {int(lost.argmax())} is worse by {float(lost.max())}"
