"""The keyword arguments of a call that its signature does not name: those of transformers that we follow, and no others.

A misspelt keyword, or one that asks for what the model does not do, would otherwise run the model as if it were not there.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from transformers import GenerationConfig

from yoco_u.config import did_you_mean
from yoco_u.errors import UserError

OF_OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits", "return_dict")
OF_LOSS = ("shift_labels", "num_items_in_batch")
_LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k")
OF_PACKING = ("seq_idx", *_LENGTHS, "max_length_q", "max_length_k")
OF_MODEL = (*OF_OUTPUTS, *OF_PACKING, "is_causal")

_IMPOSSIBLE: dict[str, tuple[bool, str]] = {
    "output_attentions": (True, "the kernels of attention compute no weights; yoco_u.analysis.attention measures them"),
    "output_router_logits": (True, "the scores of experts are not returned; leave it out"),
    "is_causal": (False, "every architecture of this project is causal; leave it out"),
}


def refuse_unknown(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse keywords that are not known.

    Raises:
        UserError: if there is one; the message names the known one that is spelt most like it.
    """
    for problem in unknown(what, given, known).values():
        raise UserError(problem)


def unknown(what: str, given: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """The keywords that are not known, each with what to say of it."""
    names = sorted(known)
    return {name: f"{what} has no argument {name!r}; {did_you_mean(name, names)}" for name in given if name not in names}


def refuse_impossible(given: Mapping[str, Any]) -> None:
    """Refuse values that ask for what no model of this project does.

    Raises:
        UserError: if there is one.
    """
    for name, (value, reason) in _IMPOSSIBLE.items():
        if given.get(name) is not None and bool(given[name]) == value:
            raise UserError(f"{name} is {given[name]!r}, but {reason}")


def not_followed(generation_config: GenerationConfig) -> dict[str, str]:
    """The settings that no config knows, or that ask for what our models do not do, each with what to say of it."""
    public = [name for name in vars(generation_config) if not name.startswith("_")]
    found = unknown("the generation config", public, {*vars(GenerationConfig()), "num_loops"})
    if (kind := generation_config.cache_implementation) not in (None, "dynamic"):
        found["cache_implementation"] = (
            f"cache_implementation is {kind!r}, but these models have a cache of their own; leave it out"
        )
    if generation_config.assistant_early_exit is not None:
        found["assistant_early_exit"] = (
            "assistant_early_exit cuts a model by its layers; let the first loop draft in yoco_u.LLM instead"
        )
    return found


def follow(generation_config: GenerationConfig, call: dict[str, Any]) -> dict[str, Any]:
    """Take `num_loops` from a generation config, where the call does not say.

    Args:
        call: the keywords of a call of `generate()` that go to the model.

    Returns:
        These keywords with the loop count.

    Raises:
        UserError: if the generation config has a setting that no config knows, or asks for what our models do not do.
    """
    for problem in not_followed(generation_config).values():
        raise UserError(problem)
    loops = call.get("num_loops", getattr(generation_config, "num_loops", None))
    if loops is not None and generation_config.guidance_scale not in (None, 1):
        raise UserError(
            "guidance_scale runs a second pass, which does not know the call's num_loops; set num_loops in the model's config"
        )
    return call if loops is None else call | {"num_loops": loops}


def packing(document_ids: Tensor | None, given: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The documents of packed rows as transformers' collators name them.

    `max_length_q` and `max_length_k` follow from the other two, and are not used.

    Returns:
        `ids` and `lengths` of `yoco_u.model.segments.lay_out`.

    Raises:
        UserError: if one argument needs another one.
    """
    ids = {"document_ids": document_ids, "seq_idx": given.get("seq_idx")}
    lengths = {name: given.get(name) for name in _LENGTHS}
    if lengths["cu_seq_lens_q"] is None:
        for name in ("cu_seq_lens_k", "max_length_q", "max_length_k"):
            if given.get(name) is not None:
                raise UserError(f"{name} came without cu_seq_lens_q, which says where documents begin; give both")
    return ({k: v for k, v in ids.items() if v is not None}, {k: v for k, v in lengths.items() if v is not None})
