"""Solves the questions of generated documents from their text alone, directly from the definition of each task."""

import re
from collections.abc import Callable
from itertools import pairwise

S3 = {letter: {1: 1, 2: 3, 3: 2} for letter in "adgjmpsvyB"}
S3 |= {letter: {1: 2, 2: 1, 3: 3} for letter in "behknqtwzC"}
S3 |= {letter: {1: 3, 2: 2, 3: 1} for letter in "cfiloruxAD"}
S5 = {
    letter: dict(enumerate(map(int, images), start=1))
    for letters, images in {
        "afkpuzEJOT": "12354",
        "bglqvAFKPU": "21543",
        "chmrwBGLQV": "35412",
        "dinsxCHMRW": "43125",
        "ejotyDINSX": "54231",
    }.items()
    for letter in letters
}


def questions(instance: str) -> list[tuple[str, str]]:
    """What stands before each answer, and the answer."""
    parts = re.findall(r"([^;]*)=([^;]*);", instance)
    assert "".join(f"{asked}={answer};" for asked, answer in parts) == instance
    return [(asked, answer) for asked, answer in parts]


def p_hop(instance: str) -> tuple[list[str], int]:
    text, _, rest = instance.partition("?")
    assert all(a != b for a, b in pairwise(text))
    found = []
    for asked, _ in questions(rest):
        seen, letter, hops = text, asked[0].lower(), int(asked[1:])
        for _ in range(hops):
            place = seen.rindex(letter) + 1
            letter, seen = text[place], text[:place]
        found.append(letter.upper())
    return found, hops


def pointers(instance: str) -> tuple[list[str], int]:
    told, _, rest = instance.partition("?")
    behind = {told[place].lower(): told[place + 1] for place in range(0, len(told), 2)}
    found, steps = [], set()
    for asked, _ in questions(rest):
        way, count = [asked[0].lower()], int(asked[1:])
        while behind[way[-1]] != way[0]:
            way.append(behind[way[-1]])
        assert len(way) == len(behind) == len(told) / 2 > 2 * count
        found.append(way[count])
        steps.add(count)
    [level] = steps
    return found, level


def assignments(instance: str) -> tuple[list[str], int]:
    told, _, rest = instance.partition("?")
    source = {pair[0]: pair[1] for pair in told.split(",")}
    assert len(source) == len(told.split(","))
    found, steps = [], set()
    for asked, _ in questions(rest):
        name, count = asked, 0
        while not name.isdigit():
            name, count = source[name], count + 1
        found.append(name)
        steps.add(count)
    [level] = steps
    return found, level


def addition(instance: str) -> tuple[list[str], int]:
    [(asked, answer)] = questions(instance)
    first, second = asked.split("+")
    assert len(first) == len(second) == len(answer) - 1
    return [str(int(first) + int(second)).zfill(len(answer))], len(first)


def word(generators: dict[str, dict[int, int]]) -> Callable[[str], tuple[list[str], int]]:
    def solve(instance: str) -> tuple[list[str], int]:
        [(asked, _)] = questions(instance)
        image = int(asked[-1])
        for letter in asked[:-1]:
            image = generators[letter][image]
        return [str(image)], len(asked) - 1

    return solve


def word_problems(in_steps: bool) -> Callable[[str], tuple[list[str], int]]:
    def solve(instance: str) -> tuple[list[str], int]:
        told, asked = re.findall(r"[^.;]*\.|[^.;]*;", instance), []
        known, open_ = {}, []
        chain: dict[str, list[str]] = {}
        for sentence in (one.strip() for one in told):
            if found := re.fullmatch(r"(.) has (\d)\.", sentence):
                known[found[1]], chain[found[1]] = int(found[2]), [found[1]]
            elif found := re.fullmatch(r"(.) has (\d) (more|less) than (.)\.", sentence):
                open_.append(found.groups())
            else:
                asked.append(re.fullmatch(r"(.) has=[^;]*;", sentence)[1])  # type: ignore[index]
        while open_:
            name, number, kind, other = open_.pop(0)
            if other not in known:
                open_.append((name, number, kind, other))
                continue
            known[name] = known[other] + int(number) * (1 if kind == "more" else -1)
            chain[name] = [*chain[other], name]
        lengths = {len(chain[name]) for name in asked}
        [level] = lengths
        if in_steps:
            return ["".join(f"{one}{known[one]}" for one in chain[name]) for name in asked], level
        return [str(known[name]) for name in asked], level

    return solve


SOLVERS: dict[str, Callable[[str], tuple[list[str], int]]] = {
    "p-hop": p_hop,
    "pointers": pointers,
    "assignments": assignments,
    "addition": addition,
    "s3": word(S3),
    "s5": word(S5),
    "word-problems": word_problems(False),
    "word-problems-in-steps": word_problems(True),
}
"""For each task, a function from an instance to the answers to its questions, and the steps that they take."""


def answers(instance: str) -> list[str]:
    return [answer for _, answer in re.findall(r"=(([^;]*));", instance)]
