"""Conversion: the blocks of a source in the stages of another architecture, and its folder."""

import os
import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from yoco_u.architecture import Architecture
from yoco_u.checksums import check_changes
from yoco_u.conversion.families import config_of, tensor_names
from yoco_u.conversion.global_kv import Method, Moments, blocks, collect, write_global_kvs
from yoco_u.conversion.source import Source, in_dtype
from yoco_u.conversion.target import spans
from yoco_u.data import Corpus, DocumentEncoder
from yoco_u.errors import UserError
from yoco_u.folders import check_part, marked
from yoco_u.inference.exits import FILE as EXITS
from yoco_u.inference.exits import Exits, find_exits
from yoco_u.loading import check_loops
from yoco_u.model import YocoUConfig, YocoUForCausalLM, save_model
from yoco_u.model.blocks import LoopedStack
from yoco_u.model.keywords import not_followed
from yoco_u.model.remote_code import AUTO_MAP

Progress = Callable[[int], AbstractContextManager[Callable[[int], None]]]


@dataclass(frozen=True)
class Calibration:
    """The texts whose activations the global KVs are fitted to.

    Attributes:
        corpus: entries as of `yoco_u.data.Corpus`.
        tokens: how many tokens are read, equally many from each entry, from documents that are drawn by `seed`.
        length: tokens of a row.
        special_tokens: whether what spells a special token is that token, as in chats that a template rendered, and not text.
    """

    corpus: tuple[str, ...] = ("documentation", "packages")
    tokens: int = 32_768
    length: int = 1024
    seed: int = 0
    special_tokens: bool = False


@dataclass(frozen=True)
class Converted:
    """A converted model.

    Attributes:
        model: in evaluation mode, in float32.
        explained: for each layer that the cross-decoder replaces, the share of the variance of its keys and values that its
            global KV explains on the calibration texts; None if there were none.
        tokens: how many tokens of the calibration texts were read.
    """

    model: YocoUForCausalLM
    explained: list[float] | None
    tokens: int = 0


def convert(
    source: Source,
    target: Architecture,
    method: Method = "fit",
    calibration: Calibration | None = None,
    progress: Progress = lambda total: nullcontext(lambda done: None),
    moments: Moments | None = None,
) -> Converted:
    """Put the blocks of a source into the stages of another architecture, in their order.

    Args:
        target: as `target_architecture` makes it.
        method: how the global KVs come about, see `yoco_u.conversion.global_kv`.
        calibration: the texts for methods other than `mean`.
        progress: from a number of tokens, a context that is called with the tokens done.
        moments: what `collect` found for another number of global KVs, where it is there already.

    Raises:
        UserError: if the texts cannot be read, or are too few.
    """
    kept = {name: getattr(source.model.config, name) for name in _KEPT}
    with torch.device("meta"):
        model = YocoUForCausalLM(YocoUConfig.from_architecture(target, **kept))
    _copy_blocks(source.model, model)
    if not target.has_global_kv:
        return Converted(model.eval(), None)
    if method != "mean" and moments is None:
        rows = calibration_rows(source, calibration or Calibration())
        with progress(rows.numel()) as advance:
            moments = collect(model.eval(), source.model, rows, advance)
    weights = write_global_kvs(model, source.model, method, moments)
    if moments is None:
        return Converted(model.eval(), None)
    return Converted(model.eval(), list(map(moments.explained, range(len(weights)), weights)), moments.tokens)


def check_target(folder: Path) -> None:
    """Check, before anything is computed, that a converted model may be written to a folder.

    Raises:
        UserError: if it holds anything but an earlier conversion, or one that a user has changed.
        OSError: if the folder that it is in cannot be written to.
    """
    check_part(folder)
    if folder.is_dir() and os.listdir(folder) and not marked(folder, _FOLDER):
        raise UserError(f"{folder}: holds something else than what yoco-u convert wrote; name a new folder")
    check_changes(folder)


def write(converted: Converted, source: Source, folder: Path, remote_code: bool = False) -> list[str]:
    """Save a converted model with its source's tokenizer, chat template and generation config, in the source's dtype.

    The source's `exits.json`, whose heads and threshold are fitted to its weights, comes along where these stay as they are;
    of the generation config, what our models follow.

    Args:
        remote_code: whether to write the modelling files too, see `yoco_u.model.remote_code`.

    Returns:
        What does not come along and why, in lines.

    Raises:
        UserError: if something else is in the folder.
    """
    model, exits = converted.model, _exits(converted, source)
    left_out = [exits] if isinstance(exits, str) else []
    if source.generation is not None:
        model.generation_config = GenerationConfig.from_dict(source.generation.to_dict())
        for name, problem in not_followed(model.generation_config).items():
            left_out.append(f"left out of the generation config: {problem}")
            if hasattr(plain := GenerationConfig(), name):
                setattr(model.generation_config, name, getattr(plain, name))
            else:
                delattr(model.generation_config, name)
    if remote_code:
        model.config.auto_map = dict(AUTO_MAP)
    exact = {name: tensor for name, tensor in model.state_dict().items() if "choice_bias" in name}  # float32 in every model
    for name, tensor in model.state_dict().items():
        if name not in exact:
            in_dtype(name, tensor, source.dtype)
    model.to(source.dtype).load_state_dict(exact, strict=False, assign=True)
    results = {EXITS: exits.model_dump(mode="json", exclude={"model"})} if isinstance(exits, Exits) else {}
    save_model(model, source.tokenizer, folder, results, _FOLDER)
    return left_out


