"""The scores of a model on held-out text: at one loop count or several, and with quantized weights beside float32."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from yoco_u.config import Config
from yoco_u.data import Corpus, DocumentEncoder, PackedDataset, SplitDocuments
from yoco_u.errors import UserError
from yoco_u.evaluation.perplexity import Score, score_documents, score_split
from yoco_u.loading import is_run, load_model, read_tokenizer
from yoco_u.model.quantization import WeightType, quantize, require_torchao
from yoco_u.training.distributed import distributed_session
from yoco_u.training.run_folder import has_special_tokens, read_run_config, run_dataset

_DEFAULT_LENGTH = 1024


class QuantizedScore(Config):
    """The score of quantized weights on the same text. Each change is this figure minus that of the float32 weights."""

    weights: WeightType
    loss: float
    perplexity: float
    bits_per_byte: float
    loss_change: float
    perplexity_change: float


class LoopScore(Score):
    """The score of float32 weights at the loop count `num_loops`, and that of quantized ones where they were asked for."""

    num_loops: int
    quantized: QuantizedScore | None = None


class HeldOutScores(Config):
    """What `score_held_out` found.

    Attributes:
        sequence_length: tokens per row.
        results: one for each loop count, in the order in which they were asked for.
    """

    sequence_length: int
    results: tuple[LoopScore, ...]


def score_held_out(
    path: Path,
    files: Sequence[str] = (),
    *,
    num_loops: Sequence[int] = (),
    sequence_length: int | None = None,
    text_field: str = "text",
    weights: WeightType | None = None,
    device: str = "auto",
) -> HeldOutScores:
    """Score a run or a saved model on held-out text, with float32 weights and activations.

    Args:
        path: a run folder or a saved model.
        files: entries of a corpus, as in a config's `data.corpus`; the run's validation split where there are none.
        num_loops: loop counts T; the model's own by default.
        sequence_length: tokens per row; by default the run's, or 1024 for a saved model.
        text_field: the field of JSON, CSV and Parquet files that holds the text.
        weights: score the text a second time with linear layers and LM head in this type, see `quantize`. Activations stay in
            float32, so that the change is the weights' alone.
        device: auto, cpu or cuda.

    Raises:
        UserError: if the model or the text cannot be read, there is no text, or torchao is not installed.
    """
    if weights is not None:
        require_torchao()
    with distributed_session(device) as distributed:
        model, tokenizer = load_model(path, distributed.device)
        length = sequence_length or row_length(path)
        counts = num_loops or [model.model.at_loops().num_loops]
        for loops in counts:
            model.model.at_loops(loops)  # refuses an impossible one

        def scores() -> list[Score]:
            if not files:
                validation = validation_split(path, length)
                return [score_split(model, validation, distributed, loops) for loops in counts]
            encoder, corpus = document_encoder(path, tokenizer), Corpus(files, text_field)
            return [score_documents(model, encoder, corpus.documents(), length, loops) for loops in counts]

        results = [LoopScore(num_loops=loops, **dict(score)) for loops, score in zip(counts, scores(), strict=True)]
        if weights is not None:
            quantize(model, weights)
            results = [_beside(result, weights, score) for result, score in zip(results, scores(), strict=True)]
    return HeldOutScores(sequence_length=length, results=tuple(results))


def _beside(result: LoopScore, weights: WeightType, score: Score) -> LoopScore:
    compared = QuantizedScore(
        weights=weights,
        loss=score.loss,
        perplexity=score.perplexity,
        bits_per_byte=score.bits_per_byte,
        loss_change=score.loss - result.loss,
        perplexity_change=score.perplexity - result.perplexity,
    )
    return result.model_copy(update={"quantized": compared})


def row_length(path: Path) -> int:
    """Tokens of a row in the run's training; 1024 for a saved model."""
    return read_run_config(path).training.sequence_length if is_run(path) else _DEFAULT_LENGTH


def document_encoder(path: Path, tokenizer: PreTrainedTokenizerFast) -> DocumentEncoder:
    """Makes documents of texts as those of a run's dataset are made: with the special tokens that texts spell, or without.

    A saved model does not say, and has them as ordinary text.

    Args:
        tokenizer: that of the run or the saved model.
    """
    return DocumentEncoder(tokenizer, special_tokens=is_run(path) and has_special_tokens(path))


def read_documents(path: Path, files: Sequence[str], text_field: str = "text") -> Iterable[NDArray[np.integer]]:
    """The documents that a command names, as tokens, with `<|endoftext|>` first.

    Args:
        path: a run folder or a saved model.
        files: entries of a corpus, as in a config's `data.corpus`; the run's validation split where there are none.

    Raises:
        UserError: if the tokenizer or the text cannot be read, or for a saved model without files.
    """
    if not files:
        documents = SplitDocuments(_validation_dataset(path, "--files"), "validation")
        documents.index.verify("validation")
        return documents
    encoder = document_encoder(path, read_tokenizer(path))
    return (encoder.encode_documents([document])[0] for document in Corpus(files, text_field).documents())


def validation_split(path: Path, sequence_length: int) -> PackedDataset:
    """The validation split of a run, in the order of its files.

    Raises:
        UserError: for a saved model, which has none.
    """
    dataset = PackedDataset(_validation_dataset(path, "files"), "validation", sequence_length, shuffle=False)
    dataset.index.verify("validation")
    return dataset


def _validation_dataset(path: Path, files: str) -> Path:
    if not is_run(path):
        raise UserError(f"{path}: a saved model has no validation split; name {files} to take the text from")
    return run_dataset(path)
