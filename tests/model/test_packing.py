"""Rows of several documents, and of padding, as trainers of other libraries send them: each document is as if it ran alone."""

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flash import use_flash
from models import EVERYTHING, EXPERTS, PRESETS, architecture, assert_same_gradients, build, gradients, tokens
from torch import Tensor
from transformers import DataCollatorWithFlattening
from transformers.masking_utils import find_packed_sequence_indices

from yoco_u import YocoUForCausalLM
from yoco_u.errors import UserError
from yoco_u.model import backend
from yoco_u.model.segments import lay_out

N = 26
CPU = torch.device("cpu")
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in PRESETS},
    "everything": ("yoco_u", EVERYTHING),
    "experts": ("yoco_u", {"experts": EXPERTS}),
}
ONE_OF_EACH_KIND = ["transformer", "yoco_u", "yoco_retention", "parscale"]
PATHS = ["blocks", "fused", "flash"]
CASES = [(v, p) for v in VARIANTS for p in (PATHS if v in ONE_OF_EACH_KIND else PATHS[:1])]


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A test's passes on a CPU, on a device without flash attention, and on a GPU with it."""
    if request.param == "flash":
        use_flash(monkeypatch)
    elif request.param == "fused":
        monkeypatch.setattr(backend, "runs_blockwise", lambda tokens, device: False)
    return str(request.param)


def make(variant: str) -> YocoUForCausalLM:
    name, settings = VARIANTS[variant]
    model = build(architecture(name, layers=2, **settings), use_cache=False)
    return model if model.config.experts else model.double()


def tolerance(model: YocoUForCausalLM) -> float:
    return 1e-8 if model.dtype == torch.float64 and all(s["attention"] != "retention" for s in model.config.stages) else 2e-4


class Rows:
    """Two rows of documents with padding at either end and, now and then, between two documents."""

    def __init__(self, seed: int, padding: bool, first: int = 0) -> None:
        rng = random.Random(seed)
        self.ids = tokens(2, N, seed=seed)
        self.mask, self.positions, self.seq_idx = (torch.zeros(2, N, dtype=torch.long) for _ in range(3))
        self.documents: list[tuple[int, slice]] = []
        starts = [0]
        for row in range(2):
            at, end = (rng.choice([0, 3]), N - rng.choice([0, 2])) if padding else (0, N)
            while at < end:
                place = slice(at, min(end, at + rng.choice([1, 4, 9, 13])))
                self.documents.append((row, place))
                self.mask[row, place] = 1
                self.positions[row, place] = torch.arange(first, first + place.stop - at)
                self.seq_idx[row, at:] += 1
                starts.append(row * N + place.stop)
                at = place.stop + (rng.choice([0, 0, 2]) if padding else 0)
        self.lengths = torch.tensor(starts, dtype=torch.int32)
        self.first = first

    def forms(self) -> dict[str, dict[str, Any]]:
        """The same documents in the words of several libraries."""
        longest = int(self.lengths.diff().max())
        flash = {"cu_seq_lens_q": self.lengths, "cu_seq_lens_k": self.lengths, "max_length_q": longest, "max_length_k": longest}
        positions = {"position_ids": self.positions}
        if not bool(self.mask.all()):
            mask = {"attention_mask": self.mask}
            return {"positions": positions | mask, "numbers": {"seq_idx": self.seq_idx} | positions | mask}
        found: dict[str, dict[str, Any]] = {"positions": positions, "everything": {"seq_idx": self.seq_idx} | positions | flash}
        if self.first == 0:
            found |= {"numbers": {"seq_idx": self.seq_idx}, "lengths": flash}
        return found


def alone(model: YocoUForCausalLM, rows: Rows) -> tuple[list[Tensor], Tensor]:
    """Logits of each document by itself, and the mean loss of all their targets."""
    logits = []
    for row, place in rows.documents:
        positions = torch.arange(rows.first, rows.first + place.stop - place.start)[None]
        logits.append(model(rows.ids[row : row + 1, place], position_ids=positions).logits[0])
    losses = [
        F.cross_entropy(x[:-1], rows.ids[row, p][1:], reduction="sum")
        for x, (row, p) in zip(logits, rows.documents, strict=True)
    ]
    return logits, sum(losses) / sum(len(x) - 1 for x in logits)


