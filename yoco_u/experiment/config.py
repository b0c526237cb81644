"""What an experiment's YAML file may hold: shared settings, models, the axes of the grid, and how costs are matched."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PositiveInt, model_validator

from yoco_u.config import Config, EachOnce, Seed, at_most, merged
from yoco_u.evaluation.levels import ANSWERS, MOST_ANSWERS
from yoco_u.evaluation.needle_grid import NeedleSettings
from yoco_u.inference import SamplingParams

Role = Literal[
    "transformer", "yoco", "universal_transformer", "rins", "parscale", "yoco_u", "upper_loop", "upper_loop_without_shared_kv",
    "deep", "deeper", "plain_loop", "tamed_loop", "drawn_loops", "window_only", "unrolled_yoco",
]  # fmt: skip
"""What a model stands for where the paper's findings are judged. Most roles are architectures of the paper. A `plain_loop` is a
YOCO-U without a remedy against its slow start, a `tamed_loop` one with a remedy; the T of `drawn_loops` is drawn for each
step; `window_only` has sliding attention alone; an `unrolled_yoco` has as many layers as a YOCO-U unrolled, with parameters of
their own."""

Scalar = bool | int | float | str | None
Vary = dict[str, Annotated[tuple[Scalar, ...], Field(min_length=1)]]
"""Values to try, by the dotted key of a run's setting, such as `architecture.loops`."""


class Match(Config):
    """A rule that gives a model the cost of another one, the reference, run by run at the same tokens and seed.

    Attributes:
        by: what is made equal. `parameters` chooses the width of the feed-forward network that brings the parameter counts
            nearest to each other, and leaves the steps as configured; `tokens` and `flops` choose the number of steps.
        reference: name of the other model, whose own width (or steps) must not come from a match.
    """

    by: Literal["parameters", "tokens", "flops"]
    reference: str


def _has(given: Mapping[str, Any], key: str) -> bool:
    """Whether settings, nested or by dotted key, say this one."""
    group, _, name = key.partition(".")
    return key in given or (isinstance(given.get(group), dict) and name in given[group])


def _one_of_each(matches: tuple[Match, ...]) -> tuple[Match, ...]:
    steps = [match.by for match in matches if match.by != "parameters"]
    if len(steps) > 1 or len(matches) > len(steps) + 1:
        raise ValueError(
            f"matched by {', '.join(match.by for match in matches)}; expected parameters, tokens or flops, or "
            "parameters and one of the others"
        )
    return matches


Matches = Annotated[
    tuple[Match, ...],
    BeforeValidator(lambda value: [value] if isinstance(value, dict) else value),
    AfterValidator(_one_of_each),
]
"""At most one match by parameters, and at most one by tokens or FLOPs."""


class ModelPlan(Config):
    """A model of the grid, or several: with `vary`, there is one for each combination of the values.

    Attributes:
        label: name in tables and plots; by default the model's name in the file.
        role: what the model stands for in the paper's findings; by default its name, if that is a role.
        settings: settings of its runs, which win over the base.
        vary: values of single settings, in addition to the experiment's.
        match: whose cost the model has; by default what the experiment says.
    """

    label: str | None = None
    role: Role | None = None
    settings: dict[str, Any] = {}
    vary: Vary = {}
    match: Matches | None = None


class Samples(Config):
    """Prompts that each model continues once it is trained."""

    prompts: tuple[str, ...]
    sampling: SamplingParams = SamplingParams(max_tokens=200, temperature=0.8, seed=0)


class AngularMeasure(Config):
    """Angular distance between the input and the output of each layer, over the first `tokens` of the validation split."""

    tokens: PositiveInt = 32_768


class TaskMeasure(Config):
    """Right answers to the generated tasks of the run's corpus, at each of its levels: at least `answers` of each."""

    answers: Annotated[PositiveInt, at_most(MOST_ANSWERS, "with which a share is known to 0.3%")] = ANSWERS


