"""A study: the chosen measures of one model, run on the same text."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from yoco_u.analysis.acceptance import DraftAcceptance, draft_acceptance
from yoco_u.analysis.angular import AngularDistances, angular_distances
from yoco_u.analysis.attention import QUERIES, AttentionSpans, attention_spans
from yoco_u.analysis.classes import token_classes
from yoco_u.analysis.convergence import TOLERANCE, Convergence, loops_to_convergence
from yoco_u.analysis.lens import LogitLens, Sample, logit_lens
from yoco_u.analysis.loss import LoopLoss, counts_around, loss_against_loops
from yoco_u.analysis.token_loops import ExitLoops, exit_loops
from yoco_u.analysis.trace import UnrolledLayer, unroll
from yoco_u.architecture import Architecture
from yoco_u.data import Batch
from yoco_u.errors import UserError
from yoco_u.evaluation.finite import non_finite_weight
from yoco_u.formatting import as_json_numbers
from yoco_u.inference import SamplingParams
from yoco_u.inference.detokenizer import Detokenizer
from yoco_u.inference.exits import FILE, Exits, exit_problem
from yoco_u.model import YocoUForCausalLM

MEASURES = ("angular", "lens", "loss", "convergence", "attention", "exits", "drafts")
"""In the order in which they run. The last two run in the engine, which may change the model."""

COMPARED = ("angular", "loss")
"""The measures that are drawn for several models in one picture."""


@dataclass(frozen=True)
class Subject:
    """A model to study.

    Attributes:
        name: what tables and pictures call it.
        model: the model.
        num_loops: loop count of the passes that are looked into; None for the model's own.
        exits: how its tokens leave the loop, with the threshold, or what is wrong with its file; None if there is none.
    """

    name: str
    model: YocoUForCausalLM
    num_loops: int | None = None
    exits: Exits | UserError | None = None

    @property
    def architecture(self) -> Architecture:
        """The model's architecture with the loop count of the study."""
        return self.model.model.at_loops(self.num_loops)

    @property
    def is_looped(self) -> bool:
        """Whether the model was trained with loops, or the study runs it with loops."""
        return bool(self.architecture.looped_stages or self.model.model.architecture.looped_stages)


@dataclass(frozen=True)
class SampleText:
    """A sample of the logit lens as text.

    Attributes:
        context: the text up to the position.
        target: the token that follows.
        guesses: the token that the model expects after 1 .. T loops, by the reading `rest`.
        probabilities: the probability of each guess.
    """

    context: str
    target: str
    guesses: list[str]
    probabilities: list[float]


@dataclass(frozen=True)
class ShownToken:
    """A token of the text: what it adds to the text, and how many loops it ran before it left."""

    text: str
    loops: int


@dataclass(frozen=True)
class Study:
    """The results for one model; None for each measure that was not asked for.

    Attributes:
        name: the model's name.
        architecture: the model's architecture in words.
        trained_loops: loop count T with which the model was trained.
        num_loops: loop count of the passes that were looked into.
        unrolled: the layers in the order of a forward pass.
        samples: the samples of the logit lens as text.
        shown: the first tokens of the text with the loops that they ran. Tokens that only begin a character are left out.
    """

    name: str
    architecture: str
    trained_loops: int
    num_loops: int
    unrolled: list[UnrolledLayer]
    samples: list[SampleText]
    shown: list[ShownToken]
    angular: AngularDistances | None = None
    lens: LogitLens | None = None
    loss: list[LoopLoss] | None = None
    convergence: Convergence | None = None
    attention: AttentionSpans | None = None
    exits: ExitLoops | None = None
    drafts: DraftAcceptance | None = None

    def as_json(self) -> dict[str, Any]:
        """The study as `analysis.json` holds it; what does not exist, such as a mean over no tokens, is null."""
        found: dict[str, Any] = as_json_numbers(asdict(self))
        return found


@dataclass(frozen=True)
class StudySettings:
    """What to measure, and how.

    Attributes:
        measures: some of `MEASURES`.
        tolerance: tolerance for states, see `loops_to_convergence`.
        queries: positions per row, see `attention_spans`.
    """

    measures: Sequence[str] = MEASURES
    tolerance: float = TOLERANCE
    queries: int = QUERIES