@pytest.mark.parametrize(("variant", "path"), CASES, indirect=["path"])
def test_documents_do_not_see_each_other(variant: str, path: str) -> None:
    """Logits in every form; loss and gradients in the first one, with labels that are simply the tokens."""
    model = make(variant)
    close = {"rtol": tolerance(model), "atol": tolerance(model)}
    cases = [(False, 0), (True, 0), (False, 3)] if variant in ONE_OF_EACH_KIND else [(True, 0)]
    for seed, (padding, first) in enumerate(cases):
        rows = Rows(seed, padding, first)
        with torch.set_grad_enabled(seed == 0):
            expected, expected_loss = alone(model, rows)
        for name, call in rows.forms().items():
            with torch.set_grad_enabled(seed == 0 and name == "positions"):
                out = model(rows.ids, labels=rows.ids, **call)
            for (row, place), logits in zip(rows.documents, expected, strict=True):
                torch.testing.assert_close(out.logits[row, place], logits, **close, msg=lambda m, name=name: f"{name}: {m}")
            torch.testing.assert_close(out.loss, expected_loss, rtol=1e-5, atol=1e-5, check_dtype=False)
            if out.loss.requires_grad:
                found = gradients(model, out.loss.to(expected_loss.dtype))
                assert_same_gradients(found, gradients(model, expected_loss), max(1e-5, 10 * tolerance(model)))


@pytest.mark.parametrize(
    "settings", [{}, {"return_flash_attn_kwargs": True}, {"return_seq_idx": True, "position_ids_start": 2}]
)
def test_the_flattening_collator_of_transformers(settings: dict[str, Any]) -> None:
    """A step of training: the loss of its batch is that of the texts padded in the usual way."""
    texts = [tokens(1, n, seed=n)[0].tolist() for n in (9, 1, 14)]
    collator = DataCollatorWithFlattening(return_tensors="pt", **settings)
    model = make("yoco_u").train()
    ids, labels, mask = (torch.full((3, 14), fill) for fill in (0, -100, 0))
    for i, text in enumerate(texts):
        ids[i, : len(text)] = labels[i, : len(text)] = torch.tensor(text)
        mask[i, : len(text)] = 1
    expected = model(ids, attention_mask=mask, labels=labels).loss
    loss = model(**collator([{"input_ids": text} for text in texts])).loss
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)


def test_documents_begin_where_transformers_finds_them() -> None:
    """Positions that start again anywhere, stand still or jump."""
    for seed in range(40):
        rng = random.Random(seed)
        row = [rng.randint(0, 3)]
        while len(row) < 20:
            row.append(row[-1] + 1 if rng.random() < 0.7 else rng.randint(0, 9))
        positions = torch.tensor([row, list(range(5, 25))])
        expected = find_packed_sequence_indices(positions)
        found = lay_out((2, 20), 0, CPU, {"sliding"}, position_ids=positions).segments
        if expected is None:
            assert found is None
        else:
            assert found is not None and torch.equal(found - 1, expected)


def reasons(path: str) -> type[Exception]:
    return RuntimeError if path == "flash" else UserError


def test_contradictions_are_refused() -> None:
    model, ids = make("yoco_u"), tokens(2, N)
    halves = (torch.arange(N) >= 13).long().expand(2, -1)
    restart = torch.arange(N) % 13
    lengths = torch.tensor([0, 13, 26, 39, 52], dtype=torch.int32)
    wrong: dict[str, dict[str, Any]] = {
        "inside a document": {"document_ids": torch.zeros_like(ids), "position_ids": restart[None]},
        "document_ids and seq_idx contradict": {"document_ids": halves, "seq_idx": torch.zeros_like(ids)},
        "seq_idx and cu_seq_lens_q contradict": {"seq_idx": torch.zeros_like(ids), "cu_seq_lens_q": lengths},
        "cu_seq_lens_q and cu_seq_lens_k contradict": {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths[[0, 2, 4]]},
        "cu_seqlens does not fit": {"document_ids": halves, "cu_seqlens": lengths[[0, 2, 4]]},
        "cu_seq_lens_q does not cut": {"cu_seq_lens_q": lengths[[0, 1, 3, 4]]},
        "expected 0, the start": {"cu_seq_lens_q": lengths[1:]},
        "and 52": {"cu_seq_lens_q": lengths[:-1]},
        "cu_seq_lens_q has dtype": {"cu_seq_lens_q": lengths[None]},
        "cu_seq_lens_k came without cu_seq_lens_q": {"cu_seq_lens_k": lengths},
        "max_length_q came without": {"max_length_q": 13},
        "position_ids has shape": {"position_ids": restart},
        "position_ids has dtype": {"position_ids": restart[None].float()},
        "position_ids is a list": {"position_ids": restart[None].tolist()},
        "seq_idx has shape": {"seq_idx": halves[:1]},
    }
    for message, call in wrong.items():
        with pytest.raises(UserError, match=message) as error:
            model(ids, **call)
        assert "\n" not in str(error.value)


