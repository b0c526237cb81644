"""The tables of a study, for the terminal and for the page."""

from collections.abc import Sequence
from dataclasses import dataclass

from yoco_u.analysis.acceptance import DraftAcceptance
from yoco_u.analysis.study import Study
from yoco_u.analysis.token_loops import ExitLoops, LoopShares
from yoco_u.analysis.trace import UnrolledLayer


@dataclass(frozen=True)
class Table:
    """A table of formatted cells, whose first column names the rows.

    Attributes:
        is_text: whether the cells quote text instead of showing numbers.
    """

    title: str
    head: list[str]
    rows: list[list[str]]
    is_text: bool = False


def tables(studies: Sequence[Study]) -> dict[str, list[Table]]:
    """The tables by measure, for what was measured. Studies after the first appear in the tables that compare only."""
    first = studies[0]
    found: dict[str, list[Table]] = {}
    if first.angular:
        found["angular"] = [_angular(study) for study in studies]
    if first.lens:
        found["lens"] = [_lens(first), *([_samples(first)] if first.samples else [])]
    if first.loss:
        found["loss"] = [_loss(studies)]
    if first.convergence:
        found["convergence"] = [_convergence(first)]
    if first.attention:
        found["attention"] = [_attention(first)]
    if first.exits:
        found["exits"] = _exits(first.exits)
    if first.drafts:
        found["drafts"] = [_drafts(first.drafts)]
    return found


def _angular(study: Study) -> Table:
    """One row for each layer with weights of its own, one column for each loop."""
    assert study.angular is not None
    loops = max(layer.loop for layer in study.unrolled)
    cells: dict[tuple[int, int], list[str]] = {}
    for layer, distance in zip(study.unrolled, study.angular.layers, strict=True):
        cells.setdefault((layer.stage, layer.layer), [_name(layer)]).append(f"{distance:.3f}")
    rows = list(cells.values())
    whole: dict[int, list[str]] = {}
    for loop in study.angular.loops:
        whole.setdefault(loop.stage, [f"whole loop of stage {loop.stage + 1}"]).append(f"{loop.distance:.3f}")
    rows += whole.values()
    head = ["layer", *(f"loop {loop}" for loop in range(1, loops + 1))] if loops > 1 else ["layer", "distance"]
    return Table(f"Angular distance, half turns: {study.name}", head, [row + [""] * (len(head) - len(row)) for row in rows])


def _lens(study: Study) -> Table:
    assert study.lens is not None
    head = ["loop", "KL, directly", "KL, rest", "agreement, directly", "agreement, rest", "loss, directly", "loss, rest"]
    rows = []
    for reading in study.lens.loops:
        direct, rest = reading.direct, reading.rest
        row = [f"{direct.kl:.4f}", f"{rest.kl:.4f}", f"{direct.agreement:.1%}", f"{rest.agreement:.1%}"]
        rows.append([str(reading.loop), *row, f"{direct.loss:.4f}", f"{rest.loss:.4f}"])
    return Table("Logit lens: each loop's prediction against the final one", head, rows)


def _samples(study: Study) -> Table:
    rows = [
        [
            quoted(sample.context[-24:]),
            quoted(sample.target),
            *(f"{quoted(guess)} {p:.0%}" for guess, p in zip(sample.guesses, sample.probabilities, strict=True)),
        ]
        for sample in study.samples
    ]
    loops = range(1, study.num_loops + 1)
    return Table("What follows, after each loop", ["text", "next", *(f"loop {loop}" for loop in loops)], rows, is_text=True)


def _loss(studies: Sequence[Study]) -> Table:
    losses = [{row.loops: row for row in study.loss or []} for study in studies]
    counts = sorted({loops for rows in losses for loops in rows})
    head = ["loops", *(study.name for study in studies)]
    rows = []
    for loops in counts:
        cells = []
        for study, found in zip(studies, losses, strict=True):
            trained = "T " if loops == study.trained_loops else ""
            cells.append(f"{trained}{found[loops].loss:.4f}" if loops in found else "")
        rows.append([str(loops), *cells])
    return Table("Loss against loops run, nats per token; T: the loop count trained with", head, rows)


def _convergence(study: Study) -> Table:
    found = study.convergence
    assert found is not None
    loops = range(1, found.loops + 1)
    head = ["", "tokens", *(f"prediction {loop}" for loop in loops), *(f"state {loop}" for loop in loops)]
    rows = [
        [group.name, f"{group.tokens:,}", *(f"{share:.1%}" for share in [*group.prediction, *group.state])]
        for group in (found.all, *found.classes, *found.quarters)
    ]
    changes = ["state moved by the loop", "", *([""] * found.loops), *(f"{change:.1%}" for change in found.changes)]
    return Table("First loop from which nothing changes, shares of tokens", head, [*rows, changes])


def _attention(study: Study) -> Table:
    found = study.attention
    assert found is not None
    prefix = any(span.prefix for span in found.layers)
    head = ["layer", "mean distance", "even", "entropy", "even", "first token", *(["prefix"] if prefix else [])]
    rows = []
    loops = {layer.stage: layer.loop for layer in study.unrolled}
    for span in found.layers:
        layer = study.unrolled[span.layer - 1]
        name = _name(layer) + (f", loop {layer.loop}" if loops[layer.stage] > 1 else "")
        first = "-" if span.first_token is None else f"{span.first_token:.1%}"
        cells = [f"{span.distance:.1f}", f"{span.even_distance:.1f}", f"{span.entropy:.2f}", f"{span.even_entropy:.2f}", first]
        rows.append([name, *cells, *([f"{span.prefix:.1%}"] if prefix else [])])
    return Table("Attention span, means over heads and positions", head, rows)


def _exits(found: ExitLoops) -> list[Table]:
    def table(title: str, first: str, groups: Sequence[LoopShares]) -> Table:
        head = [first, "tokens", *(f"loops {count}" for count in range(1, found.loops + 1)), "mean", "loss"]
        rows = [
            [one.name, f"{one.tokens:,}", *(f"{share:.1%}" for share in one.shares), f"{one.mean:.2f}", f"{one.loss:.4f}"]
            for one in groups
        ]
        return Table(title, head, rows)

    title = f"Loops run, shares of tokens; tokens leave by {found.score} below {found.threshold:.4g}"
    return [
        table(title, "", [found.all, *found.classes, *found.quarters]),
        table("Loops run, by place in the document", "token", found.places),
    ]


def _drafts(found: DraftAcceptance) -> Table:
    head = ["token of the draft", *(f"{kind.by}{what}" for kind in found.kinds for what in ("", ", after right ones"))]
    rows = []
    for token in range(max(len(kind.accepted) for kind in found.kinds)):
        row = [str(token + 1)]
        for kind in found.kinds:
            accepted = kind.accepted[token] if kind.drafts else 0
            before = kind.accepted[token - 1] if token and kind.drafts else kind.drafts
            row += [f"{accepted / of:.1%}" if of else "-" for of in (kind.drafts, before)]
        rows.append(row)
    rows.append(["drafts", *(cell for kind in found.kinds for cell in (f"{kind.drafts:,}", ""))])
    rows.append(["tokens a step", *(cell for kind in found.kinds for cell in (f"{kind.tokens_per_step:.2f}", ""))])
    return Table(f"Drafts accepted behind {found.places:,} places, shares that are right up to a token", head, rows)


def _name(layer: UnrolledLayer) -> str:
    return f"{layer.attention} {layer.layer}"


def quoted(text: str) -> str:
    """Text in quotes and on one line, with line ends as escapes."""
    return repr(text)
