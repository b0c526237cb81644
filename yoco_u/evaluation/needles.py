"""Needles: facts hidden at a given depth of a long text, with a question at its end, after RULER (arXiv 2404.06654).

They are generated offline for any tokenizer and have an exact number of tokens. The same arguments give the same needle on
every machine.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from string import ascii_uppercase
from typing import Literal, get_args

from yoco_u.data import Corpus, DocumentEncoder
from yoco_u.errors import UserError
from yoco_u.evaluation.needle_words import ADJECTIVES, NOUNS

Kind = Literal["single_1", "single_2", "multi_key", "multi_value", "variable_tracking"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Values = Literal["numbers", "words"]
NOISE_KINDS: tuple[Kind, ...] = ("single_1", "variable_tracking")
"""The kinds that RULER always hides in noise; the others are hidden in a text."""

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
SLACK = 16
"""Number of tokens that an output may have beyond those of the right answer."""
PLACE_TOLERANCE = 200
"""Number of characters by which a fact's place may differ from its depth, so that no line, sentence or word is torn apart."""

_NEEDLES = 4  # values that are hidden in needles of the kinds multi_key and multi_value
_HOPS = 4  # assignments that lead from the first variable to the last
_HAYSTACK_CHARACTERS = 1 << 24
_LEAST_HAYSTACK = 16  # tokens of haystack that a needle must have room for
_FILLERS = tuple(" a" * count for count in range(8))
_BORDERS = tuple(re.compile(pattern) for pattern in (r"\n", r"[.!?]\s+", r"\s+"))


@dataclass(frozen=True)
class Needle:
    """One question about a long text.

    Attributes:
        kind: kind of the needle.
        length: number of tokens of the prompt and the room for an output together: `len(prompt_ids) + max_tokens`.
        depth: place of the fact that is asked for, as a share of the haystack; see `NeedleMaker.make`.
        seed: seed of everything that was drawn.
        prompt: haystack with hidden facts, and question. It ends where the answer begins.
        prompt_ids: tokens of the prompt, with `<|endoftext|>` before them.
        facts: the hidden lines, in their order in the text.
        answers: the values that an output must contain.
        answer: the text of the right answer, as it continues the prompt.
        answer_ids: tokens of `answer` behind the prompt.
        max_tokens: room for an output: the tokens of the answer and `SLACK` more.
    """

    kind: Kind
    length: int
    depth: float
    seed: int
    prompt: str
    prompt_ids: list[int]
    facts: tuple[str, ...]
    answers: tuple[str, ...]
    answer: str
    answer_ids: list[int]
    max_tokens: int

    @property
    def document(self) -> str:
        """Prompt and answer together: a text to train on."""
        return self.prompt + self.answer


@dataclass(frozen=True)
class _Task:
    """What is hidden and what is asked, without the haystack.

    Attributes:
        head: the text before the haystack.
        facts: the lines to hide, each with its depth.
        question: the text after the haystack, which ends where the answer begins.
        answers: the values that an output must contain.
    """

    head: str
    facts: tuple[tuple[float, str], ...]
    question: str
    answers: tuple[str, ...]

    def around(self, hay: str) -> str:
        """The prompt with a haystack."""
        return self.head + _hide(hay, self.facts) + self.question


@dataclass(frozen=True)
class _Draft:
    """A needle whose haystack is not cut yet.

    Attributes:
        text: the haystack, at least as long as is needed.
        ends: position in `text`, in characters, at which each of its tokens ends.
        answer, answer_ids: as of `Needle`.
        least: tokens of the prompt with the least haystack.
    """

    text: str
    ends: list[int]
    task: _Task
    answer: str
    answer_ids: list[int]
    least: int

    @property
    def room(self) -> int:
        """Number of tokens to leave for the output."""
        return len(self.answer_ids) + SLACK


