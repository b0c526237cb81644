"""Configs on the command line: a YAML file or the name of a packaged config, changed by dotted overrides."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yoco_u.config import apply_overrides, did_you_mean, load_yaml, parse
from yoco_u.errors import UserError
from yoco_u.loading import is_run, with_architectures

if TYPE_CHECKING:
    from yoco_u.training.config import RunConfig

PACKAGED = Path(str(files("yoco_u") / "configs"))
"""The folder of the configs that come with the package."""


def packaged_configs() -> list[str]:
    """Names of the packaged run configs."""
    return sorted(path.stem for path in PACKAGED.glob("*.yaml") if path.stem != "quickstart")


def find_config(name: str) -> Path:
    """The path of a config: a YAML file of the user, or a packaged config by its name.

    Raises:
        UserError: if the name is neither, naming the nearest packaged config.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    known = packaged_configs()
    if name in known:
        return PACKAGED / f"{name}.yaml"
    if is_run(path):
        raise UserError(f"{name}: is a run, and no config; to go on with it, give its config and --out {name}")
    hint = did_you_mean(name, known, f"packaged are {', '.join(known)}")
    raise UserError(f"{name}: neither a file nor a packaged config; {hint}")


def is_override(word: str) -> bool:
    """Whether an argument is KEY=VALUE, and not a file that happens to be called so."""
    return "=" in word and not Path(word).is_file()


def load_settings(name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The contents of a config file with the overrides applied, not checked yet."""
    return apply_overrides(load_yaml(find_config(name)), overrides)


def load_run_config(name: str, overrides: Sequence[str]) -> "RunConfig":
    """The run config of a file or a packaged name, with the overrides applied.

    Raises:
        UserError: for a missing file, an unknown key or a value that does not fit.
    """
    settings = with_architectures(load_settings(name, overrides))
    from yoco_u.training.config import RunConfig  # which takes seconds

    return parse(RunConfig, settings, name)
