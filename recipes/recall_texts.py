"""Chats in which parts of a text are asked for again, word for word: what a converted model has to learn anew first.

The keys and values of the cross-decoder are new, so looking things up in a long text is what a conversion harms most, and plain
text rarely asks for it. `talk.py` makes these chats from the same documents that it heals with.
"""

import random
import re
from collections import Counter
from collections.abc import Iterator

SHORTEST, LONGEST = 600, 4_500  # characters of a text: the longest leaves room for its questions in a row of 2,048 tokens
PART = range(40, 500)  # characters of a part that is asked for
BEGINNING = 5  # words that name a part
QUESTIONS = 4  # of a chat, at most


def recall_chats(documents: list[str], seed: int = 0) -> Iterator[list[dict[str, str]]]:
    """A chat of each document that has parts to ask for, as messages: a stretch of it with a question, then more questions.

    A part is what stands between two blank lines, named by the words that it begins with, which no other part begins with.
    """
    drawn = random.Random(seed)
    for document in documents:
        parts = re.split(r"\n\s*\n", document)
        wanted = round(SHORTEST * (LONGEST / SHORTEST) ** drawn.random())
        begin = drawn.randrange(len(parts))
        chosen: list[str] = []
        for part in parts[begin:]:
            if sum(map(len, chosen)) + len(part) > wanted:
                break
            chosen.append(part)
        counts = Counter(map(beginning, chosen))
        named = [part for part in chosen if len(part.split()) > BEGINNING and counts[beginning(part)] == 1]
        asked = [part for part in named if len(part) in PART]
        drawn.shuffle(asked)
        if len(chosen) < 3 or not asked:
            continue
        chat: list[dict[str, str]] = []
        for part in asked[:QUESTIONS]:
            question = f"Repeat, word for word, the part that begins with: {beginning(part)}"
            text = "" if chat else "\n\n".join(chosen) + "\n\n"
            chat += [{"role": "user", "content": text + question}, {"role": "assistant", "content": part.strip()}]
        yield chat


def beginning(part: str) -> str:
    """The first words of a part."""
    return " ".join(part.split()[:BEGINNING])