@dataclass(frozen=True)
class NeedleMaker:
    """Hides one fact or several in a haystack, and asks for them.

    - `single_1`: one value (a number, or words) under a key, hidden in noise.
    - `single_2`: one value under a key, hidden in a text.
    - `multi_key`: four values under four keys, hidden in a text; the question asks for one of them.
    - `multi_value`: four values under one key, hidden in a text; the question asks for all of them.
    - `variable_tracking`: a chain of assignments from a number to five variables, hidden in noise; the question asks for the
      names of all five.

    Attributes:
        encoder: the tokenizer.
        haystack: a text to hide facts in. It is read from a random place on, and again from its beginning where it ends. Kinds
            in `NOISE_KINDS` do not use it; the others need it (`NOISE` will do).
        digits: number of digits of the hidden numbers.
        values: what is hidden under the keys: numbers, or words of the same form as the keys (`adjective-noun`).

    Raises:
        UserError: for unknown values, or numbers of fewer than two digits.
    """

    encoder: DocumentEncoder
    haystack: str | None = None
    digits: int = 7
    values: Values = "numbers"

    def __post_init__(self) -> None:
        if self.digits < 2:
            raise UserError(f"numbers of {self.digits} digits are too few to tell needles apart; ask for at least 2")
        if self.values not in get_args(Values):
            raise UserError(f"unknown values {self.values!r}; expected {' or '.join(get_args(Values))}")

    def make(self, kind: Kind, length: int, depth: float, seed: int) -> Needle:
        """Make a needle.

        Args:
            kind: its kind.
            length: number of tokens of the prompt and the room for an output together.
            depth: place of the fact that is asked for, from 0, the beginning of the haystack, to 1, its end. If several are
                asked for, the first lies there, and the others follow at even distances up to the end. The other keys of
                `multi_key` lie anywhere.
            seed: seed of everything that is drawn: the keys, values and names, and the place from which the haystack is read.

        Raises:
            UserError: for an unknown kind, a missing haystack or one that will not do, a depth that is no share, or a length
                that is too short.
        """
        draft = self._draft(kind, length, depth, seed)
        prompt, prompt_ids = _fit(draft, self.encoder, length)
        task = draft.task
        return Needle(
            kind, length, depth, seed, prompt, prompt_ids, tuple(fact for _, fact in task.facts), task.answers, draft.answer,
            draft.answer_ids, draft.room,
        )  # fmt: skip

    def check(self, kind: Kind, length: int, seed: int) -> None:
        """Refuse what `make` would refuse, at any depth: at another one the same facts lie elsewhere."""
        self._draft(kind, length, 0, seed)

    def _draft(self, kind: Kind, length: int, depth: float, seed: int) -> _Draft:
        haystack = self._haystack_of(kind)
        if not 0 <= depth <= 1:
            raise UserError(f"the depth is {depth}; expected a share from 0 to 1")
        drawn = random.Random(f"{kind} {seed}")
        start = _place(haystack, drawn.random()) % len(haystack)
        text, ends = _read(self.encoder, haystack, start, length)
        task = self._task(kind, drawn, depth, text)
        answer = " " + ", ".join(task.answers)
        answer_ids = _continuation(self.encoder, task.question, answer)
        least = len(self.encoder.encode([task.around("")])[0]) + _LEAST_HAYSTACK
        draft = _Draft(text, ends, task, answer, answer_ids, least)
        if length < draft.least + draft.room:
            raise UserError(
                f"{length} tokens are too few for a needle of kind {kind}: its question, facts and answer take "
                f"{draft.least + draft.room} with the least haystack; ask for a longer one"
            )
        return draft

    def _haystack_of(self, kind: str) -> str:
        if kind not in KINDS:
            raise UserError(f"unknown kind of needle {kind!r}; expected one of {', '.join(KINDS)}")
        if kind in NOISE_KINDS:
            return NOISE
        if self.haystack is None or not self.haystack.strip():
            raise UserError(f"needles of kind {kind} are hidden in a text; give a haystack that holds some")
        return self.haystack

    def _task(self, kind: Kind, drawn: random.Random, depth: float, text: str) -> _Task:
        """Draw the keys, values and names of a task. None of them occurs in the text."""

        def number() -> str:
            return str(drawn.randrange(10 ** (self.digits - 1), 10**self.digits))

        def pair_of_words() -> str:
            return f"{drawn.choice(ADJECTIVES)}-{drawn.choice(NOUNS)}"

        if kind == "variable_tracking":
            names = _distinct(lambda: "".join(drawn.choices(ascii_uppercase, k=5)), _HOPS + 1, text)
            return _tracking_task(depth, names, _distinct(number, 1, text)[0])
        key, *others = keys = _distinct(pair_of_words, _NEEDLES, text)
        what = self.values
        draw, taken = (number, text) if what == "numbers" else (pair_of_words, f"{text} {keys}")
        values = _distinct(draw, _NEEDLES, taken)
        if kind == "multi_value":
            facts = [(at, _fact(what, key, value)) for at, value in zip(_spread(depth, len(values)), values, strict=True)]
            return _magic_task(what, key, facts, values)
        facts = [(depth, _fact(what, key, values[0]))]
        if kind == "multi_key":
            facts += [(drawn.random(), _fact(what, other, value)) for other, value in zip(others, values[1:], strict=True)]
        return _magic_task(what, key, sorted(facts, key=itemgetter(0)), values[:1])


def load_haystack(entries: Sequence[str], text_field: str = "text") -> str:
    """The texts of a corpus, one after another, up to 16M characters.

    Args:
        entries: what to read, as in a config's `data.corpus`: files, folders, globs, `stdlib`.
        text_field: the field of JSON, CSV and Parquet files that holds the text.

    Raises:
        UserError: if something cannot be read, or there is no text.
    """
    texts, characters = [], 0
    for document in Corpus(entries, text_field).documents():
        texts.append(document.text if document.text.endswith("\n") else document.text + "\n")
        characters += len(texts[-1])
        if characters >= _HAYSTACK_CHARACTERS:
            break
    haystack = "".join(texts)[:_HAYSTACK_CHARACTERS]
    if not haystack.strip():
        raise UserError(f"{', '.join(entries)}: there is no text to hide needles in; name files that hold some")
    return haystack


def _fact(what: Values, key: str, value: str) -> str:
    return f"One of the special magic {what} for {key} is: {value}."


