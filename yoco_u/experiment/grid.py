"""From an experiment to its runs: a checked config each, in an order and under names that do not change as the grid grows."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, get_args

from yoco_u.architecture import Architecture
from yoco_u.budget import parameters
from yoco_u.config import apply_overrides, merged, parse, shown, with_value
from yoco_u.errors import UserError
from yoco_u.experiment.config import Experiment, Match, Matches, ModelPlan, Role, Scalar
from yoco_u.formatting import short_count
from yoco_u.training.config import RunConfig

_FEED_FORWARD_MULTIPLE = 8  # a match by parameters chooses among the multiples of this width


@dataclass(frozen=True)
class GridRun:
    """One run of the grid: one training.

    Attributes:
        name: name of its folder, inside the experiment's folder: in the folder of its size, where the grid has sizes.
        series: the name without the seed. Runs of one series differ in nothing but their seeds.
        model: the name of its entry in `models` with the varied values, without tokens and seed.
        model_label: name of the model in tables and plots.
        label: name of the series in tables and plots: `model_label`, with the training tokens where these are an axis.
        role: what its model stands for in the paper's findings; None for nothing.
        size: its value on the axis of sizes; None without that axis.
        budget: its value on the axis of training tokens, or of tokens per parameter; None without that axis.
        seed: its value on the axis of seeds, or the seed of its settings without that axis.
        config: its settings, matched and checked.
    """

    name: str
    series: str
    model: str
    model_label: str
    label: str
    role: Role | None
    size: str | None
    budget: int | None
    seed: int
    config: RunConfig


@dataclass(frozen=True)
class _Variant:
    """A model with one combination of its varied values.

    Attributes:
        name: the entry's name with the varied values.
        label: name in tables and plots.
        entry: name of its entry in `models`.
        values: the varied values by dotted key.
        match: whose cost it has, from the entry or from the experiment.
    """

    name: str
    label: str
    entry: str
    plan: ModelPlan
    values: dict[str, Scalar]
    match: Matches


def expand(experiment: Experiment, folder: Path, overrides: Sequence[str] = ()) -> list[GridRun]:
    """All runs: sizes outermost, then seeds, then tokens, then the models in their order with the last varied setting fastest.

    In this order all models of the first seed are finished, and can be compared, before the second seed begins; and a seed that
    is added later comes last in its size. All runs share one dataset, `folder`/data.

    Args:
        folder: folder of the experiment.
        overrides: `key=value` settings that win over those of the file in every run.

    Raises:
        UserError: if settings do not fit, a reference names no model or several, or two runs get the same name.
    """
    _check_overrides(experiment, overrides)
    if experiment.sizes:
        runs = [run for size in experiment.sizes for run in _expand_size(experiment, size, folder, overrides)]
    else:
        runs = _expand(experiment, folder, overrides)
    _check(runs)
    return runs


def count_runs(experiment: Experiment) -> int:
    """How many runs `expand` gives, without making them."""
    variants = sum(
        math.prod(len(values) for values in (experiment.vary | plan.vary).values()) for plan in experiment.models.values()
    )
    budgets = experiment.tokens or experiment.tokens_per_parameter
    return variants * math.prod(len(axis) or 1 for axis in (experiment.sizes, experiment.seeds, budgets))


def _check_overrides(experiment: Experiment, overrides: Sequence[str]) -> None:
    """Refuse overrides of what the grid itself says of each run."""
    budget = "tokens" if experiment.tokens else "tokens_per_parameter" if experiment.tokens_per_parameter else None
    said = {"name": "models", "dataset": "the grid's folder", "training.steps": budget}
    said["training.seed"] = "seeds" if experiment.seeds else None
    for override in overrides:
        if (axis := said.get(override.partition("=")[0])) is not None:
            raise UserError(f"{shown(override)} has no effect here: {axis} says it of every run; leave it out")


def _expand_size(experiment: Experiment, size: str, folder: Path, overrides: Sequence[str]) -> Iterator[GridRun]:
    for run in _expand(experiment.at_size(size), folder, overrides):
        config = run.config.model_copy(update={"name": f"{size} {run.config.name}"})
        yield replace(run, name=f"{size}/{run.name}", series=f"{size}/{run.series}", size=size, config=config)


def _expand(experiment: Experiment, folder: Path, overrides: Sequence[str]) -> list[GridRun]:
    variants = list(_variants(experiment))
    grid = _Grid(experiment, variants, folder, overrides)
    budgets = experiment.tokens or experiment.tokens_per_parameter or (None,)
    return [
        grid.run(variant, budget, seed) for seed, budget, variant in product(experiment.seeds or (None,), budgets, variants)
    ]


def choose(runs: Sequence[GridRun], run: str | None = None, only: str | None = None) -> list[GridRun]:
    """Choose one run by name or number, or an even share of them; without either, all.

    Args:
        run: name of a run, or its number in the list, counted from 0; what is both is taken as a number.
        only: `SHARD/COUNT`: every COUNT-th run from the SHARD-th on, SHARD = 1 .. COUNT.

    Raises:
        UserError: if there is no such run, or `only` does not have that form.
    """
    if run is not None:
        known = {one.name: one for one in runs} | {str(number): one for number, one in enumerate(runs)}
        if run not in known:
            raise UserError(f"--run {run}: no such run; give a number from 0 to {len(runs) - 1} or a name, see --list")
        return [known[run]]
    if only is not None:
        parts = re.fullmatch(r"([0-9]+)/([0-9]+)", only)
        shard, count = map(int, parts.groups()) if parts else (0, 0)
        if not 1 <= shard <= count:
            raise UserError(f"--only {only}: expected SHARD/COUNT with SHARD from 1 to COUNT, such as 2/8")
        return list(runs[shard - 1 :: count])
    return list(runs)


def with_steps(config: RunConfig, steps: int) -> RunConfig:
    """The config with another number of steps, at least 1; it is checked anew."""
    data = config.model_dump()
    data["training"]["steps"] = max(1, steps)
    return parse(RunConfig, data, config.name)


def with_equal_flops(config: RunConfig, reference: RunConfig) -> RunConfig:
    """The config with the number of steps that spends the training FLOPs of the reference, to the nearest step."""
    per_step = config.training_flops() / config.training.steps
    return with_steps(config, round(reference.training_flops() / per_step))


def with_equal_tokens(config: RunConfig, tokens: int) -> RunConfig:
    """The config with the number of steps that reads `tokens` training tokens, to the nearest step."""
    return with_steps(config, round(tokens / config.tokens_per_step))


def with_equal_parameters(config: RunConfig, reference: Architecture) -> RunConfig:
    """The config with the feed-forward width, a multiple of 8, whose parameter count is nearest to the reference's.

    Raises:
        UserError: for a mixture of experts, or if even the smallest width has more parameters.
    """
    a, multiple = config.architecture, _FEED_FORWARD_MULTIPLE
    if a.experts is not None:
        raise UserError(f"{config.name}: a mixture of experts cannot be matched by parameters; set its widths yourself")

    def total(width: int) -> int:
        return parameters(a.model_copy(update={"intermediate_size": width})).total

    wanted, per_width = parameters(reference).total, total(2) - total(1)
    width = multiple * round((wanted - total(0)) / per_width / multiple)
    if width < multiple:
        raise UserError(
            f"{config.name}: has {total(multiple):,} parameters even with intermediate_size {multiple}, more than the "
            f"{wanted:,} to match; choose other widths"
        )
    return config.model_copy(update={"architecture": a.model_copy(update={"intermediate_size": width})})


class _Grid:
    """Makes the runs: the settings of a variant at given tokens and seed, then its matches."""

    def __init__(self, experiment: Experiment, variants: list[_Variant], folder: Path, overrides: Sequence[str]) -> None:
        self.experiment, self.variants, self.folder, self.overrides = experiment, variants, folder, overrides

    def run(self, variant: _Variant, budget: int | None, seed: int | None) -> GridRun:
        parts = [variant.name]
        if budget is not None:
            parts.append(f"per-parameter-{budget}" if self.experiment.tokens_per_parameter else f"tokens-{_count(budget)}")
        series, config = "_".join(parts), self._matched(variant, budget, seed)
        name = series if seed is None else f"{series}_seed-{seed}"
        read = f", {short_count(config.tokens)} tokens" if budget is not None else ""
        label = f"{variant.label}{read}"
        config = config.model_copy(update={"name": label if seed is None else f"{label}, seed {seed}"})
        role = variant.plan.role or next((role for role in get_args(Role) if role == variant.entry.replace("-", "_")), None)
        seed = config.training.seed
        return GridRun(name, series, variant.name, variant.label, label, role, None, budget, seed, config)

    def _matched(self, variant: _Variant, budget: int | None, seed: int | None) -> RunConfig:
        """The config of a run. The width comes before the steps, as FLOPs depend on both."""
        config = self._plain(variant, budget, seed)
        for match in sorted(variant.match, key=lambda match: match.by != "parameters"):
            other = self._reference(variant, match)
            if match.by == "parameters":
                reference = self._plain(other, budget, seed)
                config = with_equal_parameters(config, reference.architecture)
                if self.experiment.tokens_per_parameter:
                    config = with_equal_tokens(config, reference.tokens)
            elif match.by == "flops":
                config = with_equal_flops(config, self._matched(other, budget, seed))
            else:
                config = with_equal_tokens(config, self._matched(other, budget, seed).tokens)
        return config

    def _plain(self, variant: _Variant, budget: int | None, seed: int | None) -> RunConfig:
        """The config of a run before it is matched."""
        settings = merged(self.experiment.base, variant.plan.settings)
        for key, value in variant.values.items():
            settings = with_value(settings, key, value, f"models.{variant.entry}.vary")
        settings = apply_overrides(settings, self.overrides)
        settings = _without_useless_gate(settings) | {"name": variant.name, "dataset": str(self.folder / "data")}
        if seed is not None:
            settings = merged(settings, {"training": {"seed": seed}})
        if budget is not None:
            # A placeholder: parameters, and how many tokens a step reads, are known only after parsing.
            settings = merged(settings, {"training": {"steps": 10**9}})
        config = parse(RunConfig, settings, f"model {variant.name}")
        if budget is None:
            return config
        each = parameters(config.architecture).total if self.experiment.tokens_per_parameter else 1
        return with_equal_tokens(config, budget * each)

    def _reference(self, variant: _Variant, match: Match) -> _Variant:
        """The one variant that `match` names and whose varied values agree with those of `variant`."""
        where, models = f"models.{variant.entry}.match", self.experiment.models
        named = [other for other in self.variants if match.reference in (other.name, other.entry)]
        if not named:
            raise UserError(f"{where}: no model {match.reference!r}; the models are {', '.join(models)}")
        found = [other for other in named if other.name == match.reference or _agree(other.values, variant.values)]
        if len(found) != 1:
            names = ", ".join(other.name for other in found or named)
            raise UserError(f"{where}: {match.reference} could be any of {names}; name one of them")
        if any((own.by == "parameters") == (match.by == "parameters") for own in found[0].match):
            raise UserError(f"{where}: {match.reference} is itself matched so; name a model that is not")
        return found[0]


def _agree(some: dict[str, Scalar], others: dict[str, Scalar]) -> bool:
    """Whether all keys that both have are of equal value."""
    return all(some[key] == others[key] for key in some.keys() & others.keys())


def _variants(experiment: Experiment) -> Iterator[_Variant]:
    for entry, plan in experiment.models.items():
        vary = experiment.vary | plan.vary
        match = plan.match
        if match is None:
            match = tuple(match for match in experiment.match if match.reference != entry)
        for values in product(*vary.values()):
            chosen = dict(zip(vary, values, strict=True))
            parts = [f"{_last(key).replace('_', '-')}-{_text(value)}" for key, value in chosen.items()]
            words = [f"{_last(key).replace('_', ' ')} {_text(value)}" for key, value in chosen.items()]
            label = ", ".join([plan.label or entry, *words])
            yield _Variant("_".join([entry, *parts]), label, entry, plan, chosen, match)


def _without_useless_gate(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings without `loop_gate` at one loop: presets refuse it there, but loops may be varied from 1 on."""
    architecture = settings.get("architecture")
    if not isinstance(architecture, dict) or architecture.get("loops") != 1:
        return settings
    return settings | {"architecture": {key: value for key, value in architecture.items() if key != "loop_gate"}}


def _check(runs: Sequence[GridRun]) -> None:
    seen, labels = set[str](), dict[tuple[str | None, str], str]()
    for run in runs:
        if (other := labels.setdefault((run.size, run.model_label), run.model)) != run.model:
            raise UserError(f"{other} and {run.model} are both called {run.model_label!r}; give one of them another label")
        if run.name in seen:
            raise UserError(f"two runs come out as {run.name}; rename a model, or drop a value that is there twice")
        seen.add(run.name)
        if run.config.data != runs[0].config.data:
            raise UserError(f"{run.name} and {runs[0].name} differ in data; all runs read one dataset, set data in the base")


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _text(value: Scalar) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^A-Za-z0-9.-]", "-", text)


def _count(tokens: int) -> str:
    """1_500_000 -> 1500K; never rounded, so that different numbers have different names."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if tokens % size == 0:
            return f"{tokens // size}{unit}"
    return str(tokens)
