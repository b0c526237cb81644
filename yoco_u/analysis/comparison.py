"""A comparison of runs as data: shared settings, what each run differs in, and which runs are to cost the same."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from yoco_u.budget import training_flops
from yoco_u.files import write_json
from yoco_u.inference import LLM, SamplingParams
from yoco_u.runs import SAMPLES, Run, read_json, read_run
from yoco_u.training import RunConfig, train
from yoco_u.typed import Config, apply_overrides, parse


class PlannedRun(Config):
    """One run of a comparison.

    Attributes:
        folder: of the run, inside the comparison's.
        name: shown in tables and plots.
        equal_flops_with: folder of the run whose training FLOPs this one is to spend, which sets its steps.
        settings: of the run, on top of the base.
    """

    folder: str
    name: str
    equal_flops_with: str | None = None
    settings: dict[str, Any]


class Samples(Config):
    """What each model is asked to write."""

    prompts: tuple[str, ...]
    sampling: SamplingParams = SamplingParams(max_tokens=200, temperature=0.8, seed=0)


class Comparison(Config):
    """Runs that share a dataset and settings.

    Attributes:
        base: settings of every run: those of `RunConfig` without name and dataset.
    """

    title: str
    base: dict[str, Any]
    runs: tuple[PlannedRun, ...] = Field(min_length=1)
    samples: Samples

    @model_validator(mode="after")
    def _references(self) -> "Comparison":
        plain = [run.folder for run in self.runs if run.equal_flops_with is None]
        for run in self.runs:
            if run.equal_flops_with is not None and run.equal_flops_with not in plain:
                raise ValueError(
                    f"run {run.folder} has equal_flops_with {run.equal_flops_with!r}; expected one of {', '.join(plain)}"
                )
        return self


def plan(comparison: Comparison, folder: Path, overrides: Sequence[str] = ()) -> dict[str, RunConfig]:
    """The config of every run, by its folder; the dataset they share is `folder`/data.

    Args:
        overrides: `key=value` settings that win in every run.

    Raises:
        UserError: if settings do not fit.
    """
    configs: dict[str, RunConfig] = {}
    for run in sorted(comparison.runs, key=lambda run: run.equal_flops_with is not None):
        settings = apply_overrides(_merged(comparison.base, run.settings), overrides)
        settings |= {"name": run.name, "dataset": str(folder / "data")}
        config = parse(RunConfig, settings, f"run {run.folder}")
        if run.equal_flops_with is not None:
            config = with_equal_flops(config, configs[run.equal_flops_with])
        configs[run.folder] = config
    return {run.folder: configs[run.folder] for run in comparison.runs}


def with_equal_flops(config: RunConfig, reference: RunConfig) -> RunConfig:
    """The config with as many steps as spend the training FLOPs of the reference, to the nearest step."""
    steps = round(_flops(reference) / (_flops(config) / config.training.steps))
    return config.model_copy(update={"training": config.training.model_copy(update={"steps": max(1, steps)})})


def run_comparison(
    comparison: Comparison,
    folder: Path,
    overrides: Sequence[str] = (),
    progress: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> list[Run]:
    """Train every run that is not finished yet, let each model write samples, and read the runs back.

    Args:
        say: is told what comes next.

    Raises:
        UserError: as `train` does; also if a folder holds a run of other settings.
    """
    configs = plan(comparison, folder, overrides)
    for number, (name, config) in enumerate(configs.items(), start=1):
        say(f"run {number} of {len(configs)}: {config.name} ({config.training.steps:,} steps)")
        train(config, folder / name, progress=progress)
        write_samples(folder / name, comparison.samples)
    return [read_run(folder / name) for name in configs]


def write_samples(run: Path, samples: Samples) -> None:
    """Let the model of a run write, and keep it in samples.json; nothing happens if the same was asked before."""
    settings = samples.sampling.model_dump(mode="json")
    found = read_json(run / SAMPLES, [])
    if [(sample["prompt"], sample["settings"]) for sample in found] == [(prompt, settings) for prompt in samples.prompts]:
        return
    requests = LLM(run, dtype="float32").generate(samples.prompts, samples.sampling)
    written = [
        {"prompt": prompt, "text": output.text, "tokens": len(output.token_ids), "settings": settings}
        for prompt, request in zip(samples.prompts, requests, strict=True)
        for output in request.outputs
    ]
    write_json(run / SAMPLES, written)


def _flops(config: RunConfig) -> float:
    training = config.training
    tokens = training.steps * training.batch_rows * training.sequence_length
    return training_flops(config.architecture, training.sequence_length) * tokens


def _merged(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """Mappings joined group by group; where both have a value, that of `top`."""
    result = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        result[key] = _merged(base[key], value) if both else value
    return result
