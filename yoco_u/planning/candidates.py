"""From a name on the command line to an architecture: a preset, a config file, a run folder or a saved model."""

from pathlib import Path
from typing import Any

from yoco_u.architecture import STAGES, Architecture, preset
from yoco_u.config import apply_overrides, did_you_mean, load_yaml, parse, split_settings
from yoco_u.errors import UserError
from yoco_u.loading import is_run, model_folder, read_config


def find_architecture(text: str, size: str) -> Architecture:
    """The architecture that a name stands for.

    Args:
        text: a preset; or the path of a YAML config, a run folder or a saved model. Settings may follow a colon: a preset takes
            any of its settings (`yoco_u:loops=5,window=256`), a path takes `loops` only (`runs/8m:loops=5`).
        size: the size of a preset whose settings name none.

    Raises:
        UserError: if the name is unknown, with the nearest known one, or if the settings make an impossible architecture.
    """
    name, settings = _split(text)
    if name in STAGES:
        return preset(name, **({"size": size} | settings))
    architecture = _read(name)
    if not settings:
        return architecture
    if set(settings) != {"loops"}:
        raise UserError(f"{text}: of a config, a run or a model only loops can be set, got {', '.join(settings)}")
    return architecture.with_loops(settings["loops"])


def takes_size(text: str) -> bool:
    """Whether a name is that of a preset whose settings name no size."""
    name, settings = _split(text)
    return name in STAGES and "size" not in settings


def _split(text: str) -> tuple[str, dict[str, Any]]:
    """`yoco_u:loops=5` -> yoco_u, {loops: 5}; a colon without a setting behind it belongs to the name, as in a path."""
    name, _, settings = text.partition(":")
    if name not in STAGES:
        name, _, settings = text.rpartition(":")
    return (name, apply_overrides({}, split_settings(settings))) if name and "=" in settings else (text, {})


def _read(name: str) -> Architecture:
    path = Path(name).expanduser()
    if path.is_dir():
        return _of_yaml(path / "config.yaml") if is_run(path) else _of_model(path)
    if path.is_file():
        return _of_yaml(path)
    hint = did_you_mean(name, STAGES, f"presets are {', '.join(STAGES)}")
    raise UserError(f"unknown architecture {name!r}: {hint}; or give a config file, a run folder or a saved model")


def _of_yaml(file: Path) -> Architecture:
    data = load_yaml(file)
    if "architecture" in data:
        data = data["architecture"]
    elif not {"preset", "stages"} & data.keys():
        raise UserError(f"{file}: no architecture in it; expected a run's config, or the settings of an architecture")
    return parse(Architecture, data, str(file))


def _of_model(folder: Path) -> Architecture:
    data = read_config(model_folder(folder))
    return parse(Architecture, {key: data[key] for key in Architecture.model_fields if key in data}, str(folder))
