"""Self-contained HTML pages: a template for each kind, one style for all, and nothing that a browser would have to load."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from yoco_u.config import Config
from yoco_u.files import check_result, write_text
from yoco_u.plotting import PALETTE
from yoco_u.version import __version__


def as_yaml(config: Config) -> str:
    """A config as a page shows it."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)


def render_page(template: str, **values: Any) -> str:
    """The HTML of a page.

    Args:
        template: name of the template's file in this folder.
        values: what the template shows; text is escaped.
    """
    environment = Environment(
        loader=PackageLoader("yoco_u", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return environment.get_template(template).render(version=__version__, written=written, palette=PALETTE, **values)


def write_page(target: Path, page: str) -> None:
    """Write a page to a file, whole or not at all; the file's folder is made.

    Raises:
        UserError: if there is something else than a page at its place.
        OSError: if the file cannot be written.
    """
    check_result(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, page)
