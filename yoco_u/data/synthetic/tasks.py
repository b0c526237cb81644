"""Tasks whose questions need a number of steps, one after another, that is their level.

A task is a function from a random generator and a level to an instance: a text with questions, whose answers stand between
`BEGIN` and `END`. All instances of a level are equally long. No answer follows from other answers, nor from a part of what is
told: each is uniform, or nearly so, as long as one of its steps is unknown.
"""

from collections.abc import Callable, Sequence
from functools import partial
from random import Random
from string import ascii_letters, ascii_lowercase, ascii_uppercase, digits
from typing import NamedTuple

BEGIN, END = "=", ";"
"""What stands before an answer, and behind it; they occur nowhere else."""

HOP_LETTERS = "abcde"
LEAST_CIRCLE = 5
CHAINS, ASKED_CHAINS = 6, 2
SPELLINGS = 10
"""Letters for each permutation. So even short words are too many to be learned by heart."""
TRANSPOSITIONS = ("132", "213", "321")
"""Three permutations of S3, which generate it: the images of 1, 2, 3."""
LATIN_SQUARE = ("12354", "21543", "35412", "43125", "54231")
"""Five permutations of S5, which generate it: the images of 1 to 5. Each column has every number once, as has each column of
`TRANSPOSITIONS`: so where one letter of a word is unknown, all images are equally likely."""


def p_hop(draw: Random, level: int) -> str:
    """Hops of induction (Sanford et al., arXiv 2402.09268): `abcacb...?B3=C;`

    A hop leads from a letter to the letter behind its last occurrence before. A question names the letter of the first hop, as
    if it stood behind the text, and the number of hops, the level. No letter stands beside itself, and every letter but the
    last is asked for; different letters lead to different places after any number of hops.
    """
    while True:
        text, behind, jumps = _without_repeats(draw, 13 + 5 * level), dict[str, int](), list[int | None]()
        for place, letter in enumerate(text):
            jumps.append(behind.get(letter))
            behind[letter] = place + 1
        asked = sorted(set(HOP_LETTERS) - {text[-1]})
        ends = [_hop(jumps, behind.get(letter), level - 1) for letter in asked]
        if None not in ends:
            break
    questions = [
        f"{letter.upper()}{level}{_answer(text[end].upper())}"
        for letter, end in zip(asked, ends, strict=True)
        if end is not None
    ]
    return f"{text}?{''.join(questions)}"


def pointers(draw: Random, level: int) -> str:
    """Steps around a circle: `DaAcEbBdCe?A2=e;B2=a;`

    A letter points at the one behind it, and all are in one circle of the first letters of the alphabet: of five, or of twice
    as many as there are steps and one more, so that the way back is longer. Two letters are asked for. As low levels have few
    letters, a model can learn to look one up before it meets many.
    """
    circle = list(ascii_lowercase[: max(LEAST_CIRCLE, 2 * level + 1)])
    draw.shuffle(circle)
    told = [circle[place - 1].upper() + letter for place, letter in enumerate(circle)]
    draw.shuffle(told)
    questions = [
        f"{circle[place].upper()}{level}{_answer(circle[(place + level) % len(circle)])}"
        for place in draw.sample(range(len(circle)), 2)
    ]
    return f"{''.join(told)}?{''.join(questions)}"


def assignments(draw: Random, level: int) -> str:
    """Chains of variables (`ab,b7,...?a=7;`), each with the value of another one or with a digit, in random order.

    There are six chains, each of as many assignments as the level says, so that nothing but following it tells a chain from
    others; two are asked for the value of their last variable. At level 1 a question is a look-up. As the digits are drawn
    independently, the answer to one question says nothing about that to the other.
    """
    names = draw.sample(ascii_letters, CHAINS * level)
    chains = [names[start : start + level] for start in range(0, len(names), level)]
    values = draw.choices(digits, k=CHAINS)
    told = [
        name + source
        for chain, value in zip(chains, values, strict=True)
        for name, source in zip(chain, [value, *chain], strict=False)
    ]
    draw.shuffle(told)
    asked = draw.sample(range(CHAINS), ASKED_CHAINS)
    return f"{','.join(told)}?{''.join(chains[one][-1] + _answer(values[one]) for one in asked)}"