def _magic_task(what: Values, key: str, facts: Sequence[tuple[float, str]], values: Sequence[str]) -> _Task:
    some, are, asked = ("Some", "are", "are all") if len(values) > 1 else ("A", "is", "is")
    name = what if len(values) > 1 else what.removesuffix("s")
    return _Task(
        f"{some} special magic {name} {are} hidden within the following text. Make sure to memorize it. I will quiz you about "
        f"the {name} afterwards.\n",
        tuple(facts),
        f"\nWhat {asked} the special magic {name} for {key} mentioned in the provided text? The special magic {name} for {key} "
        f"mentioned in the provided text {are}",
        tuple(values),
    )


def _tracking_task(depth: float, names: Sequence[str], value: str) -> _Task:
    sources = [value, *(f"VAR {name}" for name in names[:-1])]
    chain = [f"VAR {name} = {source}" for name, source in zip(names, sources, strict=True)]
    return _Task(
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n",
        tuple(zip(_spread(depth, len(chain)), chain, strict=True)),
        f"\nQuestion: Find all variables that are assigned the value {value} in the text above. Answer: According to the "
        f"chain(s) of variable assignment in the text above, {len(names)} variables are assigned the value {value}, they are:",
        tuple(names),
    )


def _spread(depth: float, count: int) -> list[float]:
    """`count` depths at even distances, from `depth` on, before 1."""
    return [depth + (1 - depth) * i / count for i in range(count)]


def _distinct(draw: Callable[[], str], count: int, text: str) -> list[str]:
    """Draw `count` different words that do not occur in the text."""
    found: dict[str, None] = {}
    for _ in range(10_000):
        if len(found) == count:
            return list(found)
        one = draw()
        if one not in text:
            found[one] = None
    raise UserError("the haystack holds nearly every value that a needle could have; ask for more digits, or hide words")


def _read(encoder: DocumentEncoder, haystack: str, start: int, tokens: int) -> tuple[str, list[int]]:
    """A piece of the haystack of at least `tokens` tokens, and the position in it, in characters, at which each token ends.

    The piece begins at `start` and is read on from the haystack's beginning where that ends, as often as needed.
    """
    for characters in (6 * tokens, 24 * tokens, 96 * tokens):
        text = haystack[start : start + characters]
        missing = characters - len(text)
        text += (haystack * (missing // len(haystack) + 1))[:missing]
        ends = encoder.token_ends(text)
        if len(ends) >= tokens:
            return text, ends
    raise UserError(f"the haystack gives fewer than {tokens} tokens in {characters} characters; choose another text")


def _continuation(encoder: DocumentEncoder, before: str, text: str) -> list[int]:
    """The tokens of a text as they come behind another text."""
    first, both, alone = (ids.tolist() for ids in encoder.encode([before, before + text, text]))
    return both[len(first) :] if both[: len(first)] == first else alone[1:]


def _hide(text: str, facts: Sequence[tuple[float, str]]) -> str:
    """Insert facts into a text, each at the border nearest to its depth; as a line of its own where a line begins.

    Args:
        facts: depths from 0 to 1, which must not fall, and the facts.
    """
    parts, at = [], 0
    for depth, fact in facts:
        place = _place(text, depth)
        parts.append(text[at:place])
        at = place
        if place == 0 or text[place - 1] == "\n":
            parts.append(f"{fact}\n")
        elif place == len(text):
            parts.append(f"\n{fact}")
        else:
            parts.append(f"{fact} " if text[place - 1].isspace() else f" {fact} ")
    return "".join([*parts, text[at:]])


def _place(text: str, depth: float) -> int:
    """The beginning of a line nearest to a depth; where lines are long, that of a sentence, and else that of a word."""
    wanted = round(depth * len(text))
    first, last = max(0, wanted - PLACE_TOLERANCE), min(len(text), wanted + PLACE_TOLERANCE)
    edges = [edge for edge in (0, len(text)) if first <= edge <= last]
    for border in _BORDERS:
        places = [found.end() for found in border.finditer(text, first, last)] + edges
        if places:
            return min(places, key=lambda place: abs(place - wanted))
    return wanted


def _fit(draft: _Draft, encoder: DocumentEncoder, length: int) -> tuple[str, list[int]]:
    """Cut the haystack so that the prompt has exactly `length - draft.room` tokens.

    The number of tokens of the prompt is not the sum of those of its parts, because text merges into other tokens where parts
    meet. So the prompt is made with a first guess of the cut and counted, and the cut moves by the number of tokens that are
    missing, until none is. If the cut comes back to a place that was tried before, this would never end; then a filler of a few
    short words at the cut changes the count.
    """
    target = length - draft.room
    for filler in _FILLERS:
        taken, tried = target - draft.least + _LEAST_HAYSTACK, set[int]()
        while taken not in tried and 0 < taken <= len(draft.ends):
            tried.add(taken)
            prompt = draft.task.around(draft.text[: draft.ends[taken - 1]] + filler)
            ids = encoder.encode([prompt])[0].tolist()
            if len(ids) == target:
                return prompt, ids
            taken += target - len(ids)
    raise UserError(f"found no text of exactly {length} tokens with this tokenizer; ask for a few more or fewer")
