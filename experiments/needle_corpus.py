"""Synthetic documents to learn retrieval from: four numbers under four keys, hidden in noise, each asked for and answered.

    python experiments/needle_corpus.py --out datasets/needles.jsonl

They are `multi_key` needles of `yoco-u needles` with other seeds, at random depths and lengths; the other three numbers, which
no needle asks for, are asked for here too, so that a document teaches four times. The same arguments write the same file.
"""

import argparse
import json
import random
from pathlib import Path

from rich.progress import track

from yoco_u.data import DocumentEncoder
from yoco_u.data.config import MINIMUM_VOCABULARY
from yoco_u.data.tokenizer import train_tokenizer
from yoco_u.evaluation.needles import NOISE, Needle, generate_needle
from yoco_u.files import write_text

FIRST_SEED = 1_000_000
"""Beyond those that needles are evaluated with."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, required=True)
    arguments.add_argument("--documents", type=int, default=10_000)
    arguments.add_argument("--shortest", type=int, default=1100, help="bytes of a document")
    arguments.add_argument("--longest", type=int, default=3000, help="bytes of a document")
    arguments.add_argument("--digits", type=int, default=3)
    chosen = arguments.parse_args()

    encoder = DocumentEncoder(train_tokenizer(["a"], MINIMUM_VOCABULARY))  # a token is a byte
    drawn, lines = random.Random(0), []
    for number in track(range(chosen.documents), description="needles"):
        length, depth, seed = drawn.randint(chosen.shortest, chosen.longest), drawn.random(), FIRST_SEED + number
        needle = generate_needle("multi_key", encoder, length, depth, seed, NOISE, chosen.digits)
        lines.append(json.dumps({"text": with_all_questions(needle, drawn)}))
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(chosen.out, "\n".join(lines) + "\n")
    print(f"{chosen.out}: {chosen.documents:,} documents")


def with_all_questions(needle: Needle, drawn: random.Random) -> str:
    """The needle with its answer, then the same question for each other key, in any order, with its answer."""
    question = needle.prompt[needle.prompt.rindex("\nWhat ") :]
    values = dict(fact.removesuffix(".").split(" for ")[1].split(" is: ") for fact in needle.facts)
    [asked] = [key for key in values if f" {key} " in question]
    others = [key for key in values if key != asked]
    drawn.shuffle(others)
    return needle.document + "".join(f"{question.replace(asked, key)} {values[key]}" for key in others)


if __name__ == "__main__":
    main()
