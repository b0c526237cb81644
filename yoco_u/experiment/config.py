"""An experiment as data: shared settings, models, the axes of the grid, and whose cost a model is to match."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PositiveInt, model_validator

from yoco_u.config import Config
from yoco_u.evaluation.needle_grid import NeedleSettings
from yoco_u.inference import SamplingParams

Role = Literal[
    "transformer", "yoco", "universal_transformer", "rins", "parscale", "yoco_u", "upper_loop", "upper_loop_without_shared_kv",
    "deep", "deeper", "plain_loop", "tamed_loop", "window_only",
]  # fmt: skip
"""What a model stands for where the paper's findings are judged: an architecture of the paper; `plain_loop`, a YOCO-U without
remedies against its slow start; `tamed_loop`, the same with one; `window_only`, a model of sliding attention alone."""

Scalar = bool | int | float | str | None
Vary = dict[str, Annotated[tuple[Scalar, ...], Field(min_length=1)]]
"""Dotted keys of the run's settings, such as `architecture.loops`, and the values that each takes."""


class Match(Config):
    """Another model whose cost a model is to have, in the run of the same tokens and seed.

    Attributes:
        by: `parameters` chooses the width of the feed-forward so that the counts are as near as can be, at the steps that are
            configured; `tokens` and `flops` choose the steps.
        reference: name of the other model; one that is not matched by tokens or FLOPs itself.
    """

    by: Literal["parameters", "tokens", "flops"]
    reference: str


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
"""One match, or one by parameters and one by tokens or FLOPs."""


class ModelPlan(Config):
    """One model of the grid; with `vary`, one for each combination of the values.

    Attributes:
        label: shown in tables and plots; by default the name.
        role: what it stands for in the paper's findings; by default its name, if that is one.
        settings: of its runs, on top of the base.
        vary: values of single settings; one model for each combination.
        match: whose cost it has; by default what the experiment says.
    """

    label: str | None = None
    role: Role | None = None
    settings: dict[str, Any] = {}
    vary: Vary = {}
    match: Matches | None = None


class Samples(Config):
    """What each model is asked to write when it is trained."""

    prompts: tuple[str, ...]
    sampling: SamplingParams = SamplingParams(max_tokens=200, temperature=0.8, seed=0)


class AngularMeasure(Config):
    """Angular distances between consecutive layers, over the first tokens of the validation split."""

    tokens: PositiveInt = 32_768


class Measures(Config):
    """What is measured of each model when it is trained; nothing by default.

    Attributes:
        angular: see `yoco_u.analysis.angular`.
        needles: see `yoco_u.evaluation.needle_grid`; hidden in the corpus where a kind needs a text.
    """

    angular: AngularMeasure | None = None
    needles: NeedleSettings | None = None


class Experiment(Config):
    """A grid of runs: models x varied settings x training tokens x seeds, all on one dataset.

    Attributes:
        title: heading of the report.
        base: settings of every run: those of `RunConfig` without name and dataset.
        models: by their names.
        vary: as a model's, for every model.
        tokens: training tokens, an axis of the grid; each is a run of its own with a schedule of its own. If empty, the steps
            are those of the settings.
        seeds: of the initial weights and the order of the data, an axis; if empty, the seed is that of the settings.
        match: whose cost all other models have, the reference itself left out.
        samples: prompts that each trained model continues.
        measures: what is measured of each trained model.
    """

    title: str
    base: dict[str, Any]
    models: dict[str, ModelPlan] = Field(min_length=1)
    vary: Vary = {}
    tokens: tuple[PositiveInt, ...] = ()
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = ()
    match: Matches = ()
    samples: Samples | None = None
    measures: Measures | None = None

    @model_validator(mode="after")
    def _names(self) -> "Experiment":
        for name in self.models:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]*", name) or name == "data":
                raise ValueError(f"models.{name}: a model's name has letters, digits and hyphens alone, and is not data")
        for axis, values in (("tokens", self.tokens), ("seeds", self.seeds)):
            if len(set(values)) < len(values):
                raise ValueError(f"{axis} names {', '.join(map(str, values))}; expected each value once")
        return self
