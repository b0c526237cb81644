"""A small saved model with a tokenizer of code, as our engine and as lm-evaluation-harness's own path through transformers."""

from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from models import architecture, build

from yoco_u.data import train_tokenizer
from yoco_u.evaluation.harness import EngineLM
from yoco_u.evaluation.stdlib_tasks import texts


def save_model(folder: Path, name: str = "yoco_u", **settings: Any) -> None:
    tokenizer = train_tokenizer(texts()["test"]["text"][:60], 400)
    end = tokenizer.eos_token_id
    build(architecture(name, vocab_size=400, **settings), eos_token_id=end, bos_token_id=end, pad_token_id=end).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)


def ours(folder: Path, **settings: Any) -> EngineLM:
    return EngineLM(folder, **{"device": "cpu", "cache_tokens": 8192} | settings)


def theirs(folder: Path, **settings: Any) -> HFLM:
    return HFLM(str(folder), **{"backend": "causal", "device": "cpu", "dtype": "float32", "batch_size": 3} | settings)


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, one, index, metadata=("some task", index, 1)) for index, one in enumerate(arguments)]
