"""Synthetic documents to learn retrieval from: a number hidden in noise, asked for at the end, and the answer.

    python experiments/needle_corpus.py --out data/needles.jsonl

The needles of `yoco-u needles` with other seeds, at random depths and lengths. The same arguments write the same file.
"""

import argparse
import json
import random
from pathlib import Path

from rich.progress import track

from yoco_u.data import DocumentEncoder
from yoco_u.data.config import MINIMUM_VOCABULARY
from yoco_u.data.tokenizer import train_tokenizer
from yoco_u.evaluation.needles import KINDS, generate_needle
from yoco_u.files import write_text

FIRST_SEED = 1_000_000
"""Beyond those that needles are evaluated with."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, required=True)
    arguments.add_argument("--kind", choices=KINDS, default="single_1")
    arguments.add_argument("--documents", type=int, default=20_000)
    arguments.add_argument("--shortest", type=int, default=600, help="bytes of a document")
    arguments.add_argument("--longest", type=int, default=3000, help="bytes of a document")
    arguments.add_argument("--digits", type=int, default=3)
    chosen = arguments.parse_args()

    encoder = DocumentEncoder(train_tokenizer(["a"], MINIMUM_VOCABULARY))  # a token is a byte
    drawn, lines = random.Random(0), []
    for number in track(range(chosen.documents), description="needles"):
        length, depth = drawn.randint(chosen.shortest, chosen.longest), drawn.random()
        needle = generate_needle(chosen.kind, encoder, length, depth, FIRST_SEED + number, digits=chosen.digits)
        lines.append(json.dumps({"text": needle.document}))
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(chosen.out, "\n".join(lines) + "\n")
    print(f"{chosen.out}: {chosen.documents:,} documents")


if __name__ == "__main__":
    main()
