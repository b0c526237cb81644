"""Which tokens of a batch see each other: segments, and the positions and sequences that follow from them.

Segments are explained in `yoco_u.model.attention`. A sequence is a longest run of tokens of one segment in one row. `lay_out`
finds them in what a call says about its rows, and refuses what contradicts itself.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from yoco_u.device import host_waits, read_back, upload
from yoco_u.errors import UserError

_MASK_VALUES = (
    "attention_mask holds other values than 0 and 1; expected 1 for a token and 0 for padding (what tells documents apart goes "
    "into document_ids)"
)
_HOLE = (
    "attention_mask has padding between tokens of one document; expected it before or after them: pad prompts on the left, or "
    "remove the padding before going on from a cache"
)
_NOT_AS_CACHED = (
    "attention_mask contradicts the one that the cache was filled with; there padding stays padding, and a token that others "
    "have seen stays a token"
)
_POSITIONS_IN_DOCUMENT = (
    "position_ids do not count up by one inside a document; leave them out, or give the documents that they show"
)
_POSITIONS_BEHIND_CACHE = (
    "position_ids do not count up by one behind a filled cache; packed documents are for calls without one"
)


@dataclass(frozen=True)
class Layout:
    """The rows of one call.

    Attributes:
        segments: of all tokens so far, (batch, past + tokens); None if each row is known to be one document without padding.
        positions: of the new tokens for RoPE, (batch or 1, tokens).
        cu_seqlens: where the sequences begin, see `cumulative_lengths`; None if it was neither given nor looked for.
        mask: false where one of all tokens so far is padding, (batch, past + tokens); None if none is known to be.
        packed: whether rows hold more than one document, as far as is known without waiting for a GPU.
    """

    segments: Tensor | None
    positions: Tensor
    cu_seqlens: Tensor | None = None
    mask: Tensor | None = None
    packed: bool = False


def lay_out(
    shape: tuple[int, int],
    past: int,
    device: torch.device,
    attentions: Collection[str],
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    ids: Mapping[str, Tensor] | None = None,
    lengths: Mapping[str, Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
    cached_mask: Tensor | None = None,
) -> Layout:
    """Find the documents and the padding of a call.

    Documents are those of `ids` and `lengths`; without these, a new one begins wherever `position_ids` do not count up by one.
    Values are looked at on a CPU. A GPU is waited for once, and only for rows with a mask, positions or ids that begin in this
    call and come without lengths. Where values are not looked at, as in a traced program, the program itself stops
    (`torch._assert_async`) if they contradict each other.

    Args:
        shape: (batch, tokens) of the new tokens.
        past: number of cached tokens.
        attentions: the kinds of attention of the stages. A window counts the slots of a cache, and so would count padding in
            between too; a retention state cannot forget.
        attention_mask: (batch, past + tokens), 1 for a token and 0 for padding; by default what the cache holds, and tokens.
        position_ids: (batch or 1, tokens), integers.
        ids: by the name of the argument, numbers that change where a document begins, (batch, tokens).
        lengths: by the name of the argument, where documents begin in the rows laid one after another, (documents + 1,), int32.
        cu_seqlens: what `cumulative_lengths` returned.
        cached_mask: `mask` of the layout of the call before, (batch, at least past).

    Raises:
        UserError: if a shape does not fit, a value is impossible or two arguments contradict each other.
    """
    ids, lengths = ids or {}, lengths or {}
    batch, tokens = shape
    _check_shapes(shape, past, attention_mask, position_ids, ids)
    traced, waits = torch.compiler.is_compiling(), host_waits(device)
    cached_mask = None if cached_mask is None or not past else cached_mask[:, :past]
    if cached_mask is not None:
        attention_mask = F.pad(cached_mask, (0, tokens), value=True) if attention_mask is None else attention_mask
    elif attention_mask is not None and cu_seqlens is None and not traced and not waits and bool((attention_mask == 1).all()):
        attention_mask = None

    wrong: list[tuple[Tensor, str]] = []  # what must be false everywhere, and what to say if it is not
    real = None if attention_mask is None else attention_mask != 0
    if attention_mask is not None and real is not None and attention_mask.dtype != torch.bool:
        wrong.append((real & (attention_mask != 1), _MASK_VALUES))
    borders = _borders(shape, ids, lengths, wrong)
    if position_ids is not None and tokens > 1:
        breaks = _breaks(position_ids.expand(batch, -1), None if real is None else real[:, past:])
        if borders is not None:
            wrong.append((breaks & ~borders, _POSITIONS_IN_DOCUMENT))
        elif past:
            wrong.append((breaks, _POSITIONS_BEHIND_CACHE))
        else:
            borders = breaks

    segments = None if borders is None else F.pad(borders.long().cumsum(dim=1), (1, 0)) + 1
    if real is not None:
        segments = real.long() if segments is None else segments * real
        if "sliding" in attentions or not past:
            wrong.append((_holes(segments), _HOLE))
        if past:
            wrong.append((_contradicts(real[:, :past], cached_mask, "retention" in attentions), _NOT_AS_CACHED))
    check_cumulative_lengths(cu_seqlens, segments)
    if cu_seqlens is not None and segments is not None:
        given = torch.zeros(batch * tokens + 1, dtype=torch.bool, device=device).index_fill(0, cu_seqlens.long(), True)
        wrong.append((given[:-1] != _begins(segments).flatten(), "cu_seqlens does not fit document_ids and attention_mask"))
    if position_ids is None:
        position_ids = _positions(segments if borders is not None else None, real, tokens, past, device)

    known = next(iter(lengths.values()), None) if real is None and cu_seqlens is None else cu_seqlens
    if traced or (waits and (past > 0 or tokens == 1 or known is not None)):
        for found, message in wrong:
            torch._assert_async(~found.any(), message)
        return Layout(segments, position_ids, known, real, bool(ids or lengths))
    sequences, padded, packed = _look(segments, wrong)
    if segments is not None and not (padded or packed):
        return Layout(None, position_ids)
    if segments is not None and waits:
        known = _starts(segments, sequences)
    return Layout(segments, position_ids, known, real if padded else None, packed)


def _look(segments: Tensor | None, wrong: list[tuple[Tensor, str]]) -> tuple[int, bool, bool]:
    """Read values, all at once. Returns the number of sequences, and whether there are padding and several documents.

    Raises:
        UserError: if something is true that must not be.
    """
    facts = [] if segments is None else [_begins(segments).sum(), (segments == 0).any(), (segments > 1).any()]
    if not facts and not wrong:
        return 0, False, False
    values = read_back(torch.stack([fact.long() for fact in (*facts, *(found.any() for found, _ in wrong))]))
    for is_wrong, (_, message) in zip(values[len(facts) :], wrong, strict=True):
        if is_wrong:
            raise UserError(message)
    return (values[0], bool(values[1]), bool(values[2])) if facts else (0, False, False)


def _check_shapes(
    shape: tuple[int, int], past: int, attention_mask: Tensor | None, position_ids: Tensor | None, ids: Mapping[str, Tensor]
) -> None:
    batch, tokens = shape
    if not (batch and tokens):
        raise UserError(f"the rows have shape {shape}; expected at least one row of at least one token")
    for name, tensor in {"attention_mask": attention_mask, "position_ids": position_ids, **ids}.items():
        if tensor is not None and not isinstance(tensor, Tensor):
            raise UserError(f"{name} is a {type(tensor).__name__}; expected a tensor")
    if attention_mask is not None and attention_mask.shape != (batch, past + tokens):
        raise UserError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; expected {(batch, past + tokens)}, one value per token "
            "so far"
        )
    if position_ids is not None and position_ids.shape not in ((batch, tokens), (1, tokens)):
        raise UserError(f"position_ids has shape {tuple(position_ids.shape)}; expected {shape}, one position per token")
    if position_ids is not None and (position_ids.is_floating_point() or position_ids.dtype == torch.bool):
        raise UserError(f"position_ids has dtype {position_ids.dtype}; expected integers")
    for name, tensor in ids.items():
        if tensor.shape != shape:
            raise UserError(f"{name} has shape {tuple(tensor.shape)}; expected {shape}, one id per token")


def _borders(
    shape: tuple[int, int], ids: Mapping[str, Tensor], lengths: Mapping[str, Tensor], wrong: list[tuple[Tensor, str]]
) -> Tensor | None:
    """True where the next token belongs to another document, (batch, tokens - 1); None if nothing says so.

    What must not be true is added to `wrong`.
    """
    batch, tokens = shape
    borders = {name: tensor.diff(dim=1) != 0 for name, tensor in ids.items()}
    for name, starts in lengths.items():
        if starts.ndim != 1 or len(starts) < 2 or starts.is_floating_point():
            raise UserError(
                f"{name} has dtype {starts.dtype} and shape {tuple(starts.shape)}; expected integers of shape (documents + 1,)"
            )
        index = torch.arange(batch * tokens, device=starts.device, dtype=starts.dtype)
        of_token = torch.searchsorted(starts.contiguous(), index, right=True).view(batch, tokens)
        across_rows = of_token[1:, 0] == of_token[:-1, -1]
        ends = (starts[0] != 0) | (starts[-1] != batch * tokens) | (starts.diff() < 0).any()
        expected = f"expected 0, the start of each document, of which none spans two rows, and {batch * tokens}"
        wrong.append((across_rows.any() | ends, f"{name} does not cut the rows into documents; {expected}"))
        borders[name] = of_token.diff(dim=1) != 0
    if not borders:
        return None
    first, *others = borders
    for other in others:
        wrong.append((borders[first] != borders[other], f"{first} and {other} contradict each other; give one of them"))
    return borders[first]


def _breaks(positions: Tensor, real: Tensor | None) -> Tensor:
    """True where the next token's position is not one more than that of the token before it, (batch, tokens - 1).

    Args:
        positions: (batch, tokens).
        real: (batch, tokens), false where a token is padding, which is passed over; None without padding.
    """
    if real is None:
        return positions.diff(dim=1) != 1
    index = torch.arange(positions.shape[1], device=positions.device)
    before = torch.where(real, index, -1).cummax(dim=1).values[:, :-1]  # the last real token up to each
    expected = positions.gather(1, before.clamp(min=0)) + 1
    return real[:, 1:] & (before >= 0) & (positions[:, 1:] != expected)


def _holes(segments: Tensor) -> Tensor:
    """True where a document goes on behind padding, (batch, tokens - 1)."""
    so_far = segments.cummax(dim=1).values
    return (segments[:, :-1] == 0) & (segments[:, 1:] != 0) & (segments[:, 1:] == so_far[:, :-1])


def _contradicts(real: Tensor, cached: Tensor | None, keeps_all: bool) -> Tensor:
    """True where a mask does not say what the cache was filled with, (batch, past).

    A cached token may become padding as long as no token behind it stays, which would have seen it.

    Args:
        real, cached: false where a token is padding, now and then, (batch, past); None without padding.
        keeps_all: whether the cache is a state, which has seen all tokens.
    """
    dropped = ~real if cached is None else cached & ~real
    if not keeps_all:
        index = torch.arange(real.shape[1], device=real.device)
        dropped = dropped & (index < (index * real).amax(dim=1, keepdim=True))
    return dropped if cached is None else dropped | (real & ~cached)


def _positions(documents: Tensor | None, real: Tensor | None, tokens: int, past: int, device: torch.device) -> Tensor:
    """Positions of the new tokens for RoPE, (batch or 1, tokens): from 0 in each document, padding not counted."""
    if documents is not None:
        index = torch.arange(tokens, device=device)
        return index - torch.where(_begins(documents), index, 0).cummax(dim=1).values
    if real is None:
        return torch.arange(past, past + tokens, device=device)[None]
    return (real.long().cumsum(dim=1) - 1).clamp(min=0)[:, past:]


def cumulative_lengths(segments: Tensor) -> Tensor:
    """Where the sequences of a batch begin, and where the last one ends, when its rows are laid one after another.

    Tensors on a GPU are read once, for the number of sequences. A caller that has the segments on the host too, as training
    has, calls this there and uploads the result.

    Args:
        segments: segments or document ids, (batch, tokens).

    Returns:
        `cu_seqlens` of `YocoUModel.forward`: (sequences + 1,), int32, from 0 to batch * tokens.
    """
    return _starts(segments, read_back(_begins(segments).sum()))


def _starts(segments: Tensor, sequences: int) -> Tensor:
    begins = F.pad(_begins(segments).flatten(), (0, 1), value=True)  # (batch * tokens + 1,)
    return torch.nonzero_static(begins, size=sequences + 1).flatten().int()


def check_cumulative_lengths(cu_seqlens: Tensor | None, segments: Tensor | None) -> None:
    """Refuse what cannot be the cumulative lengths of these segments, by its shape.

    Raises:
        UserError: if there are no segments, or if dtype or shape are wrong.
    """
    if cu_seqlens is None:
        return
    if segments is None:
        raise UserError("cu_seqlens came without document_ids or attention_mask; give what it was computed from as well")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
        raise UserError(
            f"cu_seqlens has dtype {cu_seqlens.dtype} and shape {tuple(cu_seqlens.shape)}; expected int32 of shape "
            "(sequences + 1,), as yoco_u.model.segments.cumulative_lengths returns it"
        )


def kept_positions(logits_to_keep: int | Tensor, tokens: int, device: torch.device) -> tuple[Tensor | None, int | None]:
    """Which positions' logits are asked for.

    Returns:
        Their indices, (kept,), or None for all; and their number if they are known to be the last ones of each row, else None.
    """
    if isinstance(logits_to_keep, Tensor):
        if logits_to_keep.ndim != 1 or logits_to_keep.is_floating_point() or logits_to_keep.dtype == torch.bool:
            raise UserError(
                f"logits_to_keep has dtype {logits_to_keep.dtype} and shape {tuple(logits_to_keep.shape)}; expected indices, "
                "(kept,)"
            )
        if torch.compiler.is_compiling() or (logits_to_keep.device == device and host_waits(device)):
            return logits_to_keep.to(device), None
        if wrong := [index for index in logits_to_keep.tolist() if not -tokens <= index < tokens]:
            raise UserError(f"logits_to_keep has the index {wrong[0]}; expected {-tokens} .. {tokens - 1}, for {tokens} tokens")
        only_last = logits_to_keep.numel() == 1 and int(logits_to_keep) in (-1, tokens - 1)
        return upload(logits_to_keep, device), 1 if only_last else None
    if isinstance(logits_to_keep, bool) or not hasattr(logits_to_keep, "__index__") or logits_to_keep < 0:
        raise UserError(
            f"logits_to_keep is {logits_to_keep!r}; expected a number of last positions, 0 for all, or their indices"
        )
    if logits_to_keep == 0 or logits_to_keep >= tokens:
        return None, tokens
    return torch.arange(tokens - logits_to_keep, tokens, device=device), logits_to_keep


def _begins(segments: Tensor) -> Tensor:
    """True where a sequence begins, (batch, tokens)."""
    return F.pad(segments.diff(dim=1) != 0, (1, 0), value=True)
