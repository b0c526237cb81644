"""Documents of generated instances, for an entry of a corpus: `synthetic:TASK[:KEY=VALUE...]`."""

import hashlib
import re
from collections.abc import Callable, Iterator
from random import Random

from pydantic import field_validator, model_validator

from yoco_u.config import Config, Count, Seed, did_you_mean, parse
from yoco_u.data.compression import Advance
from yoco_u.data.config import GENERATED
from yoco_u.data.formats import Document
from yoco_u.data.synthetic.tasks import BEGIN, END, TASKS, Task
from yoco_u.errors import UserError

HELD_OUT = 1 / 8
"""Share of the instances that are for tests alone."""

_FILLER = "\n"  # ends each instance, and fills a document up to its length
_ANSWER = re.compile(f"{BEGIN}[^{END}]*{END}")
_MOST_DRAWS = 100_000
_MOST_TOKENS = 2**34  # of all documents together: hours of drawing
_LONGEST = 2**20  # a document is made in memory, and rows of training are shorter


class SyntheticCorpus(Config):
    """What an entry asks for.

    Attributes:
        task: one of `TASKS`.
        levels: the lowest and the highest level, `1-8` or `3` in an entry, where 1-4 are the default. Every document is of
            one of them, see `draw_level`.
        documents: number of documents.
        length: tokens of each document, `<|endoftext|>` included. A token is a byte.
        seed: another seed gives other documents, of the same instances for training and for tests.
    """

    task: str
    levels: tuple[int, int]
    documents: Count = 20_000
    length: Count = 256
    seed: Seed = 0

    @field_validator("levels", mode="before")
    @classmethod
    def _range(cls, given: object) -> object:
        if not isinstance(given, str):
            return given
        if not (found := re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", given)):
            raise ValueError(f"{given}: expected a level or a range of them, such as 3 or 1-8")
        return int(found[1]), int(found[2] or found[1])

    @model_validator(mode="after")
    def _fits(self) -> "SyntheticCorpus":
        task, (low, high) = self.generator, self.levels
        if self.length > _LONGEST:
            raise ValueError(f"length {self.length} is more than a document may have, {_LONGEST:,} tokens; shorten it")
        if self.documents * self.length > _MOST_TOKENS:
            raise ValueError(
                f"{self.documents} documents of {self.length} tokens would take days to draw; expected at most "
                f"{_MOST_TOKENS:,} tokens in all"
            )
        if not 1 <= low <= high <= task.highest:
            raise ValueError(f"levels {low}-{high}: expected a range within 1-{task.highest}")
        needed = len(task.make(Random(0), high)) + len(_FILLER) + 1
        if self.length < needed:
            raise ValueError(f"length {self.length} is too short for level {high}, which needs {needed}")
        return self

    @property
    def generator(self) -> Task:
        return TASKS[self.task]

    @property
    def all_levels(self) -> range:
        return range(self.levels[0], self.levels[1] + 1)

    def draw_level(self, draw: Random) -> int:
        """The level of a document: any up to one that is drawn first. So low levels, on which others build, come more often."""
        return draw.randint(self.levels[0], draw.choice(self.all_levels))


def is_synthetic(entry: str) -> bool:
    """Whether an entry of a corpus asks for generated documents."""
    return entry.startswith(GENERATED)


def read_entry(entry: str) -> SyntheticCorpus:
    """What an entry asks for.

    Raises:
        UserError: if there is no such task, or a setting does not fit.
    """
    name, _, rest = entry.removeprefix(GENERATED).partition(":")
    if name not in TASKS:
        raise UserError(f"{entry}: no such task; {did_you_mean(name, TASKS)}")
    settings: dict[str, object] = {"task": name, "levels": "1-4"}
    given = set[str]()
    for part in filter(None, rest.split(":")):
        key, separator, value = part.partition("=")
        if not separator or key == "task":
            raise UserError(f"{entry}: {part}: expected levels=1-8, documents=20000, length=256 or seed=0, with colons between")
        if key in given:
            raise UserError(f"{entry}: {key} comes twice; give it once")
        given.add(key)
        settings[key] = int(value) if re.fullmatch(r"[0-9]{1,18}", value) and key != "levels" else value
    return parse(SyntheticCorpus, settings, entry)


def is_held_out(task: str, instance: str) -> bool:
    """Whether an instance is for tests alone, by a hash of its questions without their answers."""
    key = f"{task}\0{_ANSWER.sub(BEGIN + END, instance)}"
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") < HELD_OUT * 2**64


def document_text(settings: SyntheticCorpus, level: int, number: int, held_out: bool) -> str:
    """The text of a document, `length` - 1 bytes: as many instances as fit, each with its end of line, then ends of lines.

    Args:
        number: number of the document; with the other arguments it determines the text.
        held_out: whether its instances are those for tests or those for training.
    """
    draw = Random(f"{settings.task} {settings.seed} {level} {number} {held_out}")
    text = ""
    while True:
        instance = _draw_instance(settings, level, held_out, draw) + _FILLER
        if len(text) + len(instance) > settings.length - 1:
            return text.ljust(settings.length - 1, _FILLER)
        text += instance


def synthetic_documents(
    entry: str, settings: SyntheticCorpus, held_out: Callable[[str], bool], advance: Advance
) -> Iterator[Document]:
    """The documents of an entry, named `ENTRY:NUMBER`, each of one level.

    Args:
        held_out: says of a document's name whether it is of the instances for tests.
        advance: called with the bytes of each document.
    """
    for number in range(1, settings.documents + 1):
        name = f"{entry}:{number}"
        level = settings.draw_level(Random(f"level {settings.seed} {number}"))
        text = document_text(settings, level, number, held_out(name))
        advance(len(text))
        yield Document(name, text)


def _draw_instance(settings: SyntheticCorpus, level: int, held_out: bool, draw: Random) -> str:
    for _ in range(_MOST_DRAWS):
        instance = settings.generator.make(draw, level)
        if is_held_out(settings.task, instance) == held_out:
            return instance
    raise UserError(f"{GENERATED}{settings.task}: no instance of level {level} is for {'tests' if held_out else 'training'}")