class Measures(Config):
    """What is measured of each model once it is trained; nothing by default.

    Attributes:
        angular: angular distances, see `yoco_u.analysis.angular`.
        needles: needle test, see `yoco_u.evaluation.needle_grid`; kinds that need a text are hidden in the run's corpus.
        tasks: right answers to generated tasks, see `yoco_u.evaluation.levels`.
    """

    angular: AngularMeasure | None = None
    needles: NeedleSettings | None = None
    tasks: TaskMeasure | None = None


class Experiment(Config):
    """A grid of runs: sizes x models x varied settings x training tokens x seeds, all on one dataset.

    Attributes:
        title: heading of the report.
        base: settings of every run: those of `RunConfig`, without name and dataset.
        models: the models by name.
        sizes: settings of each size by its name, an axis of the grid. They win over the base, and a model's own settings win
            over them. Each size is a grid of its own; the report compares the gaps of the sizes.
        vary: values of single settings, for every model.
        tokens: numbers of training tokens, an axis of the grid. Each is a run of its own, whose learning rate schedule ends
            there. If empty, every run has the steps of its settings.
        tokens_per_parameter: the same axis, counted in tokens for each parameter of the model.
        seeds: seeds of the initial weights and of the order of the data, an axis of the grid. If empty, every run has the seed
            of its settings.
        match: the match of every model that has none of its own; a reference is not matched to itself.
        samples: prompts that each trained model continues.
        measures: what is measured of each trained model.
    """

    title: str
    base: dict[str, Any]
    models: dict[str, ModelPlan] = Field(min_length=1)
    sizes: dict[str, dict[str, Any]] = {}
    vary: Vary = {}
    tokens: Annotated[tuple[PositiveInt, ...], EachOnce] = ()
    tokens_per_parameter: Annotated[tuple[PositiveInt, ...], EachOnce] = ()
    seeds: Annotated[tuple[Seed, ...], EachOnce] = ()
    match: Matches = ()
    samples: Samples | None = None
    measures: Measures | None = None

    @model_validator(mode="after")
    def _names(self) -> "Experiment":
        for group, names in (("models", self.models), ("sizes", self.sizes)):
            for name in names:
                if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]*", name) or name == "data":
                    raise ValueError(f"{group}.{name}: a name has letters, digits and hyphens alone, and is not data")
        return self

    @model_validator(mode="after")
    def _axes(self) -> "Experiment":
        if self.tokens and self.tokens_per_parameter:
            raise ValueError("tokens and tokens_per_parameter are both given; they are one axis, keep one of them")
        return self

    @model_validator(mode="after")
    def _followed(self) -> "Experiment":
        shared = {"base": self.base, **{f"sizes.{name}": size for name, size in self.sizes.items()}}
        settings = {f"models.{name}.settings": plan.settings for name, plan in self.models.items()}
        varied = {"vary": self.vary, **{f"models.{name}.vary": plan.vary for name, plan in self.models.items()}}
        for where, given in (shared | settings | varied).items():
            for key in ("name", "dataset"):
                if key in given:
                    raise ValueError(f"{where}.{key}: a grid names its runs and has one dataset, in its own folder; drop it")
        steps = "tokens" if self.tokens else "tokens_per_parameter" if self.tokens_per_parameter else None
        for key, axis in (("training.seed", "seeds" if self.seeds else None), ("training.steps", steps)):
            for where, given in (settings | varied).items():
                if axis is not None and _has(given, key):
                    raise ValueError(f"{where}.{key}: {axis} says it of every run; drop one of the two")
        for name, plan in self.models.items():
            matched = self.match if plan.match is None else plan.match
            for match in (match for match in matched if match.reference != name):
                key = "architecture.intermediate_size" if match.by == "parameters" else "training.steps"
                for where, given in (("settings", plan.settings), ("vary", plan.vary)):
                    if _has(given, key):
                        said = f"a match by {match.by} with {match.reference} says it"
                        raise ValueError(f"models.{name}.{where}.{key}: {said}; drop one of the two")
        return self

    def at_size(self, size: str) -> "Experiment":
        """The grid of one size alone."""
        return self.model_copy(
            update={"title": f"{self.title}: {size}", "base": merged(self.base, self.sizes[size]), "sizes": {}}
        )