# A cache


def test_packed_rows_cannot_go_on_from_a_cache(path: str) -> None:
    model, ids = make("yoco_u"), tokens(2, N)
    packed = model(ids, position_ids=(torch.arange(N) % 13)[None], use_cache=True).past_key_values
    with pytest.raises(UserError, match="the cache holds packed documents"):
        model(ids[:, :1], past_key_values=packed)
    plain = model(ids, use_cache=True).past_key_values
    with pytest.raises(UserError, match="seq_idx came with a filled cache"):
        model(ids[:, :2], seq_idx=torch.tensor([[0, 1]] * 2), past_key_values=plain)
    with pytest.raises(reasons(path), match="behind a filled cache"):
        model(ids[:, :4], position_ids=torch.tensor([[26, 27, 0, 1]]), past_key_values=plain)


@pytest.mark.parametrize("variant", ONE_OF_EACH_KIND)
def test_a_cache_keeps_its_padding(variant: str, path: str) -> None:
    """Calls that go on from it may leave out the mask, and its rows may be cropped, chosen, repeated and reordered before."""
    model, ids, more = make(variant), tokens(2, N), tokens(2, 3, seed=5)
    mask = (torch.arange(N) >= torch.tensor([[0], [4]])).long()
    rows = [1, 1, 0, 0]
    expected = [model(torch.cat([ids[row : row + 1, 4 * row :], more[row : row + 1]], 1)).logits[0, -3:] for row in rows]

    cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    if variant != "yoco_retention":
        cache.activate_past_recording()
        model(more[:, 1:], past_key_values=cache)
        cache.crop(-2)
    cache.batch_select_indices(torch.tensor([0, 1]))
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([2, 3, 0, 0]))
    found = [model(part, past_key_values=cache).logits for part in more[rows].split([1, 2], dim=1)]
    torch.testing.assert_close(torch.cat(found, 1), torch.stack(expected), rtol=tolerance(model), atol=tolerance(model))


@pytest.mark.parametrize(
    ("variant", "path"), [*((name, "blocks") for name in ONE_OF_EACH_KIND), ("transformer", "flash")], indirect=["path"]
)
def test_a_mask_that_goes_on_from_a_cache_is_right_or_refused(variant: str, path: str) -> None:
    """Generated pairs of masks: of the tokens that filled a cache, and of these and new ones, which are all tokens."""
    model, ids, past = make(variant), tokens(2, 12), 9
    outcomes = set()
    for seed in range(12):
        rng = random.Random(seed)
        filled, mask = torch.zeros(2, past), torch.ones(2, 12)
        for row in range(2):
            filled[row, rng.choice([0, 0, 3, past]) : rng.choice([past, past, 6])] = 1
            mask[row, :past] = filled[row]
            if rng.random() < 0.5:
                mask[row, slice(*sorted(rng.choices([0, 3, 6, past], k=2)))] = rng.choice([0, 1])
        same, holed = torch.equal(mask[:, :past], filled), bool((mask.diff(dim=1) == -1).any())
        cache = model(ids[:, :past], attention_mask=filled, use_cache=True).past_key_values
        try:
            out = model(ids[:, past:], attention_mask=mask, past_key_values=cache).logits
        except reasons(path) as error:
            assert not same or (holed and model.config.window), error
            outcomes.add("refused")
            continue
        outcomes.add("the same" if same else "another")
        for row in range(2):
            expected = model(ids[row : row + 1, mask[row] == 1]).logits[0, -3:]
            torch.testing.assert_close(out[row], expected, rtol=tolerance(model), atol=tolerance(model))
    assert {"refused", "the same"} <= outcomes and ("another" in outcomes or variant == "yoco_retention")


