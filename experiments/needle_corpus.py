"""Synthetic documents to learn retrieval from: a number under a key, hidden in noise, asked for and answered.

    python experiments/needle_corpus.py --out datasets/needles.jsonl

They are `single_1` needles of `yoco-u needles` with other seeds, at random depths. Half of them are shorter than the geometric
mean of the shortest and the longest, so that there are many answers to learn from. The same arguments write the same file.
"""

import argparse
import json
import math
import random
from pathlib import Path

from rich.progress import track

from yoco_u.data import DocumentEncoder
from yoco_u.data.config import MINIMUM_VOCABULARY
from yoco_u.data.tokenizer import train_tokenizer
from yoco_u.evaluation.needles import generate_needle
from yoco_u.files import write_text

FIRST_SEED = 1_000_000
"""Beyond those that needles are evaluated with."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, required=True)
    arguments.add_argument("--documents", type=int, default=12_000)
    arguments.add_argument("--shortest", type=int, default=500, help="bytes of a document")
    arguments.add_argument("--longest", type=int, default=4000, help="bytes of a document")
    arguments.add_argument("--digits", type=int, default=3)
    chosen = arguments.parse_args()

    encoder = DocumentEncoder(train_tokenizer(["a"], MINIMUM_VOCABULARY))  # a token is a byte
    drawn, lines = random.Random(0), []
    for number in track(range(chosen.documents), description="needles"):
        length = round(math.exp(drawn.uniform(math.log(chosen.shortest), math.log(chosen.longest))))
        depth, seed = drawn.random(), FIRST_SEED + number
        needle = generate_needle("single_1", encoder, length, depth, seed, digits=chosen.digits)
        lines.append(json.dumps({"text": needle.document}))
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(chosen.out, "\n".join(lines) + "\n")
    print(f"{chosen.out}: {chosen.documents:,} documents")


if __name__ == "__main__":
    main()