def addition(draw: Random, level: int) -> str:
    """A sum of two numbers with as many digits as the level says: `347+652=0999;`

    In half of the columns and more the digits add up to 9, so that whether they carry is known from the columns to their right
    alone; the last column is any. Both numbers may begin with zeros, and the answer always has one digit more.
    """
    columns = [_column(draw, nine=draw.random() < 0.5) for _ in range(level - 1)] + [_column(draw, nine=False)]
    first, second = ("".join(str(column[row]) for column in columns) for row in (0, 1))
    return f"{first}+{second}{_answer(f'{int(first) + int(second):0{level + 1}}')}"


def permutations(draw: Random, level: int, images: Sequence[str]) -> str:
    """State tracking: where a word of as many permutations as the level says leads a number, `bMcx2=3;`

    The first letter comes first. The letters a, b, ... stand for the permutations in their order, again and again, until each
    has its ten letters.

    Args:
        images: for each permutation the images of 1, 2, ...
    """
    word, number = draw.choices(range(SPELLINGS * len(images)), k=level), draw.choice(images[0])
    image = number
    for letter in word:
        image = images[letter % len(images)][int(image) - 1]
    return f"{''.join(ascii_letters[letter] for letter in word)}{number}{_answer(image)}"


def word_problems(draw: Random, level: int, in_steps: bool = False) -> str:
    """How many each of some people has: `A has 3. B has 4 more than A. ... B has=7;`

    Two chains of people in random order, each of as many sentences as the level says; the last of each chain is asked for. All
    numbers have one digit and are drawn independently.

    Args:
        in_steps: answer with everyone of the chain and what he has, the first one first: `B has=A3B7;`
    """
    names = draw.sample(ascii_uppercase, 2 * level)
    sentences, questions = list[str](), list[str]()
    for chain in (names[:level], names[level:]):
        values = [draw.randrange(10) for _ in chain]
        sentences.append(f"{chain[0]} has {values[0]}.")
        for place in range(1, level):
            more = values[place] - values[place - 1]
            kind = "more" if more >= 0 else "less"
            sentences.append(f"{chain[place]} has {abs(more)} {kind} than {chain[place - 1]}.")
        steps = "".join(f"{name}{value}" for name, value in zip(chain, values, strict=True))
        questions.append(f"{chain[-1]} has{_answer(steps if in_steps else str(values[-1]))}")
    draw.shuffle(sentences)
    draw.shuffle(questions)
    return " ".join([*sentences, *questions])


class Task(NamedTuple):
    """A task: its function, the highest level that it can be given, from 1 on, and what its level counts."""

    make: Callable[[Random, int], str]
    highest: int
    counts: str


TASKS = {
    "p-hop": Task(p_hop, 32, "hops"),
    "pointers": Task(pointers, (len(ascii_lowercase) - 1) // 2, "steps around a circle"),
    "assignments": Task(assignments, len(ascii_letters) // CHAINS, "assignments in a chain"),
    "addition": Task(addition, 40, "digits"),
    "s3": Task(partial(permutations, images=TRANSPOSITIONS), 64, "permutations"),
    "s5": Task(partial(permutations, images=LATIN_SQUARE), 64, "permutations"),
    "word-problems": Task(word_problems, len(ascii_uppercase) // 2, "sentences in a chain"),
    "word-problems-in-steps": Task(partial(word_problems, in_steps=True), len(ascii_uppercase) // 2, "sentences in a chain"),
}
"""The tasks by name."""


def _answer(text: str) -> str:
    return f"{BEGIN}{text}{END}"


def _without_repeats(draw: Random, length: int) -> str:
    text = draw.choice(HOP_LETTERS)
    while len(text) < length:
        text += draw.choice(HOP_LETTERS.replace(text[-1], ""))
    return text


def _hop(jumps: Sequence[int | None], place: int | None, hops: int) -> int | None:
    """Where so many hops lead from a place; None if one of them leads nowhere."""
    for _ in range(hops):
        if place is None:
            return None
        place = jumps[place]
    return place


def _column(draw: Random, nine: bool) -> tuple[int, int]:
    first = draw.randrange(10)
    return first, 9 - first if nine else draw.randrange(10)