def why_not(measure: str, subjects: Sequence[Subject]) -> str | None:
    """Why a measure makes no sense for these models, in words; None if it does make sense.

    The measures in `COMPARED` are about all subjects, the others about the first one.
    """
    first, stages = subjects[0], len(subjects[0].architecture.looped_stages)
    if measure == "loss" and not any(subject.is_looped for subject in subjects):
        return f"{first.name} has no loop"
    if measure in ("lens", "convergence") and stages != 1:
        found = f"loops {stages} stages at once" if stages else "runs no loop"
        return f"{first.name} {found}, and this measure follows one looped stage"
    if measure == "attention" and all(stage.attention == "retention" for stage in first.architecture.stages):
        return f"{first.name} has only gated retention, which has no attention weights"
    if measure == "exits":
        return _why_no_exits(first)
    if measure == "drafts":
        return _why_no_drafts(first)
    return None


def _why_no_exits(subject: Subject) -> str | None:
    if isinstance(subject.exits, UserError):
        return str(subject.exits)
    problem = exit_problem(subject.architecture, subject.exits)
    if not problem and subject.exits is None:
        return f"{subject.name} has no {FILE}; run yoco-u exits first, or give --exit-threshold"
    return problem or None


def _why_no_drafts(subject: Subject) -> str | None:
    if not subject.architecture.looped_stages:
        return f"{subject.name} runs no loop"
    if subject.architecture.num_slots("retention"):
        return f"{subject.name} has gated retention, which cannot take a wrong draft back"
    if subject.model.device.type != "cpu":
        return "drafts are looked at on CPUs alone so far"
    return None


def study(
    subject: Subject, batches: Callable[[], Iterable[Batch]], settings: StudySettings, tokenizer: PreTrainedTokenizerFast
) -> Study:
    """Run the measures on one model.

    Args:
        batches: called once for each measure; returns the same batches each time.
        tokenizer: the model's tokenizer, for classes of tokens and for samples.

    Raises:
        UserError: if a weight of the model is not finite.
    """
    damaged = non_finite_weight(subject.model)
    if damaged is not None:
        raise UserError(f"{subject.name}: {damaged} holds NaN or infinity; take another checkpoint, or train again")
    model, loops, own = subject.model, subject.num_loops, subject.model.model.architecture
    counts = counts_around(own) if subject.is_looped else [1]
    measures: dict[str, Callable[[Iterable[Batch]], Any]] = {
        "angular": lambda text: angular_distances(model, text, loops),
        "lens": lambda text: logit_lens(model, text, loops),
        "loss": lambda text: loss_against_loops(model, text, counts),
        "convergence": lambda text: loops_to_convergence(model, text, loops, settings.tolerance, token_classes(tokenizer)),
        "attention": lambda text: attention_spans(model, text, loops, settings.queries),
        "exits": lambda text: exit_loops(model, text, subject.exits, token_classes(tokenizer)),  # type: ignore[arg-type]
        "drafts": lambda text: draft_acceptance(model, text, loops),
    }
    results = {measure: measures[measure](batches()) for measure in settings.measures}
    lens, leaving = results.get("lens"), results.get("exits")
    return Study(
        name=subject.name,
        architecture=own.in_words,
        trained_loops=own.num_loops,
        num_loops=subject.architecture.num_loops,
        unrolled=unroll(subject.architecture),
        samples=[_as_text(sample, tokenizer) for sample in lens.samples] if lens else [],
        shown=_shown(leaving.first, tokenizer) if leaving else [],
        **results,
    )


def _as_text(sample: Sample, tokenizer: PreTrainedTokenizerFast) -> SampleText:
    def text(*tokens: int) -> str:
        return tokenizer.decode(tokens)

    guesses = [text(guess.token) for guess in sample.rest]
    return SampleText(text(*sample.context), text(sample.target), guesses, [guess.probability for guess in sample.rest])


def _shown(tokens: Sequence[tuple[int, int]], tokenizer: PreTrainedTokenizerFast) -> list[ShownToken]:
    texts = Detokenizer(tokenizer, SamplingParams(skip_special_tokens=False))
    found = [ShownToken(texts.append(token), loops) for token, loops in tokens]
    return [one for one in found if one.text]
