"""Small made-up documents."""

import json
import random
from pathlib import Path

WORDS = ["alpha", "beta", "délta", "数", "x1", "def", "return", "self", "(a,", "b)", "\n", "\n   ", "", "\t", "🦉"]


def texts(count: int, seed: int = 0, longest: int = 60) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(1, longest))) + f" {n}" for n in range(count)]


def write_json_lines(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return path
