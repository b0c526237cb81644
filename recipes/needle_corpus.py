"""Writes documents from which a model learns retrieval: words under a key, hidden in noise, and asked for several times.

    python recipes/needle_corpus.py --out datasets/needles.jsonl

Each document begins as a `single_1` needle of `yoco-u needles`, with a seed of its own and at a random depth. More noise and
the same question with its answer follow, so that a document holds more than one answer to learn from. The same arguments write
the same file; one that is there already stays.
"""

import json
import math
import random
from pathlib import Path

from rich.progress import track

from yoco_u.data import DocumentEncoder
from yoco_u.data.config import MINIMUM_VOCABULARY
from yoco_u.data.tokenizer import train_tokenizer
from yoco_u.errors import UserError, in_one_line, script_parser
from yoco_u.evaluation.needles import NOISE, Needle, NeedleMaker
from yoco_u.files import check_result, write_text

FIRST_SEED = 1_000_000
"""The seed of the first document. An evaluation counts its seeds up from 0, so it asks for other needles."""


def main() -> None:
    arguments = script_parser(__doc__)
    arguments.add_argument("--out", type=Path, required=True)
    arguments.add_argument("--documents", type=int, default=12_000)
    arguments.add_argument("--shortest", type=int, default=450, help="bytes up to the first answer")
    arguments.add_argument("--longest", type=int, default=1900, help="bytes up to the first answer")
    arguments.add_argument("--again", type=int, default=2, help="how often a fact is asked for again")
    arguments.add_argument("--values", choices=("words", "numbers"), default="words")
    arguments.add_argument("--digits", type=int, default=2, help="digits of the numbers")
    chosen = arguments.parse_args()

    if chosen.out.exists():
        raise UserError(f"{chosen.out}: is there already; name another file, or move it elsewhere")
    check_result(chosen.out)
    if not (
        chosen.documents >= 1 and 1 <= chosen.shortest <= chosen.longest and chosen.again >= 0 and 2 <= chosen.digits <= 18
    ):
        raise UserError(
            "--documents and --shortest are at least 1, --digits 2 to 18, --again at least 0, --longest at least --shortest"
        )
    encoder = DocumentEncoder(train_tokenizer(["a"], MINIMUM_VOCABULARY))  # the smallest vocabulary: a token is a byte
    maker = NeedleMaker(encoder, digits=chosen.digits, values=chosen.values)
    drawn, lines = random.Random(0), []
    for number in track(range(chosen.documents), description="needles"):
        length, depth = log_uniform(drawn, chosen.shortest, chosen.longest), drawn.random()
        seed = FIRST_SEED + number
        needle = maker.make("single_1", length, depth, seed)
        lines.append(json.dumps({"text": needle.document + "".join(asked_again(needle, drawn) for _ in range(chosen.again))}))
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(chosen.out, "\n".join(lines) + "\n")
    print(f"{chosen.out}: {chosen.documents:,} documents")


def asked_again(needle: Needle, drawn: random.Random) -> str:
    """The needle's question and answer once more, after up to 4 lines of noise; few lines are likelier than many."""
    question = needle.prompt[needle.prompt.rindex("What ") :]
    return "\n" + NOISE * (log_uniform(drawn, 1, 5) - 1) + question + needle.answer


def log_uniform(drawn: random.Random, least: int, most: int) -> int:
    """A random number from `least` to `most`, uniform over the logarithm."""
    return round(math.exp(drawn.uniform(math.log(least), math.log(most))))


if __name__ == "__main__":
    in_one_line(main)