def _exits(converted: Converted, source: Source) -> Exits | str | None:
    """The source's exits, or why they are none of the converted model."""
    if source.ours is None or not (source.ours / EXITS).is_file():
        return None
    a, weights, new = source.model.model.architecture, source.model.state_dict(), converted.model.state_dict()
    same = a == converted.model.model.architecture and weights.keys() == new.keys()
    if not (same and all(torch.equal(tensor, new[name]) for name, tensor in weights.items())):
        return f"{EXITS} of the source is fitted to other weights and loops, and is left out; fit it anew with yoco-u exits"
    found = find_exits(source.ours, a)
    return f"left out: {found}" if isinstance(found, UserError) else found


_FOLDER = "converted"
"""The kind of mark that tells the folder from a run's model, a dataset and a checkpoint."""

_CHARACTERS = 8  # per token, more than a piece of a document needs
_KEPT = ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range")


def write_back(source: Source, folder: Path) -> str:
    """Save a Transformer of ours as a Llama, Mistral or Qwen, which other programs read.

    Returns:
        The `model_type` of the family.

    Raises:
        UserError: if the model is none of these, or something else is in the folder.
    """
    config, a = source.model.config, source.model.model.architecture
    check_loops(source.name, a, config.num_loops)
    kept = {name: getattr(config, name) for name in _KEPT}
    theirs = AutoConfig.for_model(**config_of(a, **{name: value for name, value in kept.items() if value is not None}))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(theirs)
    weights = source.model.state_dict()
    given = {name: in_dtype(name, weights[ours], source.dtype) for name, ours in tensor_names(a)}
    model.load_state_dict(given, strict=False, assign=True)
    model.tie_weights()
    model.generation_config = source.generation or model.generation_config
    save_model(model, source.tokenizer, folder, kind=_FOLDER)
    return str(theirs.model_type)


def _copy_blocks(source: YocoUForCausalLM, target: YocoUForCausalLM) -> None:
    """Copy what both have; what only the target has gets its initial values."""
    weights, found = source.state_dict(), {}
    names = {
        f"stages.{s}.layers.{n}.": f"stages.{t}.layers.{m}."
        for (s, n), (t, m) in zip(blocks(source), blocks(target), strict=True)
    }
    back = {ours: theirs for theirs, ours in names.items()}
    for name, empty in target.state_dict().items():
        theirs = name
        for ours, source_layer in back.items():
            if name.startswith(f"model.{ours}"):
                theirs = name.replace(ours, source_layer, 1)
        if "loop_gates" not in name and theirs in weights and weights[theirs].shape == empty.shape:
            found[name] = weights[theirs].clone()
        else:
            found[name] = torch.zeros(empty.shape)
    target.load_state_dict(found, assign=True)
    target.tie_weights()
    before = spans(source.config.architecture.stages)
    for span, number in spans(target.config.architecture.stages).items():
        gates = _gates(target, number)
        if gates is None:
            continue
        kept = _gates(source, before[span]) if span in before else None
        if kept is None:
            torch.nn.init.constant_(gates, target.config.architecture.stages[number].loop_gate or 0.0)
        else:  # further loops have the last gate, as where the source runs them
            gates.data.copy_(kept[torch.arange(len(gates)).clamp(max=len(kept) - 1)])


def _gates(model: YocoUForCausalLM, stage: int) -> Tensor | None:
    stack = model.model.stages[stage]
    assert isinstance(stack, LoopedStack)
    return stack.loop_gates


def calibration_rows(source: Source, calibration: Calibration) -> Tensor:
    """Rows of tokens, (rows, length): a piece of each document.

    Every entry of the corpus gives as many tokens; what one lacks, others give.
    """
    encoder, draw = DocumentEncoder(source.tokenizer, calibration.special_tokens), random.Random(calibration.seed)
    count, length, entries = -(-calibration.tokens // calibration.length), calibration.length, len(calibration.corpus)
    stream: list[int] = []
    sampled = [Corpus([entry], unique=False).sample(calibration.seed) for entry in calibration.corpus]
    shares = [count * length * number // entries for number in range(1, entries + 1)]
    for wanted, documents in zip(shares + [count * length] * entries, sampled * 2, strict=True):
        while len(stream) < wanted and (document := next(documents, None)) is not None:
            begin = draw.randrange(max(1, len(document.text) - _CHARACTERS * length))
            [tokens] = encoder.encode([document.text[begin : begin + _CHARACTERS * length]])
            stream += tokens[:length].tolist()
    rows = min(count, len(stream) // length)
    if not rows:
        raise UserError(f"the calibration texts have {len(stream)} tokens; expected at least {length}; name more of them")
    return torch.tensor(stream[: rows * length]).view(rows, length)