# Holes in the mask


@pytest.mark.parametrize("variant", ONE_OF_EACH_KIND)
def test_any_mask_is_right_or_refused(variant: str, path: str) -> None:
    """Generated masks of every dtype: refused if padding stands between tokens, else each row is its tokens alone."""
    model, ids, n = make(variant), tokens(2, 12), 12
    outcomes = set()
    for seed in range(12):
        rng = random.Random(seed)
        bounds = [sorted(rng.choices(range(n + 1), k=2)) for _ in range(2)]
        mask = torch.zeros(2, n)
        for row, (start, end) in enumerate(bounds):
            mask[row, start:end] = 1
        if seed % 3 == 0:
            mask[rng.randrange(2), rng.randrange(n)] = seed % 2
        rows = [row.nonzero().flatten() for row in mask]
        holed = any(len(row) and int(row[-1] - row[0]) >= len(row) for row in rows)
        outcomes.add(holed)
        mask = mask.to(rng.choice([torch.bool, torch.long, torch.float32, torch.bfloat16]))
        if holed:
            with pytest.raises(UserError, match="padding between tokens"):
                model(ids, attention_mask=mask)
            continue
        out = model(ids, attention_mask=mask).logits
        assert out.isfinite().all()
        for i, row in enumerate(rows):
            if len(row):
                expected = model(ids[i : i + 1, row]).logits[0]
                torch.testing.assert_close(out[i, row], expected, rtol=tolerance(model), atol=tolerance(model))
    assert outcomes == {True, False}


@pytest.mark.parametrize("value", [2, -1, 0.5, float("nan"), float("-inf")])
def test_a_mask_of_other_values_is_refused(value: float, path: str) -> None:
    model, ids = make("yoco_u"), tokens(1, 9)
    mask = torch.ones(1, 9, dtype=torch.long if isinstance(value, int) else torch.float32)
    mask[0, 4:] = value
    with pytest.raises(UserError, match="other values than 0 and 1"):
        model(ids, attention_mask=mask)


@pytest.mark.parametrize("mask", [torch.ones(1, 1, 9, 9), torch.zeros(9), {"full_attention": None}, [[1] * 9]], ids=str)
def test_a_mask_of_another_kind_is_refused(mask: Any) -> None:
    with pytest.raises(UserError, match=r"attention_mask (has shape|is a)"):
        make("yoco_u")(tokens(1, 9), attention_mask=mask)


@pytest.mark.parametrize("variant", ONE_OF_EACH_KIND)
def test_a_cache_goes_on_behind_padding_or_refuses(variant: str, path: str) -> None:
    """With a window it refuses: the cache keeps the last slots, of which some are padding. Without one the rows are right."""
    model, ids, more = make(variant), tokens(1, 20), tokens(1, 4, seed=3)
    mask = torch.tensor([[1] * 15 + [0] * 5])
    for sizes in ([4], [1, 3]):
        cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
        parts: list[Tensor] = []

        def go_on(sizes: list[int] = sizes, cache: Any = cache, parts: list[Tensor] = parts) -> None:
            at = 0
            for size in sizes:
                longer = F.pad(mask, (0, at + size), value=1)
                parts.append(model(more[:, at : at + size], attention_mask=longer, past_key_values=cache).logits)
                at += size

        if model.config.window is not None:
            with pytest.raises(reasons(path), match="padding between tokens"):
                go_on()
            continue
        go_on()
        expected = model(torch.cat([ids[:, :15], more], 1)).logits[:, 15:]
        torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=tolerance(model), atol=tolerance(model))


def test_generate_refuses_prompts_padded_on_the_right(path: str) -> None:
    model = make("yoco_u")
    mask = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
    with pytest.raises(reasons(path), match="pad prompts on the left"):
        model.generate(
            tokens(2, 9).clamp(min=1), attention_mask=mask, max_new_tokens=3, do_sample=False, use_cache=True, pad_token_id=0
        )
