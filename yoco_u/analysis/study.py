"""All measures of one model, or those that make sense for it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from yoco_u.analysis.angular import AngularDistances, angular_distances
from yoco_u.analysis.attention import QUERIES, AttentionSpans, attention_spans
from yoco_u.analysis.classes import token_classes
from yoco_u.analysis.convergence import TOLERANCE, Convergence, loops_to_convergence
from yoco_u.analysis.lens import LogitLens, Sample, logit_lens
from yoco_u.analysis.loss import LoopLoss, counts_around, loss_against_loops
from yoco_u.analysis.trace import UnrolledLayer, at_loops, unroll
from yoco_u.architecture import Architecture
from yoco_u.data import Batch
from yoco_u.model import YocoUForCausalLM

MEASURES = ("angular", "lens", "loss", "convergence", "attention")
COMPARED = ("angular", "loss")
"""Those that are drawn of several models in one picture."""


@dataclass(frozen=True)
class Subject:
    """A model to study, and the loop count to run it at; its own by default."""

    name: str
    model: YocoUForCausalLM
    num_loops: int | None = None

    @property
    def architecture(self) -> Architecture:
        """At the loop count of the study."""
        return at_loops(self.model, self.num_loops)

    @property
    def is_looped(self) -> bool:
        """Whether the model was trained with loops, or is run with some."""
        return bool(self.architecture.looped_stages or self.model.model.architecture.looped_stages)


@dataclass(frozen=True)
class SampleText:
    """A position of the logit lens to read: the text up to it, what follows, and what the model expects after 1 .. T loops."""

    context: str
    target: str
    guesses: list[str]
    probabilities: list[float]


@dataclass(frozen=True)
class Study:
    """What was measured of one model; None where a measure was not asked for.

    Attributes:
        architecture: in words.
        trained_loops: T that the model was trained with.
        num_loops: T of the passes that were looked into.
        unrolled: its layers in the order of a pass.
        samples: those of the lens as text.
    """

    name: str
    architecture: str
    trained_loops: int
    num_loops: int
    unrolled: list[UnrolledLayer]
    samples: list[SampleText]
    angular: AngularDistances | None = None
    lens: LogitLens | None = None
    loss: list[LoopLoss] | None = None
    convergence: Convergence | None = None
    attention: AttentionSpans | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class StudySettings:
    """
    Attributes:
        measures: of `MEASURES`.
        tolerance: of states, see `convergence`.
        queries: positions per row, see `attention`.
    """

    measures: Sequence[str] = MEASURES
    tolerance: float = TOLERANCE
    queries: int = QUERIES


def why_not(measure: str, subjects: Sequence[Subject]) -> str | None:
    """Why a measure makes no sense, in words; None if it does. All but `COMPARED` are about the first subject alone."""
    first, stages = subjects[0], len(subjects[0].architecture.looped_stages)
    if measure == "loss" and not any(subject.is_looped for subject in subjects):
        return f"{first.name} has no loop"
    if measure in ("lens", "convergence") and stages != 1:
        found = f"loops {stages} stages at once" if stages else "runs no loop"
        return f"{first.name} {found}, and this measure follows one looped stage"
    if measure == "attention" and all(stage.attention == "retention" for stage in first.architecture.stages):
        return f"{first.name} has only gated retention, which has no attention weights"
    return None


def study(
    subject: Subject, batches: Callable[[], Iterable[Batch]], settings: StudySettings, tokenizer: PreTrainedTokenizerFast
) -> Study:
    """Run the measures, all on the same batches, which are asked for once a measure."""
    model, loops, own = subject.model, subject.num_loops, subject.model.model.architecture
    counts = counts_around(own) if subject.is_looped else [1]
    measures: dict[str, Callable[[Iterable[Batch]], Any]] = {
        "angular": lambda text: angular_distances(model, text, loops),
        "lens": lambda text: logit_lens(model, text, loops),
        "loss": lambda text: loss_against_loops(model, text, counts),
        "convergence": lambda text: loops_to_convergence(model, text, loops, settings.tolerance, token_classes(tokenizer)),
        "attention": lambda text: attention_spans(model, text, loops, settings.queries),
    }
    results = {measure: measures[measure](batches()) for measure in settings.measures}
    lens = results.get("lens")
    return Study(
        name=subject.name,
        architecture=own.in_words,
        trained_loops=own.num_loops,
        num_loops=subject.architecture.num_loops,
        unrolled=unroll(subject.architecture),
        samples=[_as_text(sample, tokenizer) for sample in lens.samples] if lens else [],
        **results,
    )


def _as_text(sample: Sample, tokenizer: PreTrainedTokenizerFast) -> SampleText:
    def text(*tokens: int) -> str:
        return tokenizer.decode(tokens)

    guesses = [text(guess.token) for guess in sample.rest]
    return SampleText(text(*sample.context), text(sample.target), guesses, [guess.probability for guess in sample.rest])
