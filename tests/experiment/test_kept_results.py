"""The results that the docs quote say what today's findings and statistics make of the losses in them."""

import json
from pathlib import Path
from typing import Any

import pytest

from yoco_u.experiment.kept import judge_again

RESULTS = Path(__file__).parents[2] / "recipes" / "results"


def close(found: Any, wanted: Any, at: str) -> None:
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), at
        for key, value in wanted.items():
            close(found[key], value, f"{at}.{key}")
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), at
        for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
            close(one, other, f"{at}[{number}]")
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=2e-3, abs=1e-6), at
    else:
        assert found == wanted, at


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_the_verdicts_are_those_of_today(path: Path) -> None:
    """If this fails: `python recipes/judge_again.py recipes/results/*.json`, and bring docs/experiments.md up to date."""
    kept = json.loads(path.read_text())
    found = json.loads(json.dumps(judge_again(kept).as_json()))
    for key in {*found} - {"version", "experiment"}:
        close(found[key], kept[key], key)
